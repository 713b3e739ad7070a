//! Whether two requests under one `request_id` are the same request.
//!
//! ```text
//!   request - request_id - validate_only  --encode-->  bytes  --BLAKE3-->  body digest
//! ```
//!
//! Invariants: fields are encoded in the order of their numbers and maps in the order of their keys (`build.rs`), so
//! equal requests have equal digests, in every process and build. The message's name is hashed along, so requests of
//! different RPCs never have the same one. What this version does not know of is not in it.

use prost::Message;
use vfio_checkpoint_seal::SealHasher;

use crate::v1;

/// A request that has an id, in most of them `request_id`.
pub trait IdempotentRequest: Message + Clone {
    /// The name of the message, in full.
    const NAME: &'static str;

    /// Clears that id, `validate_only`, and what only opens the door: a ticket is good once, and whoever asks again
    /// comes with another, and with the key that the destination has by then.
    fn clear_call_fields(&mut self);
}

macro_rules! idempotent {
    ($($message:ident: $($clear_more:expr)?),*) => {$(
        impl IdempotentRequest for v1::$message {
            const NAME: &'static str = concat!("vfio.checkpoint.v1.", stringify!($message));

            fn clear_call_fields(&mut self) {
                self.request_id.clear();
                self.validate_only = false;
                $($clear_more(self);)?
            }
        }
    )*};
}

idempotent!(StartSaveRequest:, RestoreRequest:, ResetDeviceRequest:, MigrateRequest: clear_admission);

/// Of one agent to another. Its id is the operation of the source.
impl IdempotentRequest for v1::PrepareRequest {
    const NAME: &'static str = "vfio.checkpoint.v1.PrepareRequest";

    fn clear_call_fields(&mut self) {
        self.source_operation.clear();
        self.validate_only = false;
        self.ticket.clear();
    }
}

fn clear_admission(request: &mut v1::MigrateRequest) {
    request.ticket.clear();
    if let Some(target) = &mut request.target {
        target.key_sha256.clear();
    }
}

/// Digest of all that a request asks for: equal for equal requests, whatever their `request_id`.
pub fn body_digest<R: IdempotentRequest>(request: &R) -> [u8; 32] {
    let mut body = request.clone();
    body.clear_call_fields();
    let mut hasher = SealHasher::new();
    hasher.update(R::NAME.as_bytes());
    hasher.update(&[0]);
    hasher.update(&body.encode_to_vec());
    hasher.seal().blake3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn save() -> v1::StartSaveRequest {
        v1::StartSaveRequest { devices: vec!["devices/a".into()], max_bytes: 7, ..Default::default() }
    }

    #[test]
    fn the_call_is_not_part_of_the_body_and_all_else_is() {
        let digest = body_digest(&save());
        let same = v1::StartSaveRequest { request_id: "x".into(), validate_only: true, ..save() };
        assert_eq!(body_digest(&same), digest);
        for other in [
            v1::StartSaveRequest { max_bytes: 8, ..save() },
            v1::StartSaveRequest { devices: vec!["devices/b".into()], ..save() },
            v1::StartSaveRequest { viommu: true, ..save() },
        ] {
            assert_ne!(body_digest(&other), digest);
        }
        assert_ne!(
            body_digest(&v1::StartSaveRequest::default()),
            body_digest(&v1::RestoreRequest::default())
        );
    }

    #[test]
    fn what_opens_the_destination_is_not_part_of_the_body() {
        let migrate = |ticket: u8, key: u8, endpoint: &str| {
            body_digest(&v1::MigrateRequest {
                target: Some(v1::MigrationTarget {
                    endpoint: endpoint.into(),
                    key_sha256: vec![key; 32].into(),
                    ..Default::default()
                }),
                ticket: vec![ticket; 32].into(),
                ..Default::default()
            })
        };
        assert_eq!(migrate(1, 2, "https://a:1"), migrate(3, 4, "https://a:1"));
        assert_ne!(migrate(1, 2, "https://a:1"), migrate(1, 2, "https://b:1"));
    }

    #[test]
    fn the_order_in_which_facts_were_sent_does_not_matter() {
        // Two encodings of one map: by hand, as a client in another language may send them.
        let facts = |order: [u8; 2]| {
            let encoded: Vec<u8> =
                order.iter().flat_map(|name| [0x0a, 6, 0x0a, 1, *name, 0x12, 1, b'v']).collect();
            let fingerprint = v1::Fingerprint::decode(&encoded[..]).unwrap();
            assert_eq!(fingerprint.facts.len(), 2);
            let device = v1::DeviceManifest { fingerprint: Some(fingerprint), ..Default::default() };
            let manifest = v1::CheckpointManifest { devices: vec![device], ..Default::default() };
            body_digest(&v1::RestoreRequest { manifest: Some(manifest), ..Default::default() })
        };
        assert_eq!(facts([b'a', b'b']), facts([b'b', b'a']));
        assert_ne!(facts([b'a', b'b']), facts([b'a', b'c']));
    }

    #[test]
    fn the_digest_stays_the_same_across_builds() {
        // It is kept in the journal: another one here makes every repeated request after an upgrade a conflict.
        let mut hasher = SealHasher::new();
        hasher.update(b"vfio.checkpoint.v1.StartSaveRequest\0");
        hasher.update(b"\x0a\x09devices/a");
        hasher.update(b"\x50\x07");
        assert_eq!(body_digest(&save()), hasher.seal().blake3);
    }
}
