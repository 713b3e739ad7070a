//! `save` and `restore`: a state file at one end, a device at the other.

use std::io::{self, IsTerminal};
use std::time::Duration;

use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use vfio_checkpoint_device::operation::{
    self, Alone, Arrival, BoxError, PrecopyPolicy, RestoreTerms, SaveTerms, StateSink, StateSource,
};
use vfio_checkpoint_device::seal::{Seal, Verifier};
use vfio_checkpoint_device::sim::SimDevice;
use vfio_checkpoint_device::state_file::{Header, StateFile, StateFileError, StateFileWriter};
use vfio_checkpoint_device::{Call, ConfigCapture, DataSize, Driver, Identity, Rearm, chain};
use vfio_checkpoint_fsm::AfterSave;

use crate::args::{Output, Restore, Save};
use crate::failure::CommandFailure;
use crate::output::{line, print_json};
use crate::target::Target;

/// Nobody but this process has to be ready, and it is.
const READY_LIMIT: Duration = Duration::from_secs(1);

/// What a save did.
#[derive(Serialize)]
struct Saved {
    device: Identity,
    #[serde(flatten)]
    seal: Seal,
    pre_copied_bytes: u64,
    downtime_ms: f64,
    took_ms: f64,
    left_stopped: bool,
    /// The digest of a simulated device's state, which its restored copy must have too.
    #[serde(skip_serializing_if = "Option::is_none")]
    device_digest: Option<String>,
}

/// What a restore did.
#[derive(Serialize)]
struct Restored {
    device: Identity,
    #[serde(flatten)]
    seal: Seal,
    took_ms: f64,
    /// Interrupts that whoever uses the device must arm again.
    rearm: Option<Rearm>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device_digest: Option<String>,
}

pub(crate) fn save(arguments: &Save) -> Result<(), CommandFailure> {
    let mut target = Target::parse(&arguments.device, &arguments.common)?;
    if arguments.leave_stopped && !arguments.hold && target.resets_on_last_close() {
        return Err(CommandFailure::blocked(
            "a PCI function, and most device processes, are reset and run when their last holder closes them: say --hold \
             with --leave-stopped",
        ));
    }
    // Before the device is opened, which resets it: whatever is wrong with the file must cost nothing.
    let header = Header { device: target.identity()?, fingerprint: target.fingerprint()? };
    let writer = StateFileWriter::create(&arguments.file, &header, arguments.replace)
        .map_err(|error| CommandFailure::blocked(chain(&error)))?;
    let opened = target.open()?;
    let size = opened.lane.call(Call::DataSize, Driver::data_size).map_err(CommandFailure::hung)?;
    let progress = progress("saving", size.ok().and_then(DataSize::bytes));
    let mut sink = FileSink { writer: Some(writer), seal: None, progress, sim: opened.sim, digest: None };

    let after = if arguments.leave_stopped { AfterSave::StayStopped } else { AfterSave::Resume };
    let policy = PrecopyPolicy {
        downtime_limit: arguments.downtime_limit,
        time_budget: arguments.pre_copy_budget,
        stop_over_limit: !arguments.insist,
    };
    let terms = SaveTerms::automatic(arguments.pre_copy, after, policy);
    let saving = operation::save(std::slice::from_ref(&opened.lane), terms, &Alone, &mut sink);
    let report = pollster::block_on(saving)?;
    sink.progress.finish_and_clear();
    let Some(seal) = sink.seal else {
        return Err(CommandFailure::blocked("the save ended without a seal; please report this as a defect"));
    };
    let saved = Saved {
        device: header.device,
        seal,
        pre_copied_bytes: report.precopy_bytes,
        downtime_ms: milliseconds(report.downtime),
        took_ms: milliseconds(report.took),
        left_stopped: arguments.leave_stopped,
        device_digest: sink.digest,
    };
    let printed = print_saved(&saved, arguments);
    if arguments.hold {
        hold(&saved.device);
    }
    printed
}

fn print_saved(saved: &Saved, arguments: &Save) -> Result<(), CommandFailure> {
    match arguments.common.output {
        Output::Json => print_json(saved),
        Output::Table => {
            line(format_args!("saved {} to {}", saved.device, arguments.file.display()))?;
            line(format_args!("  state     {}", saved.seal))?;
            line(format_args!("  pre-copy  {} bytes while the device ran", saved.pre_copied_bytes))?;
            let after = if saved.left_stopped { "; the device stays stopped" } else { "" };
            line(format_args!("  downtime  {:.1} ms of {:.1} ms{after}", saved.downtime_ms, saved.took_ms))?;
            print_digest(saved.device_digest.as_deref())
        }
    }
}

/// Keeps a device open. It is let go of with this process, so nothing that could end it comes before this.
fn hold(device: &Identity) {
    eprintln!("holding {device}; it is let go when standard input ends");
    // Whatever ends the input ends the hold.
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
}

pub(crate) fn restore(arguments: &Restore) -> Result<(), CommandFailure> {
    let mut target = Target::parse(&arguments.device, &arguments.common)?;
    let mut file =
        StateFile::open(&arguments.file).map_err(|error| CommandFailure::blocked(chain(&error)))?;
    let differences = file.header().fingerprint.differences(&target.fingerprint()?);
    if !differences.is_empty() {
        let list: Vec<String> = differences.iter().map(ToString::to_string).collect();
        return Err(CommandFailure::blocked(format!(
            "the state of {} does not fit this device: {}",
            file.header().device,
            list.join("; ")
        )));
    }
    let bytes = file.trailer().seal.bytes;
    let checking = progress("checking", Some(bytes));
    file.verify(|read| checking.set_position(read))
        .map_err(|error| CommandFailure::blocked(chain(&error)))?;
    checking.finish_and_clear();

    let opened = target.open()?;
    let (seal, config) = (file.trailer().seal, file.trailer().config);
    let chunks = file.state().map_err(|error| CommandFailure::failed(&error))?;
    let mut source = FileSource {
        chunks: Box::new(chunks),
        verifier: Some(Verifier::new()),
        seal,
        config,
        rearm: None,
        progress: progress("restoring", Some(bytes)),
    };
    let terms = RestoreTerms::run(READY_LIMIT);
    let restoring = operation::restore(std::slice::from_ref(&opened.lane), terms, &Alone, &mut source);
    let report = pollster::block_on(restoring)?;
    source.progress.finish_and_clear();

    let restored = Restored {
        device: opened.lane.identity().clone(),
        seal,
        took_ms: milliseconds(report.took),
        rearm: source.rearm,
        device_digest: opened.sim.as_ref().map(digest),
    };
    let printed = print_restored(&restored, arguments);
    if arguments.hold {
        hold(&restored.device);
    }
    printed
}

fn print_restored(restored: &Restored, arguments: &Restore) -> Result<(), CommandFailure> {
    match arguments.common.output {
        Output::Json => print_json(restored),
        Output::Table => {
            line(format_args!("restored {} from {}", restored.device, arguments.file.display()))?;
            line(format_args!("  state     {}, verified", restored.seal))?;
            line(format_args!("  took      {:.1} ms", restored.took_ms))?;
            if let Some(rearm) = restored.rearm {
                let Rearm { kind, vectors } = rearm;
                line(format_args!("  re-arm    {vectors} vectors of {kind:?}, by whoever uses the device"))?;
            }
            print_digest(restored.device_digest.as_deref())
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn digest(device: &SimDevice) -> String {
    Seal { bytes: 0, blake3: device.digest() }.hex()
}

fn print_digest(digest: Option<&str>) -> Result<(), CommandFailure> {
    digest.map_or(Ok(()), |digest| line(format_args!("  device    digest {digest}")))
}

/// A bar on a terminal, nothing elsewhere.
fn progress(what: &'static str, bytes: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = bytes.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let template = "{msg} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} {wide_bar}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_message(what)
}

struct FileSink {
    /// Gone once the file is sealed.
    writer: Option<StateFileWriter>,
    seal: Option<Seal>,
    progress: ProgressBar,
    sim: Option<SimDevice>,
    /// Taken while the device is stopped: later it may have moved on.
    digest: Option<String>,
}

/// The program does nothing else meanwhile, so the file is written to in place.
impl StateSink for FileSink {
    async fn chunk(&mut self, _device: usize, bytes: Bytes) -> Result<(), BoxError> {
        if let Some(writer) = &mut self.writer {
            writer.write(&bytes)?;
            self.progress.set_position(writer.bytes());
        }
        Ok(())
    }

    async fn seal(&mut self, config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        self.digest = self.sim.as_ref().map(digest);
        if let Some(writer) = self.writer.take() {
            self.seal = Some(writer.finish(config.first().copied().flatten())?);
        }
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        Err("a state file cannot be marked, and a save to one is not held".into())
    }

    /// An unfinished file leaves nothing behind.
    async fn discard(&mut self) -> Result<(), BoxError> {
        self.writer = None;
        Ok(())
    }
}

struct FileSource<'a> {
    chunks: Box<dyn Iterator<Item = Result<Bytes, StateFileError>> + Send + 'a>,
    /// Gone once the end was handed out.
    verifier: Option<Verifier>,
    seal: Seal,
    config: Option<ConfigCapture>,
    rearm: Option<Rearm>,
    progress: ProgressBar,
}

impl StateSource for FileSource<'_> {
    async fn next(&mut self) -> Result<Option<Arrival>, BoxError> {
        let Some(mut verifier) = self.verifier.take() else { return Ok(None) };
        if let Some(bytes) = self.chunks.next().transpose()? {
            self.progress.inc(bytes.len() as u64);
            let chunk = verifier.accept(bytes);
            self.verifier = Some(verifier);
            return Ok(Some(Arrival::Chunk { device: 0, chunk }));
        }
        let seal = verifier.finish(&self.seal)?;
        Ok(Some(Arrival::Sealed { device: 0, seal, config: self.config }))
    }

    /// Nothing uses the device yet: this process maps no memory and waits for no interrupt, so it is ready as it is.
    /// What its next user must arm is reported.
    async fn ready(&mut self, rearm: &[Option<Rearm>]) -> Result<(), BoxError> {
        self.rearm = rearm.first().copied().flatten();
        Ok(())
    }
}
