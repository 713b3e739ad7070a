//! Both sides of a migration come to an end, and what must hold then.
//!
//! ```text
//!   source: done, or in doubt for good --Resolve by what the destination says--> done
//!   destination: every arrival done
//!     -> verdicts agree -> every device free, ready, RUNNING -> a save of each: who has what -> epochs -> the watch
//! ```
//! What is where is read from the devices: by the seals of a save that is made then, and by what they said themselves.

use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_proto::v1;

use super::{Move, Pair, becomes, operations};
use crate::job::done;
use crate::world::Content;

/// Where the state is that was to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// It was not even begun, on record.
    Never,
    /// At the source.
    Stays,
    /// At the source, because an admin has had it resumed by what the destination had on record.
    Resolved,
    /// At the destination.
    Moves,
    /// Nowhere, and told so: the source had begun, and nobody kept its devices.
    Lost,
    /// Nowhere: nobody kept the devices that had it, and no operation had those in its hands.
    Gone,
}

impl Pair {
    /// The migration is over, at its source: an admin resolves it where it stays in doubt.
    async fn ended(&self, client: &Client, job: &Move) -> Option<v1::Operation> {
        let operation = self.recorded(client, job).await?;
        let in_doubt = becomes(client, &operation.name, |operation| {
            let verdict = operation.handover.as_ref().map(v1::Handover::verdict);
            matches!(verdict, Some(v1::HandoverVerdict::Lost | v1::HandoverVerdict::Broken))
        });
        let in_doubt = tokio::time::timeout(crate::lab::PATIENCE, in_doubt).await;
        let in_doubt =
            in_doubt.unwrap_or_else(|elapsed| panic!("{elapsed}: it stays in doubt\n{}", self.log()));
        if in_doubt.unwrap() {
            let request = v1::ResolveRequest {
                operation: operation.name.clone(),
                resolution: v1::Resolution::ResumeHere.into(),
                ..Default::default()
            };
            let resolved = client.resolve(request).await.unwrap();
            assert_eq!(resolved.refused, "", "{resolved:?}");
        }
        Some(done(client, &operation.name).await.unwrap())
    }

    /// Waits until a migration is over on both sides, where it was begun at all.
    pub(crate) async fn until_over(&self, job: &Move) {
        let client = self.nodes[self.home].client().await;
        if self.ended(&client, job).await.is_some() {
            arrivals(&self.nodes[self.away()].client().await).await;
        }
    }

    /// Asserts all that must hold after a migration in which something went wrong, and that `after` is what became of it.
    /// Both agents are served. Leaves the state to move at [`home`](Pair::home), which is where it was found.
    pub(crate) async fn settle(&mut self, job: &Move, after: After) -> Option<v1::Operation> {
        let (home, away) = (self.home, self.away());
        let clients = [self.nodes[0].client().await, self.nodes[1].client().await];
        let ended = self.ended(&clients[home], job).await;
        let arrivals = arrivals(&clients[away]).await;
        let arrival = ended.as_ref().and_then(|ended| {
            let peer = &ended.handover.as_ref()?.peer_operation;
            arrivals.iter().find(|arrival| arrival.name == *peer).cloned()
        });
        match &ended {
            None => assert!(matches!(after, After::Never | After::Gone), "{after:?}: it is not on record"),
            Some(ended) => self.told(ended, arrival.as_ref(), after),
        }
        self.all_at_rest(&clients).await;
        let contents: [_; 2] =
            tokio::join!(self.nodes[0].contents(&clients[0]), self.nodes[1].contents(&clients[1])).into();
        let owner = match after {
            After::Never | After::Stays | After::Resolved => Some(home),
            After::Moves => Some(away),
            After::Lost | After::Gone => None,
        };
        for (side, contents) in contents.iter().enumerate() {
            let content = if Some(side) == owner { Content::Own } else { Content::Fresh };
            assert!(
                contents.iter().all(|found| *found == content),
                "{after:?}: node {side} has {contents:?}\n{}",
                self.log()
            );
        }
        self.epochs(&clients, after, owner).await;
        self.watch.check(&self.own, self.kept_since);
        if let Some(owner) = owner {
            self.home = owner;
        } else {
            // All is as before a first migration, but for the epochs.
            self.load().await;
        }
        self.lives = self.living().await;
        ended
    }

    /// Asserts that source and destination tell the same story, and that it is this one.
    fn told(&self, ended: &v1::Operation, arrival: Option<&v1::Operation>, after: After) {
        let log = || format!("{after:?}: {ended:?}\n{arrival:?}\n{}", self.log());
        let verdict = ended.handover.as_ref().unwrap().verdict();
        let (result, outcome) = match after {
            After::Never => panic!("it is on record: {}", log()),
            After::Stays | After::Resolved => (v1::OperationResult::Failed, v1::StateOutcome::Preserved),
            After::Moves | After::Gone => (v1::OperationResult::Succeeded, v1::StateOutcome::Moved),
            After::Lost => (v1::OperationResult::Failed, v1::StateOutcome::StateLost),
        };
        assert_eq!((ended.result(), ended.outcome()), (result, outcome), "{}", log());
        let is_moved = matches!(after, After::Moves | After::Gone);
        assert_eq!(ended.failure.is_none(), is_moved, "{}", log());
        assert!(!ended.handover.as_ref().unwrap().in_doubt, "{}", log());
        match after {
            After::Lost if verdict == v1::HandoverVerdict::Lost => {}
            // The source may end before it has heard of the destination's end, where that needs none.
            After::Never | After::Stays | After::Lost => assert!(
                matches!(verdict, v1::HandoverVerdict::Unspecified | v1::HandoverVerdict::Refused),
                "{}",
                log()
            ),
            After::Resolved => assert_eq!(verdict, v1::HandoverVerdict::Lost, "{}", log()),
            After::Moves | After::Gone => assert_eq!(verdict, v1::HandoverVerdict::Committed, "{}", log()),
        }
        let Some(arrival) = arrival else {
            assert!(!is_moved, "the destination knows nothing of it: {}", log());
            return;
        };
        let there = arrival.handover.as_ref().unwrap().verdict();
        assert_eq!(arrival.result() == v1::OperationResult::Succeeded, is_moved, "{}", log());
        if verdict == v1::HandoverVerdict::Unspecified {
            assert_eq!(there, v1::HandoverVerdict::Refused, "{}", log());
        } else {
            assert_eq!(there, verdict, "{}", log());
        }
    }

    /// Asserts that no operation has a device, and every device runs.
    pub(super) async fn all_at_rest(&self, clients: &[Client; 2]) {
        for (node, client) in self.nodes.iter().zip(clients) {
            for device in node.devices(client).await {
                assert_eq!(device.operation, "", "the lease is free: {device:?}");
                assert_eq!(device.standing(), v1::DeviceStanding::Ready, "{device:?}");
                assert_eq!(device.state(), v1::MigrationState::Running, "{device:?}");
            }
        }
    }

    /// Asserts that what the agents call what lives in their devices fits what is there.
    async fn epochs(&self, clients: &[Client; 2], after: After, owner: Option<usize>) {
        for (index, life) in self.lives.iter().enumerate() {
            for (side, client) in clients.iter().enumerate() {
                let now = self.nodes[side].devices(client).await.swap_remove(index).logical_device.unwrap();
                let is_here = Some(side) == owner;
                assert_eq!(
                    now.id == life.id,
                    is_here,
                    "{after:?}, node {side}: {now:?}, and it was {life:?}"
                );
                if !is_here {
                    continue;
                }
                match after {
                    After::Never | After::Stays => {
                        assert_eq!(now.epoch, life.epoch, "it was never elsewhere");
                    }
                    After::Moves => assert!(now.epoch > life.epoch, "{now:?}, and it was {life:?}"),
                    // The destination may have run it under the epoch between.
                    After::Resolved => assert!(now.epoch > life.epoch + 1, "{now:?}, and it was {life:?}"),
                    After::Lost | After::Gone => unreachable!("nobody has it"),
                }
            }
        }
    }
}

/// What came to a node, once all of it is over.
async fn arrivals(client: &Client) -> Vec<v1::Operation> {
    let mut ended = Vec::new();
    for operation in operations(client).await {
        if operation.kind() == v1::OperationKind::Arrival {
            ended.push(done(client, &operation.name).await.unwrap());
        }
    }
    ended
}
