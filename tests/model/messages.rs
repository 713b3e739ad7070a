//! The messages of a hand-over, in one place: the page shows this list, and a test compares it with the contract.
//!
//! ```text
//!   MESSAGES --> docs/handover.md
//!            `-> the calls of MigrationService, one for one
//! ```
//! # Invariants
//! Every call of the contract's service is here, and nothing else is but the stream.

/// One message, as somebody has to know it who writes another side.
pub(crate) struct Message {
    /// The call.
    pub(crate) call: &'static str,
    /// The service that it belongs to.
    pub(crate) service: &'static str,
    /// From whom to whom.
    pub(crate) way: &'static str,
    /// When it is sent.
    pub(crate) when: &'static str,
    /// What is on record before it is sent.
    pub(crate) record: &'static str,
    /// What the receiver does.
    pub(crate) does: &'static str,
    /// What becomes of a second one.
    pub(crate) again: &'static str,
}

const MIGRATION: &str = "MigrationService";

pub(crate) const MESSAGES: [Message; 11] = [
    Message {
        call: "GetAgent",
        service: MIGRATION,
        way: "caller to either",
        when: "before Admit",
        record: "nothing",
        does: "says its key and the versions that it speaks",
        again: "the same",
    },
    Message {
        call: "Admit",
        service: MIGRATION,
        way: "caller to destination",
        when: "before Migrate",
        record: "nothing",
        does: "gives a ticket for one source, one set and a short time, and its own key. The ticket is kept in memory alone",
        again: "another ticket",
    },
    Message {
        call: "Migrate",
        service: MIGRATION,
        way: "caller to source",
        when: "with the ticket, and the key that came with it",
        record: "nothing",
        does: "records the operation and an offer in BEGUN, then begins",
        again: "the same request_id gives the same operation",
    },
    Message {
        call: "Prepare",
        service: MIGRATION,
        way: "source to destination",
        when: "first, with the ticket, and to that key alone",
        record: "source: BEGUN",
        does: "uses the ticket up, leases the devices, and records the arrival in LOADING. The devices are left alone until \
               the stream opens. The answer brings the secret",
        again: "the same answer while the arrival is on record; after that the ticket is not known. With another manifest or \
                other devices it is refused (ALREADY_EXISTS), and so it is under an epoch that is over here \
                (STALE_EPOCH). One that was refused has left the ticket as it was",
    },
    Message {
        call: "StreamState",
        service: "CheckpointService",
        way: "source to destination",
        when: "after Prepare, once",
        record: "source: BEGUN; destination: LOADING",
        does: "brings the devices to RESUMING once it is open, and writes verified chunks. Once every seal is verified it records PREPARED, and only then sends the last \
               Ack, with `complete`: that is Prepared",
        again: "where the connection breaks, the same stream over another one, from the first frame that is not \
                acknowledged (from version 2 of its protocol on). Where nobody comes back in time, and where an agent \
                was started anew, the source undoes, and the destination refuses",
    },
    Message {
        call: "Ready",
        service: MIGRATION,
        way: "who called Admit, or an admin, to destination",
        when: "where Admit asked for it, before Prepared is said",
        record: "destination: LOADING or PREPARED",
        does: "has it on record, and sends the last Ack, which waits for it; until then CommitHandover is refused",
        again: "nothing",
    },
    Message {
        call: "Commit",
        service: MIGRATION,
        way: "caller to source",
        when: "MANUAL alone, after Prepared was heard",
        record: "source: BEGUN",
        does: "records COMMITTING, then sends CommitHandover",
        again: "nothing while the first has its effect; refused once that is undone",
    },
    Message {
        call: "CommitHandover",
        service: MIGRATION,
        way: "source to destination",
        when: "after Prepared was heard, and again until it is answered, also after a crash. Once more where an \
               administrator let go without an answer, unless a device may run there still",
        record: "source: COMMITTING, or its end",
        does: "see what a Commit is answered. Another epoch, another hand-over or no proof is refused as a call and moves nothing",
        again: "the same answer for ever",
    },
    Message {
        call: "AbandonHandover",
        service: MIGRATION,
        way: "source to destination",
        when: "when the source undoes, or has ended so; may get lost",
        record: "source: BEGUN, or its end",
        does: "resets its devices and records REFUSED; from COMMITTING on it moves nothing. The answer is what is on record",
        again: "nothing",
    },
    Message {
        call: "GetHandover",
        service: MIGRATION,
        way: "source to destination",
        when: "at any time; with `settled` once the source has its own end on record, and again until it is answered, also \
               after a crash",
        record: "source: anything; with `settled`: its end",
        does: "says what is on record. With `settled` an arrival that is over may be forgotten, in its time",
        again: "the same; not found once it is forgotten",
    },
    Message {
        call: "Resolve",
        service: MIGRATION,
        way: "admin to source",
        when: "in doubt: COMMITTING is on record, and no answer moves the source",
        record: "source: COMMITTING",
        does: "asks the destination, then decides by the table below. Nothing, where whoever asked has hung up",
        again: "refused: nothing is in doubt any more",
    },
];
