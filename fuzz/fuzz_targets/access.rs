#![no_main]

use firezone_gateway::access::fuzzing::access;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| access(data));
