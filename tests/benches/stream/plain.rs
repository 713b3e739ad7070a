//! A client stream of tonic with its default settings: messages of one bytes field, over TLS, and nothing else.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::{ClientStreamingService, Grpc, NamedService};
use tonic::transport::server::Connected;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::child::{runtime, tell, told, until_over};
use crate::secrets::{client_tls, server_tls};

/// As long as a chunk of the service.
const PIECE_BYTES: usize = 1 << 20;

#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Total {
    #[prost(uint64, tag = "1")]
    bytes: u64,
}

#[derive(Clone)]
struct Count;

impl NamedService for Count {
    const NAME: &'static str = "bench.Count";
}

impl ClientStreamingService<Piece> for Count {
    type Response = Total;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Total>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Piece>>) -> Self::Future {
        Box::pin(async move {
            let mut pieces = request.into_inner();
            let mut bytes = 0;
            while let Some(piece) = pieces.next().await {
                bytes += piece?.data.len() as u64;
            }
            Ok(Response::new(Total { bytes }))
        })
    }
}

impl tower::Service<http::Request<Body>> for Count {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<http::Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let codec: ProstCodec<Total, Piece> = ProstCodec::default();
            Ok(Grpc::new(codec).client_streaming(Count, request).await)
        })
    }
}

/// tonic asks what it knows of a connection: nothing.
struct Known(TlsStream<TcpStream>);

impl Connected for Known {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Known {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Known {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

pub(crate) fn take(folder: &Path) {
    let acceptor = TlsAcceptor::from(server_tls(folder));
    runtime().block_on(async {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tell(&tcp.local_addr().unwrap().to_string());
        let (ready, connections) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let (stream, _) = tcp.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let stream = acceptor.accept(stream).await.map(Known);
                if ready.send(stream).await.is_err() {
                    return;
                }
            }
        });
        let incoming = ReceiverStream::new(connections);
        tokio::spawn(Server::builder().add_service(Count).serve_with_incoming(incoming));
        until_over().await;
    });
}

pub(crate) fn give(folder: &Path, address: &str, mib: &str) {
    let connector = TlsConnector::from(client_tls(folder));
    let (address, pieces) = (address.to_owned(), mib.parse::<usize>().unwrap());
    let data = (0..=250).cycle().take(PIECE_BYTES).collect::<Bytes>();
    runtime().block_on(async {
        let connect = tower::service_fn(move |_: http::Uri| {
            let (connector, address) = (connector.clone(), address.clone());
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from("localhost").unwrap();
                Ok::<_, io::Error>(TokioIo::new(connector.connect(name, stream).await?))
            }
        });
        let channel =
            Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap();
        let mut client = tonic::client::Grpc::new(channel);
        tell("ready");
        while tokio::task::spawn_blocking(told).await.unwrap() {
            let begun = Instant::now();
            client.ready().await.unwrap();
            let stream = tokio_stream::iter(vec![Piece { data: data.clone() }; pieces]);
            let codec: ProstCodec<Piece, Total> = ProstCodec::default();
            let path = http::uri::PathAndQuery::from_static("/bench.Count/Count");
            let total =
                client.client_streaming(Request::new(stream), path, codec).await.unwrap().into_inner();
            assert_eq!(total.bytes, (pieces * PIECE_BYTES) as u64);
            tell(&begun.elapsed().as_secs_f64().to_string());
        }
    });
}
