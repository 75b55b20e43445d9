//! Log lines on their way out. A container runtime that does not take them (Docker's `blocking`
//! mode with a slow log driver) must not stop packets, so that they pass a bounded queue; lines
//! that find it full are counted and dropped.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender, TrySendError},
    },
    thread,
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait at most. At some 200 bytes each this is below a megabyte.
const LONGEST_QUEUE: usize = 4096;

enum Item {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// The end that is kept for flushing.
#[derive(Debug, Clone)]
pub(super) struct LogQueue {
    queue: SyncSender<Item>,
}

/// The end that log lines go into.
#[derive(Debug, Clone)]
pub(super) struct LogWriter {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

/// Starts the thread that writes to `output`.
pub(super) fn start(output: Box<dyn Write + Send>) -> io::Result<(LogQueue, LogWriter)> {
    let (queue, items) = mpsc::sync_channel(LONGEST_QUEUE);
    let dropped = Arc::new(AtomicU64::new(0));
    let writer = LogWriter {
        queue: queue.clone(),
        dropped: Arc::clone(&dropped),
    };
    thread::Builder::new()
        .name("log-writer".to_owned())
        .spawn(move || write_all(items, output, &dropped))?;
    Ok((LogQueue { queue }, writer))
}

fn write_all(items: Receiver<Item>, mut output: Box<dyn Write + Send>, dropped: &AtomicU64) {
    for item in items {
        // There is no place left to report a failure to.
        match item {
            Item::Line(line) => {
                let _ = output.write_all(&line);
                let lost = dropped.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    let _ = writeln!(output, "{lost} log lines dropped: output too slow");
                }
                let _ = output.flush();
            }
            Item::Flush(done) => {
                let _ = output.flush();
                let _ = done.try_send(());
            }
        }
    }
}

impl LogQueue {
    /// Waits until all lines so far are written, but not longer than `limit`.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let (done, finished) = mpsc::sync_channel(1);
        match self.queue.try_send(Item::Flush(done)) {
            Ok(()) => finished.recv_timeout(limit).is_ok(),
            Err(_) => false,
        }
    }
}

/// One log line; it is sent when it is complete.
pub(super) struct Line<'a> {
    text: Vec<u8>,
    writer: &'a LogWriter,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        let text = std::mem::take(&mut self.text);
        if text.is_empty() {
            return;
        }
        match self.writer.queue.try_send(Item::Line(text)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.writer.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        Line {
            text: Vec::new(),
            writer: self,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn log(writer: &LogWriter, text: &str) {
        writer.make_writer().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn flush_waits_for_all_lines_in_order() {
        let output = Shared::default();
        let (queue, writer) = start(Box::new(output.clone())).unwrap();
        for n in 0..100 {
            log(&writer, &format!("{n}\n"));
        }

        assert!(queue.flush(Duration::from_secs(10)));

        let expected: String = (0..100).map(|n| format!("{n}\n")).collect();
        assert_eq!(output.text(), expected);
    }

    #[test]
    fn output_that_blocks_costs_lines_but_never_time() {
        let output = Shared::default();
        let (queue, writer) = start(Box::new(output.clone())).unwrap();
        let blocked = output.0.lock().unwrap();
        // One may be in the writer's hands already.
        let lines = LONGEST_QUEUE + 10;

        for _ in 0..lines {
            log(&writer, "line\n");
        }
        assert!(!queue.flush(Duration::from_millis(1)));
        drop(blocked);

        // The queue is full until the thread runs again.
        while !queue.flush(Duration::from_secs(10)) {
            thread::yield_now();
        }
        let text = output.text();
        let written = text.lines().filter(|line| *line == "line").count();
        let lost: usize = text
            .lines()
            .filter_map(|line| line.strip_suffix(" log lines dropped: output too slow"))
            .map(|count| count.parse::<usize>().unwrap())
            .sum();
        assert!(lost >= 9, "{lost}");
        assert_eq!(written + lost, lines);
    }
}
