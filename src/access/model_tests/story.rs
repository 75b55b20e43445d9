//! What happened in a round, to be told when the two sides disagree.

use super::packet::Packet;
use super::talk::Millis;

pub(super) struct Story {
    seed: u64,
    round: usize,
    steps: Vec<String>,
}

impl Story {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            seed,
            round: 0,
            steps: Vec::new(),
        }
    }

    pub(super) fn begin(&mut self, round: usize) {
        self.round = round;
        self.steps.clear();
    }

    pub(super) fn step(&mut self, now: Millis, what: String) {
        self.steps.push(format!("{now:>9} ms: {what}"));
    }

    /// What became of the packet of the last step.
    pub(super) fn verdict(&mut self, packet: &Packet, passed: Option<&Packet>) {
        let Some(step) = self.steps.last_mut() else {
            return;
        };
        match passed {
            None => *step += " - dropped",
            Some(same) if same == packet => *step += " - passed",
            Some(other) => *step += &format!(" - passed as {other}"),
        }
    }

    /// Ends the test.
    #[track_caller]
    pub(super) fn disagree(&self, state: &str, expected: &str, got: &str) -> ! {
        panic!(
            "the model and the implementation disagree\n\
             ACCESS_MODEL_SEED={} round {}, step {}:\n{}\n\n\
             what the model knows now (times in ms):\n{state}\n\
             expected: {expected}\n\
             got:      {got}\n",
            self.seed,
            self.round,
            self.steps.len(),
            self.steps.join("\n"),
        )
    }
}
