#![no_main]

use firezone_gateway::packet::fuzzing::packet;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| packet(data));
