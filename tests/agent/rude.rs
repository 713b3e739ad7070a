//! What an agent bears of a client that is rude on HTTP/2.
//!
//! ```text
//!   TLS --> Rude: frames by hand --> agent
//!                 HEADERS, RST_STREAM, WINDOW_UPDATE as no library sends them
//! ```
//! A library keeps to what the agent announces, so the limits are tried without one. Each time the agent goes on serving
//! others.

use std::collections::BTreeMap;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_server::serve::Agent;

use crate::flow::{connection, soon};
use crate::lab::{Lab, start};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

const MAX_CONCURRENT_STREAMS: u16 = 3;
const MAX_HEADER_LIST_SIZE: u16 = 6;

const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;

/// One frame, either way.
#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&u32::try_from(self.payload.len()).unwrap().to_be_bytes()[1..]);
        out.extend_from_slice(&[self.kind, self.flags]);
        out.extend_from_slice(&self.stream.to_be_bytes());
        out.extend_from_slice(&self.payload);
    }

    /// What `RST_STREAM` and GOAWAY say.
    fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Frame {
    Frame { kind, flags, stream, payload: payload.to_vec() }
}

/// The headers of a gRPC call, without any compression, and one more header so long.
fn call(stream: u32, more_bytes: usize) -> Frame {
    let mut block = vec![0x83, 0x87];
    let mut literal = |name: &[u8], value: &[u8]| {
        block.extend_from_slice(name);
        // An integer with a prefix of 7 bits.
        match value.len().checked_sub(127) {
            None => block.push(u8::try_from(value.len()).unwrap()),
            Some(rest) => {
                block.push(127);
                let mut rest = rest;
                while rest >= 128 {
                    block.push(u8::try_from(rest % 128 + 128).unwrap());
                    rest /= 128;
                }
                block.push(u8::try_from(rest).unwrap());
            }
        }
        block.extend_from_slice(value);
    };
    literal(&[0x01], b"agent.lab");
    literal(&[0x04], b"/vfio.checkpoint.v1.DeviceService/ListDevices");
    literal(&[0x0f, 0x10], b"application/grpc");
    literal(b"\x00\x02te", b"trailers");
    if more_bytes > 0 {
        literal(b"\x00\x04more", &vec![b'x'; more_bytes]);
    }
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// The rest of such a call: an empty message.
fn message(stream: u32) -> Frame {
    frame(DATA, END_STREAM, stream, &[0; 5])
}

fn reset(stream: u32) -> Frame {
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

/// A client that says what it likes.
struct Rude {
    tls: TlsStream<TcpStream>,
    settings: BTreeMap<u16, u32>,
}

impl Rude {
    async fn connect(lab: &Lab, agent: &Agent) -> Self {
        let mut tls = connection(lab, agent, "spiffe://lab.test/viewer/rude").await;
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        frame(SETTINGS, 0, 0, &[]).encode(&mut hello);
        tls.write_all(&hello).await.unwrap();
        let mut rude = Self { tls, settings: BTreeMap::new() };
        let settings = rude.until(|frame| frame.kind == SETTINGS).await;
        let entries = settings.payload.chunks_exact(6);
        rude.settings = entries
            .map(|entry| {
                let (id, value) = entry.split_at(2);
                (u16::from_be_bytes(id.try_into().unwrap()), u32::from_be_bytes(value.try_into().unwrap()))
            })
            .collect();
        rude
    }

    /// Says all of it at once.
    async fn say(&mut self, frames: impl IntoIterator<Item = Frame>) {
        let mut bytes = Vec::new();
        frames.into_iter().for_each(|frame| frame.encode(&mut bytes));
        self.tls.write_all(&bytes).await.unwrap();
        self.tls.flush().await.unwrap();
    }

    async fn hear(&mut self) -> Frame {
        let mut head = [0; 9];
        self.tls.read_exact(&mut head).await.expect("the agent says why before it hangs up");
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.tls.read_exact(&mut payload).await.unwrap();
        Frame { kind, flags, stream: u32::from_be_bytes(stream), payload }
    }

    async fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Frame {
        let hearing = async {
            loop {
                let frame = self.hear().await;
                if wanted(&frame) {
                    return frame;
                }
                assert_ne!(frame.kind, GOAWAY, "{frame:?}");
            }
        };
        soon(hearing).await
    }

    /// The end of a stream: its last headers, or its reset.
    async fn end_of(&mut self, stream: u32) -> Frame {
        let ends = |frame: &Frame| {
            frame.stream == stream
                && (frame.kind == RST_STREAM || frame.kind == HEADERS && frame.flags & END_STREAM != 0)
        };
        self.until(ends).await
    }
}

/// Others are served, whatever was done.
async fn serves(lab: &Lab, agent: &Agent) {
    let viewer = lab.client(agent, "viewer").await;
    soon(viewer.list_devices(v1::ListDevicesRequest::default())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn more_streams_than_are_announced_are_refused_one_by_one() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[]);
    config.server.max_concurrent_streams = 4;
    let agent = start(config).await;
    let mut rude = Rude::connect(&lab, &agent).await;
    assert_eq!(rude.settings.get(&MAX_CONCURRENT_STREAMS), Some(&4));
    // Calls that have not said all: they wait.
    rude.say([1, 3, 5, 7, 9].map(|stream| call(stream, 0))).await;
    let refused = rude.end_of(9).await;
    assert_eq!((refused.kind, refused.code()), (RST_STREAM, REFUSED_STREAM), "{refused:?}");
    serves(&lab, &agent).await;
    // The others go on, and each that ends makes room.
    rude.say([message(3)]).await;
    assert_eq!(rude.end_of(3).await.kind, HEADERS);
    rude.say([call(11, 0), message(11)]).await;
    assert_eq!(rude.end_of(11).await.kind, HEADERS);
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_too_long_are_refused_and_nothing_else_is() {
    let lab = Lab::new();
    let mut config = lab.config("a", &[]);
    config.server.max_header_bytes = 4096;
    let agent = start(config).await;
    let mut rude = Rude::connect(&lab, &agent).await;
    assert_eq!(rude.settings.get(&MAX_HEADER_LIST_SIZE), Some(&4096));
    // As the HTTP/2 library encodes `:status 431`, or a reset, which says less.
    let refused = |frame: &Frame| {
        frame.kind == RST_STREAM || frame.payload.starts_with(&[0x48, 0x83, 0x69, 0x90, 0xff])
    };
    rude.say([call(1, 8000), message(1)]).await;
    let end = rude.until(|frame| frame.stream == 1).await;
    assert!(refused(&end), "{end:?}");
    rude.say([call(3, 2000), message(3)]).await;
    let end = rude.until(|frame| frame.stream == 3).await;
    assert!(!refused(&end), "{end:?}");
    serves(&lab, &agent).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_streams_that_are_reset_at_once_ends_its_connection() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[])).await;
    let mut rude = Rude::connect(&lab, &agent).await;
    // Within one record of TLS, so that nobody looks at a stream before it is reset.
    let flood = (0..100).flat_map(|number| [call(2 * number + 1, 0), reset(2 * number + 1)]);
    rude.say(flood).await;
    let end = soon(async {
        loop {
            let frame = rude.hear().await;
            if frame.kind == GOAWAY {
                return frame;
            }
        }
    })
    .await;
    assert_eq!(end.code(), ENHANCE_YOUR_CALM, "{end:?}");
    serves(&lab, &agent).await;
    agent.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_streams_that_have_to_be_reset_here_ends_its_connection() {
    let lab = Lab::new();
    let agent = start(lab.config("a", &[])).await;
    let mut rude = Rude::connect(&lab, &agent).await;
    // A window that overflows is the stream's error, not the connection's.
    let overflow = |stream| frame(WINDOW_UPDATE, 0, stream, &0x7fff_ffff_u32.to_be_bytes());
    let flood = (0..120).flat_map(|number| [call(2 * number + 1, 0), overflow(2 * number + 1)]);
    rude.say(flood).await;
    let end = soon(async {
        loop {
            let frame = rude.hear().await;
            if frame.kind == GOAWAY {
                return frame;
            }
        }
    })
    .await;
    assert_eq!(end.code(), ENHANCE_YOUR_CALM, "{end:?}");
    serves(&lab, &agent).await;
    agent.stop().await.unwrap();
}
