//! `vfioctl dirty-tracking`: the log of pages that a device writes by DMA.
//!
//! ```text
//!   report: range -> calls of at most 8 Mi pages -> bitmaps -> runs of dirty pages
//! ```
//!
//! Invariants: reading the log clears it. So where a later call of one report fails, all of the range counts as dirty,
//! and that is said. Failure paths: a bitmap of another length than the range asks for is refused.

use clap::{Args, Subcommand};
use serde::Serialize;
use tonic::Code;
use vfio_checkpoint_client::call::{CallError, Client, printable};
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1::{
    IovaRange, ReportDirtyPagesRequest, StartDirtyTrackingRequest, StopDirtyTrackingRequest,
};

use crate::cli::OutputFormat;
use crate::outcome::{Exit, Failure};
use crate::render::{self, Column, usual};
use crate::values::{device, page_bytes, range};

/// The most pages of one call, as in the contract.
const MAX_PAGES_OF_CALL: u64 = 8 << 20;
/// The most pages of one report: 4 TiB of 4 KiB pages.
const MAX_PAGES: u64 = 1 << 30;
/// The most runs that a table shows. Documents have all of them.
const SHOWN_RUNS: usize = 16;

/// Log the pages that a device writes by DMA.
#[derive(Debug, Subcommand)]
pub(crate) enum DirtyTrackingCommand {
    /// Start the log
    Start {
        /// The device
        #[arg(value_name = "DEVICE", value_parser = device)]
        name: DeviceName,
        /// The page size to ask for; the device may choose another
        #[arg(long, value_name = "BYTES", default_value = "4KiB", value_parser = page_bytes)]
        page_size: u64,
        /// What to log, such as 0x100000+16MiB; may be given again
        #[arg(long = "range", value_name = "START+LENGTH", value_parser = range, required = true)]
        ranges: Vec<IovaRange>,
    },
    /// Read the log over a range, and clear it
    Report(ReportArgs),
    /// End the log
    Stop {
        /// The device
        #[arg(value_name = "DEVICE", value_parser = device)]
        name: DeviceName,
    },
}

/// Read the log over a range.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The device
    #[arg(value_name = "DEVICE", value_parser = device)]
    name: DeviceName,
    /// Whole pages, such as 0x100000+16MiB
    #[arg(long, value_name = "START+LENGTH", value_parser = range)]
    range: IovaRange,
    /// The page size that `start` printed
    #[arg(long, value_name = "BYTES", default_value = "4KiB", value_parser = page_bytes)]
    page_size: u64,
}

pub(crate) async fn run(
    client: &Client,
    command: DirtyTrackingCommand,
    format: OutputFormat,
) -> Result<Exit, Failure> {
    match command {
        DirtyTrackingCommand::Start { name, page_size, ranges } => {
            let request = StartDirtyTrackingRequest { name: name.to_string(), page_bytes: page_size, ranges };
            let answer = client.start_dirty_tracking(request).await.map_err(|error| {
                let is_device =
                    error.refusal().is_some_and(|refusal| refusal.code == Code::FailedPrecondition);
                let failure = Failure::call(error);
                if is_device {
                    failure.hint("if it logs already, end that first: vfioctl dirty-tracking stop")
                } else {
                    failure
                }
            })?;
            let doc = Started { device: name.to_string(), page_bytes: answer.page_bytes };
            let table = |_| {
                let (name, page) = (printable(&doc.device), render::bytes(doc.page_bytes));
                format!("{name} logs the pages that it writes, in pages of {page}\n")
            };
            render::print(format, table, &doc)?;
        }
        DirtyTrackingCommand::Report(args) => {
            let report = report(client, &args).await?;
            render::print(format, |_| report.table(), &report)?;
        }
        DirtyTrackingCommand::Stop { name } => {
            let request = StopDirtyTrackingRequest { name: name.to_string() };
            client.stop_dirty_tracking(request).await.map_err(Failure::call)?;
            let doc = Stopped { device: name.to_string() };
            render::print(format, |_| format!("{} logs no more\n", printable(&doc.device)), &doc)?;
        }
    }
    Ok(Exit::Done)
}

#[derive(Debug, Serialize)]
struct Started {
    device: String,
    page_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Stopped {
    device: String,
}

/// What was dirty.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report {
    device: String,
    page_bytes: u64,
    pages: u64,
    dirty_pages: u64,
    /// The log could not be read, so that every page of the range, or of a part of it, counts as dirty.
    all_dirty: bool,
    dirty: Vec<Run>,
}

/// Dirty pages side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Run {
    start: u64,
    length_bytes: u64,
}

async fn report(client: &Client, args: &ReportArgs) -> Result<Report, Failure> {
    let IovaRange { start, length_bytes } = args.range;
    let page_bytes = args.page_size;
    if start % page_bytes != 0 || length_bytes % page_bytes != 0 {
        let text = format!("the range is not of whole pages of {}; widen it", render::bytes(page_bytes));
        return Err(Failure::usage(text));
    }
    let pages = length_bytes / page_bytes;
    if pages > MAX_PAGES {
        let text =
            format!("the range has {pages} pages, and one report has at most {MAX_PAGES}; ask in parts");
        return Err(Failure::usage(text));
    }
    let mut runs = Runs { page_bytes, all: Vec::new() };
    let (mut all_dirty, mut dirty_pages, mut done) = (false, 0, 0);
    while done < pages {
        let count = (pages - done).min(MAX_PAGES_OF_CALL);
        let part = IovaRange { start: start + done * page_bytes, length_bytes: count * page_bytes };
        let request = ReportDirtyPagesRequest { name: args.name.to_string(), range: Some(part), page_bytes };
        let found = match client.report_dirty_pages(request).await {
            Ok(answer) => runs.add(part, &answer.bitmap).map(|found| (found, answer.all_dirty)),
            Err(error) => Err(error),
        };
        let (found, is_all) = found.map_err(|error| {
            // Whatever was read before is cleared, and so may be what an answer that was lost had told.
            let note = "take every page of the range for dirty: what was read of the log is cleared";
            Failure::call(error).note(note)
        })?;
        dirty_pages += found;
        all_dirty |= is_all;
        done += count;
    }
    Ok(Report { device: args.name.to_string(), page_bytes, pages, dirty_pages, all_dirty, dirty: runs.all })
}

/// Puts bitmaps together into runs.
struct Runs {
    page_bytes: u64,
    all: Vec<Run>,
}

impl Runs {
    /// How many pages of the part are dirty.
    fn add(&mut self, part: IovaRange, bitmap: &[u8]) -> Result<u64, CallError> {
        let pages = part.length_bytes / self.page_bytes;
        let expected = pages.div_ceil(8);
        if bitmap.len() as u64 != expected {
            let problem = format!("its bitmap has {} bytes, and {pages} pages need {expected}", bitmap.len());
            return Err(CallError::BadAnswer { rpc: "ReportDirtyPages", problem });
        }
        let mut dirty = 0;
        let bits = bitmap.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1));
        for (page, is_dirty) in (0..pages).zip(bits) {
            if is_dirty {
                dirty += 1;
                self.push(part.start + page * self.page_bytes);
            }
        }
        Ok(dirty)
    }

    fn push(&mut self, start: u64) {
        match self.all.last_mut() {
            // A run that ends at the very top has no next page.
            Some(run) if run.start.checked_add(run.length_bytes) == Some(start) => {
                run.length_bytes += self.page_bytes;
            }
            Some(_) | None => self.all.push(Run { start, length_bytes: self.page_bytes }),
        }
    }
}

const COLUMNS: [Column<Run>; 3] = [
    usual("START", |run| format!("{:#x}", run.start)),
    usual("END", |run| format!("{:#x}", run.start + (run.length_bytes - 1))),
    usual("SIZE", |run| render::bytes(run.length_bytes)),
];

impl Report {
    fn table(&self) -> String {
        let page = render::bytes(self.page_bytes);
        let mut text = format!("{} of {} pages of {page} are dirty", self.dirty_pages, self.pages);
        if self.all_dirty {
            text += "; the log could not be read, so all of a part or of the range counts as dirty";
        }
        text.push('\n');
        let shown = &self.dirty[..self.dirty.len().min(SHOWN_RUNS)];
        if !shown.is_empty() {
            text += &render::rows(render::Detail::Usual, &COLUMNS, shown);
        }
        if self.dirty.len() > shown.len() {
            text.extend([format!(
                "and {} more runs; -o json has all of them\n",
                self.dirty.len() - shown.len()
            )]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(start: u64, pages: u64) -> IovaRange {
        IovaRange { start, length_bytes: pages * 4096 }
    }

    #[test]
    fn bits_become_runs_across_bytes_and_calls() {
        let mut runs = Runs { page_bytes: 4096, all: Vec::new() };
        assert_eq!(runs.add(part(0, 16), &[0b1000_0001, 0b1000_0001]).unwrap(), 4);
        assert_eq!(runs.add(part(16 * 4096, 3), &[0b0000_0001]).unwrap(), 1);
        let expected = [(0, 1), (7, 2), (15, 2)]
            .map(|(start, pages)| Run { start: start * 4096, length_bytes: pages * 4096 });
        assert_eq!(runs.all, expected);
    }

    #[test]
    fn bits_past_the_range_say_nothing() {
        let mut runs = Runs { page_bytes: 4096, all: Vec::new() };
        assert_eq!(runs.add(part(0, 3), &[0xff]).unwrap(), 3);
        assert_eq!(runs.all, [Run { start: 0, length_bytes: 3 * 4096 }]);
    }

    #[test]
    fn a_bitmap_of_another_length_is_refused() {
        let mut runs = Runs { page_bytes: 4096, all: Vec::new() };
        for bitmap in [&[][..], &[0], &[0; 3]] {
            assert!(runs.add(part(0, 9), bitmap).is_err(), "{}", bitmap.len());
        }
    }

    #[test]
    fn the_last_page_of_all_is_one() {
        let top = u64::MAX - 4095;
        let mut runs = Runs { page_bytes: 4096, all: Vec::new() };
        assert_eq!(runs.add(part(top, 1), &[1]).unwrap(), 1);
        runs.push(0);
        assert_eq!(runs.all.len(), 2);
    }

    #[test]
    fn a_report_for_people() {
        let dirty: Vec<Run> =
            (0..18).map(|run| Run { start: run * 8192 + 0x10_0000, length_bytes: 4096 }).collect();
        let report = Report {
            device: "devices/a".to_owned(),
            page_bytes: 4096,
            pages: 128,
            dirty_pages: 18,
            all_dirty: false,
            dirty,
        };
        insta::assert_snapshot!(report.table());
    }
}
