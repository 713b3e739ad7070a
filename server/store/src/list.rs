//! Which checkpoints there are, and what is marked beside them.

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;

use crate::bucket::{Bucket, Found};
use crate::key::{self, Part};
use crate::manifest::Manifest;
use crate::{CheckpointId, Store, StoreError};

/// A checkpoint, as a list shows it.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Which one.
    pub id: CheckpointId,
    /// What it is, or why that cannot be told: a damaged checkpoint is shown, so that it can be deleted.
    pub manifest: Result<Manifest, String>,
    /// Its hold ran out.
    pub is_inconsistent: bool,
}

/// Some checkpoints, the newest first.
#[derive(Debug, Clone)]
pub struct Page {
    /// These.
    pub checkpoints: Vec<Listed>,
    /// Where the next page begins. None where this is the last.
    pub next: Option<CheckpointId>,
}

/// What lies beside each other under one id.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Parts {
    pub manifest: bool,
    pub table: bool,
    pub deleted: Option<SystemTime>,
    pub inconsistent: bool,
}

impl Parts {
    fn is_listed(self) -> bool {
        self.manifest && self.deleted.is_none()
    }
}

/// Everything that lies under a checkpoint's id, for all of them.
pub(crate) async fn parts(bucket: &Bucket) -> Result<BTreeMap<CheckpointId, Parts>, StoreError> {
    let mut all: BTreeMap<CheckpointId, Parts> = BTreeMap::new();
    for Found { path, modified, .. } in bucket.list(&key::CHECKPOINTS.into()).await? {
        let Some((id, part)) = key::parse_part(&path) else { continue };
        let parts = all.entry(id).or_default();
        match part {
            Part::Manifest => parts.manifest = true,
            Part::Table => parts.table = true,
            Part::Deleted => parts.deleted = Some(modified),
            Part::Inconsistent => parts.inconsistent = true,
        }
    }
    Ok(all)
}

/// How long the manifests of a page are together, but for the last. In memory one may be twenty times as long.
const MOST_PAGE_BYTES: usize = 512 << 10;

impl Store {
    /// Up to `count` checkpoints before `before`, the newest first; fewer where their manifests are long. One listing of
    /// the names, and a read of each manifest that is shown.
    pub async fn list(&self, before: Option<CheckpointId>, count: usize) -> Result<Page, StoreError> {
        let all = parts(&self.bucket).await?;
        let older =
            all.iter().rev().filter(|(id, parts)| parts.is_listed() && before.is_none_or(|b| **id < b));
        let mut page = Page { checkpoints: Vec::new(), next: None };
        let mut read_bytes = 0;
        for (id, parts) in older {
            if page.checkpoints.len() == count.max(1) || read_bytes >= MOST_PAGE_BYTES {
                page.next = page.checkpoints.last().map(|listed| listed.id);
                break;
            }
            let (manifest, bytes) = match self.bucket.read_manifest_sized(*id).await {
                Ok(Some((manifest, bytes))) => (Ok(manifest), bytes),
                // Deleted meanwhile, or revoked.
                Ok(None) => continue,
                Err(error @ StoreError::Damaged { .. }) => (Err(error.to_string()), 0),
                Err(error) => return Err(error),
            };
            read_bytes += bytes;
            page.checkpoints.push(Listed { id: *id, manifest, is_inconsistent: parts.inconsistent });
        }
        Ok(page)
    }

    /// Deletes a checkpoint. Its space is free after the next collection.
    pub async fn delete(&self, id: CheckpointId) -> Result<(), StoreError> {
        self.mark(id, Part::Deleted).await
    }

    /// Marks a checkpoint whose hold ran out: memory that was captured along with it may have moved on.
    pub async fn mark_inconsistent(&self, id: CheckpointId) -> Result<(), StoreError> {
        self.mark(id, Part::Inconsistent).await
    }

    async fn mark(&self, id: CheckpointId, mark: Part) -> Result<(), StoreError> {
        let is_deleted = self.bucket.has(&key::part(id, Part::Deleted)).await?;
        if is_deleted || !self.bucket.has(&key::part(id, Part::Manifest)).await? {
            return Err(StoreError::NotFound { id });
        }
        match self.bucket.put(&key::part(id, mark), Bytes::new()).await {
            Err(StoreError::DiskFull { .. }) => {
                self.bucket.before_freeing().await;
                let put = self.bucket.put(&key::part(id, mark), Bytes::new()).await;
                self.bucket.after_freeing().await;
                put
            }
            put => put,
        }
    }
}
