#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code, reason = "one of them is run here")]
mod targets;

libfuzzer_sys::fuzz_target!(|input: &[u8]| targets::requests(input));
