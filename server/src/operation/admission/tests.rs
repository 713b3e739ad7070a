//! Each blocker, by the one thing that brings it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use vfio_checkpoint_device::{Backend, DeviceCapabilities};
use vfio_checkpoint_proto::domain::{LogicalDevice, RestoreSource, SourceDisposition};
use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId, OperationName};

use super::*;
use crate::environment::UnixMillis;
use crate::journal::DeviceRecord;

const BOUNDS: Bounds = Bounds { rate_bytes_per_second: 1000, max_device_bytes: 5000 };

fn operation() -> OperationName {
    OperationName::from_id("00000000001-0000000000000001").unwrap()
}

/// A device that nothing is wrong with, with 1000 bytes of state.
fn view(id: &str) -> DeviceView {
    DeviceView {
        name: DeviceName::from_id(id).unwrap(),
        address: "sim".to_owned(),
        backend: Backend::Sim,
        driver: "sim".to_owned(),
        state: Some((State::Running, UnixMillis(1))),
        standing: Standing::Ready,
        capabilities: Some(DeviceCapabilities {
            migration: Capabilities { p2p: true, pre_copy: true },
            reset: true,
            data_size: true,
            precopy_reinit: false,
            dma_logging: true,
            config_space: true,
        }),
        data_size: DataSize::Known(1000),
        fingerprint: Fingerprint::new().with("firmware", "1"),
        record: Some(DeviceRecord {
            logical: LogicalDeviceId::from_bytes([1; 16]),
            epoch: Epoch(1),
            rate_bytes_per_second: None,
            quarantined: false,
            left_stopped: false,
            handed_over: false,
            past: Vec::new(),
        }),
        lease: None,
        owner_pod: String::new(),
        revision: 1,
    }
}

fn can(id: &str, change: impl FnOnce(&mut DeviceCapabilities)) -> DeviceView {
    let mut view = view(id);
    change(view.capabilities.as_mut().unwrap());
    view
}

fn spec() -> SaveRequestSpec {
    SaveRequestSpec {
        devices: Vec::new(),
        pre_copy: PreCopy::IfAble { budget: None },
        cutover: domain::Cutover::Auto,
        after: domain::AfterSave::Resume,
        downtime_limit: None,
        no_convergence: domain::NoConvergence::StopAnyway,
        max_bytes: None,
        allow_unknown_size: false,
        memory_capture: MemoryCapture::None,
        viommu: false,
        forbid_all_dirty: false,
        validate_only: false,
        request_id: None,
        owner_pod: None,
        store: None,
    }
}

fn reasons(found: &[Blocker]) -> Vec<(BlockerReason, &str)> {
    found.iter().map(|blocker| (blocker.reason, blocker.device.as_ref().map_or("", DeviceName::id))).collect()
}

#[track_caller]
fn blocks(views: &[DeviceView], spec: &SaveRequestSpec, expected: &[(BlockerReason, &str)]) {
    let (found, _, _) = save(views, spec, BOUNDS, Duration::ZERO);
    assert_eq!(reasons(&found), expected);
    assert!(found.iter().all(|blocker| !blocker.message.is_empty()));
}

#[test]
fn what_stands_in_the_way_of_a_device() {
    use BlockerReason::{Leased, NotRunning, OutOfService};
    blocks(&[view("a")], &spec(), &[]);
    for standing in
        [Standing::Quarantined, Standing::Hung("it hangs".into()), Standing::Unavailable("no".into())]
    {
        blocks(&[DeviceView { standing, ..view("a") }], &spec(), &[(OutOfService, "a")]);
    }
    for state in [State::Stop, State::Error, State::Resuming, State::StopCopy, State::RunningP2p] {
        let stands = DeviceView { state: Some((state, UnixMillis(1))), ..view("a") };
        blocks(std::slice::from_ref(&stands), &spec(), &[(NotRunning, "a")]);
        // While it is leased its state says nothing.
        let leased = DeviceView { lease: Some(operation()), ..stands };
        blocks(&[leased], &spec(), &[(Leased, "a")]);
    }
    let both = DeviceView { lease: Some(operation()), standing: Standing::Quarantined, ..view("a") };
    blocks(&[both], &spec(), &[(OutOfService, "a"), (Leased, "a")]);
}

#[test]
fn only_what_passes_by_itself_is_passing() {
    let leased = Blocker::from(Leased { device: view("a").name, by: operation() });
    assert!(leased.is_passing() && leased.message.contains("operations/"));
    assert!(Blocker::set(BlockerReason::AgentBusy, "").is_passing());
    assert!(!not_found(&view("a").name).is_passing());
    assert!(!Blocker::set(BlockerReason::Viommu, "").is_passing());
}

#[test]
fn a_set_needs_what_one_device_does_not() {
    use BlockerReason::{NoDirtyTracking, NoP2p, NoPreCopy};
    let lone = can("a", |can| can.migration.p2p = false);
    blocks(std::slice::from_ref(&lone), &spec(), &[]);
    blocks(&[view("b"), lone], &spec(), &[(NoP2p, "a")]);

    let still = can("a", |can| can.migration.pre_copy = false);
    let required = SaveRequestSpec { pre_copy: PreCopy::Required { budget: None }, ..spec() };
    blocks(std::slice::from_ref(&still), &required, &[(NoPreCopy, "a")]);
    let (_, plan, _) = save(&[view("b"), still], &spec(), BOUNDS, Duration::ZERO);
    assert!(!plan.pre_copy && plan.barrier, "where every device can: {plan:?}");

    let blind = can("a", |can| can.dma_logging = false);
    blocks(std::slice::from_ref(&blind), &spec(), &[]);
    blocks(&[blind], &SaveRequestSpec { forbid_all_dirty: true, ..spec() }, &[(NoDirtyTracking, "a")]);
}

#[test]
fn the_plan_is_what_was_asked_for() {
    let (_, plan, prediction) = save(&[view("a")], &spec(), BOUNDS, Duration::ZERO);
    assert!(plan.pre_copy && prediction.pre_copy && prediction.downtime.is_none());
    assert_eq!((plan.cutover, plan.after), (Cutover::Auto, AfterSave::Resume));
    let asked = SaveRequestSpec {
        pre_copy: PreCopy::Never,
        cutover: domain::Cutover::Manual { timeout: None },
        after: domain::AfterSave::Hold { timeout: None },
        ..spec()
    };
    let (_, plan, _) = save(&[view("a")], &asked, BOUNDS, Duration::ZERO);
    assert_eq!((plan.pre_copy, plan.cutover, plan.after), (false, Cutover::Manual, AfterSave::Hold));
    let left = SaveRequestSpec { after: domain::AfterSave::StayStopped, ..spec() };
    assert_eq!(save(&[view("a")], &left, BOUNDS, Duration::ZERO).1.after, AfterSave::StayStopped);
}

#[test]
fn memory_that_device_state_cannot_follow_is_refused() {
    use BlockerReason::{MemoryCapture as Memory, Viommu};
    for (capture, is_refused) in [
        (MemoryCapture::None, false),
        (MemoryCapture::WhileStopped, false),
        (MemoryCapture::DirtyTracking, false),
        (MemoryCapture::BackgroundSnapshot, true),
        (MemoryCapture::PostCopy, true),
    ] {
        let expected: &[_] = if is_refused { &[(Memory, "")] } else { &[] };
        blocks(&[view("a")], &SaveRequestSpec { memory_capture: capture, ..spec() }, expected);
    }
    blocks(&[view("a")], &SaveRequestSpec { viommu: true, ..spec() }, &[(Viommu, "")]);
}

#[test]
fn sizes_meet_limits() {
    use BlockerReason::{SizeUnknown, TooLarge};
    let sized = |data_size| DeviceView { data_size, ..view("a") };
    let limit = |max_bytes| SaveRequestSpec { max_bytes: Some(max_bytes), ..spec() };
    for size in [DataSize::Known(1000), DataSize::UpperBound(1000)] {
        blocks(&[sized(size)], &limit(1000), &[]);
        blocks(&[sized(size)], &limit(999), &[(TooLarge, "")]);
        blocks(&[sized(size), view("b")], &limit(1999), &[(TooLarge, "")]);
        blocks(&[sized(size), view("b")], &limit(2000), &[]);
    }
    blocks(&[sized(DataSize::Known(5000))], &spec(), &[]);
    blocks(&[sized(DataSize::Known(5001))], &spec(), &[(TooLarge, "a")]);
    blocks(&[sized(DataSize::Unknown)], &spec(), &[]);
    blocks(&[sized(DataSize::Unknown)], &limit(u64::MAX), &[(SizeUnknown, "a")]);
    let allowed = SaveRequestSpec { allow_unknown_size: true, ..limit(1) };
    blocks(&[sized(DataSize::Unknown)], &allowed, &[]);
}

#[test]
fn a_stop_is_predicted_and_meets_its_limit() {
    use BlockerReason::{DowntimeLimit, SizeUnknown};
    let stop =
        |limit: Duration| SaveRequestSpec { pre_copy: PreCopy::Never, downtime_limit: Some(limit), ..spec() };
    let second = Duration::from_secs(1);
    blocks(&[view("a")], &stop(second), &[]);
    blocks(&[view("a")], &stop(Duration::from_millis(999)), &[(DowntimeLimit, "")]);
    blocks(&[view("a"), view("b")], &stop(second), &[(DowntimeLimit, "")]);
    // With pre-copy, pre-copy decides.
    let copied = SaveRequestSpec { downtime_limit: Some(Duration::from_nanos(1)), ..spec() };
    blocks(&[view("a")], &copied, &[]);
    let unknown = DeviceView { data_size: DataSize::Unknown, ..view("a") };
    blocks(std::slice::from_ref(&unknown), &stop(second), &[(SizeUnknown, "")]);
    blocks(&[unknown], &SaveRequestSpec { allow_unknown_size: true, ..stop(second) }, &[]);

    let measured = |rate| {
        let mut view = view("a");
        view.record.as_mut().unwrap().rate_bytes_per_second = rate;
        view
    };
    let (_, _, prediction) =
        save(&[measured(Some(500)), measured(Some(250))], &stop(second), BOUNDS, Duration::ZERO);
    assert_eq!((prediction.rate_bytes_per_second, prediction.rate_measured), (250, true), "the slowest");
    assert_eq!(prediction.downtime, Some(Duration::from_secs(8)));
    let (_, _, prediction) = save(&[measured(Some(0))], &stop(second), BOUNDS, Duration::ZERO);
    assert_eq!(prediction.rate_bytes_per_second, 1, "never by zero");
    // A hand-over takes its time as well, and that alone may be too long.
    let handed_over = |spec: &SaveRequestSpec, cost: u64| {
        let (found, _, prediction) = save(&[view("a")], spec, BOUNDS, Duration::from_millis(cost));
        (found.len(), prediction.downtime, prediction.downtime_at_most)
    };
    let (stop, both) = (stop(second * 2), Some(Duration::from_millis(1900)));
    assert_eq!(handed_over(&stop, 900), (0, both, both));
    assert_eq!(handed_over(&stop, 1001).0, 1, "each fits alone");
    let copied = SaveRequestSpec { downtime_limit: Some(second), ..spec() };
    assert_eq!(handed_over(&copied, 900), (0, None, both), "pre-copy may bring it down");
    assert_eq!(handed_over(&copied, 1001).0, 1, "and that not");

    let stop = |limit: Duration| SaveRequestSpec { downtime_limit: Some(limit), ..stop.clone() };
    let (_, _, prediction) = save(&[measured(None)], &stop(second), BOUNDS, Duration::ZERO);
    assert_eq!((prediction.rate_bytes_per_second, prediction.rate_measured), (1000, false));
}

fn saved(id: &str, logical: u8, firmware: &str, bytes: u64) -> DeviceManifest {
    let facts = BTreeMap::from([("firmware".to_owned(), firmware.to_owned())]);
    DeviceManifest {
        source_device: DeviceName::from_id(id).unwrap(),
        source_address: "sim".to_owned(),
        backend: domain::Backend::Sim,
        driver: "sim".to_owned(),
        fingerprint: facts.try_into().unwrap(),
        logical_device: LogicalDevice { id: LogicalDeviceId::from_bytes([logical; 16]), epoch: Epoch(1) },
        data_size: domain::DataSize::Known(bytes),
    }
}

fn restored(ids: &[&str], devices: Vec<DeviceManifest>) -> RestoreSpec {
    RestoreSpec {
        devices: ids.iter().map(|id| DeviceName::from_id(id).unwrap()).collect(),
        source: RestoreSource::Stream(Box::new(Manifest {
            operation: operation(),
            create_time: SystemTime::UNIX_EPOCH,
            devices,
            source_disposition: SourceDisposition::StaysStopped,
        })),
        after: AfterRestore::Run,
        max_bytes: None,
        validate_only: false,
        request_id: None,
        owner_pod: None,
        allow_fork: false,
        allow_inconsistent: false,
    }
}

#[test]
fn a_state_goes_into_a_device_that_matches_it() {
    use BlockerReason::{FingerprintMismatch, NoP2p, TooLarge};
    let one = |firmware: &str, bytes| restored(&["a"], vec![saved("x", 1, firmware, bytes)]);
    let told = |views: &[DeviceView], spec: &RestoreSpec| {
        let RestoreSource::Stream(manifest) = &spec.source else { panic!("a stream") };
        let (found, plan) = restore(views, spec, manifest, &Whereabouts::default(), BOUNDS);
        (reasons(&found).into_iter().map(|(reason, id)| (reason, id.to_owned())).collect::<Vec<_>>(), plan)
    };
    let about = |reason, id: &str| (reason, id.to_owned());
    let (found, plan) = told(&[view("a")], &one("1", 1000));
    assert!(found.is_empty() && !plan.barrier && plan.after == AfterLoad::Run);
    assert_eq!(told(&[view("a")], &one("2", 1000)).0, [about(FingerprintMismatch, "a")]);
    assert_eq!(told(&[view("a")], &one("1", 5001)).0, [about(TooLarge, "a")]);
    let limited = RestoreSpec { max_bytes: Some(999), ..one("1", 1000) };
    assert_eq!(told(&[view("a")], &limited).0, [about(TooLarge, "")]);
    let held = RestoreSpec { after: AfterRestore::Hold { timeout: None }, ..one("1", 1) };
    assert_eq!(told(&[view("a")], &held).1.after, AfterLoad::Hold);

    let two = restored(&["a", "b"], vec![saved("x", 1, "1", 1), saved("y", 2, "1", 1)]);
    let (found, plan) = told(&[view("a"), view("b")], &two);
    assert!(found.is_empty() && plan.barrier);
    let lone = can("b", |can| can.migration.p2p = false);
    assert_eq!(told(&[view("a"), lone], &two).0, [about(NoP2p, "b")]);

    // What is not configured shifts nothing.
    let mixed = restored(&["gone", "b"], vec![saved("x", 1, "2", 1), saved("y", 2, "1", 1)]);
    assert!(told(&[view("b")], &mixed).0.is_empty());
}
