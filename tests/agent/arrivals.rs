//! What a destination is asked by agents, and what it answers to all of them.

use std::time::Duration;

use tonic::Code;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::failpoint::fail;
use vfio_checkpoint_server::migration::Tickets;

use crate::flow::{Bench, Line, at_once, device, done, millis, refused, soon};
use crate::lab::{Lab, start};
use crate::migrations::{moved, prepare_request, stayed};
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

#[tokio::test(flavor = "multi_thread")]
async fn the_same_operation_of_a_source_prepares_the_same_and_nothing_else() {
    let pair = Pair::new(2).await;
    let (source, destination) = pair.migrator().await;
    let mut admission = pair.admission(&source).await;
    admission.logical_devices.truncate(1);
    admission.devices.truncate(1);
    let logical = admission.logical_devices[0].clone();
    let fingerprint = device(&source, "n0").await.fingerprint;
    let ticket = destination.admit(admission.clone()).await.unwrap().ticket;
    let first = prepare_request(admission.devices, "operations/some", fingerprint, logical, ticket);
    let as_source = at_once(pair.lab.client_as(&pair.destination, "source").await);
    let answer = as_source.prepare(first.clone()).await.unwrap();
    assert!(!answer.operation.is_empty() && answer.secret.len() == 32);
    assert_eq!(as_source.prepare(first.clone()).await.unwrap(), answer, "the same again");
    let changes: [fn(&mut v1::PrepareRequest); 3] = [
        |request| request.devices = vec!["devices/n1".to_owned()],
        |request| request.commit_timeout = millis(2000),
        |request| {
            let device = &mut request.manifest.as_mut().unwrap().devices[0];
            device.logical_device.as_mut().unwrap().epoch += 1;
        },
    ];
    for change in changes {
        let mut other = first.clone();
        change(&mut other);
        refused(as_source.prepare(other).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    }
    pair.stop().await;
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

/// What is in the way for a moment uses up no ticket: whoever asks again is let in, or is told what is still in the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_comes_to_nothing_for_now_leaves_the_ticket_as_it_was() {
    for lasts in [false, true] {
        let pair = Pair::new(1).await;
        let before = pair.digests();
        let (source, _) = pair.migrator().await;
        let mut failing = fail(&pair.lab.path("destination").join("state"), "commit of ADMITTED", 0);
        let name = pair.start(|_, _| {}).await;
        soon(failing.times(1)).await;
        let failing = lasts.then_some(failing);
        let ended = soon(done(&source, &name)).await;
        if lasts {
            let message = ended.failure.clone().unwrap().message;
            assert!(message.contains("journal") && !message.contains("ticket"), "{message}");
            stayed(&pair, &before);
        } else {
            assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
            moved(&pair, &before);
        }
        drop(failing);
        pair.stop().await;
    }
}
