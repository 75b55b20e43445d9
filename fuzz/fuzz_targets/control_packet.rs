#![no_main]

use firezone_gateway::packet::fuzzing::control_packet;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| control_packet(data));
