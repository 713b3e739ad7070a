//! Hand-overs of devices that resist, or that somebody else has moved.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_fsm::{SaveState, State};

use super::super::answers::{node, save, small};
use super::super::crashes::last_save;
use super::super::node::{Node, configs};
use super::super::script::{Script, What};
use super::super::watch::Side;
use super::{HOUR, Source, kinds, take_up};
use crate::driver::Standing;
use crate::fault::Fault;
use crate::operation::{Cause, OperationError, RecordedSave, Word};
use crate::{Call, MigrationDevice as _};

/// It must not run again, and the others are not its hostages.
#[test]
fn a_device_that_cannot_be_let_go_of_is_quarantined_and_the_hand_over_stands() {
    let hangs = Fault::Slow { call: Call::Reset, takes: HOUR };
    for fault in [Fault::Reset { errno: libc::EIO }, hangs] {
        for kind in kinds() {
            let script = kind.script(What::Nothing, 0);
            let faults: &[&[Fault]] = if kind.devices == 1 { &[&[fault]] } else { &[&[], &[fault]] };
            let configs = configs(kind.devices, small);
            let node = Node::on(Arc::new(script.clone()), script.inline.time(), &configs, faults);
            let source = Source::new(&script, node, Side::There);
            let (saved, _) = save(&script, &source.node, kind.terms);
            saved.unwrap().unwrap();
            assert_eq!(last_save(&script), SaveState::HandedOver);
            let last = source.node.lanes.last().unwrap();
            if fault == hangs {
                assert!(last.hung().is_some());
            } else {
                let standing = last.call(Call::GetState, |driver| driver.standing()).unwrap();
                assert_eq!(standing, Standing::Quarantined);
                assert_eq!(source.node.slots.last().unwrap().state(), State::Stop);
            }
            if kind.devices == 2 {
                let (slot, digest) = (&source.node.slots[0], source.node.digests()[0]);
                assert_eq!((slot.state(), slot.resets(), digest), (State::Running, 1, source.blank[0]));
            }
        }
    }
}

/// Somebody else let a device run while nobody looked: the destination must not be told to run it as well.
#[test]
fn a_device_that_was_moved_meanwhile_is_asked_back() {
    for kind in kinds() {
        for (verdict, resets) in [(None, 0), (Some(Side::Here), 0), (Some(Side::There), 1)] {
            let script = kind.script(What::Nothing, 0);
            let source = Source::new(&script, node(&script, kind.devices, small), Side::There);
            script.watch.answers_after(None);
            let (saved, sink) = save(&script, &source.node, kind.terms);
            assert!(saved.is_none() && script.watch.words() == [Word::Commit]);
            script.watch.heard(verdict);
            script.watch.meddled();
            source.node.others[0].duplicate().set_state(State::Running).unwrap();

            let again = Script::quiet().after(&script);
            let source = source.found(&again);
            again.watch.answers_after(Some(Duration::ZERO));
            let (end, memory) = take_up(&again, &source, kind.plan(), RecordedSave::Committing, sink.memory);
            assert_eq!(again.watch.words(), [Word::Commit, Word::Withdraw]);
            if verdict == Some(Side::There) {
                assert_eq!(end.unwrap().unwrap(), SaveState::HandedOver);
                source.is_blank(1..=1);
                continue;
            }
            let Err(OperationError::Failed { cause, quarantined, checkpoint, .. }) = end.unwrap() else {
                panic!()
            };
            assert!(matches!(&cause, Cause::Device { device, .. } if device.name == "sim0"), "{cause}");
            let quarantined: Vec<_> = quarantined.into_iter().map(|device| device.name).collect();
            assert_eq!((quarantined, checkpoint), (vec!["sim0".to_owned()], None));
            assert!(memory.discarded, "what the destination had loaded runs nowhere");
            assert!(source.node.slots.iter().all(|slot| slot.resets() == resets));
            assert!(source.node.slots[1..].iter().all(|slot| slot.state() == State::Running));
            assert_eq!(source.node.digests(), source.carried);
        }
    }
}
