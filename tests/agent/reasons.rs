//! Reasons: that each one has a test which provokes it, and those of requests that no handler sees.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use vfio_checkpoint_client::call::Refusal;
use vfio_checkpoint_proto::MAX_REQUEST_BYTES;
use vfio_checkpoint_proto::v1::{self, ErrorReason, FILE_DESCRIPTOR_SET, FailureReason};
use vfio_checkpoint_server::config::AgentConfig;
use vfio_checkpoint_server::security::roles::{Grant, Policy, Role};

use crate::flow::{channel, done, failure, refused, save_of, soon, start_save};
use crate::lab::{Lab, start};

/// What cannot be provoked from outside of an agent, with the reason why not.
const UNPROVOKED: &[(&str, &str)] = &[
    ("ErrorReason DEFECT", "takes work that panics, and there is none on purpose; see rpc/status/tests.rs"),
    ("ErrorReason CALLER_GONE", "is told to nobody; tests/kill/two/doubt.rs finds it in the audit log"),
    ("FailureReason DEVICE_UNAVAILABLE", "no device that was open is ever taken out of its slot"),
    ("FailureReason BLOCKED", "the device layer refuses a plan that admission has made for the same devices"),
    (
        "FailureReason FAILED",
        "stands for errors without a reason of their own, and all that are known have one",
    ),
];

/// Where reasons are provoked. This file is none of them: it names reasons that are not; and `each_error.rs` repeats, of each
/// method, what others provoke.
fn provoking() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(root.join("agent"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            path.extension().is_some_and(|extension| extension == "rs")
                && !["reasons.rs", "each_error.rs"].iter().any(|file| path.ends_with(file))
        })
        .collect();
    files.push(root.join("../server/src/security/tests/service.rs"));
    let mut all: String = files.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    // Of this one, only what comes after the list.
    all.push_str(include_str!("reasons.rs").split_once("// Provoked here.").unwrap().1);
    all.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// How often a reason stands in tests: after the code of a call, and elsewhere.
fn asserted(tests: &str, reason: &str) -> (usize, usize) {
    let (mut of_calls, mut others) = (0, 0);
    for (at, _) in tests.match_indices(&format!("\"{reason}\"")) {
        let before = tests[..at].trim_end_matches([' ', '(']);
        let word = before.strip_suffix(',').and_then(|before| before.rsplit([' ', '(']).next());
        if word.is_some_and(|word| word.starts_with("Code::")) { of_calls += 1 } else { others += 1 }
    }
    (of_calls, others)
}

/// A reason that a client's author reads of and that no test provokes may as well not be there, or be wrong. The other
/// direction needs no test: the agent has no reasons but those of reason.proto.
#[test]
fn each_reason_is_provoked_by_a_test_or_says_why_it_cannot_be() {
    let tests = provoking();
    let calls = ErrorReason::all().map(ErrorReason::as_reason);
    let ends: Vec<&str> = FailureReason::all().map(FailureReason::as_reason).collect();
    let mut found = BTreeMap::new();
    for reason in calls {
        let (of_calls, others) = asserted(&tests, reason);
        // Where an operation can fail for it as well, only a code tells that a call is meant.
        let is_clear = !ends.contains(&reason);
        found.insert(format!("ErrorReason {reason}"), of_calls > 0 || is_clear && others > 0);
    }
    for reason in ends {
        found.insert(format!("FailureReason {reason}"), asserted(&tests, reason).1 > 0);
    }
    let missing: Vec<&str> =
        found.iter().filter(|(_, is_there)| !**is_there).map(|(name, _)| name.as_str()).collect();
    let mut excused: Vec<&str> = UNPROVOKED.iter().map(|(name, _)| *name).collect();
    excused.sort_unstable();
    assert_eq!(missing, excused, "left: no test provokes it; right: those that say why not");
}

/// The same of what stands in the way of a job. Some take a real kernel's device.
#[test]
fn each_blocker_is_provoked_by_a_test() {
    let tests = provoking() + include_str!("../guest/suite/agent/blocked.rs");
    let all = (1..i32::MAX).map_while(|number| v1::BlockerReason::try_from(number).ok());
    let names: Vec<&str> = all.map(|reason| reason.as_str_name()).collect();
    assert!(names.len() >= 25, "they are not numbered one after the other: {names:?}");
    let is_asserted = |name: &str| {
        let short = name.strip_prefix("BLOCKER_REASON_").unwrap();
        let words = short.split('_').map(|word| word[..1].to_owned() + &word[1..].to_lowercase());
        let variant = format!("BlockerReason::{}", words.collect::<String>());
        let is_variant = tests
            .match_indices(&variant)
            .any(|(at, _)| !tests[at + variant.len()..].starts_with(|next: char| next.is_alphanumeric()));
        is_variant
            || tests.contains(&format!("\"{name}\""))
            || tests.contains(&format!("\"{short}\", \"devices/"))
    };
    let missing: Vec<&str> = names.into_iter().filter(|name| !is_asserted(name)).collect();
    assert!(missing.is_empty(), "no test provokes {missing:?}");
}

// Provoked here.

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_whose_role_was_taken_away_resumes_nothing() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")])).await;
    let saver = lab.client(&agent, "saver").await;
    let hold = v1::StartSaveRequest { after: v1::AfterSave::Hold.into(), ..save_of(&["n0"]) };
    let name = start_save(&saver, hold).await;
    // It may call Resume, but not of a save.
    let grant = Grant { who: "spiffe://lab.test/saver/*".parse().unwrap(), roles: vec![Role::Restorer] };
    agent.set_policy(Policy { grants: vec![grant] });
    let saver = lab.client(&agent, "saver").await;
    let resume = v1::ResumeRequest { operation: name.clone() };
    let refusal = refused(saver.resume(resume.clone()).await, Code::PermissionDenied, "ROLE_REQUIRED");
    assert!(refusal.message.contains("saver") && refusal.message.contains(&name), "{refusal}");
    agent.set_policy(Policy { grants: agent.core().config.grants.clone() });
    let saver = lab.client(&agent, "saver").await;
    refused(saver.resume(resume).await, Code::FailedPrecondition, "NOT_HELD");
    saver.cancel_operation(v1::CancelOperationRequest { name: name.clone() }).await.unwrap();
    assert_eq!(failure(&done(&saver, &name).await), "CANCELLED");
    agent.stop().await.unwrap();
}

/// An admin that is another agent, too, may call whatever there is.
pub(crate) fn for_everything(mut config: AgentConfig) -> AgentConfig {
    let who = "spiffe://lab.test/admin/test".parse().unwrap();
    config.grants.push(Grant { who, roles: vec![Role::Peer] });
    config
}

/// Every method of this package that takes one message.
fn unary_requests() -> Vec<String> {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let mut found = Vec::new();
    for file in &set.file {
        for service in &file.service {
            let methods = service.method.iter().filter(|method| !method.client_streaming());
            found.extend(
                methods.map(|method| format!("/{}.{}/{}", file.package(), service.name(), method.name())),
            );
        }
    }
    assert!(found.len() >= 16, "{found:?}");
    found
}

/// Calls a method with this as field 1 of its request, whatever that is; `encoding` is what the request claims.
async fn call(channel: &Channel, method: &str, field: Bytes, encoding: Option<&'static str>) -> Status {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    soon(grpc.ready()).await.unwrap();
    let mut request = Request::new(tokio_stream::once(field));
    if let Some(encoding) = encoding {
        request.metadata_mut().insert("grpc-encoding", encoding.parse().unwrap());
    }
    let path = PathAndQuery::try_from(method).unwrap();
    let answer = soon(grpc.streaming(request, path, ProstCodec::<Bytes, ()>::default())).await;
    answer.map(|_| ()).expect_err(method)
}

#[track_caller]
fn told(method: &str, status: &Status, code: Code, reason: &str) {
    let refusal = Refusal::from_status("any", status);
    assert_eq!((refusal.code, refusal.reason.as_deref()), (code, Some(reason)), "{method}: {refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_cannot_be_read_is_refused_with_a_reason_by_every_method() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]))).await;
    let admin = channel(&lab, &agent, "spiffe://lab.test/admin/test").await;
    // The tag and the length of field 1 are before it.
    let longest = MAX_REQUEST_BYTES - 4;
    for method in &unary_requests() {
        let letters = |count| Bytes::from(vec![b'x'; count]);
        let status = call(&admin, method, letters(longest + 1), None).await;
        told(method, &status, Code::OutOfRange, "REQUEST_TOO_LONG");
        let status = call(&admin, method, Bytes::from_static(b"x"), Some("gzip")).await;
        told(method, &status, Code::Unimplemented, "REQUEST_ENCODING");
        if method.ends_with("/GetAgent") {
            // It has no field that anything could be wrong with.
            continue;
        }
        // No longer than allowed, and nothing that could be meant; where field 1 is a number it is no message at all.
        let status = call(&admin, method, letters(longest), None).await;
        let is_a_number = ["/ListDevices", "/ListOperations"].iter().any(|list| method.ends_with(list));
        let reason = if is_a_number { "REQUEST_UNREADABLE" } else { "INVALID_FIELD" };
        told(method, &status, Code::InvalidArgument, reason);

        if method.ends_with("/Prepare") {
            // Its first field is no text, so whatever comes is one.
            continue;
        }
        // No text, no number, no message that begins so.
        let status = call(&admin, method, Bytes::from_static(&[0xff; 3]), None).await;
        told(method, &status, Code::InvalidArgument, "REQUEST_UNREADABLE");
    }
    // A stream is told likewise, as a stream that was not opened.
    let stream = "/vfio.checkpoint.v1.CheckpointService/StreamState";
    let status = call(&admin, stream, Bytes::from_static(&[0xff; 3]), None).await;
    told(stream, &status, Code::InvalidArgument, "STREAM_OPEN");
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_without_a_message_is_refused_with_a_reason() {
    let lab = Lab::new();
    let agent = start(for_everything(lab.config("a", &[]))).await;
    let admin = channel(&lab, &agent, "spiffe://lab.test/admin/test").await;
    for method in &unary_requests() {
        let mut grpc = tonic::client::Grpc::new(admin.clone());
        soon(grpc.ready()).await.unwrap();
        let nothing = Request::new(tokio_stream::empty::<()>());
        let path = PathAndQuery::try_from(method.as_str()).unwrap();
        let answer = soon(grpc.streaming(nothing, path, ProstCodec::<(), ()>::default())).await;
        told(method, &answer.map(|_| ()).expect_err(method), Code::Internal, "REQUEST_UNREADABLE");
    }
    agent.stop().await.unwrap();
}
