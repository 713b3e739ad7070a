//! Leases: whole sets or nothing, and given back once.

use std::time::Duration;

use vfio_checkpoint_proto::ids::{Epoch, LogicalDeviceId};

use super::*;
use crate::environment::Environment;
use crate::journal::DeviceRecord;

fn name(id: &str) -> DeviceName {
    DeviceName::from_id(id).unwrap()
}

fn operation(last: u64) -> OperationName {
    OperationName::from_id(&format!("{:011x}-{last:016x}", 1)).unwrap()
}

fn registry(ids: &[&str]) -> Registry {
    let revision = Arc::new(watch::Sender::new(0));
    let environment = Environment::production();
    let slots: Vec<Slot> = ids
        .iter()
        .map(|id| {
            let address = "sim:seed=1".parse().unwrap();
            Slot::new(name(id), address, String::new(), environment.clone(), Arc::clone(&revision))
        })
        .collect();
    Registry::new(slots, revision)
}

fn slots(registry: &Registry, ids: &[&str]) -> Vec<Arc<Slot>> {
    ids.iter().map(|id| Arc::clone(registry.get(&name(id)).unwrap())).collect()
}

fn leased_by(registry: &Registry, id: &str) -> Option<OperationName> {
    registry.get(&name(id)).unwrap().leased_by()
}

#[test]
fn devices_come_by_name_and_after_a_name() {
    let registry = registry(&["c", "a", "b"]);
    let ids =
        |slots: Vec<&Arc<Slot>>| slots.iter().map(|slot| slot.name().id().to_owned()).collect::<Vec<_>>();
    assert_eq!(ids(registry.all().collect()), ["a", "b", "c"]);
    assert_eq!(ids(registry.after(None).collect()), ["a", "b", "c"]);
    assert_eq!(ids(registry.after(Some(&name("a"))).collect()), ["b", "c"]);
    // A name that is not there any more is a place all the same.
    assert_eq!(ids(registry.after(Some(&name("aa"))).collect()), ["b", "c"]);
    assert_eq!(ids(registry.after(Some(&name("c"))).collect()), Vec::<String>::new());
    assert!(registry.get(&name("d")).is_none());
}

#[test]
fn a_set_is_leased_whole_or_not_at_all() {
    let registry = registry(&["a", "b", "c"]);
    let lease = registry.lease(slots(&registry, &["c", "b"]), &operation(1)).unwrap();
    let order: Vec<&str> = lease.slots().iter().map(|slot| slot.name().id()).collect();
    assert_eq!(order, ["c", "b"], "in the caller's order");
    let refused = registry.lease(slots(&registry, &["a", "b", "c"]), &operation(2)).unwrap_err();
    let expected = ["b", "c"].map(|id| Leased { device: name(id), by: operation(1) });
    assert_eq!(refused, expected, "every device that is in the way");
    assert_eq!(leased_by(&registry, "a"), None, "nothing of the set stays leased");
    drop(lease);
    assert_eq!(leased_by(&registry, "b"), None);
    let lease = registry.lease(slots(&registry, &["a", "b", "c"]), &operation(2)).unwrap();
    assert_eq!(leased_by(&registry, "a"), Some(operation(2)));
    drop(lease);
}

#[test]
fn of_many_that_want_overlapping_sets_one_gets_its_own() {
    let registry = registry(&["a", "b", "c"]);
    let sets = [["a", "b"], ["b", "c"], ["c", "a"]];
    let leases: Vec<_> = std::thread::scope(|scope| {
        let wanting: Vec<_> = (0..12_u64)
            .map(|number| {
                let (registry, set) = (&registry, sets[usize::try_from(number % 3).unwrap()]);
                scope.spawn(move || registry.lease(slots(registry, &set), &operation(number)))
            })
            .collect();
        wanting.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let won: Vec<&Lease> = leases.iter().filter_map(|lease| lease.as_ref().ok()).collect();
    assert_eq!(won.len(), 1, "any two of these sets overlap");
    for slot in won[0].slots() {
        assert_eq!(slot.leased_by().as_ref(), Some(&won[0].operation));
    }
    let free = registry.all().filter(|slot| slot.leased_by().is_none()).count();
    assert_eq!(free, 1, "whoever lost has nothing");
}

#[test]
fn each_change_is_told_with_a_higher_revision() {
    let registry = registry(&["a", "b"]);
    let mut changes = registry.changes();
    changes.mark_unchanged();
    let slot = registry.get(&name("a")).unwrap();
    slot.set_owner_pod("default/pod".to_owned());
    assert!(changes.has_changed().unwrap());
    let first = slot.view().revision;
    registry.get(&name("b")).unwrap().unavailable("why".to_owned());
    let second = registry.get(&name("b")).unwrap().view().revision;
    assert!(second > first, "revisions are of all devices together");
    assert_eq!(slot.view().revision, first);
}

#[tokio::test]
async fn a_slot_that_is_not_open_is_unavailable_and_stays_so() {
    let registry = registry(&["a"]);
    let slot = registry.get(&name("a")).unwrap();
    assert!(matches!(slot.view().standing, Standing::Unavailable(_)));
    slot.unavailable("the socket is not there".to_owned());
    // A record alone does not open it.
    slot.set_record(DeviceRecord {
        logical: LogicalDeviceId::from_bytes([1; 16]),
        epoch: Epoch(1),
        rate_bytes_per_second: None,
        quarantined: false,
        left_stopped: false,
        handed_over: false,
        past: Vec::new(),
    });
    let view = tokio::time::timeout(Duration::from_secs(10), slot.refresh()).await.unwrap();
    assert_eq!(view.standing, Standing::Unavailable("the socket is not there".to_owned()));
    assert_eq!(view.standing.detail(), "the socket is not there");
    assert!(slot.lane().is_none() && view.state.is_none() && view.capabilities.is_none());
}
