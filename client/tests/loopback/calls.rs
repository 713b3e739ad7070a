//! When calls are made again, and what they carry.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use vfio_checkpoint_client::call::{CallError, CallOptions, Client, RetryPolicy};
use vfio_checkpoint_client::connect::ConnectOptions;
use vfio_checkpoint_client::tls::ServerCheck;
use vfio_checkpoint_proto::v1;

use crate::pki::{Ca, agent_names, config};
use crate::server::Agent;
use crate::shelf::checkpoint;

pub(crate) async fn client(agent: &Agent) -> Client {
    let ca = Ca::new("one");
    let address = agent.serve(&ca.server(agent_names()), &ca).await;
    let check = ServerCheck::Name(None);
    let endpoint = format!("https://localhost:{}", address.port());
    let options = ConnectOptions::new(endpoint, config(&ca, &ca.client(), &check), check);
    Client::connect(&options).await.unwrap().with_call_options(quick())
}

/// Attempts without pauses that are worth speaking of.
fn quick() -> CallOptions {
    let retry = RetryPolicy {
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(2),
        ..RetryPolicy::default()
    };
    CallOptions { retry, ..CallOptions::default() }
}

fn save(request_id: &str) -> v1::StartSaveRequest {
    v1::StartSaveRequest { request_id: request_id.to_owned(), ..v1::StartSaveRequest::default() }
}

fn away(times: usize) -> Vec<Status> {
    vec![Status::unavailable("restarting"); times]
}

#[tokio::test]
async fn unavailable_is_tried_again_with_the_same_request() {
    let agent = Agent::with_script(away(3));
    client(&agent).await.start_save(save("id")).await.unwrap();
    let calls = agent.calls();
    assert_eq!(calls.len(), 4);
    assert!(calls.iter().all(|call| call.request == save("id") && call.has_deadline));
}

#[tokio::test]
async fn what_changes_something_is_tried_again_only_with_a_request_id() {
    let agent = Agent::with_script(away(3));
    let client = client(&agent).await;
    let error = client.start_save(save("")).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().code, Code::Unavailable);
    assert_eq!(agent.calls().len(), 1);
    client.resume(v1::ResumeRequest::default()).await.unwrap_err();
    assert_eq!(agent.script.lock().unwrap().len(), 1, "Resume was made again");
    let dry = v1::StartSaveRequest { validate_only: true, ..save("") };
    client.start_save(dry).await.unwrap();
    assert_eq!(agent.calls().len(), 3, "a dry run changes nothing");
}

#[tokio::test]
async fn what_is_in_the_way_is_waited_for_only_by_who_wants_to() {
    let blocked = |times| {
        let mut details = ErrorDetails::new();
        details.add_precondition_failure_violation("LEASED", "devices/a", "operations/7 has it");
        vec![Status::with_error_details(Code::Unavailable, "blocked", details); times]
    };
    for (repeat_blocked, calls) in [(true, 4), (false, 1)] {
        let agent = Agent::with_script(blocked(3));
        let client = client(&agent).await;
        let pause = Duration::from_millis(1);
        let retry = RetryPolicy {
            repeat_blocked,
            first_pause: pause,
            longest_pause: pause,
            ..RetryPolicy::default()
        };
        let client = client.with_call_options(CallOptions { retry, ..CallOptions::default() });
        assert_eq!(client.start_save(save("id")).await.is_ok(), repeat_blocked);
        assert_eq!(agent.calls().len(), calls);
    }
}

#[tokio::test]
async fn no_other_code_is_tried_again() {
    for code in 1..=16 {
        let code = Code::from(code);
        if code == Code::Unavailable {
            continue;
        }
        let agent = Agent::with_script(vec![Status::new(code, "no")]);
        let error = client(&agent).await.start_save(save("id")).await.unwrap_err();
        assert_eq!(error.refusal().unwrap().code, code);
        assert_eq!(agent.calls().len(), 1, "{code:?}");
    }
}

#[tokio::test]
async fn attempts_are_bounded_by_their_number_and_by_the_deadline() {
    let agent = Agent::with_script(away(20));
    let client = client(&agent).await;
    client.start_save(save("id")).await.unwrap_err();
    assert_eq!(agent.calls().len(), 8);

    // The agent asks for a pause that ends after the deadline, so there is no use in waiting.
    let mut details = ErrorDetails::new();
    details.set_retry_info(Some(Duration::from_hours(1)));
    let agent = Agent::with_script(vec![Status::with_error_details(Code::Unavailable, "later", details)]);
    let error = self::client(&agent).await.start_save(save("id")).await.unwrap_err();
    assert_eq!(error.refusal().unwrap().retry_after, Some(Duration::from_hours(1)));
    assert_eq!(agent.calls().len(), 1);
}

#[tokio::test]
async fn a_call_that_is_not_answered_ends_with_its_deadline() {
    let agent = Agent::default();
    let options = CallOptions { deadline: Duration::from_millis(50), ..CallOptions::default() };
    let client = client(&agent).await.with_call_options(options);
    let error = client.cutover(v1::CutoverRequest::default()).await.unwrap_err();
    assert!(matches!(error, CallError::Deadline { rpc: "Cutover", .. }), "{error}");
}

#[tokio::test]
async fn the_trace_is_passed_on() {
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let agent = Agent::default();
    let options = CallOptions { trace: Some(trace.parse().unwrap()), ..CallOptions::default() };
    client(&agent).await.with_call_options(options).start_save(save("id")).await.unwrap();
    assert_eq!(agent.calls()[0].traceparent.as_deref(), Some(trace));
}

#[tokio::test]
async fn an_agent_that_goes_away_is_told_by_what_the_connection_found() {
    let ca = Ca::new("one");
    let agent = Agent::default();
    let address = agent.serve(&ca.server(agent_names()), &ca).await;
    // Carries one connection and can cut it.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let carrier = tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut far = tokio::net::TcpStream::connect(address).await.unwrap();
        tokio::io::copy_bidirectional(&mut near, &mut far).await.unwrap();
    });
    let check = ServerCheck::Name(None);
    let options =
        ConnectOptions::new(format!("https://localhost:{port}"), config(&ca, &ca.client(), &check), check);
    let client = Client::connect(&options).await.unwrap().with_call_options(quick());
    client.start_save(save("id")).await.unwrap();
    carrier.abort();
    carrier.await.unwrap_err();
    let error = client.start_save(save("id")).await.unwrap_err();
    assert!(matches!(error, CallError::NotConnected { .. }), "{error}");
    assert!(error.to_string().contains("refuses the connection"), "{error}");
    assert_eq!(agent.calls().len(), 1);
}

#[tokio::test]
async fn reads_of_a_store_are_tried_again_and_a_deletion_is_not() {
    let agent = Agent::default();
    let client = client(&agent).await;
    agent.shelf.checkpoints.lock().unwrap().push(checkpoint("1"));
    let name = crate::shelf::name("1");
    let again = |times| {
        *agent.shelf.away.lock().unwrap() = away(times);
        *agent.shelf.calls.lock().unwrap() = 0;
    };
    let calls = || *agent.shelf.calls.lock().unwrap();
    again(2);
    client.get_checkpoint(v1::GetCheckpointRequest { name: name.clone() }).await.unwrap();
    assert_eq!(calls(), 3);
    again(2);
    client.list_checkpoints(v1::ListCheckpointsRequest::default()).await.unwrap();
    assert_eq!(calls(), 3);
    again(2);
    client.verify_checkpoint(v1::VerifyCheckpointRequest { name: name.clone() }).await.unwrap();
    assert_eq!(calls(), 3);
    again(1);
    let error = client.delete_checkpoint(v1::DeleteCheckpointRequest { name }).await.unwrap_err();
    assert_eq!((error.refusal().unwrap().code, calls()), (Code::Unavailable, 1));
}
