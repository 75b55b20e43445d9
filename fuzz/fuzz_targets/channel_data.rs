#![no_main]

use firezone_gateway::connectivity::fuzzing::channel_data;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| channel_data(data));
