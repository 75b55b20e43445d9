#![no_main]

use firezone_gateway::connectivity::fuzzing::stun;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stun(data));
