#![no_main]

use firezone_gateway::connectivity::fuzzing::turn_client;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| turn_client(data));
