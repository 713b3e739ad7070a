//! Where things lie in a store. Every name is made here, out of ids and digests, and none is taken from what was read.

use object_store::path::{Path, PathPart};

use crate::CheckpointId;

/// Says that this is a store, and of which version.
pub const MARKER: &str = "vfio-checkpoint-store";
/// All chunks.
pub const CHUNKS: &str = "chunks";
/// All checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// Which logical device has which checkpoints.
pub const DEVICES: &str = "devices";
/// Writers at work.
pub const INTENTS: &str = "intents";
/// What collectors are about to delete.
pub const CONDEMNED: &str = "condemned";

/// A part of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What it is.
    Manifest,
    /// Its chunks.
    Table,
    /// It was deleted, or its writer was revoked.
    Deleted,
    /// Its hold ran out.
    Inconsistent,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Manifest, Self::Table, Self::Deleted, Self::Inconsistent];

    fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Table => "table",
            Self::Deleted => "deleted",
            Self::Inconsistent => "inconsistent",
        }
    }
}

fn path<'a>(parts: impl IntoIterator<Item = &'a str>) -> Path {
    parts.into_iter().map(PathPart::from).collect()
}

/// A chunk: the BLAKE3 of its plain bytes, and the upload that brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// BLAKE3 of its plain bytes.
    pub blake3: [u8; 32],
    /// The checkpoint that it was uploaded for.
    pub upload: CheckpointId,
}

impl ChunkKey {
    /// Where it lies.
    pub fn path(&self) -> Path {
        let hash = blake3::Hash::from_bytes(self.blake3).to_hex();
        path([CHUNKS, &hash[..2], &format!("{hash}-{}", self.upload)])
    }

    /// The chunk that lies there, if one does.
    pub fn parse(at: &Path) -> Option<Self> {
        let (hash, upload) = at.filename()?.split_once('-')?;
        let key =
            Self { blake3: *blake3::Hash::from_hex(hash).ok()?.as_bytes(), upload: upload.parse().ok()? };
        (key.path() == *at).then_some(key)
    }
}

/// Where a part of a checkpoint lies.
pub fn part(id: CheckpointId, part: Part) -> Path {
    path([CHECKPOINTS, &id.to_string(), part.name()])
}

/// The checkpoint, and the part of it, that lies there.
pub fn parse_part(at: &Path) -> Option<(CheckpointId, Part)> {
    let id = at.parts().nth(1)?.as_ref().parse().ok()?;
    Part::ALL.into_iter().find(|candidate| part(id, *candidate) == *at).map(|part| (id, part))
}

/// The checkpoints of one logical device.
pub fn of_device(logical_device: &str) -> Path {
    path([DEVICES, logical_device])
}

/// That a logical device has this checkpoint.
pub fn device_has(logical_device: &str, id: CheckpointId) -> Path {
    path([DEVICES, logical_device, &id.to_string()])
}

/// What a writer builds on.
pub fn intent(id: CheckpointId) -> Path {
    path([INTENTS, &id.to_string()])
}

/// What a collector is about to delete.
pub fn condemned(id: CheckpointId) -> Path {
    path([CONDEMNED, &id.to_string()])
}

/// An object that is there for a moment, to read the store's clock.
pub fn clock(unique: CheckpointId) -> Path {
    path(["clock", &unique.to_string()])
}

/// The id that the last part of a path is.
pub fn id_of(at: &Path) -> Option<CheckpointId> {
    at.filename()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_back_and_others_are_not() {
        let upload: CheckpointId = "019aa7b4c10-5c0ffee15c0ffee1".parse().unwrap();
        let key = ChunkKey { blake3: [0xab; 32], upload };
        assert_eq!(ChunkKey::parse(&key.path()), Some(key));
        assert_eq!(key.path().as_ref().split('/').nth(1), Some("ab"));
        for each in Part::ALL {
            assert_eq!(parse_part(&part(upload, each)), Some((upload, each)));
        }
        for other in ["chunks/ab/x", "chunks/cd/abcd-019aa7b4c10-5c0ffee15c0ffee1", "checkpoints/x/manifest"]
        {
            assert_eq!(ChunkKey::parse(&Path::from(other)), None);
            assert_eq!(parse_part(&Path::from(other)), None);
        }
    }
}
