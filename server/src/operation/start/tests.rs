use vfio_checkpoint_fsm::State;

use super::*;
use crate::boot::boot;
use crate::config::{AgentConfig, DeviceConfig};
use crate::environment::Environment;
use crate::journal::DeviceRecord;

async fn core(folder: &tempfile::TempDir) -> Arc<Core> {
    let mut config = AgentConfig::default();
    config.node.state_dir = folder.path().join("state");
    config.devices = vec![DeviceConfig {
        name: "n0".to_owned(),
        address: "sim:seed=1,memory=64KiB".to_owned(),
        path: None,
        owner_pod: String::new(),
    }];
    boot(Arc::new(config), Environment::production(), None).await.unwrap()
}

async fn admit(core: &Arc<Core>, found: &Found) -> Result<(Arc<Entry>, Lease, run::Arrival), Refusal> {
    let job = JobRecord::Save {
        pre_copy: false,
        barrier: false,
        manual_cutover: false,
        after: AfterRecord::Resume,
    };
    let view = &found.views[0];
    let record = view.record.clone().unwrap();
    let devices = vec![(view.name.clone(), record.logical, record.epoch)];
    let starter = Starter { caller: "somebody".to_owned(), request: None, trace_id: None };
    let asked = Asked { job, devices, owner_pod: String::new(), kept: None, handover: None };
    core.admit(found, Vec::new(), asked, starter).await
}

/// What another operation leaves behind that had the device between the look at it and its lease.
#[tokio::test]
async fn what_was_looked_at_before_another_operation_had_it_is_not_admitted() {
    let folder = tempfile::tempdir().unwrap();
    let core = core(&folder).await;
    let name = DeviceName::from_id("n0").unwrap();
    let slot = Arc::clone(core.registry.get(&name).unwrap());
    let record = |change: fn(&mut DeviceRecord)| {
        let mut record = slot.view().record.unwrap();
        change(&mut record);
        slot.set_record(record);
    };
    let left: [(&str, &dyn Fn()); 4] = [
        ("it was restored", &|| record(|record| record.epoch = Epoch(record.epoch.0 + 1))),
        ("it was left stopped", &|| slot.set_state(State::Stop)),
        ("it was quarantined", &|| record(|record| record.quarantined = true)),
        ("it was brought back", &|| record(|record| record.quarantined = false)),
    ];
    for (what, leave) in left {
        let running = *core.operations.running().borrow();
        let found = core.look(std::slice::from_ref(&name)).await;
        leave();
        let Err(Refusal::Blocked(blockers)) = admit(&core, &found).await else {
            panic!("admitted, although {what}")
        };
        let reasons: Vec<_> = blockers.iter().map(|blocker| (blocker.reason, &blocker.device)).collect();
        assert_eq!(reasons, [(BlockerReason::Leased, &Some(name.clone()))], "{what}");
        assert!(blockers[0].is_passing(), "trying again makes sense");
        assert_eq!((slot.leased_by(), *core.operations.running().borrow()), (None, running), "{what}");

        let found = core.look(std::slice::from_ref(&name)).await;
        let (entry, lease, _arrival) = admit(&core, &found).await.unwrap();
        assert_eq!(slot.leased_by().as_ref(), Some(&entry.fixed.name), "{what}: tried again");
        drop(lease);
    }
}
