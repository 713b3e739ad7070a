//! What the fuzzer has found so far is tried again: each input of `corpus`, which is one per path through the code.
//!
//! `tests/fuzz/run TARGET [SECONDS]` looks for more, and puts what it finds there.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test: helpers assert by panicking, too")]

mod corpus;
mod targets;

use std::io::Write as _;
use std::path::Path;

#[test]
fn what_was_found_before_is_well() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in targets::ALL {
        let text = std::fs::read_to_string(folder.join(name).with_extension("hex")).unwrap();
        let mut tried = 0;
        for (line, input) in (1..).zip(corpus::inputs(&text)) {
            let run = std::panic::catch_unwind(|| target(&input));
            assert!(run.is_ok(), "{name}.hex, line {line}");
            tried += 1;
        }
        assert!(tried >= 100, "{name} has a corpus");
        let _ = writeln!(std::io::stdout(), "\nfigures: fuzz: {name}: {tried} inputs, each well");
    }
}
