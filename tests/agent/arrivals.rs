//! What a destination is asked by agents, and what it answers to all of them.

use std::time::Duration;

use tonic::Code;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::migration::Tickets;

use crate::flow::{Bench, Line, at_once, device, refused, soon};
use crate::lab::{Lab, start};
use crate::migrations::prepare_request;
use crate::pair::{Pair, small};

/// A device that does not answer keeps whoever asks for it waiting, and nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_hangs_keeps_no_other_arrival_waiting() {
    for validate_only in [true, false] {
        let (hangs, well) = (Bench::new(small(1)), Bench::new(small(2)));
        let line = Line::to(&hangs);
        let lab = Lab::new();
        let mut config = lab.config("a", &[("n0", line.address.as_str()), ("n1", well.address.as_str())]);
        // Longer than anything that the test waits for.
        config.limits.device_call_timeout = Duration::from_mins(1);
        let agent = start(config).await;
        let restorer = lab.client(&agent, "restorer").await;
        let (peer, other) = (lab.client(&agent, "peer").await, lab.client(&agent, "peer").await);
        let fingerprint = device(&restorer, "n1").await.fingerprint;
        let comes = |name: &str, validate_only| v1::PrepareRequest {
            validate_only,
            ..prepare_request(
                vec![format!("devices/{name}")],
                "operations/some",
                fingerprint.clone(),
                v1::LogicalDevice { id: "7".repeat(32), epoch: 1 },
                bytes::Bytes::from_static(&[7; 32]),
            )
        };
        line.cut();
        let waiting = tokio::spawn({
            let request = comes("n0", validate_only);
            async move { peer.prepare(request).await.map(drop) }
        });
        line.keeps_waiting().await;
        let answer = soon(other.prepare(comes("n1", true))).await.unwrap();
        assert_eq!(answer.blockers, []);
        let restore = v1::RestoreRequest {
            devices: vec!["devices/n1".to_owned()],
            manifest: comes("n1", true).manifest,
            validate_only: true,
            ..Default::default()
        };
        assert_eq!(soon(restorer.restore(restore)).await.unwrap().blockers, []);
        assert!(!waiting.is_finished(), "it was answered too soon for this to say anything");
        waiting.abort();
    }
}

/// Whoever may migrate must not be able to keep everybody else who may from it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_all_tickets() {
    let pair = Pair::new(1).await;
    let (source, destination) = pair.migrator().await;
    let admission = pair.admission(&source).await;
    for _ in 0..Tickets::MOST_OF_ONE {
        destination.admit(admission.clone()).await.unwrap();
    }
    let more = at_once(destination).admit(admission.clone()).await;
    let refusal = refused(more, Code::Unavailable, "TOO_MANY_TICKETS");
    assert!(refusal.message.contains("spiffe://lab.test/migrator/test"), "{refusal}");
    let other = pair.lab.client_named(&pair.destination, "spiffe://lab.test/migrator/other").await;
    other.admit(admission).await.unwrap();
    pair.stop().await;
}
