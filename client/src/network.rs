//! What listens and connects: the one way to a network, for the agent and for its clients.
//!
//! ```text
//!   Network -- resolve(host) -> addresses -- connect(address) -> BoxStream
//!          '-- listen(address) -> Listener -- accept() -> BoxStream, from where
//! ```
//! [`Tcp`] is the machine's own network. Everything above it (TLS, HTTP/2, gRPC) sees a stream of bytes and asks no more,
//! so a test can put a network in its place that loses, holds and cuts as it says.
//!
//! # Invariants
//! - Nothing in this crate or in the agent opens a socket of the network but through a [`Network`].
//! - A stream sends what is written at once: frames are written whole, and waiting for more would only delay them.
//! - What a call costs more than a plain socket is one call through a table, for up to 256 KiB that are moved by it.
//!
//! # Failure paths
//! Each step has an error of its own, as the system says it; who calls knows which step it was.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, lookup_host};

/// A connection.
pub trait Stream: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Stream for T {}

/// A connection of whatever network.
pub type BoxStream = Box<dyn Stream>;

/// What a network answers, when it does.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// A network.
pub trait Network: fmt::Debug + Send + Sync {
    /// The addresses of a host, best first.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Answer<'a, Vec<SocketAddr>>;

    /// Opens a connection.
    fn connect(&self, address: SocketAddr) -> Answer<'_, BoxStream>;

    /// Begins to listen. Port 0: one that is free.
    fn listen(&self, address: SocketAddr) -> Answer<'_, Box<dyn Listener>>;
}

/// Who listens.
pub trait Listener: fmt::Debug + Send + Sync {
    /// The next connection, and who opened it. Dropping the future loses none.
    fn accept(&self) -> Answer<'_, (BoxStream, SocketAddr)>;

    /// Where it listens.
    fn local_address(&self) -> io::Result<SocketAddr>;
}

/// The machine's network.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

impl Network for Tcp {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Answer<'a, Vec<SocketAddr>> {
        Box::pin(async move { Ok(lookup_host((host, port)).await?.collect()) })
    }

    fn connect(&self, address: SocketAddr) -> Answer<'_, BoxStream> {
        Box::pin(async move { at_once(TcpStream::connect(address).await?) })
    }

    fn listen(&self, address: SocketAddr) -> Answer<'_, Box<dyn Listener>> {
        Box::pin(async move { Ok(Box::new(TcpListener::bind(address).await?) as Box<dyn Listener>) })
    }
}

impl Listener for TcpListener {
    fn accept(&self) -> Answer<'_, (BoxStream, SocketAddr)> {
        Box::pin(async move {
            loop {
                let (stream, from) = TcpListener::accept(self).await?;
                match at_once(stream) {
                    Ok(stream) => return Ok((stream, from)),
                    // It is this connection's own failure, and says nothing of the next one.
                    Err(error) => tracing::debug!(%from, %error, "a connection was over before it began"),
                }
            }
        })
    }

    fn local_address(&self) -> io::Result<SocketAddr> {
        self.local_addr()
    }
}

fn at_once(stream: TcpStream) -> io::Result<BoxStream> {
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}
