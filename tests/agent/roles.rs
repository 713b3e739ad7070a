//! Who may call what: every method that is served, with every role, against a served agent.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_types::StatusExt as _;
use vfio_checkpoint_client::call::Refusal;
use vfio_checkpoint_proto::v1::FILE_DESCRIPTOR_SET;

use crate::flow::{channel, soon};
use crate::lab::{Lab, start};

const ROLES: [&str; 7] = ["viewer", "saver", "restorer", "migrator", "peer", "admin", "nobody"];

const READERS: &[&str] = &["viewer", "saver", "restorer", "migrator", "admin"];
const DIRTY: &[&str] = &["saver", "migrator", "admin"];

/// Written here once more, and not taken from the agent: a line that changes there has to be changed here by somebody
/// who means it.
const TABLE: &[(&str, &[&str])] = &[
    ("vfio.checkpoint.v1.DeviceService/ListDevices", READERS),
    ("vfio.checkpoint.v1.DeviceService/GetDevice", READERS),
    ("vfio.checkpoint.v1.DeviceService/WatchDevices", READERS),
    ("vfio.checkpoint.v1.DeviceService/ResetDevice", &["admin"]),
    ("vfio.checkpoint.v1.DeviceService/StartDirtyTracking", DIRTY),
    ("vfio.checkpoint.v1.DeviceService/ReportDirtyPages", DIRTY),
    ("vfio.checkpoint.v1.DeviceService/StopDirtyTracking", DIRTY),
    ("vfio.checkpoint.v1.CheckpointService/StartSave", &["saver", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/StreamState", &["saver", "restorer", "peer", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/Restore", &["restorer", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/Cutover", &["saver", "migrator", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/Resume", &["saver", "restorer", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/GetCheckpoint", READERS),
    ("vfio.checkpoint.v1.CheckpointService/ListCheckpoints", READERS),
    ("vfio.checkpoint.v1.CheckpointService/DeleteCheckpoint", &["saver", "admin"]),
    ("vfio.checkpoint.v1.CheckpointService/VerifyCheckpoint", &["saver", "restorer", "admin"]),
    (
        "vfio.checkpoint.v1.MigrationService/GetAgent",
        &["viewer", "saver", "restorer", "migrator", "peer", "admin"],
    ),
    ("vfio.checkpoint.v1.MigrationService/Admit", &["migrator", "admin"]),
    ("vfio.checkpoint.v1.MigrationService/Migrate", &["migrator", "admin"]),
    ("vfio.checkpoint.v1.MigrationService/Commit", &["migrator", "admin"]),
    ("vfio.checkpoint.v1.MigrationService/Ready", &["migrator", "admin"]),
    ("vfio.checkpoint.v1.MigrationService/Resolve", &["admin"]),
    ("vfio.checkpoint.v1.MigrationService/Prepare", &["peer"]),
    ("vfio.checkpoint.v1.MigrationService/CommitHandover", &["peer"]),
    ("vfio.checkpoint.v1.MigrationService/AbandonHandover", &["peer"]),
    ("vfio.checkpoint.v1.MigrationService/GetHandover", &["migrator", "peer", "admin"]),
    ("vfio.checkpoint.v1.OperationService/GetOperation", READERS),
    ("vfio.checkpoint.v1.OperationService/ListOperations", READERS),
    ("vfio.checkpoint.v1.OperationService/CancelOperation", &["saver", "restorer", "migrator", "admin"]),
    ("vfio.checkpoint.v1.OperationService/WaitOperation", READERS),
    ("vfio.checkpoint.v1.OperationService/WatchOperation", READERS),
    ("grpc.health.v1.Health/Check", &ROLES),
    ("grpc.health.v1.Health/Watch", &ROLES),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", READERS),
];

/// Every method of these descriptors.
fn methods(descriptors: &[u8]) -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(descriptors).unwrap();
    let mut found = BTreeSet::new();
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                found.insert(format!("{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    found
}

/// Calls a method with an empty message. What it answers matters less than whether it was let through.
async fn call(channel: &Channel, method: &str) -> Result<(), Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    soon(grpc.ready()).await.unwrap();
    let path = PathAndQuery::try_from(format!("/{method}")).unwrap();
    let request = Request::new(tokio_stream::once(()));
    soon(grpc.streaming(request, path, ProstCodec::<(), ()>::default())).await.map(|_| ())
}

fn reason(status: &Status) -> Option<String> {
    Refusal::from_status("any", status).reason
}

#[tokio::test(flavor = "multi_thread")]
async fn each_method_lets_its_roles_through_and_nobody_else() {
    let mut served = methods(FILE_DESCRIPTOR_SET);
    served.extend(methods(tonic_health::pb::FILE_DESCRIPTOR_SET));
    served.extend(methods(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET));
    let named: BTreeSet<String> = TABLE.iter().map(|(method, _)| (*method).to_owned()).collect();
    assert_eq!(served, named, "each method has its line in the table above");

    let lab = Lab::new();
    let agent = start(lab.config("a", &[("nic0", "sim:seed=1,memory=1MiB")])).await;
    for role in ROLES {
        let channel = channel(&lab, &agent, &format!("spiffe://lab.test/{role}/test")).await;
        for (method, allowed) in TABLE {
            let answer = call(&channel, method).await;
            if allowed.contains(&role) {
                let refused = answer.err().filter(|status| {
                    matches!(
                        status.code(),
                        Code::PermissionDenied | Code::Unauthenticated | Code::Unimplemented
                    )
                });
                assert!(refused.is_none(), "{role} may call {method}: {refused:?}");
            } else {
                let status = answer.expect_err(&format!("{role} may not call {method}"));
                assert_eq!(status.code(), Code::PermissionDenied, "{role} {method}: {status}");
                assert_eq!(reason(&status).as_deref(), Some("ROLE_REQUIRED"), "{role} {method}");
                let details = status.get_error_details();
                let roles = details.error_info().unwrap().metadata.get("roles").unwrap().clone();
                let told: BTreeSet<&str> = roles.split(',').collect();
                assert_eq!(told, allowed.iter().copied().collect(), "{method} says who may");
            }
        }
    }
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_table_knows_is_refused_to_everybody() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[])).await;
    let admin = channel(&lab, &agent, "spiffe://lab.test/admin/test").await;
    let unknown = [
        "vfio.checkpoint.v1.DeviceService/FormatDevice",
        "vfio.checkpoint.v1.MigrationService/Teleport",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ];
    for method in unknown {
        let status = call(&admin, method).await.expect_err(method);
        assert_eq!(status.code(), Code::PermissionDenied, "{method}: {status}");
        assert_eq!(reason(&status).as_deref(), Some("UNKNOWN_METHOD"), "{method}");
    }
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_names_the_services_of_the_table_and_no_other() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[])).await;
    let viewer = channel(&lab, &agent, "spiffe://lab.test/viewer/test").await;
    let mut reflection = ServerReflectionClient::new(viewer);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        soon(reflection.server_reflection_info(tokio_stream::once(request))).await.unwrap().into_inner();
    let ServerReflectionResponse { message_response, .. } = soon(answers.message()).await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = message_response else {
        panic!("not a list: {message_response:?}");
    };
    let told: BTreeSet<String> = list.service.into_iter().map(|service| service.name).collect();
    let named: BTreeSet<String> =
        TABLE.iter().filter_map(|(method, _)| Some(method.split_once('/')?.0.to_owned())).collect();
    assert_eq!(told, named);
    drop(answers);
    agent.stop().await.unwrap();
}
