//! The hardware behind the handles: one state, one memory, at most one session.
//!
//! ```text
//!   every call -> lock -> catch up with the clock -> act
//!
//!   SET:  next_hop -> step -> state -> next_hop -> ... as the kernel's drivers walk
//!           opens a stream   a fresh session under a new number
//!           keeps it         PRE_COPY* -> STOP_COPY tells the session that the device has stopped
//!           closes it        the session is gone; out of RESUMING only once it is loaded
//! ```
//!
//! # Invariants
//! - A data stream names its session by number and serves nothing once that session is over: ENODEV, as a file that
//!   a kernel driver has disabled.
//! - The device's own state is replaced in one step, on leaving RESUMING, or not at all.
//! - Memory changes in running states only, as far as the workload goes; DMA starts in RUNNING and PRE_COPY only.
//!
//! # Failure paths
//! A hop that fails leaves the device where the hop began; the hops before it stand.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use vfio_checkpoint_fsm::{Arc, Next, State, StreamEffect, next_hop};

use super::dma::Dma;
use super::format::{Header, firmware_digest};
use super::generator::Generator;
use super::load::{Expected, LoadSession};
use super::memory::{Memory, OverlayFull};
use super::pci::Pci;
use super::registers::Registers;
use super::save::SaveSession;
use super::workload::{Pacer, Sweep};
use super::{Hop, SimConfig, SimMemoryError};

/// How many hops are remembered.
const MAX_HOPS_KEPT: usize = 4096;

/// Which kind of stream a SET opened, and the number of its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    Save(u64),
    Restore(u64),
}

#[derive(Debug)]
pub(super) enum Session {
    None,
    Save(Box<SaveSession>),
    Load(Box<LoadSession>),
}

#[derive(Debug)]
pub(super) struct Hardware {
    pub(super) config: SimConfig,
    own: Generator,
    pub(super) state: State,
    pub(super) memory: Memory,
    pub(super) registers: Registers,
    pub(super) session: Session,
    pub(super) session_number: u64,
    pub(super) now: Duration,
    pacer: Pacer,
    sweep: Sweep,
    pub(super) dma: Dma,
    pub(super) pci: Option<Pci>,
    pub(super) hops: VecDeque<Hop>,
    pub(super) handles: usize,
    pub(super) resets: u64,
    pub(super) close_resets: u64,
}

impl Hardware {
    /// A device at power-on. The configuration has been validated.
    pub(super) fn new(config: SimConfig, now: Duration) -> Self {
        let own = Generator::new(config.seed);
        let working_set = config.workload.working_set_bytes.unwrap_or(config.memory_bytes);
        Self {
            state: State::Running,
            memory: pristine(&config, &own),
            registers: Registers::power_on(),
            session: Session::None,
            session_number: 0,
            now,
            pacer: Pacer::default(),
            sweep: Sweep::new(working_set.div_ceil(config.page_bytes.into()), config.seed),
            dma: Dma::new(&config.dma, config.seed),
            pci: config.pci.map(Pci::new),
            hops: VecDeque::new(),
            handles: 0,
            resets: 0,
            close_resets: 0,
            own,
            config,
        }
    }

    /// Lets everything happen that the device did since the last call.
    pub(super) fn catch_up(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        if elapsed.is_zero() || !self.state.is_running() {
            return;
        }
        let rate = self.config.workload.dirty_bytes_per_second;
        let writes = self.pacer.writes(elapsed, rate, self.config.page_bytes.into());
        let (memory, session) = (&mut self.memory, &mut self.session);
        self.sweep.visit(self.registers.page_writes(), writes, |page, times| {
            memory.touch(page, times);
            mark_dirty(session, page);
        });
        self.registers.add_page_writes(writes);
        match self.state {
            State::Running | State::PreCopy => {
                let writes = self.dma.run(elapsed, self.registers.dma_writes());
                self.registers.add_dma_writes(writes);
            }
            State::Error
            | State::Stop
            | State::StopCopy
            | State::Resuming
            | State::RunningP2p
            | State::PreCopyP2p => {}
        }
    }

    /// One SET. The error is an errno.
    pub(super) fn set_state(&mut self, target: State) -> Result<Option<Opened>, i32> {
        let mut opened = None;
        loop {
            let arc = match next_hop(self.config.migration, self.state, target) {
                Next::NoOp => return Ok(opened),
                Next::Forbidden(_) => return Err(libc::EINVAL),
                Next::Hop(arc) => arc,
            };
            let step = self.step(arc);
            if self.hops.len() == MAX_HOPS_KEPT {
                self.hops.pop_front();
            }
            self.hops.push_back(Hop { arc, errno: step.err() });
            opened = step?;
            self.state = arc.to();
        }
    }

    fn step(&mut self, arc: Arc) -> Result<Option<Opened>, i32> {
        match arc.stream() {
            StreamEffect::None => Ok(None),
            StreamEffect::OpensSave => {
                let header = self.header();
                self.session = Session::Save(Box::new(if arc.to() == State::StopCopy {
                    SaveSession::stop_copy(&self.memory, &header, self.now)
                } else {
                    SaveSession::precopy(&self.memory, &header, &self.config.precopy, self.now)
                }));
                self.session_number += 1;
                Ok(Some(Opened::Save(self.session_number)))
            }
            StreamEffect::OpensRestore => {
                self.session = Session::Load(Box::new(LoadSession::new(self.expected())));
                self.session_number += 1;
                Ok(Some(Opened::Restore(self.session_number)))
            }
            StreamEffect::Keeps => match &mut self.session {
                Session::Save(save) => {
                    if arc.to() == State::StopCopy {
                        save.stop();
                    }
                    Ok(None)
                }
                // The file was lost with the last close. There is no stream to hand the rest out on.
                Session::None | Session::Load(_) if arc.to() == State::StopCopy => Err(libc::EINVAL),
                Session::None | Session::Load(_) => Ok(None),
            },
            StreamEffect::Closes => {
                if arc.from() == State::Resuming {
                    self.load()?;
                }
                self.session = Session::None;
                Ok(None)
            }
        }
    }

    /// Takes in what was written. Whatever is wrong with it shows as EINVAL here.
    fn load(&mut self) -> Result<(), i32> {
        match &mut self.session {
            Session::Load(load) => {
                (self.memory, self.registers) = load.finish().map_err(|_| libc::EINVAL)?;
                Ok(())
            }
            // The file was lost with the last close: a kernel driver may crash here, this one refuses.
            Session::None | Session::Save(_) => Err(libc::EINVAL),
        }
    }

    /// `VFIO_DEVICE_RESET`.
    pub(super) fn reset(&mut self) -> Result<(), i32> {
        if !self.config.reset {
            return Err(libc::EINVAL);
        }
        self.power_on();
        if !self.config.pci.is_some_and(|pci| pci.kept_by_reset)
            && let Some(pci) = &mut self.pci
        {
            pci.reset();
        }
        self.resets += 1;
        Ok(())
    }

    fn power_on(&mut self) {
        self.state = State::Running;
        self.session = Session::None;
        self.memory = pristine(&self.config, &self.own);
        self.registers = Registers::power_on();
        self.pacer = Pacer::default();
        // pds stops tracking on a reset and mlx5 goes on. Stopping is the harder one on the caller.
        self.dma.reset();
    }

    /// The first handle comes. A device that failed with nobody there is reset, where the last close would have.
    pub(super) fn first_open(&mut self) {
        self.handles = 1;
        if self.config.reset_on_last_close && self.state != State::Running {
            self.last_close();
        }
    }

    /// The last handle is gone.
    pub(super) fn last_close(&mut self) {
        self.session = Session::None;
        self.dma.stop();
        if let Some(pci) = &mut self.pci {
            pci.release();
        }
        if self.config.reset_on_last_close {
            self.power_on();
            if let Some(pci) = &mut self.pci {
                pci.reset();
            }
            self.close_resets += 1;
        }
    }

    /// The device fails by itself.
    pub(super) fn fail(&mut self) {
        self.state = State::Error;
        self.session = Session::None;
    }

    /// Writes to memory as the device's user would.
    pub(super) fn write_memory(&mut self, at: u64, bytes: &[u8]) -> Result<(), SimMemoryError> {
        if !self.state.is_running() {
            return Err(SimMemoryError::NotRunning { state: self.state });
        }
        self.memory.check_range(at, bytes.len())?;
        let page_bytes = u64::from(self.config.page_bytes);
        let (mut at, mut left) = (at, bytes);
        while !left.is_empty() {
            let page = at / page_bytes;
            let mut whole = vec![0; self.memory.page_len(page)];
            self.memory.read(page * page_bytes, &mut whole)?;
            let offset = usize::try_from(at % page_bytes).unwrap_or(0);
            let (now, later) = left.split_at(left.len().min(whole.len() - offset));
            whole[offset..offset + now.len()].copy_from_slice(now);
            self.memory.store(page, &whole).map_err(|OverlayFull| SimMemoryError::NoRoom)?;
            mark_dirty(&mut self.session, page);
            at += now.len() as u64;
            left = later;
        }
        Ok(())
    }

    /// BLAKE3 of everything that a migration carries.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"vfio-checkpoint simulated device state 1\0").update(&self.registers.0);
        self.memory.digest_into(&mut hasher);
        *hasher.finalize().as_bytes()
    }

    pub(super) fn raise(&self, vector: u32) -> io::Result<bool> {
        self.pci.as_ref().map_or(Ok(false), |pci| pci.raise(vector))
    }

    fn header(&self) -> Header {
        Header {
            page_bytes: self.config.page_bytes,
            memory_bytes: self.config.memory_bytes,
            seed: self.memory.seed(),
            firmware: firmware_digest(&self.config.firmware),
        }
    }

    fn expected(&self) -> Expected {
        Expected {
            page_bytes: self.config.page_bytes,
            memory_bytes: self.config.memory_bytes,
            firmware: firmware_digest(&self.config.firmware),
            raw_limit_bytes: self.config.overlay_limit_bytes,
            validation: self.config.validation,
        }
    }
}

fn pristine(config: &SimConfig, own: &Generator) -> Memory {
    Memory::new(config.memory_bytes, config.page_bytes, own.clone(), config.overlay_limit_bytes)
}

fn mark_dirty(session: &mut Session, page: u64) {
    match session {
        Session::Save(save) => save.mark_dirty(page),
        Session::None | Session::Load(_) => {}
    }
}
