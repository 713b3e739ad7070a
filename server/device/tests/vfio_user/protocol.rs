//! What each command answers.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::EventfdFlags;
use vfio_checkpoint_device::sim::SimConfig;
use vfio_checkpoint_device::vfio_user::codec::{
    Capabilities, Code, Command, DEVICE_INFO_BYTES, DeviceInfo, DmaMap, DmaUnmap, IRQ_INFO_BYTES, Kind,
    REGION_INFO_BYTES, Reply, SetIrqs, UnmapBitmap, Version,
};
use vfio_checkpoint_device::vfio_user::server::ServerOptions;
use vfio_checkpoint_fsm::State;

use crate::raw::Raw;
use crate::served::{Served, paired, slot, small};

const MSI: u32 = 1;
const MSIX: u32 = 2;
const NONE: u32 = 1;
const BOOL: u32 = 2;
const EVENTFD: u32 = 4;
const MASK: u32 = 8;
const TRIGGER: u32 = 32;

fn region(client: &mut Raw, index: u32) -> Result<(u64, u32), i32> {
    let body = client.call(&Command::GetRegionInfo { argsz: REGION_INFO_BYTES, index }, &[])?;
    let found = Reply::decode(Code::GetRegionInfo, &body).unwrap();
    let Reply::RegionInfo(info) = found else { panic!("not a region: {found:?}") };
    Ok((info.size_bytes, info.flags))
}

fn vectors(client: &mut Raw, index: u32) -> Result<u32, i32> {
    let body = client.call(&Command::GetIrqInfo { argsz: IRQ_INFO_BYTES, index }, &[])?;
    let found = Reply::decode(Code::GetIrqInfo, &body).unwrap();
    let Reply::IrqInfo(info) = found else { panic!("not an interrupt: {found:?}") };
    Ok(info.count)
}

fn info(client: &mut Raw) -> DeviceInfo {
    let body = client.call(&Command::GetInfo { argsz: DEVICE_INFO_BYTES }, &[]).unwrap();
    let found = Reply::decode(Code::GetInfo, &body).unwrap();
    let Reply::Info(info) = found else { panic!("not a device: {found:?}") };
    info
}

#[test]
fn versions_are_agreed_on_or_refused() {
    let served = Served::small();
    let client = served.attach();
    let told = client.server.unwrap();
    assert_eq!((told.major, told.minor), (0, 1));
    assert_eq!(told.capabilities.max_data_xfer_bytes, 1 << 20);
    assert_eq!(told.capabilities.migration_pgsize, Some(4096));
    assert!(told.capabilities.max_msg_fds >= 8);
    drop(client);

    let nothing = Capabilities { max_data_xfer_bytes: 0, ..Capabilities::default() };
    for refused in [Version { major: 1, ..Version::ours(Capabilities::default()) }, Version::ours(nothing)] {
        let mut client = Raw::new(served.connect());
        assert_eq!(client.call(&Command::Version(refused), &[]), Err(libc::EINVAL));
        client.assert_closed();
    }
    let mut client = Raw::new(served.connect());
    assert_eq!(client.call(&Command::Reset, &[]), Err(libc::EINVAL), "before a version");
    client.assert_closed();
    assert_eq!(served.slot.resets(), 1, "by the client that was one");

    let newer = Version { minor: 9, ..Version::ours(Capabilities::default()) };
    let mut client = Raw::new(served.connect());
    let body = client.call(&Command::Version(newer), &[]).unwrap();
    assert!(matches!(Reply::decode(Code::Version, &body), Ok(Reply::Version(Version { minor: 1, .. }))));
    assert_eq!(client.call(&Command::Version(newer), &[]), Err(libc::EINVAL), "once is enough");
    assert_eq!(client.state(), State::Running);
}

/// What a client says that it can receive bounds what it is sent, not what it sends.
#[test]
fn a_client_that_can_receive_little_may_send_as_much_as_it_was_told() {
    let served = Served::new(SimConfig { memory_bytes: 1 << 20, ..small() }, ServerOptions::default());
    let little = Capabilities { max_data_xfer_bytes: 1000, ..Capabilities::default() };
    let mut client = Raw::new(served.connect());
    client.call(&Command::Version(Version::ours(little)), &[]).unwrap();
    client.set_state(State::StopCopy).unwrap();
    let mut state = Vec::new();
    loop {
        let part = client.read(1 << 20).unwrap();
        assert!(part.len() <= 1000);
        if part.is_empty() {
            break;
        }
        state.extend(part);
    }
    client.set_state(State::Resuming).unwrap();
    for part in state.chunks(1 << 20) {
        client.write(part).unwrap();
    }
    client.set_state(State::Running).unwrap();
}

#[test]
fn the_device_is_a_pci_function() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    assert_eq!(info(&mut client), DeviceInfo { flags: 0b11, regions: 9, irqs: 5 });
    let sizes: Vec<u64> = (0..9).map(|index| region(&mut client, index).unwrap().0).collect();
    assert_eq!(sizes, [4096, 0, 0, 0, 0, 0, 0, 256, 0]);
    assert_eq!(region(&mut client, 7), Ok((256, 0b11)));
    assert_eq!(region(&mut client, 9), Err(libc::EINVAL));
    let counts: Vec<u32> = (0..5).map(|index| vectors(&mut client, index).unwrap()).collect();
    assert_eq!(counts, [0, 32, 64, 0, 0]);
    assert_eq!(vectors(&mut client, 5), Err(libc::EINVAL));
}

#[test]
fn a_device_without_a_configuration_space_shows_none() {
    let (slot, _time) = slot(SimConfig { pci: None, reset: false, ..small() });
    let mut client = paired(&slot);
    assert_eq!(info(&mut client).flags, 0b10);
    assert_eq!((0..9).map(|index| region(&mut client, index).unwrap().0).sum::<u64>(), 0);
    assert_eq!((0..5).map(|index| vectors(&mut client, index).unwrap()).sum::<u32>(), 0);
    assert_eq!(client.read_region(7, 0, 1), Err(libc::EINVAL));
    assert_eq!(client.reset(), Err(libc::EINVAL));
}

#[test]
fn configuration_space_can_be_walked_as_a_vmm_does() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let config = client.read_region(7, 0, 256).unwrap();
    assert_eq!(config[0x0e], 0, "a type 0 header");
    assert_eq!(config[0x06] & 0x10, 0x10, "with capabilities");
    let mut ids = Vec::new();
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        ids.push((config[at], at));
        at = usize::from(config[at + 1]);
    }
    assert_eq!(ids, [(0x05, 0x40), (0x11, 0x50)], "MSI, MSI-X");
    assert_eq!(u16::from_le_bytes([config[0x52], config[0x53]]) & 0x7ff, 63);

    // Sizing BAR 0, in one piece and byte by byte.
    client.write_region(7, 0x10, &[0xff; 4]).unwrap();
    assert_eq!(client.read_region(7, 0x10, 4).unwrap(), 0xffff_f000_u32.to_le_bytes());
    client.write_region(7, 0x10, &0xfe00_0000_u32.to_le_bytes()).unwrap();
    assert_eq!(client.read_region(7, 0x10, 4).unwrap(), 0xfe00_0000_u32.to_le_bytes());
    client.write_region(7, 0x14, &[0xff; 4]).unwrap();
    assert_eq!(client.read_region(7, 0x14, 4).unwrap(), [0; 4]);

    // The command register is the device's, by halves too; identity cannot be written.
    client.write_region(7, 0x04, &[0x46, 0x05]).unwrap();
    client.write_region(7, 0x05, &[0x04]).unwrap();
    client.write_region(7, 0x00, &[0xff; 4]).unwrap();
    let header = client.read_region(7, 0, 6).unwrap();
    assert_eq!((&header[..4], &header[4..]), (&config[..4], &[0x46, 0x04][..]));
    // A write across both ends of it.
    client.write_region(7, 0x03, &[0, 0x02, 0, 0xff]).unwrap();
    assert_eq!(client.read_region(7, 0x04, 2).unwrap(), [0x02, 0x00]);

    client.write_region(0, 16, b"an entry of the table").unwrap();
    assert_eq!(client.read_region(0, 16, 21).unwrap(), b"an entry of the table");
}

#[test]
fn no_access_reaches_past_a_region() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let past = [
        (7, 256, 1),
        (7, 255, 2),
        (7, 0, 257),
        (7, u64::MAX, 1),
        (0, 4096, 1),
        (0, 4000, 97),
        (1, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
        (7, 0, u32::MAX),
    ];
    for (region, offset, count) in past {
        assert_eq!(client.read_region(region, offset, count), Err(libc::EINVAL), "{region} {offset} {count}");
        let data = vec![0xff; usize::try_from(count.min(5000)).unwrap()];
        assert_eq!(client.write_region(region, offset, &data), Err(libc::EINVAL));
    }
    assert_eq!(client.read_region(7, 256, 0), Ok(vec![]), "nothing at the very end");
    assert_eq!(client.read_region(7, 4, 2), Ok(vec![0, 0]), "what was refused changed nothing");
}

fn eventfds(count: usize) -> Vec<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    (0..count).map(|_| rustix::event::eventfd(0, flags).unwrap()).collect()
}

fn rung(eventfd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(eventfd, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

fn set_irqs(client: &mut Raw, flags: u32, index: u32, span: (u32, u32), fds: &[OwnedFd]) -> Result<(), i32> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let request = SetIrqs { flags, index, start: span.0, count: span.1, data: &[] };
    client.call(&Command::SetIrqs(request), &fds).map(drop)
}

#[test]
fn interrupts_are_armed_piece_by_piece_and_ring() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let fds = eventfds(20);
    set_irqs(&mut client, TRIGGER | EVENTFD, MSIX, (0, 8), &fds[..8]).unwrap();
    // Vectors 8 and 9 stay without.
    set_irqs(&mut client, TRIGGER | EVENTFD, MSIX, (10, 10), &fds[10..]).unwrap();
    for vector in 0..20 {
        assert!(slot.raise_interrupt(vector).unwrap());
    }
    assert!(!slot.raise_interrupt(20).unwrap());
    let rings: Vec<u64> = fds.iter().map(rung).collect();
    assert_eq!(rings, [[1; 8].as_slice(), &[0; 2], &[1; 10]].concat());
    let config = client.read_region(7, 0x50, 4).unwrap();
    assert_eq!(config[3] & 0x80, 0x80, "MSI-X reads as enabled");

    // Asked whether it is armed; signalled by hand.
    let ask = |client: &mut Raw, vector, data| {
        let request = SetIrqs { flags: TRIGGER | BOOL, index: MSIX, start: vector, count: 1, data };
        client.call(&Command::SetIrqs(request), &[]).map(drop)
    };
    assert_eq!(ask(&mut client, 3, &[0]), Ok(()));
    assert_eq!(rung(&fds[3]), 0);
    assert_eq!(ask(&mut client, 3, &[1]), Ok(()));
    assert_eq!(rung(&fds[3]), 1);
    assert_eq!(ask(&mut client, 20, &[0]), Err(libc::EINVAL));
    assert_eq!(ask(&mut client, 3, &[1, 1]), Err(libc::EINVAL), "a byte too many");
    set_irqs(&mut client, TRIGGER | NONE, MSIX, (4, 2), &[]).unwrap();
    assert_eq!([rung(&fds[4]), rung(&fds[5]), rung(&fds[6])], [1, 1, 0]);

    // One vector less, then none.
    set_irqs(&mut client, TRIGGER | EVENTFD, MSIX, (15, 5), &[]).unwrap();
    assert!(slot.raise_interrupt(14).unwrap());
    assert!(!slot.raise_interrupt(15).unwrap());
    set_irqs(&mut client, TRIGGER | NONE, MSIX, (0, 0), &[]).unwrap();
    assert!(!slot.raise_interrupt(0).unwrap());
    assert_eq!(ask(&mut client, 0, &[0]), Err(libc::EINVAL));
    set_irqs(&mut client, TRIGGER | EVENTFD, MSI, (0, 1), &fds[..1]).unwrap();
}

#[test]
fn requests_for_interrupts_that_make_no_sense_are_refused() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let fds = eventfds(3);
    set_irqs(&mut client, TRIGGER | EVENTFD, MSIX, (0, 2), &fds[..2]).unwrap();
    let refused = [
        (TRIGGER | EVENTFD, MSIX, (0, 3), &fds[..2]),
        (TRIGGER | EVENTFD, MSIX, (63, 2), &fds[..2]),
        (TRIGGER | EVENTFD, MSIX, (u32::MAX, 2), &fds[..2]),
        (TRIGGER | EVENTFD, MSIX, (0, u32::MAX), &fds[..0]),
        (TRIGGER | EVENTFD, MSI, (0, 1), &fds[..1]),
        (TRIGGER | EVENTFD, 0, (0, 1), &fds[..1]),
        (TRIGGER | EVENTFD, 77, (0, 1), &fds[..1]),
        (TRIGGER | EVENTFD | BOOL, MSIX, (0, 1), &fds[..1]),
        (TRIGGER | MASK | EVENTFD, MSIX, (0, 1), &fds[..1]),
        (TRIGGER | NONE, MSIX, (0, 1), &fds[..1]),
        (TRIGGER | NONE, MSIX, (1, 0), &fds[..0]),
        (EVENTFD, MSIX, (0, 1), &fds[..1]),
        (0, MSIX, (0, 0), &fds[..0]),
    ];
    for (flags, index, span, fds) in refused {
        assert_eq!(
            set_irqs(&mut client, flags, index, span, fds),
            Err(libc::EINVAL),
            "{flags:#x} {index} {span:?}"
        );
    }
    assert_eq!(set_irqs(&mut client, MASK | NONE, MSIX, (0, 1), &[]), Err(libc::ENOTTY));
    let file = [OwnedFd::from(std::fs::File::open("/dev/null").unwrap())];
    assert_eq!(set_irqs(&mut client, TRIGGER | EVENTFD, MSIX, (0, 1), &file), Err(libc::EINVAL));
    assert!(slot.raise_interrupt(1).unwrap(), "what was armed before still is");
    assert_eq!([rung(&fds[0]), rung(&fds[1])], [0, 1]);
}

#[test]
fn dma_windows_are_mapped_once_and_unmapped_whole() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    let memory = std::fs::File::open("/dev/zero").unwrap();
    let map = |flags, iova, length_bytes| Command::DmaMap(DmaMap { flags, offset: 0, iova, length_bytes });
    let unmap = |flags, iova, length_bytes, bitmap| {
        Command::DmaUnmap(DmaUnmap { argsz: 64, flags, iova, length_bytes, bitmap })
    };
    client.call(&map(0b11, 0x1000, 0x1000), &[]).unwrap();
    client.call(&map(0b111, 0x2000, 0x1000), &[memory.as_fd()]).unwrap();
    assert_eq!(client.call(&map(0b11, 0x2fff, 1), &[]), Err(libc::EEXIST));
    assert_eq!(
        client.call(&map(0b111, 0x9000, 1), &[]),
        Err(libc::EINVAL),
        "mapped by a file that did not come"
    );
    assert_eq!(client.call(&map(1 << 9, 0x9000, 1), &[]), Err(libc::EINVAL));
    assert_eq!(client.call(&map(0b11, 0x9000, 0), &[]), Err(libc::EINVAL));
    assert_eq!(client.call(&map(0b11, 0x9000, 1), &[memory.as_fd(), memory.as_fd()]), Err(libc::EINVAL));
    assert_eq!(client.call(&unmap(0, 0x1000, 0x2000, None), &[]), Err(libc::ENOENT));
    let body = client.call(&unmap(0, 0x1000, 0x1000, None), &[]).unwrap();
    let expected = Reply::DmaUnmap { flags: 0, iova: 0x1000, length_bytes: 0x1000, bitmap: &[] };
    assert_eq!(Reply::decode(Code::DmaUnmap, &body).unwrap(), expected);
    let bitmap = Some(UnmapBitmap { page_bytes: 4096, bitmap_bytes: 8 });
    assert_eq!(
        client.call(&unmap(DmaUnmap::GET_DIRTY_BITMAP, 0x2000, 0x1000, bitmap), &[]),
        Err(libc::EOPNOTSUPP)
    );
    assert_eq!(client.call(&unmap(DmaUnmap::ALL, 1, 0, None), &[]), Err(libc::EINVAL));
    client.call(&unmap(DmaUnmap::ALL, 0, 0, None), &[]).unwrap();
    client.call(&map(0b11, 0x2000, 0x1000), &[]).unwrap();
}

#[test]
fn a_command_that_wants_no_reply_gets_none() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    client.send(&Command::Reset, true, &[]);
    client.send(&Command::RegionRead { region: 77, offset: 0, count: 1 }, true, &[]);
    client.send(&Command::Other { code: Code::Unknown(99), body: b"?" }, true, &[]);
    let id = client.send(&Command::GetInfo { argsz: DEVICE_INFO_BYTES }, false, &[]);
    let (header, _) = client.receive().unwrap();
    assert_eq!((header.id, header.code, header.kind), (id, Code::GetInfo, Kind::Reply));
    assert_eq!(slot.resets(), 1);
}

#[test]
fn commands_that_the_server_does_not_know_are_refused_by_name() {
    let (slot, _time) = slot(small());
    let mut client = paired(&slot);
    for code in [Code::Unknown(14), Code::Unknown(99), Code::GetRegionIoFds, Code::RegionWriteMulti] {
        assert_eq!(client.call(&Command::Other { code, body: b"whatever" }, &[]), Err(libc::EOPNOTSUPP));
    }
    assert_eq!(client.call(&Command::DmaRead { iova: 0, count: 1 }, &[]), Err(libc::EINVAL));
    assert_eq!(client.call(&Command::DmaWrite { iova: 0, data: b"x" }, &[]), Err(libc::EINVAL));
    assert_eq!(client.state(), State::Running);
}
