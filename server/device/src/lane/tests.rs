//! What a call that is late, or dies, costs; and what happens when it comes back after all.

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_fsm::State;

use super::{DEFAULT_CALL_LIMIT, Hung};
use crate::driver::{Peers, SaveMode};
use crate::sim::{SimConfig, SimDevice};
use crate::{Call, DeviceError, DeviceLane, Driver, Executor, Inline, MigrationDevice, Threads};

/// A call that hangs and then comes back must not go on: a copy that everybody believes dead could start to run.
#[test]
fn what_was_given_up_does_nothing_when_its_call_returns() {
    for target in [State::StopCopy, State::RunningP2p] {
        let takes = DEFAULT_CALL_LIMIT + Duration::from_secs(1);
        let executor: Arc<dyn Executor> = Arc::new(Threads::new());
        let config = SimConfig { memory_bytes: 50_000, ..SimConfig::default() };
        let slot = SimDevice::new(config, Arc::new(Threads::new())).unwrap();
        let (entered, is_in) = std::sync::mpsc::channel::<()>();
        let (release, until_released) = std::sync::mpsc::channel::<()>();
        let (told, _) = std::sync::mpsc::channel();
        let inner = Box::new(slot.open().unwrap());
        let device = Stuck { inner, armed: true, entered, until_released, _last_word: LastWord(told) };
        let lane =
            DeviceLane::new(Driver::new(Box::new(device)), executor, Duration::from_millis(20)).unwrap();
        let (done, all_done) = std::sync::mpsc::channel::<()>();
        // The first GET of the step hangs; behind it the step would SET.
        let pending = lane.start(Call::SetState(target), move |driver| {
            let failure = if target == State::StopCopy {
                driver.begin_save(SaveMode::StopCopy, Peers::None).map(|_| ())
            } else {
                driver.quiesce_running(Peers::None).map(|_| ())
            };
            assert!(failure.is_err());
            let _ = done.send(());
        });
        is_in.recv().unwrap();
        assert!(matches!(pending.wait(), Err(Hung::Overdue { .. })));
        release.send(()).unwrap();
        all_done.recv_timeout(takes).unwrap();
        assert_eq!(slot.state(), State::Running, "nothing was SET after the device had been given up");
        assert!(slot.take_hops().is_empty());
    }
}

/// A device whose first GET waits until it is released.
#[derive(Debug)]
struct Stuck {
    inner: Box<dyn MigrationDevice>,
    armed: bool,
    entered: std::sync::mpsc::Sender<()>,
    until_released: std::sync::mpsc::Receiver<()>,
    _last_word: LastWord,
}

/// Tells on which thread it ends.
#[derive(Debug)]
struct LastWord(std::sync::mpsc::Sender<Option<String>>);

impl Drop for LastWord {
    fn drop(&mut self) {
        let _ = self.0.send(std::thread::current().name().map(str::to_owned));
    }
}

impl MigrationDevice for Stuck {
    fn identity(&self) -> &crate::Identity {
        self.inner.identity()
    }
    fn fingerprint(&self) -> &crate::Fingerprint {
        self.inner.fingerprint()
    }
    fn capabilities(&self) -> &crate::DeviceCapabilities {
        self.inner.capabilities()
    }
    fn state(&mut self) -> Result<State, DeviceError> {
        if std::mem::replace(&mut self.armed, false) {
            let _ = self.entered.send(());
            let _ = self.until_released.recv();
        }
        self.inner.state()
    }
    fn set_state(&mut self, target: State) -> Result<Option<crate::DataStream>, DeviceError> {
        self.inner.set_state(target)
    }
    fn data_size(&mut self) -> Result<crate::DataSize, DeviceError> {
        self.inner.data_size()
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        self.inner.reset()
    }
    fn dma_log(&mut self) -> Option<&mut dyn crate::DmaLog> {
        self.inner.dma_log()
    }
    fn config_space(&mut self) -> Option<&mut dyn crate::ConfigSpace> {
        self.inner.config_space()
    }
}

/// Each piece of work is measured on its own, whatever came before it, and work that dies is told apart from work that
/// hangs.
#[test]
fn only_a_call_that_is_itself_late_condemns_a_device() {
    let executor = Inline::new(1);
    let time = executor.time();
    let slot = SimDevice::new(SimConfig::default(), Arc::clone(&time) as Arc<dyn crate::Clock>).unwrap();
    let limit = Duration::from_secs(3);
    let lane =
        DeviceLane::new(Driver::new(Box::new(slot.open().unwrap())), Arc::new(executor), limit).unwrap();
    let delayed =
        |time: Arc<crate::executor::VirtualTime>| move |_: &mut Driver| time.advance(Duration::from_secs(2));
    let pending: Vec<_> = (0..3).map(|_| lane.start(Call::DataSize, delayed(Arc::clone(&time)))).collect();
    for one in pending {
        one.wait().unwrap();
    }

    let threads: Arc<dyn Executor> = Arc::new(Threads::new());
    let slot = SimDevice::new(SimConfig::default(), Arc::new(Threads::new())).unwrap();
    let lane = DeviceLane::new(Driver::new(Box::new(slot.open().unwrap())), threads, limit).unwrap();
    let died = lane.call(Call::Reset, |_| std::panic::resume_unwind(Box::new("a defect")));
    let _: () = match died {
        Err(hung) => assert_eq!(hung, Hung::Died { call: Call::Reset }),
        Ok(()) => panic!("it did not die"),
    };
}

/// To close a device can reset it, and take its time: not on a thread that has something else to do.
#[test]
fn a_device_is_closed_on_its_own_thread_whoever_lets_go_of_it_last() {
    let slot = SimDevice::new(SimConfig::default(), Arc::new(Threads::new())).unwrap();
    let name = slot.open().unwrap().identity().name.clone();
    let (entered, _) = std::sync::mpsc::channel::<()>();
    let (_, until_released) = std::sync::mpsc::channel::<()>();
    let (told, closed_on) = std::sync::mpsc::channel();
    let inner = Box::new(slot.open().unwrap());
    let device = Stuck { inner, armed: false, entered, until_released, _last_word: LastWord(told) };
    let driver = Driver::new(Box::new(device));
    let lane = DeviceLane::new(driver, Arc::new(Threads::new()), DEFAULT_CALL_LIMIT).unwrap();
    lane.call(Call::GetState, Driver::state).unwrap().unwrap();
    let (other, closing) = (lane.clone(), lane.closing());
    drop(lane);
    assert!(closed_on.try_recv().is_err() && !closing.has_begun(), "somebody has it still");
    drop(other);
    pollster::block_on(closing.closed());
    assert_eq!(closed_on.try_recv(), Ok(Some(name)));
    assert!(closing.has_begun());
}
