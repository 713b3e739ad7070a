//! Who has a device: left-over states, duplicates, devices in use, devices that cannot migrate.

use vfio_checkpoint_device::driver::{Peers, SaveMode, Standing};
use vfio_checkpoint_device::kernel::discovery::{Blocker, SysRoots, Verdict, discover};
use vfio_checkpoint_device::kernel::{
    DmaMemory, KernelDevice, KernelPath, OpenDevice, OpenError, OpenOptions,
};
use vfio_checkpoint_device::{Driver, MigrationDevice, chain};
use vfio_checkpoint_fsm::{Outcome, Role, State};

use crate::Test;
use crate::facts::Facts;
use crate::save_restore::open;
use crate::uart;

pub(crate) const TESTS: &[Test] = &[
    ("ownership::state_left_by_a_crashed_owner_container", |facts| left_over(facts, KernelPath::Container)),
    ("ownership::state_left_by_a_crashed_owner_iommufd", |facts| left_over(facts, KernelPath::Iommufd)),
    ("ownership::dropping_a_duplicate_leaves_the_other_attached_container", |facts| {
        duplicate(facts, KernelPath::Container);
    }),
    ("ownership::dropping_a_duplicate_leaves_the_other_attached_iommufd", |facts| {
        duplicate(facts, KernelPath::Iommufd);
    }),
    ("ownership::a_device_in_use_is_named_as_such", in_use),
    ("ownership::a_function_that_cannot_migrate_is_named_as_such", not_migratable),
    ("ownership::a_group_that_is_not_viable_is_named_as_such", not_viable),
    ("ownership::discovery_opens_nothing_and_tells_what_is_there", discovery),
];

/// A former owner went away in each state; mtty keeps it over the close. The next one finds it and recovers.
fn left_over(facts: &Facts, path: KernelPath) {
    let uuid = &facts.mtty1[0];
    let cases = [
        (State::Stop, Role::Source, Outcome::Preserved, 0),
        (State::StopCopy, Role::Source, Outcome::Preserved, 0),
        (State::PreCopy, Role::Source, Outcome::Preserved, 0),
        (State::PreCopyP2p, Role::Source, Outcome::Preserved, 0),
        (State::RunningP2p, Role::Source, Outcome::Preserved, 0),
        (State::Resuming, Role::Destination, Outcome::StateLost, 1),
    ];
    for (left, role, outcome, resets) in cases {
        let mut former = open(uuid, path);
        former.reset().expect("a reset");
        uart::program(&former, 1, 77);
        let registers = uart::registers(&former, 1);
        // The owner dies: every fd of it is closed, the data fd too.
        drop(former.set_state(left).expect("a state to leave behind"));
        drop(former);

        let device = open(uuid, path);
        let watch =
            KernelDevice::from_fds(device.duplicate_fds().expect("duplicates"), device.identity().clone())
                .expect("an adopted device");
        let mut driver = Driver::new(Box::new(device));
        assert_eq!(driver.state().expect("a state"), left, "mtty keeps its state over a close");
        let refused = driver.begin_save(SaveMode::StopCopy, Peers::None).expect_err("a refusal");
        assert_eq!((refused.outcome, refused.state), (Outcome::Preserved, Some(left)), "nothing was touched");
        assert_eq!(driver.recover_left_over(role).expect("a recovered device"), outcome, "{left}");
        assert_eq!(driver.state().expect("a state"), State::Running);
        let steps = driver.steps();
        let seen = steps.iter().filter(|step| step.to_string().starts_with("RESET")).count();
        assert_eq!(seen, resets, "{left}: {steps:?}");
        if outcome == Outcome::Preserved {
            assert_eq!(uart::registers(&watch, 1), registers, "{left}");
        }
    }

    // A source in RESUMING holds nobody knows what: it is not reset by itself, and one call by name brings it back.
    let mut former = open(uuid, path);
    drop(former.set_state(State::Resuming).expect("a state to leave behind"));
    drop(former);
    let mut driver = Driver::new(Box::new(open(uuid, path)));
    let failure = driver.recover_left_over(Role::Source).expect_err("a quarantine");
    assert_eq!((failure.standing, failure.resets()), (Standing::Quarantined, 0), "{failure}");
    driver.reset().expect("a reset");
    assert_eq!((driver.standing(), driver.state().expect("a state")), (Standing::InService, State::Running));
}

/// The agent's duplicate goes; the holder's device stays attached: it migrates, and its mappings can be made.
fn duplicate(facts: &Facts, path: KernelPath) {
    for name in [&facts.mtty1[0], &facts.e1000e] {
        let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
        let holder =
            OpenDevice::open(name, &options).unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        let memory = || DmaMemory::new(1 << 20).expect("memory");
        let mapping = holder.map_dma(0, memory()).expect("a mapping");

        let agent =
            OpenDevice::from_fds(holder.duplicate_fds().expect("duplicates"), holder.identity().clone())
                .expect("an adopted device");
        drop(agent);

        let second = holder.map_dma(1 << 30, memory()).expect("the holder can still map");
        second.unmap().expect("and unmap");
        mapping.unmap().expect("what was mapped before is still mapped");
        if name == &facts.mtty1[0] {
            let mut device = holder.into_migratable().expect("a migratable device");
            drop(device.set_state(State::StopCopy).expect("the holder's device still migrates"));
            device.reset().expect("and resets");
        }
    }
}

fn in_use(facts: &Facts) {
    for holder_path in [KernelPath::Container, KernelPath::Iommufd] {
        let holder = open(&facts.mtty1[0], holder_path);
        for path in [KernelPath::Container, KernelPath::Iommufd] {
            let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
            let error = KernelDevice::open(&facts.mtty1[0], &options).expect_err("a device in use");
            assert!(matches!(error, OpenError::InUse { .. }), "{holder_path} then {path}: {}", chain(&error));
        }
        drop(holder);
        drop(open(&facts.mtty1[0], holder_path));
    }
}

fn not_migratable(facts: &Facts) {
    for path in [KernelPath::Container, KernelPath::Iommufd] {
        let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
        let error = KernelDevice::open(&facts.e1000e, &options).expect_err("an e1000e cannot migrate");
        assert!(matches!(error, OpenError::NotMigratable { .. }), "{}", chain(&error));
        let text = chain(&error);
        assert!(
            text.contains(&facts.e1000e) && text.contains("vfio-pci"),
            "it says which device and driver: {text}"
        );
    }
}

fn not_viable(facts: &Facts) {
    for path in [KernelPath::Container, KernelPath::Iommufd] {
        let options = OpenOptions { path: Some(path), ..OpenOptions::default() };
        let error = OpenDevice::open(&facts.nonviable, &options).expect_err("a group that is not viable");
        assert!(matches!(error, OpenError::GroupNotViable { .. }), "{path}: {}", chain(&error));
        assert!(chain(&error).contains(&facts.nonviable_peer), "it names the culprit: {}", chain(&error));
    }
}

fn discovery(facts: &Facts) {
    let holder = open(&facts.mtty2[1], KernelPath::Iommufd);
    let found = discover(&SysRoots::default()).expect("a listing");
    let device = |name: &String| {
        found
            .iter()
            .find(|device| &device.name.to_string() == name)
            .unwrap_or_else(|| panic!("{name} is not listed"))
    };
    for name in facts.mtty1.iter().chain(&facts.mtty2) {
        assert_eq!(device(name).migratable.verdict(), Verdict::Candidate, "{name}");
    }
    for name in &facts.mttyv1 {
        assert_eq!(device(name).migratable.verdict(), Verdict::Unknown, "{name}: a driver nobody knows");
    }
    for name in [&facts.e1000e, &facts.nonviable] {
        assert_eq!(device(name).migratable.verdict(), Verdict::No, "{name}");
    }
    let blockers = device(&facts.nonviable).blockers();
    assert!(blockers.iter().any(|blocker| matches!(blocker, Blocker::GroupNotViable { .. })), "{blockers:?}");
    let own = std::process::id();
    let holders =
        |name| device(name).holders.processes.iter().map(|holder| holder.process.pid).collect::<Vec<_>>();
    assert_eq!(holders(&facts.mtty2[1]), [own]);
    assert!(holders(&facts.mtty2[0]).is_empty());
    assert_eq!(
        found.len(),
        13,
        "six mtty devices, four of its variant, two functions on vfio-pci, and what shares a group with one"
    );
    drop(holder);
    println!("figures: discovery: {} devices told apart without opening one", found.len());
}
