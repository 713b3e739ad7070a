//! Which chunks make up the states of a checkpoint: `checkpoints/{id}/table`.
//!
//! ```text
//!   "VFCKTBL1"  uploads: u32, 16 bytes each  chunks: 44 bytes each { blake3: 32, upload: u32, plain_bytes: u32, stored_bytes: u32 }
//! ```
//! All integers are little-endian. The manifest says how long the table is, its digest, and how many chunks each device has.
//! A chunk whose stored length is its plain length is stored plain; any other is a zstd frame.

use std::collections::HashMap;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::CheckpointId;
use crate::cut::MOST_CHUNK_BYTES;
use crate::key::ChunkKey;

const MAGIC: &[u8; 8] = b"VFCKTBL1";
pub(crate) const ENTRY_BYTES: usize = 44;
/// The longest table: about 760 000 chunks, some 700 GiB of state.
pub(crate) const MOST_BYTES: u64 = 32 << 20;
/// The most uploads that one checkpoint builds on.
pub(crate) const MOST_UPLOADS: usize = 4096;

/// One chunk of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where it lies.
    pub key: ChunkKey,
    /// How many bytes it has.
    pub plain_bytes: u32,
    /// How many of them are stored.
    pub stored_bytes: u32,
}

/// Entries, with each upload kept once.
#[derive(Debug, Default, Clone)]
pub(crate) struct Table {
    uploads: Vec<CheckpointId>,
    entries: Vec<Row>,
    seen: HashMap<CheckpointId, u32>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    blake3: [u8; 32],
    upload: u32,
    plain_bytes: u32,
    stored_bytes: u32,
}

impl Table {
    pub(crate) fn push(&mut self, entry: Entry) -> Result<(), &'static str> {
        let upload = match self.seen.get(&entry.key.upload) {
            Some(upload) => *upload,
            None if self.uploads.len() == MOST_UPLOADS => return Err("it builds on too many others"),
            None => {
                let upload = u32::try_from(self.uploads.len()).unwrap_or(u32::MAX);
                self.uploads.push(entry.key.upload);
                self.seen.insert(entry.key.upload, upload);
                upload
            }
        };
        let Entry { key, plain_bytes, stored_bytes } = entry;
        self.entries.push(Row { blake3: key.blake3, upload, plain_bytes, stored_bytes });
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, index: usize) -> Option<Entry> {
        self.entries.get(index).map(|row| self.entry(row))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Entry> + '_ {
        self.entries.iter().map(|row| self.entry(row))
    }

    fn entry(&self, row: &Row) -> Entry {
        // Every row was made, or read, with an upload that is there.
        let upload = self.uploads[row.upload as usize];
        let key = ChunkKey { blake3: row.blake3, upload };
        Entry { key, plain_bytes: row.plain_bytes, stored_bytes: row.stored_bytes }
    }

    /// How long it is when it is written.
    pub(crate) fn encoded_bytes(&self) -> u64 {
        (MAGIC.len() + 4 + self.uploads.len() * CheckpointId::BYTES + self.entries.len() * ENTRY_BYTES) as u64
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(usize::try_from(self.encoded_bytes()).unwrap_or(0));
        out.put_slice(MAGIC);
        out.put_u32_le(u32::try_from(self.uploads.len()).unwrap_or(u32::MAX));
        for upload in &self.uploads {
            out.put_slice(&upload.to_bytes());
        }
        for row in &self.entries {
            out.put_slice(&row.blake3);
            out.put_u32_le(row.upload);
            out.put_u32_le(row.plain_bytes);
            out.put_u32_le(row.stored_bytes);
        }
        out.freeze()
    }

    /// Reads a table of which nothing is believed.
    pub(crate) fn decode(mut bytes: Bytes) -> Result<Self, String> {
        if bytes.len() < MAGIC.len() + 4 || bytes.split_to(MAGIC.len()) != MAGIC[..] {
            return Err("it is no table of chunks that this version reads".to_owned());
        }
        let count = bytes.get_u32_le() as usize;
        if count > MOST_UPLOADS || count * CheckpointId::BYTES > bytes.len() {
            return Err(format!("it names {count} uploads, which are more than there can be"));
        }
        let mut uploads = Vec::with_capacity(count);
        for index in 0..count {
            let mut id = [0; CheckpointId::BYTES];
            bytes.copy_to_slice(&mut id);
            uploads.push(CheckpointId::from_bytes(id).ok_or_else(|| format!("upload {index} has no id"))?);
        }
        if !bytes.len().is_multiple_of(ENTRY_BYTES) {
            return Err(format!(
                "it ends in the middle of a chunk: {} bytes too many",
                bytes.len() % ENTRY_BYTES
            ));
        }
        let mut entries = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
        while bytes.has_remaining() {
            let mut blake3 = [0; 32];
            bytes.copy_to_slice(&mut blake3);
            let row = Row {
                blake3,
                upload: bytes.get_u32_le(),
                plain_bytes: bytes.get_u32_le(),
                stored_bytes: bytes.get_u32_le(),
            };
            let index = entries.len();
            if row.upload as usize >= count {
                return Err(format!("chunk {index} is of upload {}, and there are {count}", row.upload));
            }
            if row.plain_bytes == 0 || row.plain_bytes as usize > MOST_CHUNK_BYTES {
                return Err(format!(
                    "chunk {index} has {} bytes; 1 to {MOST_CHUNK_BYTES} are possible",
                    row.plain_bytes
                ));
            }
            if row.stored_bytes == 0 || row.stored_bytes > row.plain_bytes {
                return Err(format!("chunk {index} is stored in more bytes than it has, or in none"));
            }
            entries.push(row);
        }
        let seen = HashMap::new();
        Ok(Self { uploads, entries, seen })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table() -> Table {
        let mut table = Table::default();
        for index in 0..5_u8 {
            let upload = CheckpointId::new(std::time::UNIX_EPOCH, u64::from(index % 2));
            let key = ChunkKey { blake3: [index; 32], upload };
            table.push(Entry { key, plain_bytes: 100, stored_bytes: 100 - u32::from(index) }).unwrap();
        }
        table
    }

    #[test]
    fn a_table_is_read_back() {
        let table = table();
        let bytes = table.encode();
        assert_eq!(bytes.len() as u64, table.encoded_bytes());
        assert!(Table::decode(bytes).unwrap().iter().eq(table.iter()));
        assert_eq!(Table::decode(Table::default().encode()).unwrap().len(), 0);
    }

    #[test]
    fn lies_are_refused() {
        let whole = table().encode();
        let entries = whole.len() - 5 * ENTRY_BYTES;
        let with = |at: usize, value: u32| {
            let mut bytes = whole.to_vec();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            Table::decode(bytes.into()).unwrap_err()
        };
        assert!(with(8, u32::MAX).contains("uploads"));
        assert!(with(entries + 32, 2).contains("upload 2"));
        assert!(with(entries + 36, 0).contains("0 bytes"));
        assert!(with(entries + 36, u32::MAX).contains("bytes"));
        assert!(with(entries + 40, 101).contains("more bytes than it has"));
        assert!(with(0, 0).contains("no table"));
    }

    proptest! {
        #[test]
        fn no_input_brings_it_down(bytes in proptest::collection::vec(any::<u8>(), 0..400), keep in 0..200_usize) {
            let _ = Table::decode(Bytes::from(bytes.clone()));
            let mut spliced = table().encode().to_vec();
            spliced.truncate(keep);
            spliced.extend(bytes);
            if let Ok(read) = Table::decode(Bytes::from(spliced)) {
                prop_assert!(read.iter().count() == read.len());
            }
        }
    }
}
