//! What gets in between a store and its bucket in tests.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What is about to be asked, or was just answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    Put,
    Get,
    List,
    Delete,
}

/// Sees every request before it is made, and after it was carried out; either may fail it.
pub(crate) trait Between: fmt::Debug + Send + Sync + 'static {
    fn before(&self, _ask: Ask, _at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn after(&self, _ask: Ask, _at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// What was read.
    fn read(&self, _at: &str, bytes: Bytes) -> Bytes {
        bytes
    }
}

/// An object store with something in between.
#[derive(Debug)]
pub(crate) struct Wrapped<B> {
    pub inner: Arc<dyn ObjectStore>,
    pub between: Arc<B>,
}

impl<B: Between> fmt::Display for Wrapped<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} behind {:?}", self.inner, self.between)
    }
}

#[async_trait]
impl<B: Between> ObjectStore for Wrapped<B> {
    async fn put_opts(&self, at: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.between.before(Ask::Put, at.to_string()).await?;
        let put = self.inner.put_opts(at, payload, opts).await?;
        self.between.after(Ask::Put, at.to_string()).await?;
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.between.before(Ask::Get, at.to_string()).await?;
        let is_head = options.head;
        let mut got = self.inner.get_opts(at, options).await?;
        self.between.after(Ask::Get, at.to_string()).await?;
        if !is_head {
            let mut meta = got.meta.clone();
            let attributes = got.attributes.clone();
            let bytes = got.bytes().await?;
            let bytes = self.between.read(at.as_ref(), bytes);
            meta.size = bytes.len() as u64;
            let range: Range<u64> = 0..meta.size;
            let payload = object_store::GetResultPayload::Stream(stream::once(async { Ok(bytes) }).boxed());
            got = GetResult {
                payload,
                meta,
                range,
                attributes,
                extensions: object_store::Extensions::default(),
            };
        }
        Ok(got)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (before, after) = (Arc::clone(&self.between), Arc::clone(&self.between));
        let asked = locations.and_then(move |at| {
            let between = Arc::clone(&before);
            async move {
                between.before(Ask::Delete, at.to_string()).await?;
                Ok(at)
            }
        });
        let deleted = self.inner.delete_stream(asked.boxed());
        let answered = deleted.and_then(move |at| {
            let between = Arc::clone(&after);
            async move {
                between.after(Ask::Delete, at.to_string()).await?;
                Ok(at)
            }
        });
        answered.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, between) = (Arc::clone(&self.inner), Arc::clone(&self.between));
        let prefix = prefix.cloned();
        // The whole listing is one answer, as a page of it is.
        stream::once(async move {
            between.before(Ask::List, prefix.as_ref().map(ToString::to_string).unwrap_or_default()).await?;
            let listed: Vec<_> = inner.list(prefix.as_ref()).collect().await;
            Ok::<_, object_store::Error>(stream::iter(listed))
        })
        .try_flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
