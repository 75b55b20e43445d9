#![no_main]

use firezone_gateway::portal::fuzzing::portal_answer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| portal_answer(data));
