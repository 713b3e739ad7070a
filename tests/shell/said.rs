//! What a command said, and how it ended.

use std::process::Output;

use serde_json::Value;

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Said {
    #[allow(dead_code, reason = "told by every assertion that fails")]
    line: String,
    code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    pub(crate) fn new(line: &str, output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("text");
        let Output { status, stdout, stderr } = output;
        let said = Self {
            line: line.to_owned(),
            code: status.code().unwrap_or_else(|| panic!("{line}: {status}")),
            out: text(stdout),
            err: text(stderr),
        };
        // Nothing is drawn and nothing is coloured where nobody sees it.
        for (name, text) in [("stdout", &said.out), ("stderr", &said.err)] {
            let is_plain = text.chars().all(|letter| letter == '\n' || !letter.is_control());
            assert!(is_plain, "{name} has control characters: {said:?}");
        }
        said
    }

    /// It ended with this exit code.
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// It did what was asked for, and said nothing beside the result.
    pub(crate) fn quietly(self) -> Self {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:#?}");
        self
    }

    /// It did not, and stdout has nothing.
    pub(crate) fn without_result(self) -> Self {
        assert_eq!(self.out, "", "{self:#?}");
        self
    }

    /// Stdout has this.
    pub(crate) fn prints(self, text: &str) -> Self {
        assert!(self.out.contains(text), "no {text:?} on stdout: {self:#?}");
        self
    }

    /// Stderr has this.
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.err.contains(text), "no {text:?} on stderr: {self:#?}");
        self
    }

    /// Stdout, which is one JSON document and nothing else.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// Stderr, which is JSON, a document a line.
    pub(crate) fn told(&self) -> Vec<Value> {
        let lines = self.err.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// The failure, which is the last document of stderr. What comes before it are notes.
    pub(crate) fn error(&self) -> Value {
        let mut told = self.told();
        let last = told.pop().unwrap_or_else(|| panic!("no failure is told: {self:#?}"));
        assert!(told.iter().all(|note| note["note"].is_string()), "{self:#?}");
        let error = last["error"].clone();
        assert_eq!(error["exit_code"], self.code, "{self:#?}");
        assert!(error["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{self:#?}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{self:#?}");
        error
    }
}
