#![no_main]

use firezone_gateway::portal::fuzzing::portal_frame;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| portal_frame(data));
