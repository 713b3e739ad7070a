//! The simulated network, as the agent and its clients see one.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use turmoil::net::{TcpListener, TcpStream};
use vfio_checkpoint_client::network::{Answer, BoxStream, Listener, Network};

use crate::log::{Log, say};

/// The network, from one host.
#[derive(Debug, Clone)]
pub(crate) struct SimNetwork {
    pub(crate) host: &'static str,
    pub(crate) log: Log,
}

impl Network for SimNetwork {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> Answer<'a, Vec<SocketAddr>> {
        Box::pin(async move { Ok(vec![SocketAddr::new(turmoil::lookup(host), port)]) })
    }

    fn connect(&self, address: SocketAddr) -> Answer<'_, BoxStream> {
        Box::pin(async move {
            let to = turmoil::reverse_lookup(address.ip()).unwrap_or_else(|| address.to_string());
            say!(self.log, self.host, "connects to {to}");
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    say!(self.log, self.host, "connected to {to}");
                    Ok(Box::new(stream) as BoxStream)
                }
                Err(error) => {
                    say!(self.log, self.host, "not connected to {to}: {:?}", error.kind());
                    Err(error)
                }
            }
        })
    }

    fn listen(&self, address: SocketAddr) -> Answer<'_, Box<dyn Listener>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            Ok(Box::new(SimListener { listener, network: self.clone() }) as Box<dyn Listener>)
        })
    }
}

struct SimListener {
    listener: TcpListener,
    network: SimNetwork,
}

impl fmt::Debug for SimListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimListener").field("host", &self.network.host).finish_non_exhaustive()
    }
}

impl Listener for SimListener {
    fn accept(&self) -> Answer<'_, (BoxStream, SocketAddr)> {
        Box::pin(async move {
            let (stream, from) = self.listener.accept().await?;
            let who = turmoil::reverse_lookup(from.ip()).unwrap_or_else(|| from.to_string());
            say!(self.network.log, self.network.host, "accepts {who}");
            Ok((Box::new(stream) as BoxStream, from))
        })
    }

    fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}
