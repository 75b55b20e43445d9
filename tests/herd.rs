//! Ten thousand gateways whose portal restarts. In virtual time, with the channel's own state
//! machine; nothing is measured but decisions.
//!
//! `FIREZONE_PLOTS=DIR` draws the curves into a directory (`scripts/herd` does).

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use firezone_gateway::portal::channel::{Action, Channel, ChannelConfig, CloseCause};
use firezone_gateway::portal::error::{ErrorType, Failure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

const GATEWAYS: usize = 10_000;
/// For so long nobody listens.
const DOWN: Duration = Duration::from_secs(20);
const WATCHED: Duration = Duration::from_secs(70);
/// The portal's part of an attempt and of a join.
const ANSWERS_IN: Duration = Duration::from_millis(100);

/// What happened, in time since the portal closed its connections.
#[derive(Default)]
struct Curve {
    attempts: Vec<Duration>,
    joins: Vec<Duration>,
}

impl Curve {
    /// Attempts in the busiest second, wherever it begins.
    fn peak(&self) -> usize {
        let mut first = 0;
        let mut peak = 0;
        for (last, at) in self.attempts.iter().enumerate() {
            while *at - self.attempts[first] >= Duration::from_secs(1) {
                first += 1;
            }
            peak = peak.max(last - first + 1);
        }
        peak
    }

    /// When so many percent of the gateways were joined again.
    fn joined_at(&self, percent: usize) -> Duration {
        self.joins[GATEWAYS * percent / 100 - 1]
    }

    fn row(&self, name: &str) -> String {
        let since_return = |percent| (self.joined_at(percent) - DOWN).as_secs_f64();
        format!(
            "| {name} | {} | {} | {:.1} s | {:.1} s | {:.1} s |",
            self.peak(),
            self.attempts.len(),
            since_return(50),
            since_return(99),
            since_return(100)
        )
    }
}

/// A gateway, as far as the herd sees it.
trait Gateway {
    /// When it wants to be called.
    fn next(&self) -> Duration;
    /// Does what is due; what it tells is written down.
    fn run(&mut self, now: Duration, portal_is_up: bool, curve: &mut Curve);
}

fn stampede(mut herd: Vec<Box<dyn Gateway>>) -> Curve {
    let mut curve = Curve::default();
    let mut queue: BinaryHeap<_> = herd
        .iter()
        .enumerate()
        .map(|(n, gateway)| Reverse((gateway.next(), n)))
        .collect();
    while let Some(Reverse((now, n))) = queue.pop() {
        if now > WATCHED {
            break;
        }
        herd[n].run(now, now >= DOWN, &mut curve);
        queue.push(Reverse((herd[n].next(), n)));
    }
    curve
}

/// The product's channel.
struct Ours {
    channel: Channel,
    start: Instant,
    /// The attempt under way is answered then.
    answer_at: Option<Duration>,
}

impl Ours {
    fn new(seed: u64, cause: CloseCause) -> Self {
        let long_ago = Instant::now();
        let mut channel = Channel::new(ChannelConfig::default(), seed);
        channel.start(long_ago);
        channel.socket_opened(long_ago);
        join(&mut channel, long_ago);
        // Stable, and then nothing but heartbeats.
        let start = long_ago + Duration::from_secs(10);
        channel.handle_timeout(start);
        channel.closed(start, cause);
        let mut gateway = Self {
            channel,
            start,
            answer_at: None,
        };
        gateway.drain(Duration::ZERO, None);
        gateway
    }

    fn drain(&mut self, now: Duration, mut curve: Option<&mut Curve>) {
        while self.channel.poll_milestone().is_some() {}
        while self.channel.poll_event().is_some() {}
        while let Some(action) = self.channel.poll_action() {
            if let (Action::Dial(_), Some(curve)) = (action, curve.as_deref_mut()) {
                curve.attempts.push(now);
                self.answer_at = Some(now + ANSWERS_IN);
            }
        }
    }
}

fn join(channel: &mut Channel, now: Instant) {
    let ok = json!({"topic": "gateway", "event": "phx_reply", "ref": 0,
        "payload": {"status": "ok", "response": {}}});
    let init = json!({"topic": "gateway", "event": "init", "ref": null, "payload":
        {"interface": {"ipv4": "100.70.8.21", "ipv6": "fd00:2021:1111::7:4"}}});
    channel.frame(now, &ok.to_string());
    channel.frame(now, &init.to_string());
    assert!(channel.is_joined());
}

impl Gateway for Ours {
    fn next(&self) -> Duration {
        let timer = self.channel.poll_timeout().map(|(at, _)| at - self.start);
        match (self.answer_at, timer) {
            (Some(answer), Some(timer)) => answer.min(timer),
            (one, other) => one.or(other).unwrap(),
        }
    }

    fn run(&mut self, now: Duration, portal_is_up: bool, curve: &mut Curve) {
        let at = self.start + now;
        if self.answer_at.take_if(|answer| *answer <= now).is_some() {
            if portal_is_up {
                self.channel.socket_opened(at);
                join(&mut self.channel, at);
                curve.joins.push(now);
            } else {
                let refused = Failure::new(ErrorType::TcpConnect, "refused");
                self.channel.attempt_failed(at, refused);
            }
        } else {
            self.channel.handle_timeout(at);
        }
        self.drain(now, Some(curve));
    }
}

/// What is usually done: half a second, plus as much again at random, growing by half
/// (portal-channel spec §3.1, the stock gateway).
struct Naive {
    rng: SmallRng,
    interval: f64,
    next: Duration,
    /// Whether `next` is the answer to an attempt.
    answer: bool,
}

impl Naive {
    fn new(seed: u64) -> Self {
        let mut gateway = Self {
            rng: SmallRng::seed_from_u64(seed),
            interval: 0.5,
            next: Duration::ZERO,
            answer: false,
        };
        gateway.wait(Duration::ZERO);
        gateway
    }

    fn wait(&mut self, now: Duration) {
        let delay = self.interval * self.rng.random_range(1.0..2.0);
        self.interval = (self.interval * 1.5).min(60.0);
        self.next = now + Duration::from_secs_f64(delay);
        self.answer = false;
    }
}

impl Gateway for Naive {
    fn next(&self) -> Duration {
        self.next
    }

    fn run(&mut self, now: Duration, portal_is_up: bool, curve: &mut Curve) {
        if !self.answer {
            curve.attempts.push(now);
            self.answer = true;
            self.next = now + ANSWERS_IN;
        } else if portal_is_up {
            curve.joins.push(now);
            self.next = Duration::MAX;
        } else {
            self.wait(now);
        }
    }
}

fn ours(cause: &CloseCause) -> Curve {
    let gateway = |seed| Box::new(Ours::new(seed, cause.clone())) as Box<dyn Gateway>;
    stampede((0..GATEWAYS as u64).map(gateway).collect())
}

fn naive() -> Curve {
    let gateway = |seed| Box::new(Naive::new(seed)) as Box<dyn Gateway>;
    stampede((0..GATEWAYS as u64).map(gateway).collect())
}

fn restart() -> CloseCause {
    CloseCause::Frame {
        code: Some(1012),
        reason: "service restart".to_owned(),
    }
}

#[test]
fn a_restarting_portal_gets_no_herd_and_everybody_is_back_soon() {
    let curve = ours(&restart());
    let naive = naive();
    let crash = ours(&CloseCause::Eof);

    println!("| | attempts in the busiest second | attempts | 50 % back | 99 % back | all back |");
    println!("|---|---|---|---|---|---|");
    println!("{}", curve.row("this gateway, Close 1012"));
    println!("{}", naive.row("usual policy"));
    println!("{}", crash.row("this gateway, no Close frame"));
    if let Some(directory) = std::env::var_os("FIREZONE_PLOTS") {
        let path = std::path::Path::new(&directory).join("herd.svg");
        plot::draw(&path, &[("this gateway", &curve), ("usual policy", &naive)]).unwrap();
        println!("drawn into {}", path.display());
    }

    assert_eq!(curve.joins.len(), GATEWAYS, "everybody comes back");
    assert!(curve.peak() <= 1500, "{} in a second", curve.peak());
    assert!(curve.joined_at(99) <= DOWN + Duration::from_secs(30));
    // The comparison would be idle if the usual policy did as well.
    assert!(naive.peak() > 3 * curve.peak(), "{}", naive.peak());
}

mod plot {
    use std::path::Path;
    use std::time::Duration;

    use plotters::prelude::*;

    use super::{Curve, DOWN, GATEWAYS, WATCHED};

    const BIN: Duration = Duration::from_millis(500);
    const COLOURS: [RGBColor; 2] = [RGBColor(0, 98, 155), RGBColor(196, 78, 40)];

    /// Attempts per second above, share of the gateways that are joined below.
    pub fn draw(path: &Path, curves: &[(&str, &Curve)]) -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::new(path, (900, 640)).into_drawing_area();
        area.fill(&WHITE)?;
        let (above, below) = area.split_vertically(330);
        let end = WATCHED.as_secs_f64();

        let rates: Vec<_> = curves.iter().map(|(_, curve)| rates(curve)).collect();
        let highest = rates.iter().flatten().map(|(_, rate)| *rate);
        let highest = highest.fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(&above)
            .caption(
                format!("{GATEWAYS} gateways, portal restarts at 0 s and is back at 20 s"),
                ("sans-serif", 20),
            )
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..end, 0.0..highest * 1.05)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .y_desc("attempts per second")
            .x_desc("seconds")
            .draw()?;
        for (((name, _), rates), colour) in curves.iter().zip(rates).zip(COLOURS) {
            chart
                .draw_series(LineSeries::new(rates, colour.stroke_width(2)))?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour));
        }
        mark_return(&mut chart, highest * 1.05)?;
        chart
            .configure_series_labels()
            .background_style(WHITE)
            .border_style(BLACK)
            .draw()?;

        let mut chart = ChartBuilder::on(&below)
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..end, 0.0..105.0)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.0}"))
            .y_desc("percent joined")
            .x_desc("seconds")
            .draw()?;
        for ((_, curve), colour) in curves.iter().zip(COLOURS) {
            chart.draw_series(LineSeries::new(joined(curve), colour.stroke_width(2)))?;
        }
        mark_return(&mut chart, 105.0)?;
        area.present()?;
        Ok(())
    }

    type Chart<'a> = ChartContext<
        'a,
        SVGBackend<'a>,
        Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
    >;

    fn mark_return(chart: &mut Chart<'_>, top: f64) -> Result<(), Box<dyn std::error::Error>> {
        let at = DOWN.as_secs_f64();
        let line = PathElement::new([(at, 0.0), (at, top)], BLACK.mix(0.5));
        chart.draw_series([line])?;
        Ok(())
    }

    fn bins() -> impl Iterator<Item = Duration> {
        (0..).map(|n| BIN * n).take_while(|at| *at < WATCHED)
    }

    fn rates(curve: &Curve) -> Vec<(f64, f64)> {
        bins()
            .map(|from| {
                let within = |at: &&Duration| (from..from + BIN).contains(*at);
                let count = curve.attempts.iter().filter(within).count();
                let middle = (from + BIN / 2).as_secs_f64();
                (middle, count as f64 / BIN.as_secs_f64())
            })
            .collect()
    }

    fn joined(curve: &Curve) -> Vec<(f64, f64)> {
        bins()
            .map(|at| {
                let count = curve.joins.iter().filter(|joined| **joined <= at).count();
                (at.as_secs_f64(), 100.0 * count as f64 / GATEWAYS as f64)
            })
            .collect()
    }
}
