//! What is between the two agents: a link of a rate.
//!
//! ```text
//!   this program --unshare--> this program, in namespace A: harness, source -- veth, tbf -- namespace B: destination
//!   where that is not to be had: source -- token-bucket relay in the harness -- destination, all on loopback
//! ```
//! Namespaces have no names: they and what is in them are gone with the last process in them, however it ends. Which of the
//! two ways a run had is in its document.

use std::env;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;

use crate::child::Child;
use crate::namespaces::{FAR, Far, PREPARE, Rate};
use crate::relay::Relay;
use crate::unshared::unshared;

/// Says to this program that it is in a namespace of its own.
const INSIDE: &str = "MIGRATION_BENCH_NAMESPACE";
/// So much passes at once.
const BURST_BYTES: u64 = 256 << 10;
/// What the document calls the two ways.
const NAMESPACES: &str = "namespaces";
const RELAY: &str = "relay";

/// Runs this program again in a network namespace of its own, where the machine lets it have one, and ends with it.
pub(crate) fn enter(arguments: &[String]) {
    if env::var_os(INSIDE).is_some() {
        return;
    }
    if let Some(mut inside) = unshared("--net", PREPARE, (INSIDE, "1".as_ref())) {
        let ended = inside.arg(env::current_exe().unwrap()).args(arguments).status().unwrap();
        std::process::exit(ended.code().unwrap_or(1));
    }
    eprintln!("no network namespaces with a shaped link here: a relay in this process stands in");
}

/// A link of a rate.
pub(crate) struct Link {
    mbit_s: u64,
    /// Keeps the far namespace, where there is one.
    far: Option<Far>,
}

impl Link {
    pub(crate) fn new(mbit_s: u64) -> Self {
        if env::var_os(INSIDE).is_none() {
            return Self { mbit_s, far: None };
        }
        match Far::new(Rate { kbit_s: mbit_s * 1000, burst_bytes: BURST_BYTES }) {
            Ok(far) => Self { mbit_s, far: Some(far) },
            Err(why) => {
                eprintln!("no shaped link: {why}; a relay in this process stands in");
                Self { mbit_s, far: None }
            }
        }
    }

    /// How it is made.
    pub(crate) fn kind(&self) -> &'static str {
        if self.far.is_some() { NAMESPACES } else { RELAY }
    }

    /// Where the far end listens.
    pub(crate) fn listen(&self) -> String {
        let host = if self.far.is_some() { FAR } else { Ipv4Addr::LOCALHOST };
        format!("{host}:0")
    }

    /// A process at the far end.
    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        let Some(far) = &self.far else { return Child::start(arguments) };
        let mut command = Command::new(env::current_exe().unwrap());
        Child::of(&mut far.there(command.args(arguments)))
    }

    /// Where somebody who listens at the far end is reached over the link.
    pub(crate) async fn to(&self, address: SocketAddr) -> SocketAddr {
        if self.far.is_some() {
            return address;
        }
        Relay::start(address, Some(self.mbit_s * 1_000_000 / 8), None).await
    }

    /// What one TCP connection gets through, in Mbit/s: whether the rate is what it is to be.
    pub(crate) async fn measure(&self, mib: usize) -> f64 {
        let mut taker = self.start(&["take", &self.listen()]);
        let address = self.to(taker.hear().parse().unwrap()).await;
        let sending = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            let block = vec![0xA5; 1 << 20];
            for _ in 0..mib {
                stream.write_all(&block).unwrap();
            }
        });
        sending.await.unwrap();
        let bytes_s: f64 = taker.hear().parse().unwrap();
        bytes_s * 8.0 / 1e6
    }
}
