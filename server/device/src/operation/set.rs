//! The devices of an operation: what is held of each between two steps, and how a step on one of them fails.

use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, ready};

use super::error::{Cause, Unwound};
use crate::driver::{Driver, Failure};
use crate::lane::Hung;
use crate::{Call, DeviceError, DeviceLane};

/// A step failed; what failed is noted already.
pub(super) struct Noted;

/// One device, and what is held of it.
pub(super) struct Seat<'a, H> {
    pub(super) lane: &'a DeviceLane,
    pub(super) hold: H,
}

/// The devices of an operation, and what has happened to them.
pub(super) struct Seats<'a, H> {
    pub(super) all: Vec<Seat<'a, H>>,
    pub(super) unwound: Unwound,
    pub(super) begun: Duration,
}

impl<'a, H: Default + Send + 'static> Seats<'a, H> {
    pub(super) fn new(lanes: &'a [DeviceLane]) -> Self {
        let all = lanes.iter().map(|lane| Seat { lane, hold: H::default() }).collect();
        let begun = lanes.first().map_or(Duration::ZERO, |lane| lane.executor().now());
        Self { all, unwound: Unwound::new(), begun }
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn now(&self) -> Duration {
        self.all.first().map_or(self.begun, |seat| seat.lane.executor().now())
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.now().saturating_sub(self.begun)
    }

    /// Waits, by the executor of the set.
    pub(super) fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        // No plan is made for an empty set, so there is a first device.
        self.all.first().map_or_else(|| ready(()).boxed(), |seat| seat.lane.executor().sleep(duration))
    }

    pub(super) fn take(&mut self, index: usize) -> H {
        std::mem::take(&mut self.all[index].hold)
    }

    pub(super) fn hold(&mut self, index: usize, hold: H) {
        self.all[index].hold = hold;
    }

    /// A step of the driver; where it fails, the driver has already brought its device back, reset or quarantined it.
    pub(super) async fn step<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Noted> {
        match self.call(index, call, work).await? {
            Ok(value) => Ok(value),
            Err(failure) => {
                self.unwound.device(self.all[index].lane, Ok(failure));
                Err(Noted)
            }
        }
    }

    /// A step of the driver that leaves its device where it is when it fails.
    pub(super) async fn attempt<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, Noted> {
        self.call(index, call, work).await?.map_err(|failure| self.fail_device(index, failure))
    }

    pub(super) async fn call<T: Send + 'static>(
        &mut self,
        index: usize,
        call: Call,
        work: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Result<T, Noted> {
        let done = self.all[index].lane.start(call, work).finished().await;
        self.unless_hung(index, done)
    }

    pub(super) fn unless_hung<T>(&mut self, index: usize, done: Result<T, Hung>) -> Result<T, Noted> {
        done.map_err(|hung| {
            self.unwound.device(self.all[index].lane, Err(hung));
            Noted
        })
    }

    /// Gives a device up, whatever is held of it: `back` is one of the driver's ways back.
    pub(super) async fn give_up(
        &mut self,
        index: usize,
        call: Call,
        back: fn(&mut Driver, DeviceError) -> Failure,
    ) {
        let cause = DeviceError::GivenUp { reason: self.unwound.reason() };
        let held = self.take(index);
        let lane = self.all[index].lane;
        let given_up = lane.start(call, move |driver| {
            // On the lane: closing a data fd is a call on the device too.
            drop(held);
            back(driver, cause)
        });
        let ended = given_up.finished().await;
        self.unwound.device(lane, ended);
    }

    pub(super) fn fail(&mut self, cause: Cause) -> Noted {
        self.unwound.blame(cause);
        Noted
    }

    pub(super) fn fail_device(&mut self, index: usize, failure: DeviceError) -> Noted {
        let device = self.all[index].lane.identity().clone();
        self.fail(Cause::Device { device, failure })
    }
}
