//! What the entry points of the fuzz targets share.

#![allow(clippy::unwrap_used)]

/// An input that is read as a list of choices. Past its end every choice is zero.
pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    pub(crate) fn bit(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    /// One of `0..choices`.
    pub(crate) fn below(&mut self, choices: usize) -> usize {
        usize::from(self.byte()) % choices
    }

    /// One of several.
    pub(crate) fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A byte for the length, then so many bytes.
    pub(crate) fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        self.0.split_off(..length).unwrap_or_default()
    }

    pub(crate) fn text(&mut self) -> &'a str {
        std::str::from_utf8(self.bytes()).unwrap_or("\u{fffd}")
    }
}

/// Runs everything in `fuzz/corpus/NAME`, and up to so many beginnings of it.
#[cfg(test)]
pub(crate) fn corpus(name: &str, beginnings: usize, target: fn(&[u8])) {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut count = 0;
    for entry in std::fs::read_dir(&directory).unwrap() {
        let data = std::fs::read(entry.unwrap().path()).unwrap();
        target(&data);
        for end in (0..data.len()).step_by(1 + data.len() / beginnings) {
            target(&data[..end]);
        }
        count += 1;
    }
    assert!(count >= 5, "{} holds {count} files", directory.display());
}
