//! When the hold of a restore begins: once whoever gave the state has been told.

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, pending, ready};
use vfio_checkpoint_fsm::AfterLoad;

use super::script::Script;
use super::*;
use crate::Clock;
use crate::operation::{Caller, OperationStep, Progress, RestoreTerms};

/// How long a hold may last.
const LIMIT: Duration = Duration::from_secs(10);

/// Says Resume at a time of the clock.
struct Resumes {
    script: Script,
    at: Duration,
}

impl Caller for Resumes {
    fn cutover(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn resume(&self) -> BoxFuture<'_, ()> {
        self.script.sleep(self.at.saturating_sub(self.script.now()))
    }

    fn commit(&self) -> BoxFuture<'_, ()> {
        pending().boxed()
    }

    fn cancelled(&self) -> BoxFuture<'_, BoxError> {
        pending().boxed()
    }

    fn moved(&self, _step: OperationStep) -> BoxFuture<'_, Result<(), BoxError>> {
        ready(Ok(())).boxed()
    }

    fn progress(&self, _progress: &Progress<'_>) {}
}

/// Has all state at once, and takes its time until its giver is told.
struct Telling {
    memory: Memory,
    script: Script,
    takes: Duration,
}

impl StateSource for Telling {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        self.memory.next().await
    }

    async fn held(&mut self) -> Result<(), BoxError> {
        self.script.sleep(self.takes).await;
        Ok(())
    }

    async fn ready(&mut self, _rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        Ok(())
    }
}

#[test]
fn a_hold_is_as_long_as_was_agreed_however_long_it_took_to_say_that_it_began() {
    let source = Node::new(&configs(1, |_| ()), &[]);
    let mut memory = Memory::new(1);
    save(&source.lanes, RESUME, PrecopyPolicy::default(), &mut memory).unwrap();
    // Seconds until the giver is told, and until Resume is said; whether that is in time; when it is over.
    for (told, resumed, is_in_time, over) in [(9, 18, true, 18), (9, 30, false, 19), (30, 31, false, 10)] {
        let script = Script::quiet();
        let node = Node::on(
            Arc::new(script.clone()),
            script.inline.time(),
            &configs(1, |config| config.seed += 100),
            &[],
        );
        let mut telling =
            Telling { memory: memory.again(), script: script.clone(), takes: Duration::from_secs(told) };
        let caller = Resumes { script: script.clone(), at: Duration::from_secs(resumed) };
        let terms = RestoreTerms { after: AfterLoad::Hold, hold_limit: LIMIT, ready_limit: READY_LIMIT };
        let ended = script
            .poll(crate::operation::restore(&node.lanes, terms, &caller, &mut telling))
            .expect("nobody dies");
        assert_eq!(script.now().as_secs(), over, "{told} {resumed}");
        match ended {
            Ok(_) => assert!(is_in_time, "{told} {resumed}"),
            Err(error) => {
                let (cause, _, _) = failed(error);
                assert!(!is_in_time && matches!(cause, Cause::HoldExpired { limit: LIMIT }), "{cause}");
            }
        }
    }
}
