//! What must be true once a migration has ended: what its two agents say is what the hardware shows.
//!
//! ```text
//!   SUCCEEDED         every device of the set has run there, verdict COMMITTED, epochs are higher
//!   PRESERVED         every device of the set is here, verdict anything but COMMITTED
//!   otherwise, lost   a host ended with nobody to keep its devices
//! ```

use std::time::Duration;

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_proto::v1;

use crate::executor::EPOCH_SECONDS;
use crate::hardware::SimHardware;
use crate::log::say;
use crate::migrate::{NAMES, Story};
use crate::transfer::AGENTS;

/// One migration.
#[derive(Debug)]
pub(crate) struct Course {
    /// Which host its devices were on.
    pub(crate) from: usize,
    /// The operation at the source.
    pub(crate) name: String,
    /// When it was asked for, and what was in its devices then.
    pub(crate) asked_at: Duration,
    pub(crate) marks: Vec<u64>,
    pub(crate) logical: Vec<v1::LogicalDevice>,
}

/// How old the simulation was.
fn since_epoch(time: Option<&prost_types::Timestamp>) -> Duration {
    let Some(time) = time else { return Duration::ZERO };
    let seconds = u64::try_from(time.seconds).unwrap_or_default();
    Duration::new(seconds.saturating_sub(EPOCH_SECONDS), time.nanos.unsigned_abs())
}

impl Story {
    fn bare_end(&self, side: usize, since: Duration, until: Duration) -> bool {
        let bare_ends = self.bare_ends.lock().unwrap();
        bare_ends.iter().any(|(host, at)| *host == AGENTS[side] && (since..=until).contains(at))
    }

    /// Whether anything can have lost a device's state that is no agent's fault.
    fn may_have_lost(&self) -> bool {
        !self.bare_ends.lock().unwrap().is_empty() || self.hardware.iter().any(SimHardware::opened_anew)
    }

    /// A migration is over at its source. Whether the set has moved.
    pub(crate) async fn over(
        &self,
        clients: &[Client; 2],
        course: &Course,
        operation: &v1::Operation,
    ) -> bool {
        let (from, to) = (course.from, 1 - course.from);
        let handover = operation.handover.clone().unwrap_or_default();
        let (result, outcome, verdict) = (operation.result(), operation.outcome(), handover.verdict());
        let reason = operation.failure.as_ref().map_or("", |failure| &failure.reason);
        let by_admin = if handover.resolution.is_empty() { "" } else { ", by an admin" };
        let kind = format!(
            "{} {} {reason} there {}{by_admin}",
            result.as_str_name(),
            outcome.as_str_name(),
            verdict.as_str_name()
        );
        let kind = ["OPERATION_RESULT_", "STATE_OUTCOME_", "HANDOVER_VERDICT_"]
            .iter()
            .fold(kind, |kind, prefix| kind.replace(prefix, ""));
        say!(self.log, "client", "a migration is over: {kind}");
        self.ends.lock().unwrap().push(kind);

        let created = since_epoch(operation.create_time.as_ref());
        let ended = since_epoch(operation.end_time.as_ref());
        // A machine that ended between the question and its record has taken what was there.
        let began_whole = !self.bare_end(from, course.asked_at, created + Duration::from_millis(1));
        let marks = course.marks.iter().filter(|mark| began_whole && self.draw.marks.contains(mark));
        let arrived = marks.clone().filter(|mark| self.oracle.has_arrived(**mark, AGENTS[to])).count();
        let has_moved = result == v1::OperationResult::Succeeded;
        if has_moved {
            if (outcome, verdict) != (v1::StateOutcome::Moved, v1::HandoverVerdict::Committed) {
                self.violated(format!("a success that is {outcome:?}, {verdict:?}"));
            }
            if arrived != marks.clone().count() {
                self.violated(format!("a success of which {arrived} devices have run there"));
            }
        } else if verdict == v1::HandoverVerdict::Committed && handover.resolution.is_empty() {
            self.violated(format!("{result:?} {outcome:?}, and the verdict is {verdict:?}"));
        }
        if outcome == v1::StateOutcome::Preserved {
            let until = Duration::MAX;
            let lost_since = self.bare_end(from, ended.saturating_sub(Duration::from_millis(1)), until);
            let is_here =
                self.devices[from].iter().zip(&course.marks).all(|(device, mark)| device.scratch() == *mark);
            if began_whole && !is_here && !lost_since {
                self.violated("said to be preserved, and is not there".to_owned());
            }
        }
        if outcome == v1::StateOutcome::StateLost && !self.may_have_lost() {
            self.violated("lost, and nothing could have lost it".to_owned());
        }
        if self.is_calm && self.expects_to_move() && !has_moved && result != v1::OperationResult::Cancelled {
            self.violated(format!("nothing went wrong, and it ended {result:?} {reason}"));
        }
        if has_moved {
            self.knows(&clients[to], course, to, 1).await;
        } else if outcome == v1::StateOutcome::Preserved {
            self.knows(&clients[from], course, from, 0).await;
        }
        self.arrival_over(&clients[to], to, &handover.peer_operation, has_moved, outcome).await;
        has_moved
    }

    /// What is in a device is known there as the logical device that it is, in an epoch that is so much higher at least.
    async fn knows(&self, client: &Client, course: &Course, side: usize, higher: u64) {
        let Some(said) = self.look(client).await else { return };
        for (((said, was), device), mark) in
            said.iter().zip(&course.logical).zip(&self.devices[side]).zip(&course.marks)
        {
            // What was lost since is another logical device.
            let is_there = device.scratch() == *mark && self.draw.marks.contains(mark);
            let now = said.logical_device.clone().unwrap_or_default();
            if is_there && (now.id != was.id || now.epoch < was.epoch + higher) {
                self.violated(format!(
                    "what was {} in epoch {} is said to be {} in epoch {}",
                    was.id, was.epoch, now.id, now.epoch
                ));
            }
        }
    }

    /// What the other side says is what this one says.
    async fn arrival_over(
        &self,
        client: &Client,
        side: usize,
        name: &str,
        has_moved: bool,
        outcome: v1::StateOutcome,
    ) {
        if name.is_empty() {
            return;
        }
        let arrival = loop {
            if self.is_gone(side) {
                return;
            }
            match client.wait_operation(name, Duration::from_secs(1)).await {
                Ok(told) => match told.operation {
                    Some(operation) if operation.done => break operation,
                    Some(_) | None => {}
                },
                // A record that was settled may be gone.
                Err(error) if error.to_string().contains("OPERATION_NOT_FOUND") => return,
                Err(error) => {
                    say!(self.log, "client", "WaitOperation: {}", self.log.short(&error));
                    self.caller.rest().await;
                }
            }
        };
        let verdict = arrival.handover.clone().unwrap_or_default().verdict();
        say!(self.log, "client", "an arrival is over: {:?} {verdict:?}", arrival.result());
        let has_arrived = arrival.result() == v1::OperationResult::Succeeded;
        if has_arrived != (verdict == v1::HandoverVerdict::Committed) {
            self.violated(format!("an arrival ended {:?}, and its verdict is {verdict:?}", arrival.result()));
        }
        if has_moved && !has_arrived || has_arrived && outcome == v1::StateOutcome::Preserved {
            self.violated(format!("{outcome:?} at the source, {verdict:?} at the destination"));
        }
    }

    /// What must be true in the end. `doubtful` is who could not be told, and who is not to be expected any more.
    pub(crate) async fn judge(&self, clients: &[Option<Client>; 2], doubtful: Option<usize>) {
        let mut quarantined = 0;
        for (side, client) in clients.iter().enumerate() {
            if let Some(client) = client {
                quarantined += self.settled(side, client, doubtful == Some(side)).await;
            }
        }
        for mark in &self.draw.marks {
            let holds =
                |side: usize| self.devices[side].iter().filter(|device| device.scratch() == *mark).count();
            match holds(0) + holds(1) {
                0 if !self.may_have_lost() => self.violated(format!("nothing is left of {mark:x}")),
                0 | 1 => {}
                copies if doubtful.is_some() || quarantined > 0 => {
                    say!(self.log, "oracle", "{copies} copies of {mark:x}, of which one waits for an admin");
                }
                copies => self.violated(format!("{copies} copies of {mark:x} are left")),
            }
        }
        if self.oracle.has_wiped() && !self.may_have_lost() {
            self.violated("an agent reset the last copy of what nothing else had lost".to_owned());
        }
    }

    /// Until an agent has nothing under way, and what it says of its devices is as it is. How many are quarantined.
    async fn settled(&self, side: usize, client: &Client, is_doubtful: bool) -> usize {
        let host = AGENTS[side];
        for look in 0..20 {
            if self.is_gone(side) {
                return 0;
            }
            self.caller.rest_after(look).await;
            let Some(said) = self.look(client).await else { continue };
            let stands = |(said, device): (&v1::Device, &SimDevice)| {
                let is_quarantined = said.standing() == v1::DeviceStanding::Quarantined;
                let runs = device.state() == State::Running && said.state() == v1::MigrationState::Running;
                is_doubtful && !device.state().is_running()
                    || said.operation.is_empty() && (runs || is_quarantined)
            };
            for (said, name) in said.iter().zip(NAMES) {
                say!(self.log, host, "says of {name}: {:?} {:?}", said.state(), said.standing());
            }
            if is_doubtful || said.iter().zip(&self.devices[side]).all(stands) {
                return said.iter().filter(|said| said.standing() == v1::DeviceStanding::Quarantined).count();
            }
        }
        let are: Vec<_> = self.devices[side].iter().map(|device| device.state().to_string()).collect();
        self.violated(format!("{host} does not settle: its devices are {}", are.join(", ")));
        0
    }
}
