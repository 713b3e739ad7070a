//! One TLS connection: bytes in, bytes out. What gRPC and checks are measured against.

use std::path::Path;
use std::time::Instant;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::child::{runtime, tell, told, until_over};
use crate::secrets::{client_tls, server_tls};

/// What is written and read at a time: as much as a chunk of the service.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) fn take(folder: &Path) {
    let acceptor = TlsAcceptor::from(server_tls(folder));
    runtime().block_on(async {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        tell(&tcp.local_addr().unwrap().to_string());
        tokio::spawn(async move {
            loop {
                let (stream, _) = tcp.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let mut stream = acceptor.accept(stream).await.unwrap();
                tokio::spawn(async move {
                    let mut buffer = vec![0; BUFFER_BYTES];
                    loop {
                        // The length first, then as many bytes; one byte back when all are here.
                        let Ok(mut left) = stream.read_u64().await else { return };
                        while left > 0 {
                            let most = usize::try_from(left).unwrap().min(BUFFER_BYTES);
                            let read = stream.read(&mut buffer[..most]).await.unwrap();
                            assert!(read > 0, "the giver is gone");
                            left -= read as u64;
                        }
                        stream.write_u8(1).await.unwrap();
                        stream.flush().await.unwrap();
                    }
                });
            }
        });
        until_over().await;
    });
}

pub(crate) fn give(folder: &Path, address: &str, mib: &str) {
    let connector = TlsConnector::from(client_tls(folder));
    let bytes = mib.parse::<u64>().unwrap() << 20;
    let buffer: Vec<u8> = (0..=250).cycle().take(BUFFER_BYTES).collect();
    runtime().block_on(async {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        tell("ready");
        // As the ends of the other measurements, on a worker rather than on the thread that waits for all.
        tokio::spawn(async move {
            while tokio::task::spawn_blocking(told).await.unwrap() {
                let begun = Instant::now();
                stream.write_u64(bytes).await.unwrap();
                let mut left = bytes;
                while left > 0 {
                    let most = usize::try_from(left).unwrap().min(BUFFER_BYTES);
                    stream.write_all(&buffer[..most]).await.unwrap();
                    left -= most as u64;
                }
                stream.flush().await.unwrap();
                assert_eq!(stream.read_u8().await.unwrap(), 1);
                tell(&begun.elapsed().as_secs_f64().to_string());
            }
        })
        .await
        .unwrap();
    });
}
