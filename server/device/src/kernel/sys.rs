//! The system calls: every ioctl that the kernel backend issues, as a safe function over borrowed fds.
//!
//! ```text
//!   device.rs, stream.rs, dma.rs ...      no unsafe, no ioctl number, no struct layout
//!                 |
//!               sys.rs                    one function a call: builds the struct, checks lengths, gives the errno
//!                 |   \-- sys/memory.rs   memory of this process that devices write to
//!                 |
//!        ioctl(2) <linux/vfio.h>          device fd, data fd, container fd
//! ```
//!
//! The only module of the workspace with `unsafe`. It decides nothing: a refusal is the errno that the kernel gave.
//!
//! # Invariants
//! - A number and the struct that goes with it appear together, in one function; that is what makes each safe.
//! - Every pointer that the kernel gets points into a value that outlives the call, and the length beside it was
//!   computed from that value.
//! - An fd number is taken over as an [`OwnedFd`] only where the kernel reported success, so that it is ours.
//! - Memory that is mapped for DMA is not unmapped from this process before the kernel has forgotten it.
//!
//! # Failure paths
//! Reads of information are repeated on EINTR. A call that changes something is not: it may have changed it, and
//! only the caller can look.

#![allow(
    unsafe_code,
    reason = "ioctl(2) and mmap(2) have no safe form; everything above this module is safe"
)]

use std::ffi::c_void;
use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::Ioctl;
use vfio_bindings::bindings::vfio as uapi;
use vfio_ioctls::{VfioContainer, VfioDevice};

pub(super) mod memory;

/// `_IO(';', 100 + nr)`: every VFIO ioctl has this form, whichever way its argument goes.
const fn request(nr: u32) -> Ioctl {
    libc::_IO(uapi::VFIO_TYPE as u32, uapi::VFIO_BASE + nr)
}

const DEVICE_GET_INFO: Ioctl = request(7);
const DEVICE_GET_REGION_INFO: Ioctl = request(8);
const DEVICE_GET_IRQ_INFO: Ioctl = request(9);
const DEVICE_SET_IRQS: Ioctl = request(10);
const DEVICE_RESET: Ioctl = request(11);
const DEVICE_FEATURE: Ioctl = request(17);
const DEVICE_BIND_IOMMUFD: Ioctl = request(18);
const DEVICE_ATTACH_IOMMUFD_PT: Ioctl = request(19);
const DEVICE_DETACH_IOMMUFD_PT: Ioctl = request(20);
// Goes to the data fd of a saving session, not to the device.
const MIG_GET_PRECOPY_INFO: Ioctl = request(21);

/// `VFIO_DEVICE_FEATURE` and its payload in one piece.
#[repr(C)]
struct Feature<T> {
    argsz: u32,
    flags: u32,
    payload: T,
}

/// Bytes of the header before the payload, `struct vfio_device_feature`.
const FEATURE_HEADER: usize = size_of::<uapi::vfio_device_feature>();
/// Words of `struct vfio_irq_set` before its data.
const IRQ_SET_WORDS: usize = size_of::<uapi::vfio_irq_set>() / 4;

/// Which way a feature is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// Ask.
    Get,
    /// Tell.
    Set,
}

impl Direction {
    fn flag(self) -> u32 {
        match self {
            Self::Get => uapi::VFIO_DEVICE_FEATURE_GET,
            Self::Set => uapi::VFIO_DEVICE_FEATURE_SET,
        }
    }
}

/// The size of a struct as its `argsz` field wants it. None of them comes near the limit.
fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Repeats a call that only asks while a signal interrupts it.
fn asking<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Issues one ioctl.
///
/// # Safety
/// `argument` must be what `request` takes on this kind of file: null where it takes none, else a pointer to its
/// struct, initialised, with every length in it true and every pointer in it valid for what the kernel does there
/// for as long as the kernel may do it.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: Ioctl, argument: *mut T) -> io::Result<i32> {
    // SAFETY: `fd` is open while it is borrowed, and the caller vouches for the argument.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// Uses one feature and returns the payload as the kernel left it.
///
/// # Safety
/// `T` must be the payload of `feature` (or `()` where it has none), valid whatever bytes the kernel writes there,
/// and any pointer in it valid as for [`ioctl`].
unsafe fn feature<T>(
    device: BorrowedFd<'_>,
    feature: u32,
    direction: Direction,
    payload: T,
) -> io::Result<T> {
    let mut argument = Feature {
        argsz: u32::try_from(FEATURE_HEADER + size_of::<T>()).unwrap_or(u32::MAX),
        flags: feature | direction.flag(),
        payload,
    };
    // SAFETY: header and payload are one `repr(C)` value of at least `argsz` bytes; the caller vouches for the rest.
    unsafe { ioctl(device, DEVICE_FEATURE, &raw mut argument) }?;
    Ok(argument.payload)
}

/// Whether the device has a feature in this direction. Nothing is done.
pub(super) fn probe(device: BorrowedFd<'_>, feature: u32, direction: Direction) -> io::Result<()> {
    asking(|| {
        let mut argument = Feature {
            argsz: argsz::<uapi::vfio_device_feature>(),
            flags: feature | direction.flag() | uapi::VFIO_DEVICE_FEATURE_PROBE,
            payload: (),
        };
        // SAFETY: a probe reads the header alone, and the header is there in full.
        unsafe { ioctl(device, DEVICE_FEATURE, &raw mut argument) }.map(drop)
    })
}

/// The device's migration flags.
pub(super) fn migration_flags(device: BorrowedFd<'_>) -> io::Result<u64> {
    asking(|| {
        let payload = uapi::vfio_device_feature_migration { flags: 0 };
        // SAFETY: the payload of this feature, which is one integer.
        unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_MIGRATION, Direction::Get, payload) }
            .map(|answer| answer.flags)
    })
}

/// The kernel's number of the migration state that the device is in.
pub(super) fn migration_state(device: BorrowedFd<'_>) -> io::Result<u32> {
    asking(|| {
        let payload = uapi::vfio_device_feature_mig_state { device_state: 0, data_fd: -1 };
        // SAFETY: the payload of this feature, which is two integers. A GET opens no fd.
        unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, Direction::Get, payload) }
            .map(|answer| answer.device_state)
    })
}

/// Moves the device to a state and returns the data fd that this opened, if it opened one.
pub(super) fn set_migration_state(device: BorrowedFd<'_>, state: u32) -> io::Result<Option<OwnedFd>> {
    let payload = uapi::vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
    // SAFETY: the payload of this feature, which is two integers.
    let answer =
        unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, Direction::Set, payload) }?;
    // On success the kernel has overwritten `data_fd`: -1, or an fd that it has just installed for this process.
    // After a failure the field means nothing, and `?` above has left it alone.
    Ok((answer.data_fd >= 0).then(|| {
        // SAFETY: the call succeeded, so the fd is open, and nobody else knows its number.
        unsafe { OwnedFd::from_raw_fd(answer.data_fd) }
    }))
}

/// How many bytes a stop-copy would take, as the driver sees it.
pub(super) fn migration_data_size(device: BorrowedFd<'_>) -> io::Result<u64> {
    asking(|| {
        let payload = uapi::vfio_device_feature_mig_data_size { stop_copy_length: 0 };
        // SAFETY: the payload of this feature, which is one integer.
        unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, Direction::Get, payload) }
            .map(|answer| answer.stop_copy_length)
    })
}

/// Opts in to the second version of the pre-copy info, whose flags mean something.
pub(super) fn opt_in_to_precopy_info_v2(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this feature takes no payload.
    unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, Direction::Set, ()) }
}

/// What is left to pre-copy. Flags are zero going in, because a first-version kernel hands back what it got.
pub(super) fn precopy_info(data: BorrowedFd<'_>) -> io::Result<uapi::vfio_precopy_info> {
    asking(|| {
        let mut info = uapi::vfio_precopy_info {
            argsz: argsz::<uapi::vfio_precopy_info>(),
            flags: 0,
            initial_bytes: 0,
            dirty_bytes: 0,
        };
        // SAFETY: the struct of this request, integers only.
        unsafe { ioctl(data, MIG_GET_PRECOPY_INFO, &raw mut info) }?;
        Ok(info)
    })
}

/// Starts the DMA log over ranges of (address, bytes) and returns the page size in force.
pub(super) fn dma_log_start(
    device: BorrowedFd<'_>,
    page_bytes: u64,
    ranges: &[(u64, u64)],
) -> io::Result<u64> {
    let ranges: Vec<uapi::vfio_device_feature_dma_logging_range> = ranges
        .iter()
        .map(|&(iova, length)| uapi::vfio_device_feature_dma_logging_range { iova, length })
        .collect();
    let payload = uapi::vfio_device_feature_dma_logging_control {
        page_size: page_bytes,
        num_ranges: u32::try_from(ranges.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        __reserved: 0,
        ranges: ranges.as_ptr() as u64,
    };
    // SAFETY: `ranges` has `num_ranges` elements, outlives the call, and is only read.
    unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START, Direction::Set, payload) }
        .map(|answer| answer.page_size)
}

/// Stops the DMA log.
pub(super) fn dma_log_stop(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this feature takes no payload.
    unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, Direction::Set, ()) }
}

/// Sets a bit of `bitmap` for each page of the range that was written since the last report.
///
/// EINVAL, without asking, where the bitmap is shorter than a bit for each page.
pub(super) fn dma_log_report(
    device: BorrowedFd<'_>,
    iova: u64,
    length_bytes: u64,
    page_bytes: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    let room = u64::try_from(size_of_val(bitmap)).unwrap_or(u64::MAX).saturating_mul(8);
    if page_bytes == 0 || length_bytes.div_ceil(page_bytes) > room {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let payload = uapi::vfio_device_feature_dma_logging_report {
        iova,
        length: length_bytes,
        page_size: page_bytes,
        bitmap: bitmap.as_mut_ptr() as u64,
    };
    // SAFETY: the kernel sets bits in the first `length / page_size` bits, rounded up to whole words, of `bitmap`;
    // it has room for them by the check above, and is borrowed for writing until the call is over.
    unsafe { feature(device, uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, Direction::Get, payload) }
        .map(drop)
}

/// Resets the device.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this request takes no argument.
    unsafe { ioctl(device, DEVICE_RESET, ptr::null_mut::<c_void>()) }.map(drop)
}

/// What kind of device it is: flags, number of regions and of interrupt kinds.
pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<uapi::vfio_device_info> {
    asking(|| {
        let mut info =
            uapi::vfio_device_info { argsz: argsz::<uapi::vfio_device_info>(), ..Default::default() };
        // SAFETY: the struct of this request, integers only; capabilities beyond `argsz` are not written.
        unsafe { ioctl(device, DEVICE_GET_INFO, &raw mut info) }?;
        Ok(info)
    })
}

/// Where a region of the device lies in its file.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<uapi::vfio_region_info> {
    asking(|| {
        let mut info =
            uapi::vfio_region_info { argsz: argsz::<uapi::vfio_region_info>(), index, ..Default::default() };
        // SAFETY: the struct of this request, integers only; capabilities beyond `argsz` are not written.
        unsafe { ioctl(device, DEVICE_GET_REGION_INFO, &raw mut info) }?;
        Ok(info)
    })
}

/// How many vectors an interrupt kind has.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<uapi::vfio_irq_info> {
    asking(|| {
        let mut info =
            uapi::vfio_irq_info { argsz: argsz::<uapi::vfio_irq_info>(), index, ..Default::default() };
        // SAFETY: the struct of this request, integers only.
        unsafe { ioctl(device, DEVICE_GET_IRQ_INFO, &raw mut info) }?;
        Ok(info)
    })
}

/// What to do with the vectors of an interrupt kind.
#[derive(Debug, Clone, Copy)]
pub(super) enum Irqs<'a> {
    /// Arm from vector 0 with these eventfds.
    Arm(&'a [BorrowedFd<'a>]),
    /// Disarm all.
    Disarm,
    /// Signal one vector's eventfd, as the device would.
    Trigger(u32),
    /// "Signal one vector's eventfd, if false": changes nothing, and succeeds only where the kind is armed.
    Ask(u32),
}

/// Arms, disarms, signals or asks. ENOSPC where the host has too few vectors left.
pub(super) fn set_irqs(device: BorrowedFd<'_>, index: u32, irqs: Irqs<'_>) -> io::Result<()> {
    // `data` is the kernel's fd array, or for `Ask` one byte (false), padded to a word.
    let (kind, start, count, data): (u32, u32, usize, Vec<RawFd>) = match irqs {
        Irqs::Arm(eventfds) => (
            uapi::VFIO_IRQ_SET_DATA_EVENTFD,
            0,
            eventfds.len(),
            eventfds.iter().map(AsRawFd::as_raw_fd).collect(),
        ),
        Irqs::Disarm => (uapi::VFIO_IRQ_SET_DATA_NONE, 0, 0, Vec::new()),
        Irqs::Trigger(vector) => (uapi::VFIO_IRQ_SET_DATA_NONE, vector, 1, Vec::new()),
        Irqs::Ask(vector) => (uapi::VFIO_IRQ_SET_DATA_BOOL, vector, 1, vec![0]),
    };
    let too_many = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let bytes = u32::try_from((IRQ_SET_WORDS + data.len()) * 4).map_err(too_many)?;
    let count = u32::try_from(count).map_err(too_many)?;
    let mut words = vec![bytes, kind | uapi::VFIO_IRQ_SET_ACTION_TRIGGER, index, start, count];
    words.extend(data.iter().map(|fd| fd.cast_unsigned()));
    // SAFETY: `vfio_irq_set` is five words and its data; `words` holds them in that order, as many bytes as its
    // first word says and as `count` calls for. The fds are borrowed, hence open, until the call is over.
    let short = unsafe { ioctl(device, DEVICE_SET_IRQS, words.as_mut_ptr()) }?;
    // vfio-pci answers the number of vectors that the host has left where that is less than was asked for, and has
    // then armed none.
    if short == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOSPC)) }
}

/// Gives an opened cdev to an iommufd, which opens the device proper. Returns its id there.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bind = uapi::vfio_device_bind_iommufd {
        argsz: argsz::<uapi::vfio_device_bind_iommufd>(),
        flags: 0,
        iommufd: iommufd.as_raw_fd(),
        out_devid: 0,
        token_uuid_ptr: 0,
    };
    // SAFETY: the struct of this request; without the flag that says so its token pointer is not looked at.
    unsafe { ioctl(device, DEVICE_BIND_IOMMUFD, &raw mut bind) }?;
    Ok(bind.out_devid)
}

/// Attaches a bound device to an address space of its iommufd.
pub(super) fn attach_ioas(device: BorrowedFd<'_>, ioas_id: u32) -> io::Result<()> {
    let mut attach = uapi::vfio_device_attach_iommufd_pt {
        argsz: argsz::<uapi::vfio_device_attach_iommufd_pt>(),
        flags: 0,
        pt_id: ioas_id,
        pasid: 0,
    };
    // SAFETY: the struct of this request, integers only.
    unsafe { ioctl(device, DEVICE_ATTACH_IOMMUFD_PT, &raw mut attach) }.map(drop)
}

/// Takes a bound device out of its address space, for every holder of the file.
pub(super) fn detach_ioas(device: BorrowedFd<'_>) -> io::Result<()> {
    let mut detach = uapi::vfio_device_detach_iommufd_pt {
        argsz: argsz::<uapi::vfio_device_detach_iommufd_pt>(),
        flags: 0,
        pasid: 0,
    };
    // SAFETY: the struct of this request, integers only.
    unsafe { ioctl(device, DEVICE_DETACH_IOMMUFD_PT, &raw mut detach) }.map(drop)
}

/// A duplicate (`F_DUPFD_CLOEXEC`) of the device fd inside vfio-ioctls' value.
pub(super) fn duplicate_device(device: &VfioDevice) -> io::Result<OwnedFd> {
    // SAFETY: the value owns the fd and is borrowed for as long as the number is used here.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }.try_clone_to_owned()
}

/// A duplicate (`F_DUPFD_CLOEXEC`) of the container fd inside vfio-ioctls' value.
pub(super) fn duplicate_container(container: &VfioContainer) -> io::Result<OwnedFd> {
    // SAFETY: the value owns the fd and is borrowed for as long as the number is used here.
    unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The numbers in full, as `strace` shows them, so that neither the base nor an offset can drift unseen.
    #[test]
    fn requests_are_those_of_the_uapi() {
        let all = [
            (DEVICE_GET_INFO, 0x3b6b),
            (DEVICE_GET_REGION_INFO, 0x3b6c),
            (DEVICE_GET_IRQ_INFO, 0x3b6d),
            (DEVICE_SET_IRQS, 0x3b6e),
            (DEVICE_RESET, 0x3b6f),
            (DEVICE_FEATURE, 0x3b75),
            (DEVICE_BIND_IOMMUFD, 0x3b76),
            (DEVICE_ATTACH_IOMMUFD_PT, 0x3b77),
            (DEVICE_DETACH_IOMMUFD_PT, 0x3b78),
            (MIG_GET_PRECOPY_INFO, 0x3b79),
        ];
        for (request, number) in all {
            assert_eq!(request, number, "{request:#x}");
        }
    }

    #[test]
    fn structs_have_the_sizes_of_the_uapi() {
        assert_eq!(FEATURE_HEADER, 8);
        assert_eq!(IRQ_SET_WORDS, 5);
        assert_eq!(offset_of!(Feature<u64>, payload), FEATURE_HEADER);
        assert_eq!(offset_of!(Feature<uapi::vfio_device_feature_mig_state>, payload), FEATURE_HEADER);
        assert_eq!(
            offset_of!(Feature<uapi::vfio_device_feature_dma_logging_report>, payload),
            FEATURE_HEADER
        );
        assert_eq!(size_of::<uapi::vfio_device_feature_migration>(), 8);
        assert_eq!(size_of::<uapi::vfio_device_feature_mig_state>(), 8);
        assert_eq!(size_of::<uapi::vfio_device_feature_mig_data_size>(), 8);
        assert_eq!(size_of::<uapi::vfio_device_feature_dma_logging_control>(), 24);
        assert_eq!(size_of::<uapi::vfio_device_feature_dma_logging_range>(), 16);
        assert_eq!(size_of::<uapi::vfio_device_feature_dma_logging_report>(), 32);
        assert_eq!(size_of::<uapi::vfio_precopy_info>(), 24);
    }

    #[test]
    fn features_have_the_numbers_of_the_uapi() {
        assert_eq!(
            [
                uapi::VFIO_DEVICE_FEATURE_MIGRATION,
                uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
                uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
                uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
                uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
                uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
                uapi::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
            ],
            [1, 2, 6, 7, 8, 9, 12]
        );
        assert_eq!(uapi::VFIO_PRECOPY_INFO_REINIT, 1);
    }

    /// A file that is no VFIO device: the kernel refuses every request, and no answer is made up.
    #[test]
    fn a_file_of_another_kind_is_refused_by_the_kernel() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsFd::as_fd(&null);
        let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(errno(migration_state(fd).map(drop)), Some(libc::ENOTTY));
        assert_eq!(errno(set_migration_state(fd, 2).map(drop)), Some(libc::ENOTTY));
        assert_eq!(errno(reset(fd)), Some(libc::ENOTTY));
        assert_eq!(errno(set_irqs(fd, 2, Irqs::Arm(&[fd]))), Some(libc::ENOTTY));
        assert_eq!(errno(precopy_info(fd).map(drop)), Some(libc::ENOTTY));
    }

    #[test]
    fn a_bitmap_that_is_too_short_never_reaches_the_kernel() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let fd = std::os::fd::AsFd::as_fd(&null);
        let report = |pages: u64, bitmap: &mut [u64]| {
            dma_log_report(fd, 0, pages * 4096, 4096, bitmap).unwrap_err().raw_os_error()
        };
        assert_eq!(report(64, &mut [0]), Some(libc::ENOTTY));
        assert_eq!(report(65, &mut [0]), Some(libc::EINVAL));
        assert_eq!(report(1, &mut []), Some(libc::EINVAL));
    }
}
