//! What is between two agents: a port that stays the same while the agent behind it is started anew, and a wire that can
//! be cut, or go silent.
//!
//! ```text
//!   agent --> 127.0.0.1:port --Way::To--> the other agent
//!                            --Way::Nowhere--> refused: the connection ends at once
//!                            --Way::Silent--> taken, read, and never answered or ended
//! ```
//! # Invariants
//! - A connection that was silent once stays so. What is opened after the way is free again works.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Where the port leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Nowhere,
    To(SocketAddr),
    Silent,
}

/// A port before an agent.
#[derive(Debug)]
pub(crate) struct Relay {
    port: u16,
    way: watch::Sender<Way>,
    /// Rises with each cut.
    cuts: watch::Sender<u32>,
    serving: JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (way, cuts) = (watch::Sender::new(Way::Nowhere), watch::Sender::new(0));
        let (ways, cut) = (way.clone(), cuts.clone());
        let serving = tokio::spawn(async move {
            // They end with this task.
            let mut carried = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                carried.spawn(carry(near, ways.subscribe(), cut.subscribe()));
                while carried.try_join_next().is_some() {}
            }
        });
        Self { port, way, cuts, serving }
    }

    /// Where an agent calls the other one.
    pub(crate) fn endpoint(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    pub(crate) fn lead(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// Ends every connection that there is.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn carry(mut near: TcpStream, mut ways: watch::Receiver<Way>, mut cuts: watch::Receiver<u32>) {
    cuts.mark_unchanged();
    let way = *ways.borrow_and_update();
    let mut far = match way {
        Way::Nowhere => return,
        Way::To(address) => match TcpStream::connect(address).await {
            Ok(far) => Some(far),
            Err(_) => return,
        },
        Way::Silent => None,
    };
    if let Some(far) = &mut far {
        tokio::select! {
            _ended = copy_bidirectional(&mut near, far) => return,
            _cut = cuts.changed() => return,
            _silent = ways.wait_for(|way| *way == Way::Silent) => {}
        }
    }
    // Whoever sends finds that it is taken, so that nothing but silence tells.
    tokio::select! {
        () = swallow(&mut near) => {}
        () = async {
            match &mut far {
                Some(far) => swallow(far).await,
                None => std::future::pending().await,
            }
        } => {}
        _cut = cuts.changed() => return,
    }
    // One side has ended, and the other is not told.
    let _ = cuts.changed().await;
}

async fn swallow(from: &mut TcpStream) {
    let mut buffer = vec![0; 16 << 10];
    while from.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
