//! What the parts of the data path cost: time per packet (`cargo bench --bench parts`), or instructions per
//! packet, which are the same on a busy machine (`scripts/bench --instructions`).
//!
//! What is measured is the workers' own code: from the datagrams of one receive to what is written to the
//! device, and from what is read there to the datagrams of one send. The system calls are left out.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod cases;
mod instructions;
mod valgrind;
mod world;

use std::cell::RefCell;

use divan::Bencher;
use divan::counter::ItemsCount;

use self::cases::{CASES, Case};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    if has("--instructions") {
        let chosen: Vec<&str> = arguments
            .iter()
            .map(String::as_str)
            .filter(|argument| !argument.starts_with("--"))
            .collect();
        return instructions::compare(&chosen, has("--save"));
    }
    if let Some(at) = arguments.iter().position(|a| a == instructions::COUNT) {
        return instructions::count(&arguments[at + 1..]);
    }
    divan::main();
    Ok(())
}

/// Whether each case is only to be tried once (`cargo test --benches`).
fn is_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
}

fn names() -> impl Iterator<Item = &'static str> {
    CASES.iter().map(|case| case.name)
}

fn find(name: &str) -> &'static Case {
    CASES.iter().find(|case| case.name == name).unwrap()
}

#[divan::bench(args = names(), sample_count = 500, sample_size = 1, max_time = 3)]
fn part(bencher: Bencher, name: &str) {
    let case = find(name);
    let work = RefCell::new((case.make)());
    bencher
        .counter(ItemsCount::new(case.packets))
        .with_inputs(|| work.borrow_mut().prepare())
        .bench_local_values(|()| work.borrow_mut().run());
}
