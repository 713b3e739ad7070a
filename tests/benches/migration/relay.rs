//! A relay on loopback: bytes at a rate, and one connection that is cut.
//!
//! ```text
//!   source --TCP--> Relay --TCP--> destination      up: at the rate; the first connection that carries so many is cut
//!                                                   down: as they are
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;

/// What may go through at once, in bytes: as in the token bucket of the kernel's link.
const BURST_BYTES: u64 = 256 << 10;

pub(crate) struct Relay;

impl Relay {
    /// Where somebody is reached through it.
    pub(crate) async fn start(to: SocketAddr, bytes_s: Option<u64>, cut_after: Option<u64>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let was_cut = Arc::new(AtomicBool::new(false));
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(to).await else { continue };
                let was_cut = Arc::clone(&was_cut);
                tokio::spawn(async move {
                    near.set_nodelay(true).unwrap();
                    far.set_nodelay(true).unwrap();
                    let (near_in, near_out) = near.into_split();
                    let (far_in, far_out) = far.into_split();
                    // Whichever ends first ends both.
                    tokio::select! {
                        () = pump(near_in, far_out, bytes_s, cut_after, &was_cut) => {}
                        () = pump(far_in, near_out, None, None, &was_cut) => {}
                    }
                });
            }
        });
        address
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    bytes_s: Option<u64>,
    cut_after: Option<u64>,
    was_cut: &AtomicBool,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut carried = 0_u64;
    // When the bucket would be full, had nothing more gone through.
    let mut full_at = Instant::now();
    while let Ok(got @ 1..) = from.read(&mut buffer).await {
        carried += got as u64;
        if cut_after.is_some_and(|most| carried > most) && !was_cut.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Some(bytes_s) = bytes_s {
            let cost = |bytes: u64| Duration::from_nanos(bytes * 1_000_000_000 / bytes_s);
            full_at = full_at.max(Instant::now()) + cost(got as u64);
            tokio::time::sleep_until(full_at - cost(BURST_BYTES)).await;
        }
        if to.write_all(&buffer[..got]).await.is_err() {
            return;
        }
    }
}
