//! A relay between a client and an agent, on which connections go wrong.
//!
//! ```text
//!   client --TCP--> Relay --TCP--> agent       bytes as they are: TLS goes through
//!                     cut_after(n): both ends are closed once so much went up
//!                     admit(n): whoever comes after n connections is turned away
//!                     cut(): both ends of every connection are closed
//!                     mute(): nothing goes either way any more, and nothing is closed
//!                     lead(): connections that come from now on go to somebody else
//! ```
//! Each connection is told what to do when it comes; the last instruction stands for all that follow.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use vfio_checkpoint_server::serve::Agent;

/// What becomes of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    /// It is well.
    Lasts,
    /// It breaks once so many bytes went towards the agent.
    CutAfter(u64),
}

/// What carries bytes to an agent and back.
pub(crate) struct Relay {
    address: SocketAddr,
    connections: watch::Receiver<usize>,
    turned_away: watch::Receiver<usize>,
    /// How many connections are let through.
    admitted: watch::Sender<usize>,
    mute: watch::Sender<Mute>,
    cut: watch::Sender<()>,
    to: watch::Sender<SocketAddr>,
}

/// What does not go through any more.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Mute {
    up: bool,
    down: bool,
}

impl Relay {
    pub(crate) async fn to(agent: &Agent, fates: &[Fate]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (count, connections) = watch::channel(0);
        let (turn_away, turned_away) = watch::channel(0);
        let admitted = watch::Sender::new(usize::MAX);
        let limit = admitted.subscribe();
        let mute = watch::Sender::new(Mute::default());
        let cut = watch::Sender::new(());
        let fates = Arc::new(Mutex::new(VecDeque::from(fates.to_vec())));
        let to = watch::Sender::new(agent.address());
        let (leads, muted, cuts) = (to.subscribe(), mute.subscribe(), cut.clone());
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if *count.borrow() >= *limit.borrow() {
                    turn_away.send_modify(|count| *count += 1);
                    continue;
                }
                let to = *leads.borrow();
                let Ok(far) = TcpStream::connect(to).await else { return };
                let fate = {
                    let mut fates = fates.lock().unwrap();
                    let next = fates.front().copied().unwrap_or(Fate::Lasts);
                    if fates.len() > 1 {
                        fates.pop_front();
                    }
                    next
                };
                count.send_modify(|count| *count += 1);
                tokio::spawn(carry(near, far, fate, muted.clone(), cuts.subscribe()));
            }
        });
        Self { address, connections, turned_away, admitted, mute, cut, to }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections there have been.
    pub(crate) fn connections(&self) -> usize {
        *self.connections.borrow()
    }

    /// So many connections in all are let through. The others are closed at once.
    pub(crate) fn admit(&self, connections: usize) {
        self.admitted.send_replace(connections);
    }

    /// Waits until so many were not.
    pub(crate) async fn turned_away(&self, connections: usize) {
        self.turned_away.clone().wait_for(|count| *count >= connections).await.unwrap();
    }

    /// Every connection that there is breaks. Those that come from now on are well.
    pub(crate) fn cut(&self) {
        self.cut.send_replace(());
    }

    /// Connections that come from now on go there.
    pub(crate) fn lead(&self, to: SocketAddr) {
        self.to.send_replace(to);
    }

    /// Nothing goes through any more, and no connection is closed.
    pub(crate) fn mute(&self) {
        self.mute.send_replace(Mute { up: true, down: true });
    }

    /// The same for what comes from the agent.
    pub(crate) fn mute_down(&self) {
        self.mute.send_replace(Mute { up: false, down: true });
    }

    /// Connections that come from now on are well again. Those that fell silent stay so.
    pub(crate) fn heal(&self) {
        self.mute.send_replace(Mute::default());
    }
}

async fn carry(
    near: TcpStream,
    far: TcpStream,
    fate: Fate,
    muted: watch::Receiver<Mute>,
    mut cuts: watch::Receiver<()>,
) {
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    let limit = match fate {
        Fate::Lasts => u64::MAX,
        Fate::CutAfter(bytes) => bytes,
    };
    // Whichever ends first ends both.
    tokio::select! {
        () = pump(near_in, far_out, limit, muted.clone(), |mute| mute.up) => {}
        () = pump(far_in, near_out, u64::MAX, muted, |mute| mute.down) => {}
        _ = cuts.changed() => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    limit: u64,
    mut muted: watch::Receiver<Mute>,
    is_muted: fn(&Mute) -> bool,
) {
    let mut left = limit;
    let mut bytes = vec![0; 16 << 10];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let got = tokio::select! {
            biased;
            muted = async { muted.wait_for(is_muted).await.is_ok() } => {
                if !muted {
                    return;
                }
                std::future::pending().await
            }
            got = from.read(&mut bytes[..most]) => got,
        };
        let Ok(got @ 1..) = got else { return };
        if to.write_all(&bytes[..got]).await.is_err() {
            return;
        }
        left -= got as u64;
    }
}
