//! The state of a restore, on its way into the devices.
//!
//! ```text
//!   source --next--> chunk n+1     while the device writes chunk n
//!            busy    meanwhile, where chunk n+1 is here and chunk n is not written yet
//! ```
//! Invariants: of each device one chunk is written at a time, in order, and none after its seal. A source that has brought what
//! is next is told that it waits.
//!
//! Failure paths: a write that failed ends it at once, whatever the source is at; what does not fit is an [`ArrivalError`].

use std::pin::pin;

use futures_util::future::{Either, select};

use super::super::error::Cause;
use super::super::set::{Noted, Seats};
use super::super::state::ArrivalError;
use super::super::{Arrival, DeviceProgress};
use super::{Feed, Hold, RestoreRun, Sealed};
use crate::driver::RestoreSession;
use crate::lane::{Hung, Pending};
use crate::{Call, DeviceError, VerifiedChunk};

/// A chunk on its way into a device.
type Writing = Pending<(RestoreSession, Result<(), DeviceError>)>;

impl<S: Feed> RestoreRun<'_, S> {
    /// Writes what arrives, fetching and hashing the next chunk while one is being written. A source that has brought that waits
    /// for the device.
    pub(super) async fn load(&mut self) -> Result<(), Noted> {
        let mut writing: Option<(usize, Writing)> = None;
        loop {
            let arrival = match writing.take() {
                None => self.source.next().await,
                Some((index, pending)) => {
                    let mut written = pin!(pending.finished());
                    let first = match select(written.as_mut(), pin!(self.source.next())).await {
                        Either::Left((written, next)) => {
                            // A write that failed waits for no source that is slow.
                            written_to(&mut self.set, &mut self.progress, index, written)?;
                            Either::Left(next.await)
                        }
                        Either::Right((arrival, _)) => Either::Right(arrival),
                    };
                    match first {
                        Either::Left(arrival) => arrival,
                        Either::Right(arrival) => {
                            let written = match select(written, pin!(self.source.busy())).await {
                                Either::Left((written, _)) => written,
                                Either::Right((never, _)) => match never {},
                            };
                            written_to(&mut self.set, &mut self.progress, index, written)?;
                            arrival
                        }
                    }
                }
            };
            self.tell();
            match arrival {
                Ok(Some(Arrival::Chunk { device, chunk })) => {
                    self.expect(device)?;
                    writing = Some((device, self.write(device, chunk)?));
                }
                Ok(Some(Arrival::Sealed { device, seal, config })) => {
                    self.expect(device)?;
                    self.sealed[device] = Some(Sealed { seal, config });
                }
                Ok(None) => {
                    return match self.sealed.iter().position(Option::is_none) {
                        None => Ok(()),
                        Some(device) => Err(self.misfit(ArrivalError::Unsealed { device })),
                    };
                }
                Err(error) => return Err(self.set.fail(Cause::Other(error))),
            }
        }
    }

    /// Whether something more may come for a device.
    fn expect(&mut self, device: usize) -> Result<(), Noted> {
        match self.sealed.get(device) {
            Some(None) => Ok(()),
            Some(Some(_)) => Err(self.misfit(ArrivalError::AfterSeal { device })),
            None => Err(self.misfit(ArrivalError::NoSuchDevice { device, devices: self.set.len() })),
        }
    }

    fn misfit(&mut self, error: ArrivalError) -> Noted {
        self.set.fail(Cause::Other(error.into()))
    }

    fn write(&mut self, index: usize, chunk: VerifiedChunk) -> Result<Writing, Noted> {
        let Hold::Loading(mut session) = self.set.take(index) else {
            return Err(self.set.fail_device(index, DeviceError::Poisoned));
        };
        Ok(self.set.all[index].lane.start(Call::Write, move |_| {
            let written = session.write(&chunk);
            (session, written)
        }))
    }
}

/// Takes in that a chunk was written, or was not.
fn written_to(
    set: &mut Seats<'_, Hold>,
    progress: &mut [DeviceProgress],
    index: usize,
    done: Result<(RestoreSession, Result<(), DeviceError>), Hung>,
) -> Result<(), Noted> {
    let (session, written) = set.unless_hung(index, done)?;
    progress[index].bytes = session.written_bytes();
    set.hold(index, Hold::Loading(session));
    written.map_err(|error| set.fail_device(index, error))
}
