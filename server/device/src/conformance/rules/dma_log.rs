//! The log of pages written by DMA.

use vfio_checkpoint_fsm::State;

use super::super::bench::{Bench, Slot};
use super::super::rule::{Answer, Instead, Rule, Weight, differs, holds, not_applicable};
use super::{errno_name, source};
use crate::kernel::quirks::Quirk;
use crate::{DeviceError, DirtyBitmap, DmaLog, IovaRange};

const PAGE_BYTES: u64 = 4096;
/// A range as a small guest has it.
const RANGE_BYTES: u64 = 64 << 20;

const CHECKED: Weight = Weight::Tolerated {
    how: "the kernel's core checks ranges before any driver sees them; a wrong request is an error of the caller",
};
const CLEAN_BY_MISTAKE: Weight = Weight::Matters {
    consequence: "a report that says \"clean\" of pages that nobody watched would lose the writes to them",
};

pub(super) const RULES: &[Rule] = &[
    Rule {
        id: "dma-log-starts-reports-stops",
        contract: "A log starts, reports and stops, and says with which page size it works.",
        source: source::DMA_LOG,
        weight: Weight::Tolerated { how: "a log that fails is reported, and every page counts as dirty" },
        quirks: &[],
        check: cycle,
    },
    Rule {
        id: "dma-log-starts-again",
        contract: "A log that was stopped can be started again.",
        source: source::DMA_LOG,
        weight: Weight::Tolerated { how: "a log that fails is reported, and every page counts as dirty" },
        quirks: &[],
        check: again,
    },
    Rule {
        id: "dma-log-never-clears-the-bitmap",
        contract: "A report sets bits in the caller's bitmap and clears none.",
        source: source::DMA_REPORT,
        weight: Weight::Matters { consequence: "dirty pages of an earlier report would be lost" },
        quirks: &[],
        check: keeps_bits,
    },
    Rule {
        id: "dma-log-marks-writes",
        contract: "A page that the device wrote is in the next report.",
        source: source::DMA_REPORT,
        weight: Weight::Matters {
            consequence: "memory would be restored without what the device wrote to it",
        },
        quirks: &[],
        check: marks,
    },
    Rule {
        id: "dma-log-report-clears-the-log",
        contract: "What was reported is not reported again, unless it was written again.",
        source: source::DMA_REPORT,
        weight: Weight::Tolerated { how: "pages are copied once more than needed" },
        quirks: &[],
        check: clears,
    },
    Rule {
        id: "dma-log-reports-when-stopped",
        contract: "The log can still be read once the device has stopped: the last report is taken there.",
        source: source::DMA_LOG,
        weight: Weight::Tolerated { how: "a report that fails makes every page of the range count as dirty" },
        quirks: &[],
        check: when_stopped,
    },
    Rule {
        id: "dma-log-refuses-overlaps",
        contract: "Ranges that overlap are refused with EINVAL.",
        source: source::DMA_CORE,
        weight: CHECKED,
        quirks: &[],
        check: |bench| refuses(bench, &[(0, 2 * PAGE_BYTES), (PAGE_BYTES, 2 * PAGE_BYTES)]),
    },
    Rule {
        id: "dma-log-refuses-part-pages",
        contract: "A range that does not lie on pages is refused with EINVAL.",
        source: source::DMA_CORE,
        weight: CHECKED,
        quirks: &[],
        check: |bench| refuses(bench, &[(1, PAGE_BYTES)]),
    },
    Rule {
        id: "dma-log-refuses-no-range",
        contract: "A start without a range is refused with EINVAL.",
        source: source::DMA_CORE,
        weight: CHECKED,
        quirks: &[],
        check: |bench| refuses(bench, &[]),
    },
    Rule {
        id: "dma-log-refuses-a-second-start",
        contract: "A log that runs is not started again.",
        source: source::DMA_LOG,
        weight: Weight::Matters {
            consequence: "what the first log had seen would be forgotten without a word",
        },
        quirks: &[Quirk::NeverDirty],
        check: second_start,
    },
    Rule {
        id: "dma-log-no-report-before-start",
        contract: "Without a log a report is an error, not a clean bitmap.",
        source: source::DMA_REPORT,
        weight: CLEAN_BY_MISTAKE,
        quirks: &[Quirk::NeverDirty],
        check: before_start,
    },
    Rule {
        id: "dma-log-no-report-after-stop",
        contract: "After a log was stopped a report is an error, not a clean bitmap.",
        source: source::DMA_REPORT,
        weight: CLEAN_BY_MISTAKE,
        quirks: &[Quirk::NeverDirty],
        check: after_stop,
    },
    Rule {
        id: "dma-log-adjusts-the-page-size",
        contract: "A page size that the device cannot track is answered with one that it can, a power of two.",
        source: source::DMA_LOG,
        weight: Weight::Tolerated { how: "a start that fails is reported, and every page counts as dirty" },
        quirks: &[],
        check: page_size,
    },
];

fn log(slot: &mut Slot) -> Result<&mut dyn DmaLog, Instead> {
    match slot.device()?.dma_log() {
        Some(log) => Ok(log),
        None => not_applicable("the device keeps no DMA log"),
    }
}

/// A range that is one: all here are constants, or come from a valid one.
fn range(start: u64, length_bytes: u64) -> Result<IovaRange, Instead> {
    IovaRange::new(start, length_bytes)
        .ok_or_else(|| Instead::NotObserved("the range runs past the last address".to_owned()))
}

fn started(slot: &mut Slot) -> Result<(IovaRange, u64), Instead> {
    let whole = range(0, RANGE_BYTES)?;
    let page_bytes = log(slot)?.start(PAGE_BYTES, &[whole])?;
    Ok((whole, page_bytes))
}

fn report(slot: &mut Slot, whole: IovaRange) -> Result<DirtyBitmap, Instead> {
    let mut bitmap = DirtyBitmap::new(whole, PAGE_BYTES)?;
    log(slot)?.report(&mut bitmap)?;
    Ok(bitmap)
}

fn cycle(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let (whole, page_bytes) = started(slot)?;
    if !page_bytes.is_power_of_two() {
        return differs(format!("a page of {page_bytes} bytes"));
    }
    let dirty = report(slot, whole)?.dirty_pages();
    log(slot)?.stop()?;
    holds(format!("pages of {page_bytes} bytes, {dirty} dirty"))
}

fn again(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    for _ in 0..2 {
        let (whole, _) = started(slot)?;
        report(slot, whole)?;
        log(slot)?.stop()?;
    }
    holds("twice")
}

fn keeps_bits(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let (whole, _) = started(slot)?;
    let mut bitmap = DirtyBitmap::new(whole, PAGE_BYTES)?;
    let marks = [0, 3, 64, bitmap.pages() - 1];
    for page in marks {
        bitmap.set(page);
    }
    for _ in 0..2 {
        log(slot)?.report(&mut bitmap)?;
    }
    let lost: Vec<String> =
        marks.iter().filter(|page| !bitmap.is_set(**page)).map(ToString::to_string).collect();
    if lost.is_empty() {
        holds("no bit was cleared")
    } else {
        differs(format!("cleared pages {}", lost.join(" ")))
    }
}

/// Starts a log over where the device writes, lets it write, and reports twice.
fn written(bench: &mut Bench) -> Result<(u64, u64), Instead> {
    log(bench.source())?;
    let target = bench.dma_range()?;
    log(bench.source())?.start(PAGE_BYTES, &[target])?;
    bench.write_dma();
    let slot = bench.source();
    // A device that writes on by itself would dirty pages between the two reports.
    slot.quiet(State::Stop)?;
    let first = report(slot, target)?.dirty_pages();
    let second = report(slot, target)?.dirty_pages();
    Ok((first, second))
}

fn marks(bench: &mut Bench) -> Answer {
    match written(bench)? {
        (0, _) => differs("the device wrote, and no page is dirty"),
        (first, _) => holds(format!("{first} pages")),
    }
}

fn clears(bench: &mut Bench) -> Answer {
    match written(bench)? {
        (first, 0) => holds(format!("{first} pages, then none")),
        (first, second) => differs(format!("{first} pages, then {second} of a stopped device")),
    }
}

fn when_stopped(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let (whole, _) = started(slot)?;
    slot.quiet(State::Stop)?;
    report(slot, whole)?;
    let stream = slot.save(State::StopCopy)?;
    report(slot, whole)?;
    drop(stream);
    holds("in STOP and in STOP_COPY")
}

fn refuses(bench: &mut Bench, ranges: &[(u64, u64)]) -> Answer {
    let slot = bench.source();
    let ranges =
        ranges.iter().map(|(start, length)| range(*start, *length)).collect::<Result<Vec<_>, _>>()?;
    match log(slot)?.start(PAGE_BYTES, &ranges) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => holds("EINVAL"),
        Err(error) => differs(format!("refused with {}", errno_name(&error))),
        Ok(_) => differs("the log started"),
    }
}

fn second_start(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    started(slot)?;
    let whole = range(0, RANGE_BYTES)?;
    refused(log(slot)?.start(PAGE_BYTES, &[whole]).map(|_| ()), "a second start succeeded")
}

fn before_start(bench: &mut Bench) -> Answer {
    let mut bitmap = DirtyBitmap::new(range(0, RANGE_BYTES)?, PAGE_BYTES)?;
    refused(log(bench.source())?.report(&mut bitmap), "a report without a log succeeded")
}

fn after_stop(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let (whole, _) = started(slot)?;
    log(slot)?.stop()?;
    let mut bitmap = DirtyBitmap::new(whole, PAGE_BYTES)?;
    refused(log(slot)?.report(&mut bitmap), "a report after the stop succeeded")
}

fn refused(answer: Result<(), DeviceError>, otherwise: &str) -> Answer {
    match answer {
        Err(error) => holds(errno_name(&error)),
        Ok(()) => differs(otherwise),
    }
}

fn page_size(bench: &mut Bench) -> Answer {
    let slot = bench.source();
    let mut seen = Vec::new();
    for asked in [PAGE_BYTES, 2 << 20, RANGE_BYTES] {
        let whole = range(0, RANGE_BYTES)?;
        let got = log(slot)?.start(asked, &[whole])?;
        log(slot)?.stop()?;
        if !got.is_power_of_two() {
            return differs(format!("{asked} bytes asked for, {got} in force"));
        }
        seen.push(format!("{asked} -> {got}"));
    }
    holds(seen.join(", "))
}
