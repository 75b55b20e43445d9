#![no_main]

use firezone_gateway::connectivity::fuzzing::connectivity;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| connectivity(data));
