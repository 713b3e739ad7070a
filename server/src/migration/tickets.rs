//! What a destination has promised to let in.
//!
//! ```text
//!   Admit --issue--> Ticket, 32 random bytes --caller, source--> Prepare --take--> Promise, once
//!                                                                   nothing came of it --put_back--> out again
//! ```
//! Tickets live in memory: after a restart of the agent none is good, and whoever has one asks for another.
//!
//! # Invariants
//! - At most [`Tickets::MOST`] are out at a time, and at most [`Tickets::MOST_OF_ONE`] that one identity has asked for; those
//!   whose time is over make room. One that is put back finds its room though others were made meanwhile.
//! - A ticket that is shown by the wrong source stays good for the right one.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vfio_checkpoint_proto::domain::{AdmitSpec, LogicalDevice};
use vfio_checkpoint_proto::ids::{DeviceName, KeyHash, Ticket};

use crate::security::tls::provider;

/// The tickets that are out.
#[derive(Debug, Default)]
pub struct Tickets(Mutex<BTreeMap<Ticket, Promise>>);

/// What a ticket stands for.
#[derive(Debug, Clone)]
pub struct Promise {
    /// What was asked for.
    pub spec: AdmitSpec,
    /// Who asked.
    pub caller: String,
    /// Until when it can be used, by the monotonic clock.
    until: Duration,
}

/// Why a ticket is no good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not one of those that are out.
    #[error(
        "the ticket was used, has expired, or was made by another agent or before this one was restarted; ask for another \
         with Admit"
    )]
    Invalid,
    /// It is for somebody or something else.
    #[error("the ticket is for {wanted}, and {found} came with it; ask for one that fits with Admit")]
    Mismatch {
        /// What it is for.
        wanted: String,
        /// What came.
        found: String,
    },
    /// Too many are out.
    #[error("{} tickets are out, as many as there may be; wait until some have expired", Tickets::MOST)]
    Full,
    /// Too many of one caller are out.
    #[error(
        "{} tickets of {caller} are out, as many as there may be of one; use them, or wait until some have expired",
        Tickets::MOST_OF_ONE
    )]
    Share {
        /// Who it is.
        caller: String,
    },
    /// There is no randomness.
    #[error("no ticket can be made, because the system gives no random bytes")]
    Random,
}

impl Tickets {
    /// The most that are out at a time.
    pub const MOST: usize = 1024;
    /// The most that one identity has out at a time: whoever may ask must not be able to keep all others from it.
    pub const MOST_OF_ONE: usize = Self::MOST / 4;

    /// Makes one, at `now`.
    pub fn issue(&self, now: Duration, spec: AdmitSpec, caller: String) -> Result<Ticket, TicketError> {
        let ticket = random()?;
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, promise| promise.until > now);
        if tickets.len() >= Self::MOST {
            return Err(TicketError::Full);
        }
        if tickets.values().filter(|promise| promise.caller == caller).count() >= Self::MOST_OF_ONE {
            return Err(TicketError::Share { caller });
        }
        let until = now.saturating_add(spec.ttl);
        tickets.insert(ticket.clone(), Promise { spec, caller, until });
        Ok(ticket)
    }

    /// What a ticket stands for, where it fits who shows it and what comes. It stays good.
    pub fn look(
        &self,
        now: Duration,
        ticket: &Ticket,
        source: KeyHash,
        logical: &[LogicalDevice],
        devices: &[DeviceName],
    ) -> Result<Promise, TicketError> {
        let tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let promise =
            tickets.get(ticket).filter(|promise| promise.until > now).ok_or(TicketError::Invalid)?;
        let mismatch = |wanted: String, found: String| Err(TicketError::Mismatch { wanted, found });
        if promise.spec.source_key != source {
            return mismatch(format!("the key {}", promise.spec.source_key), format!("the key {source}"));
        }
        if promise.spec.logical_devices != logical {
            return mismatch(named(&promise.spec.logical_devices), named(logical));
        }
        if promise.spec.devices != devices {
            let names = |devices: &[DeviceName]| {
                devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            };
            return mismatch(names(&promise.spec.devices), names(devices));
        }
        Ok(promise.clone())
    }

    /// Uses a ticket up. None where somebody was quicker.
    pub fn take(&self, ticket: &Ticket) -> Option<Promise> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(ticket)
    }

    /// Nothing came of what a ticket was taken for: it is as good as it was, for as long as it was.
    pub fn put_back(&self, ticket: Ticket, promise: Promise) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(ticket, promise);
    }
}

fn named(logical: &[LogicalDevice]) -> String {
    let each: Vec<String> =
        logical.iter().map(|device| format!("{} in epoch {}", device.id, device.epoch.0)).collect();
    each.join(", ")
}

/// 32 bytes that nobody can guess.
pub(super) fn random() -> Result<Ticket, TicketError> {
    let mut bytes = [0; Ticket::BYTES];
    provider().secure_random.fill(&mut bytes).map_err(|_| TicketError::Random)?;
    Ok(Ticket(bytes))
}

#[cfg(test)]
mod tests {
    use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId};

    use super::*;

    const TTL: Duration = Duration::from_mins(1);

    fn logical(number: u8, epoch: u64) -> LogicalDevice {
        LogicalDevice { id: LogicalDeviceId::from_bytes([number; 16]), epoch: Epoch(epoch) }
    }

    fn devices(names: &[&str]) -> Vec<DeviceName> {
        names.iter().map(|name| DeviceName::from_id(name).unwrap()).collect()
    }

    fn spec() -> AdmitSpec {
        AdmitSpec {
            logical_devices: vec![logical(1, 3)],
            devices: devices(&["a"]),
            source_key: KeyHash([7; 32]),
            ttl: TTL,
            require_ready: false,
            owner_pod: None,
        }
    }

    #[test]
    fn a_ticket_is_for_one_source_one_set_and_one_use() {
        let tickets = Tickets::default();
        let ticket = tickets.issue(Duration::ZERO, spec(), "me".to_owned()).unwrap();
        let look = |key, logical: &[LogicalDevice], names: &[&str]| {
            tickets.look(Duration::ZERO, &ticket, KeyHash([key; 32]), logical, &devices(names)).map(|_| ())
        };
        for mismatch in [
            look(8, &[logical(1, 3)], &["a"]),
            look(7, &[logical(1, 4)], &["a"]),
            look(7, &[logical(2, 3)], &["a"]),
            look(7, &[logical(1, 3)], &["b"]),
        ] {
            assert!(matches!(mismatch, Err(TicketError::Mismatch { .. })), "{mismatch:?}");
        }
        assert_eq!(look(7, &[logical(1, 3)], &["a"]), Ok(()), "those did not use it up");
        let taken = tickets.take(&ticket).unwrap();
        assert_eq!(look(7, &[logical(1, 3)], &["a"]), Err(TicketError::Invalid));
        assert!(tickets.take(&ticket).is_none());
        // What it was taken for came to nothing.
        tickets.put_back(ticket.clone(), taken);
        assert_eq!(look(7, &[logical(1, 3)], &["a"]), Ok(()));
        let late = tickets.look(TTL, &ticket, KeyHash([7; 32]), &[logical(1, 3)], &devices(&["a"]));
        assert_eq!(late.map(|_| ()), Err(TicketError::Invalid), "for no longer than before");
        assert!(tickets.take(&ticket).is_some());
        assert_eq!(look(7, &[logical(1, 3)], &["a"]), Err(TicketError::Invalid));
    }

    #[test]
    fn a_ticket_ends_and_makes_room() {
        let tickets = Tickets::default();
        let first = tickets.issue(Duration::ZERO, spec(), String::new()).unwrap();
        let second = Duration::from_secs(1);
        for number in 1..Tickets::MOST {
            tickets.issue(second, spec(), (number / Tickets::MOST_OF_ONE).to_string()).unwrap();
        }
        assert_eq!(tickets.issue(second, spec(), "another".to_owned()), Err(TicketError::Full));
        let looked = |now| tickets.look(now, &first, KeyHash([7; 32]), &[logical(1, 3)], &devices(&["a"]));
        assert!(looked(Duration::from_secs(59)).is_ok());
        assert_eq!(looked(TTL).map(|_| ()), Err(TicketError::Invalid));
        assert!(tickets.issue(TTL, spec(), String::new()).is_ok(), "what has ended makes room");
    }

    #[test]
    fn nobody_has_more_than_a_share() {
        let tickets = Tickets::default();
        let issue = |now, caller: &str| tickets.issue(now, spec(), caller.to_owned());
        let first = issue(Duration::ZERO, "one").unwrap();
        let second = Duration::from_secs(1);
        for _ in 1..Tickets::MOST_OF_ONE {
            issue(second, "one").unwrap();
        }
        let share = Err(TicketError::Share { caller: "one".to_owned() });
        assert_eq!(issue(second, "one"), share);
        assert!(issue(second, "two").is_ok());
        assert!(tickets.take(&first).is_some());
        assert!(issue(second, "one").is_ok(), "what was used makes room");
        assert_eq!(issue(second, "one"), share);
        assert!(issue(second + TTL, "one").is_ok(), "and what has ended does");
    }
}
