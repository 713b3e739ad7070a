//! The disk of a simulated host, on which its journal lies: what was synced outlives the machine, what was only written
//! outlives the agent.
//!
//! ```text
//!   redb -- write --> written (the machine's memory) -- sync --> durable
//!                        |  lost when power is lost                 |  kept, whatever ends
//!   the next sync:  Fails, and is not durable  |  FailsLate, and is durable  |  Lies: says Ok, and is not durable
//! ```

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::{Builder, Database, DatabaseError, StorageBackend};
use vfio_checkpoint_server::journal::{Disk, Wanted};

use crate::log::{Log, say};

/// What is wrong with a sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SyncFault {
    /// It fails, and nothing of what was written is durable.
    Fails,
    /// It fails, and all of it is: whoever is told so knows nothing.
    FailsLate,
    /// It succeeds, and nothing is durable. No disk may do that.
    Lies,
}

#[derive(Debug, Default)]
struct Platter {
    durable: Vec<u8>,
    written: Vec<u8>,
    /// What `written` has and `durable` has not.
    unsynced: Vec<(usize, usize)>,
    /// Counts the lives of the machine: a file that was opened in another reaches nothing.
    life: u64,
    is_open: bool,
    is_there: bool,
    /// What was said to be synced and is not. It is gone with the agent: nobody else knows of it.
    has_lied: bool,
    /// What syncs do, after so many, and how many of them.
    fault: Option<(SyncFault, u32, u32)>,
}

impl Platter {
    fn sync(&mut self) {
        resize(&mut self.durable, self.written.len());
        for (from, to) in self.unsynced.drain(..) {
            let to = to.min(self.written.len());
            if from < to {
                self.durable[from..to].copy_from_slice(&self.written[from..to]);
            }
        }
        self.has_lied = false;
    }

    /// All that was not synced is gone.
    fn forget(&mut self) {
        let Self { written, durable, unsynced, .. } = self;
        written.clone_from(durable);
        unsynced.clear();
    }

    fn take_fault(&mut self) -> Option<SyncFault> {
        let (fault, after, times) = self.fault.take()?;
        if let Some(after) = after.checked_sub(1) {
            self.fault = Some((fault, after, times));
            return None;
        }
        if times > 1 {
            self.fault = Some((fault, 0, times - 1));
        }
        Some(fault)
    }
}

/// As `Vec::resize`, but not byte by byte where nothing is optimised.
fn resize(bytes: &mut Vec<u8>, length: usize) {
    if length > bytes.len() {
        let mut longer = vec![0; length];
        longer[..bytes.len()].copy_from_slice(bytes);
        *bytes = longer;
    } else {
        bytes.truncate(length);
    }
}

/// The disk of one host. Clones are the same disk.
#[derive(Debug, Clone)]
pub(crate) struct SimDisk {
    host: &'static str,
    log: Log,
    platter: Arc<Mutex<Platter>>,
}

impl SimDisk {
    pub(crate) fn new(host: &'static str, log: Log) -> Self {
        Self { host, log, platter: Arc::default() }
    }

    /// After `after` syncs, `times` of them go wrong like this.
    pub(crate) fn fail(&self, fault: SyncFault, after: u32, times: u32) {
        self.platter().fault = Some((fault, after, times));
    }

    /// The agent is dead. Whatever it still had open reaches nothing from now on.
    pub(crate) fn end_life(&self, loses_power: bool) {
        let mut platter = self.platter();
        if !loses_power && !platter.has_lied && platter.unsynced.iter().any(|(from, to)| from < to) {
            // The machine goes on, and writes what it has when it comes to it.
            platter.sync();
        }
        platter.has_lied = false;
        platter.forget();
        platter.life += 1;
        platter.is_open = false;
    }

    fn platter(&self) -> MutexGuard<'_, Platter> {
        self.platter.lock().unwrap()
    }
}

impl Disk for SimDisk {
    fn make_folder(&self, _folder: &Path) -> io::Result<()> {
        Ok(())
    }

    fn is_empty(&self, _path: &Path) -> bool {
        let platter = self.platter();
        platter.is_there && platter.durable.is_empty()
    }

    fn open(&self, _path: &Path, wanted: Wanted) -> Result<Database, DatabaseError> {
        let life = {
            let mut platter = self.platter();
            if platter.is_open {
                return Err(DatabaseError::DatabaseAlreadyOpen);
            }
            if wanted == Wanted::Old && !platter.is_there {
                return Err(DatabaseError::Storage(io::Error::from(io::ErrorKind::NotFound).into()));
            }
            // What was written and could not be synced is gone: the next one to read finds what is on the disk.
            platter.forget();
            platter.is_open = true;
            platter.life
        };
        let opened = Builder::new().create_with_backend(SimFile { disk: self.clone(), life });
        let mut platter = self.platter();
        // A file that was begun and not finished has not got its name yet.
        platter.is_there |= opened.is_ok();
        if !platter.is_there {
            platter.durable.clear();
        }
        opened
    }
}

/// The journal's file, opened.
struct SimFile {
    disk: SimDisk,
    life: u64,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile").field("host", &self.disk.host).field("life", &self.life).finish()
    }
}

impl SimFile {
    fn platter(&self) -> io::Result<MutexGuard<'_, Platter>> {
        let platter = self.disk.platter();
        if platter.life == self.life { Ok(platter) } else { Err(io::Error::other("the machine is gone")) }
    }
}

impl StorageBackend for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.platter()?.written.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.platter()?;
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = platter.written.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.platter()?;
        let (before, after) = (platter.written.len(), usize::try_from(len).map_err(io::Error::other)?);
        resize(&mut platter.written, after);
        if after > before {
            platter.unsynced.push((before, after));
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.platter()?;
        let fault = platter.take_fault();
        match fault {
            None | Some(SyncFault::FailsLate) => platter.sync(),
            Some(SyncFault::Fails) => {}
            Some(SyncFault::Lies) => {
                platter.has_lied = true;
                say!(self.disk.log, self.disk.host, "disk: says that it synced, and did not");
                return Ok(());
            }
        }
        let Some(fault) = fault else { return Ok(()) };
        say!(self.disk.log, self.disk.host, "disk: a sync {fault:?}");
        Err(io::Error::other("a disk of the simulation fails"))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.platter()?;
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let to = from + data.len();
        let place = platter.written.get_mut(from..to);
        place.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?.copy_from_slice(data);
        platter.unsynced.push((from, to));
        Ok(())
    }

    fn close(&self) -> io::Result<()> {
        if let Ok(mut platter) = self.platter() {
            platter.is_open = false;
        }
        Ok(())
    }
}
