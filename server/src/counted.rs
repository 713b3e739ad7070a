//! A plain listener whose connections are counted, and can be cut: whoever reaches its port can connect, no more than so
//! many do, and none stays for longer than the listener's owner.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_stream::Stream;
use tonic::transport::server::Connected;
use vfio_checkpoint_client::network::{BoxStream, Listener};

/// How many connections there may be at a time. The next one waits in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;

/// The connections that are open.
#[derive(Debug, Clone)]
pub(crate) struct Count {
    room: Arc<Semaphore>,
    cut: Arc<watch::Sender<bool>>,
}

impl Count {
    /// None are open yet.
    pub(crate) fn new() -> Self {
        Self { room: Arc::new(Semaphore::new(MAX_CONNECTIONS)), cut: Arc::new(watch::Sender::new(false)) }
    }

    /// Ends every connection, whatever is under way on it. Ready once none is left.
    pub(crate) async fn cut(&self) {
        self.cut.send_replace(true);
        for _ in 0..MAX_CONNECTIONS {
            // The semaphore is never closed.
            if let Ok(place) = self.room.acquire().await {
                place.forget();
            }
        }
    }
}

/// The connections of a listener, at most [`MAX_CONNECTIONS`] at a time.
pub(crate) fn counted(listener: Box<dyn Listener>, count: Count) -> impl Stream<Item = io::Result<Counted>> {
    futures_util::stream::unfold((listener, count), |(listener, count)| async move {
        // The semaphore is never closed.
        let permit = Arc::clone(&count.room).acquire_owned().await.ok()?;
        let accepted = listener.accept().await.map(|(stream, _)| Counted {
            stream,
            cut_for_reader: is_cut(&count),
            cut_for_writer: is_cut(&count),
            _permit: permit,
        });
        Some((accepted, (listener, count)))
    })
}

fn is_cut(count: &Count) -> Cut {
    let mut cut = count.cut.subscribe();
    async move {
        // A count that is gone cuts nobody.
        if cut.wait_for(|cut| *cut).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
    .boxed()
    .shared()
}

type Cut = Shared<BoxFuture<'static, ()>>;

/// A connection that gives its place back when it ends.
#[derive(Debug)]
pub(crate) struct Counted {
    stream: BoxStream,
    /// One for each direction: the two may wait in different tasks, and each has to be woken.
    cut_for_reader: Cut,
    cut_for_writer: Cut,
    _permit: OwnedSemaphorePermit,
}

fn check(cut: &mut Cut, context: &mut Context<'_>) -> io::Result<()> {
    if cut.peek().is_some() || cut.poll_unpin(context).is_ready() {
        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the agent ends"));
    }
    Ok(())
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
        check(&mut self.cut_for_reader, context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        check(&mut self.cut_for_writer, context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        check(&mut self.cut_for_writer, context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        check(&mut self.cut_for_writer, context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
