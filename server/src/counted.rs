//! A plain listener whose connections are counted: whoever reaches its port can connect, and no more than so many do.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use vfio_checkpoint_client::network::{BoxStream, Listener};

/// How many connections there may be at a time. The next one waits in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;

/// The connections of a listener, at most [`MAX_CONNECTIONS`] at a time.
pub(crate) fn counted(listener: Box<dyn Listener>) -> impl Stream<Item = io::Result<Counted>> {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    futures_util::stream::unfold((listener, room), |(listener, room)| async move {
        // The semaphore is never closed.
        let permit = Arc::clone(&room).acquire_owned().await.ok()?;
        let accepted = listener.accept().await.map(|(stream, _)| Counted { stream, _permit: permit });
        Some((accepted, (listener, room)))
    })
}

/// A connection that gives its place back when it ends.
#[derive(Debug)]
pub(crate) struct Counted {
    stream: BoxStream,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Counted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
