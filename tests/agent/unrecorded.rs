//! What has happened and cannot be recorded: it is tried until it can, and nobody gets the device before.

use tonic::Code;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::serve::Agent;

use crate::faulty::Faulty;
use crate::flow::{
    Bench, device, done, refused, request_id, save, save_of, soon, start_save, take, violations,
};
use crate::lab::{Lab, start};

fn small() -> SimConfig {
    SimConfig { memory_bytes: 1 << 20, ..SimConfig::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_that_cannot_be_recorded_is_answered_once_it_is() {
    let lab = Lab::new();
    let bench = Bench::new(small());
    let config = lab.config("a", &[("n0", bench.address.as_str())]);
    let faulty = Faulty::new();
    let agent = Agent::start(config.clone(), faulty.environment()).await.unwrap();
    let (admin, saver) = (lab.client(&agent, "admin").await, lab.client(&agent, "saver").await);
    let before = bench.device.resets();
    let request = v1::ResetDeviceRequest {
        name: "devices/n0".to_owned(),
        mode: v1::ResetMode::DiscardState.into(),
        request_id: request_id(1),
        ..Default::default()
    };
    // That it begins is recorded. How it ended is not, at the first try and the second.
    faulty.break_lane("journal", 1);
    let resetting = tokio::spawn({
        let (admin, request) = (admin.clone(), request.clone());
        async move { admin.reset_device(request).await }
    });
    faulty.lost(2).await;
    assert!(!resetting.is_finished(), "nothing is answered that is not recorded");
    assert_eq!(bench.device.resets(), before + 1);
    assert_ne!(device(&saver, "n0").await.operation, "", "it is leased");
    let refusal = refused(saver.start_save(save_of(&["n0"])).await, Code::Unavailable, "BLOCKED");
    assert_eq!(violations(&refusal), [("BLOCKER_REASON_LEASED".to_owned(), "devices/n0".to_owned())]);

    faulty.mend();
    let answer = soon(resetting).await.unwrap().unwrap();
    assert!(answer.state_lost);
    let answered = answer.device.unwrap();
    assert_eq!((answered.operation.as_str(), answered.state()), ("", v1::MigrationState::Running));
    save(&saver, &["n0"]).await;
    assert_eq!(bench.device.resets(), before + 1, "it was reset once");
    agent.stop().await.unwrap();

    let agent = start(config).await;
    let admin = lab.client(&agent, "admin").await;
    let opened = bench.device.resets();
    assert!(admin.reset_device(request).await.unwrap().state_lost, "it is on record");
    assert_eq!(bench.device.resets(), opened);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_cannot_be_recorded_is_told_once_it_is() {
    let lab = Lab::new();
    let faulty = Faulty::new();
    let config = lab.config("a", &[("n0", "sim:seed=1,memory=1MiB")]);
    let agent = Agent::start(config, faulty.environment()).await.unwrap();
    let saver = lab.client(&agent, "saver").await;
    let name = start_save(&saver, save_of(&["n0"])).await;
    // Nothing but its end is recorded of a save that resumes at once.
    faulty.break_lane("journal", 0);
    take(&saver, &name).await;
    faulty.lost(2).await;
    let request = v1::GetOperationRequest { name: name.clone() };
    assert!(!saver.get_operation(request).await.unwrap().operation.unwrap().done);
    assert_eq!(device(&saver, "n0").await.operation, name, "leased");
    faulty.mend();
    let ended = done(&saver, &name).await;
    assert_eq!(ended.result(), v1::OperationResult::Succeeded, "{ended:?}");
    save(&saver, &["n0"]).await;
    agent.stop().await.unwrap();
}
