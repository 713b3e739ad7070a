//! The messages between an agent and the holder, as bytes. No I/O.
//!
//! ```text
//!   agent                                   holder
//!   Hello{version, pid}                 ->  Welcome{version, held} | Refused{Version | Busy}      first, once
//!   Put{label} + 1..=16 fds             ->  Stored{replaced}   | Refused{TooManyDevices | TooManyFds}
//!   List{after?}                        ->  Labels{labels, more}                              in the order of keys
//!   Take{key}                           ->  Taken{label, handed_out} + fds | Refused{NotHeld}
//!   Drop{key}                           ->  Dropped{existed}
//! ```
//! One JSON document is one packet of a `SOCK_SEQPACKET` socket, so there is nothing to put together or to cut.
//!
//! # Versions
//! A holder outlives agents, so a newer agent meets an older holder. Within a version nothing is added or taken away; a
//! change of any kind is a new version, and an agent speaks every version whose holders may still run.
//!
//! # Invariants
//! - A packet has at most 64 KiB and 16 fds. Fds come with `Put` and `Taken` and with nothing else.
//! - Every text in a message is bounded by its type; a label that came in a packet fits into every packet it goes out in.
//!
//! # Failure paths
//! [`ProtocolError`] says what a packet is not. [`Refusal`] is the holder's answer; those of [`Refusal::is_final`] end the
//! connection.

use serde::{Deserialize, Serialize};

use super::label::{DeviceKey, Label};

/// The version that this code speaks.
pub const VERSION: u32 = 1;
/// The longest packet.
pub const MAX_PACKET_BYTES: usize = 64 * 1024;
/// The most fds with one packet.
pub const MAX_FDS: usize = 16;
/// Labels of one page; the rest of a packet is for what is around them.
const PAGE_BYTES: usize = 60 * 1024;

/// What an agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// Who it is. The first message.
    Hello {
        /// The version that it speaks.
        version: u32,
        /// Its process id, as it sees it.
        pid: u32,
    },
    /// Keeps the fds that come along, in place of those that were kept under the key.
    Put {
        /// What they are.
        label: Box<Label>,
    },
    /// What is held, from after a key on.
    List {
        /// The last key of the page before.
        after: Option<DeviceKey>,
    },
    /// The fds of one device. The holder keeps its own.
    Take {
        /// Which.
        key: DeviceKey,
    },
    /// Lets go of one device.
    Drop {
        /// Which.
        key: DeviceKey,
    },
}

/// What the holder answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Reply {
    /// It is this agent's now.
    Welcome {
        /// The version that it speaks.
        version: u32,
        /// How many devices it holds.
        held: u64,
    },
    /// Kept.
    Stored {
        /// Whether something was kept under the key before.
        replaced: bool,
    },
    /// A page of labels.
    Labels {
        /// In the order of keys.
        labels: Vec<Label>,
        /// Whether there are more after the last.
        more: bool,
    },
    /// The fds come along.
    Taken {
        /// What they are.
        label: Box<Label>,
        /// How many times they were handed out since they were put, this time left out.
        handed_out: u64,
    },
    /// Let go.
    Dropped {
        /// Whether there was anything.
        existed: bool,
    },
    /// Not done.
    Refused(Refusal),
}

/// Why the holder does not do something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Refusal {
    /// It speaks another version.
    #[error("the holder speaks version {holder}; start the release of the agent that does")]
    Version {
        /// Which.
        holder: u32,
    },
    /// Another agent is connected, and lives.
    #[error("another agent (pid {pid}) is connected to the holder; stop it first")]
    Busy {
        /// Its process.
        pid: u32,
    },
    /// The packet makes no sense.
    #[error("the holder could not read the packet: {reason}")]
    Malformed {
        /// What is wrong with it.
        reason: String,
    },
    /// It holds as many devices as it may.
    #[error("the holder holds {limit} devices already, which is its limit; raise --max-devices")]
    TooManyDevices {
        /// Its limit.
        limit: u64,
    },
    /// It has as many files open as it may.
    #[error("the holder may keep {limit} files open and would need {needed}; raise its LimitNOFILE")]
    TooManyFds {
        /// How many it would have.
        needed: u64,
        /// How many it may have.
        limit: u64,
    },
    /// Nothing is kept under the key.
    #[error("the holder holds no device {key}")]
    NotHeld {
        /// The key.
        key: DeviceKey,
    },
}

impl Refusal {
    /// Whether the holder closes the connection with it.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Version { .. } | Self::Busy { .. } | Self::Malformed { .. } => true,
            Self::TooManyDevices { .. } | Self::TooManyFds { .. } | Self::NotHeld { .. } => false,
        }
    }
}

/// Why bytes are no message, or a message makes no packet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// It is longer than any.
    #[error("a packet has at most {MAX_PACKET_BYTES} bytes")]
    TooLong,
    /// It is no JSON document of a message.
    #[error("the packet is no message")]
    Json(#[source] serde_json::Error),
    /// More fds than may come.
    #[error(
        "more than {MAX_FDS} file descriptors came with a packet, or more than this process has room for"
    )]
    TooManyFds,
    /// Fds that should not be there, or the other way round.
    #[error("{given} file descriptors came with a packet that has {wanted}")]
    Fds {
        /// How many came.
        given: usize,
        /// How many should.
        wanted: &'static str,
    },
    /// Something else was asked or answered than comes here.
    #[error("{0}")]
    OutOfTurn(&'static str),
}

impl Request {
    pub(super) fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        encode(self)
    }

    /// A request from a packet with `fds` file descriptors.
    pub(super) fn decode(packet: &[u8], fds: usize) -> Result<Self, ProtocolError> {
        let request: Self = serde_json::from_slice(packet).map_err(ProtocolError::Json)?;
        match &request {
            Self::Put { .. } => check_some(fds)?,
            Self::Hello { .. } | Self::List { .. } | Self::Take { .. } | Self::Drop { .. } => {
                check_none(fds)?;
            }
        }
        Ok(request)
    }
}

impl Reply {
    pub(super) fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        encode(self)
    }

    /// A reply from a packet with `fds` file descriptors.
    pub(super) fn decode(packet: &[u8], fds: usize) -> Result<Self, ProtocolError> {
        let reply: Self = serde_json::from_slice(packet).map_err(ProtocolError::Json)?;
        match &reply {
            Self::Taken { .. } => check_some(fds)?,
            Self::Welcome { .. }
            | Self::Stored { .. }
            | Self::Labels { .. }
            | Self::Dropped { .. }
            | Self::Refused(_) => check_none(fds)?,
        }
        Ok(reply)
    }

    /// As many labels as one packet has room for, at least one where there are any.
    pub(super) fn page<'a>(labels: impl Iterator<Item = &'a Label>) -> Result<Self, ProtocolError> {
        let mut page = Vec::new();
        let mut bytes = 0;
        for label in labels {
            bytes += serde_json::to_vec(label).map_err(ProtocolError::Json)?.len() + 1;
            if bytes > PAGE_BYTES && !page.is_empty() {
                return Ok(Self::Labels { labels: page, more: true });
            }
            page.push(label.clone());
        }
        Ok(Self::Labels { labels: page, more: false })
    }
}

fn check_some(fds: usize) -> Result<(), ProtocolError> {
    if (1..=MAX_FDS).contains(&fds) {
        Ok(())
    } else {
        Err(ProtocolError::Fds { given: fds, wanted: "1 to 16" })
    }
}

fn check_none(fds: usize) -> Result<(), ProtocolError> {
    if fds == 0 { Ok(()) } else { Err(ProtocolError::Fds { given: fds, wanted: "none" }) }
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, ProtocolError> {
    let packet = serde_json::to_vec(message).map_err(ProtocolError::Json)?;
    if packet.len() > MAX_PACKET_BYTES { Err(ProtocolError::TooLong) } else { Ok(packet) }
}

#[cfg(test)]
mod tests {
    use super::super::label::{BootId, Facts, OperationId};
    use super::*;

    fn label(key: &str, facts: &str) -> Label {
        Label {
            key: DeviceKey::new(key).unwrap(),
            address: "0000:03:00.1".parse().unwrap(),
            operation: Some(OperationId::new("op-1").unwrap()),
            epoch: 7,
            facts: Facts::new(facts).unwrap(),
            boot_id: BootId::new("boot").unwrap(),
        }
    }

    /// The longest label that its types allow, of characters that grow when they are written.
    fn longest(key: &str) -> Label {
        Label {
            key: DeviceKey::new(format!("{key}{}", "\"".repeat(256 - key.len()))).unwrap(),
            address: format!("sim:firmware={}", "\"".repeat(4096 - 13)).parse().unwrap(),
            operation: Some(OperationId::new("\\".repeat(256)).unwrap()),
            epoch: u64::MAX,
            facts: Facts::new("\"".repeat(16384)).unwrap(),
            boot_id: BootId::new("\"".repeat(64)).unwrap(),
        }
    }

    #[test]
    fn messages_read_back_as_they_were_written() {
        let label = || Box::new(label("nic", "{}"));
        let key = || DeviceKey::new("nic").unwrap();
        for request in [
            Request::Hello { version: 1, pid: 7 },
            Request::Put { label: label() },
            Request::List { after: None },
            Request::List { after: Some(key()) },
            Request::Take { key: key() },
            Request::Drop { key: key() },
        ] {
            let fds = usize::from(matches!(request, Request::Put { .. }));
            assert_eq!(Request::decode(&request.encode().unwrap(), fds).unwrap(), request);
            assert!(matches!(
                Request::decode(&request.encode().unwrap(), 1 - fds),
                Err(ProtocolError::Fds { .. })
            ));
        }
        for reply in [
            Reply::Welcome { version: 1, held: 3 },
            Reply::Stored { replaced: true },
            Reply::Labels { labels: vec![*label()], more: false },
            Reply::Taken { label: label(), handed_out: 2 },
            Reply::Dropped { existed: false },
            Reply::Refused(Refusal::Busy { pid: 8 }),
        ] {
            let fds = usize::from(matches!(reply, Reply::Taken { .. }));
            assert_eq!(Reply::decode(&reply.encode().unwrap(), fds).unwrap(), reply);
            assert!(Reply::decode(&reply.encode().unwrap(), 17).is_err());
        }
    }

    #[test]
    fn garbage_is_no_message() {
        let put = Request::Put { label: Box::new(label("nic", "{}")) }.encode().unwrap();
        for cut in 0..put.len() {
            assert!(Request::decode(&put[..cut], 1).is_err());
        }
        let text = String::from_utf8(put).unwrap();
        for wrong in [
            text.replace("\"epoch\"", "\"era\""),
            text.replace("\"epoch\":7", "\"epoch\":-1"),
            text.replace("\"nic\"", "\"\""),
            text.replace("0000:03:00.1", "../../etc/passwd"),
            text.replace("put", "pull"),
            format!("{text}{text}"),
            "[".repeat(60_000),
            "{\"hello\":{\"version\":1,\"pid\":2,\"more\":3}}".to_owned(),
        ] {
            assert!(Request::decode(wrong.as_bytes(), 1).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_longest_label_fits_every_packet() {
        let put = Request::Put { label: Box::new(longest("a")) }.encode().unwrap();
        let Request::Put { label } = Request::decode(&put, 1).unwrap() else { panic!("not a put") };
        Reply::Taken { label, handed_out: u64::MAX }.encode().unwrap();
        let labels = [longest("a"), longest("b"), longest("c")];
        let page = Reply::page(labels.iter()).unwrap();
        page.encode().unwrap();
        assert!(matches!(page, Reply::Labels { labels, more: true } if labels.len() == 1));
    }

    #[test]
    fn pages_hold_what_fits() {
        let labels: Vec<Label> = (0..1024).map(|i| label(&format!("{i:04}"), "{}")).collect();
        let mut seen = 0;
        loop {
            let page = Reply::page(labels[seen..].iter()).unwrap();
            assert!(page.encode().unwrap().len() <= MAX_PACKET_BYTES);
            let Reply::Labels { labels: page, more } = page else { panic!("not a page") };
            assert_eq!(page, labels[seen..seen + page.len()]);
            seen += page.len();
            if !more {
                break;
            }
        }
        assert_eq!(seen, labels.len());
    }
}
