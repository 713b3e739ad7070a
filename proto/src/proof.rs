//! Who says something about a hand-over, proved by what Prepare was answered.
//!
//! ```text
//!   PrepareResponse.secret --> on record at the source and at the destination, and never said again
//!   call of the source       --+
//!   record of the destination -+--words--> bytes --BLAKE3, keyed with the secret--> proof, 32 bytes
//! ```
//! An identity may be that of many agents, and a certificate changes while a hand-over lasts. So neither tells that the one
//! that is called is the one that took the devices, or that the one that calls is the one that they came from.
//!
//! The words of a message are its full name as a text, then every field of it but the proof, in the order of their numbers:
//!
//! - a text: the number of its bytes, then these;
//! - a number, a value of an enum, a bool (0 or 1): 8 bytes, big-endian, in two's complement;
//! - a list: how many there are, then each.
//!
//! # Invariants
//! - Two messages that differ in anything have other words, and a field that is added does not compile before it is said.
//! - Proofs are compared in a time that does not tell where they differ.
//!
//! What was proved once can be shown again by whoever saw it. That moves nothing that was not moved by it: what a source says
//! stays as true, a verdict never changes, and an answer that decides nothing yet is acted on by nobody.

use bytes::Bytes;

use crate::domain::Invalid;
use crate::ids::Ticket;
use crate::v1;

/// What can be proved.
pub trait Said {
    /// The full name of the message.
    const NAME: &'static str;

    /// Adds all that it says, but for its proof.
    fn say(&self, words: &mut Words);
}

/// A call that has its proof with it.
pub trait Proven: Said + Sized {
    /// The same with this proof.
    #[must_use]
    fn with(self, proof: Bytes) -> Self;

    /// The same with the proof that the caller has this secret.
    #[must_use]
    fn proven(self, secret: &Ticket) -> Self {
        let proof = proof(secret, &self);
        self.with(proof.bytes())
    }
}

/// What a message says, with nothing that could be taken for something else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words(Vec<u8>);

impl Words {
    fn of<S: Said>(said: &S) -> Self {
        let mut words = Self(Vec::new());
        words.text(S::NAME);
        said.say(&mut words);
        words
    }

    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_be_bytes());
    }

    fn value(&mut self, value: i32) {
        self.0.extend_from_slice(&i64::from(value).to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn numbers(&mut self, numbers: &[u64]) {
        self.number(numbers.len() as u64);
        for number in numbers {
            self.number(*number);
        }
    }

    fn proof(&self, secret: &Ticket) -> Proof {
        Proof(blake3::keyed_hash(&secret.0, &self.0))
    }
}

/// That whoever says something has the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof(blake3::Hash);

impl Proof {
    /// How long one is.
    pub const BYTES: usize = blake3::OUT_LEN;

    /// As it is sent.
    pub fn bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self.0.as_bytes())
    }
}

/// Proves that this is said by somebody who has the secret.
pub fn proof(secret: &Ticket, said: &impl Said) -> Proof {
    Words::of(said).proof(secret)
}

/// What somebody says, with what is to prove it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    words: Words,
    proof: Proof,
}

impl Claim {
    /// Takes it in, with the proof as it was sent. Whether it is one [`holds`](Self::holds) tells.
    pub fn new(said: &impl Said, proof: &[u8]) -> Result<Self, Invalid> {
        let bytes = <[u8; Proof::BYTES]>::try_from(proof).map_err(|_| {
            let problem = format!("it has {} bytes, and a proof has {}", proof.len(), Proof::BYTES);
            Invalid::new("proof", problem)
        })?;
        Ok(Self { words: Words::of(said), proof: Proof(bytes.into()) })
    }

    /// Whether it is said by somebody who has this secret.
    pub fn holds(&self, secret: &Ticket) -> bool {
        self.words.proof(secret) == self.proof
    }
}

impl Said for v1::CommitHandoverRequest {
    const NAME: &'static str = "vfio.checkpoint.v1.CommitHandoverRequest";

    fn say(&self, words: &mut Words) {
        let Self { operation, epochs, proof: _ } = self;
        words.text(operation);
        words.numbers(epochs);
    }
}

impl Proven for v1::CommitHandoverRequest {
    fn with(self, proof: Bytes) -> Self {
        Self { proof, ..self }
    }
}

impl Said for v1::AbandonHandoverRequest {
    const NAME: &'static str = "vfio.checkpoint.v1.AbandonHandoverRequest";

    fn say(&self, words: &mut Words) {
        let Self { operation, reason, proof: _ } = self;
        words.text(operation);
        words.text(reason);
    }
}

impl Proven for v1::AbandonHandoverRequest {
    fn with(self, proof: Bytes) -> Self {
        Self { proof, ..self }
    }
}

impl Said for v1::GetHandoverRequest {
    const NAME: &'static str = "vfio.checkpoint.v1.GetHandoverRequest";

    fn say(&self, words: &mut Words) {
        let Self { operation, settled, proof: _ } = self;
        words.text(operation);
        words.number(u64::from(*settled));
    }
}

impl Proven for v1::GetHandoverRequest {
    fn with(self, proof: Bytes) -> Self {
        Self { proof, ..self }
    }
}

/// Its proof is beside it, in the answer.
impl Said for v1::HandoverRecord {
    const NAME: &'static str = "vfio.checkpoint.v1.HandoverRecord";

    fn say(&self, words: &mut Words) {
        let Self { operation, step, verdict, message, epochs } = self;
        words.text(operation);
        words.value(*step);
        words.value(*verdict);
        words.text(message);
        words.numbers(epochs);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const SECRET: Ticket = Ticket([7; Ticket::BYTES]);

    fn commit(operation: &str, epochs: &[u64]) -> v1::CommitHandoverRequest {
        let (operation, epochs) = (operation.to_owned(), epochs.to_vec());
        v1::CommitHandoverRequest { operation, epochs, proof: Bytes::new() }
    }

    fn abandon(operation: &str, reason: &str) -> v1::AbandonHandoverRequest {
        let (operation, reason) = (operation.to_owned(), reason.to_owned());
        v1::AbandonHandoverRequest { operation, reason, proof: Bytes::new() }
    }

    fn get(operation: &str, settled: bool) -> v1::GetHandoverRequest {
        v1::GetHandoverRequest { operation: operation.to_owned(), settled, proof: Bytes::new() }
    }

    fn record() -> v1::HandoverRecord {
        v1::HandoverRecord {
            operation: "operations/a".to_owned(),
            step: v1::HandoverStep::Over.into(),
            verdict: v1::HandoverVerdict::Refused.into(),
            message: "no".to_owned(),
            epochs: vec![1, 2],
        }
    }

    /// Whether all of these have a proof of their own, by a secret of which each bit counts.
    fn differ(proofs: &[Proof]) -> bool {
        proofs.iter().map(Proof::bytes).collect::<BTreeSet<_>>().len() == proofs.len()
    }

    #[test]
    fn whatever_is_changed_changes_the_proof() {
        let of = |said: &v1::CommitHandoverRequest| proof(&SECRET, said);
        assert!(differ(&[
            of(&commit("operations/a", &[1, 2])),
            of(&commit("operations/b", &[1, 2])),
            of(&commit("operations/a", &[2, 1])),
            of(&commit("operations/a", &[1])),
            of(&commit("operations/a", &[])),
            proof(&Ticket([8; Ticket::BYTES]), &commit("operations/a", &[1, 2])),
        ]));
        let of = |said: &v1::AbandonHandoverRequest| proof(&SECRET, said);
        // Nothing moves from one text into the next.
        assert!(differ(&[of(&abandon("ab", "c")), of(&abandon("a", "bc")), of(&abandon("abc", ""))]));
        let of = |said: &v1::GetHandoverRequest| proof(&SECRET, said);
        assert!(differ(&[of(&get("a", false)), of(&get("a", true)), of(&get("b", true))]));
        let of = |change: fn(&mut v1::HandoverRecord)| {
            let mut record = record();
            change(&mut record);
            proof(&SECRET, &record)
        };
        assert!(differ(&[
            of(|_| {}),
            of(|record| record.operation.push('b')),
            of(|record| record.step = v1::HandoverStep::Reverting.into()),
            of(|record| record.verdict = v1::HandoverVerdict::Committed.into()),
            of(|record| record.verdict = -1),
            of(|record| record.message.push('o')),
            of(|record| record.epochs[1] = 3),
            of(|record| record.epochs.push(3)),
        ]));
    }

    #[test]
    fn what_is_proved_of_one_message_is_not_of_another() {
        assert!(differ(&[
            proof(&SECRET, &commit("a", &[])),
            proof(&SECRET, &abandon("a", "")),
            proof(&SECRET, &get("a", false)),
            proof(&SECRET, &v1::HandoverRecord { operation: "a".to_owned(), ..Default::default() }),
        ]));
    }

    #[test]
    fn only_who_has_the_secret_proves_it() {
        let said = commit("operations/a", &[1]).proven(&SECRET);
        let claim = Claim::new(&said, &said.proof).unwrap();
        assert!(claim.holds(&SECRET) && !claim.holds(&Ticket([0; Ticket::BYTES])));
        let other = Claim::new(&commit("operations/a", &[2]), &said.proof).unwrap();
        assert!(!other.holds(&SECRET));
        for short in [&said.proof[1..], &[]] {
            assert_eq!(Claim::new(&said, short).unwrap_err().field, "proof");
        }
    }

    /// What somebody else's agent has to come to. Other bytes here make two agents of different builds deaf to each other.
    #[test]
    fn the_words_are_as_documented() {
        let mut words = vec![0, 0, 0, 0, 0, 0, 0, 40];
        words.extend_from_slice(b"vfio.checkpoint.v1.CommitHandoverRequest");
        words.extend_from_slice(b"\0\0\0\0\0\0\0\x0coperations/a");
        words.extend_from_slice(b"\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\x01\0");
        let said = commit("operations/a", &[1, 256]);
        assert_eq!(Words::of(&said).0, words);
        assert_eq!(proof(&SECRET, &said), Proof(blake3::keyed_hash(&SECRET.0, &words)));
        let last = &Words::of(&v1::HandoverRecord { step: -2, ..record() }).0;
        assert!(last.windows(8).any(|bytes| bytes == b"\xff\xff\xff\xff\xff\xff\xff\xfe"));
    }
}
