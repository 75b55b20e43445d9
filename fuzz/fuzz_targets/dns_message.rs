#![no_main]

use firezone_gateway::dns::fuzzing::dns_message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| dns_message(data));
