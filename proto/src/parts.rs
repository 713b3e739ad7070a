//! How many parts an encoded message has, before it is decoded.
//!
//! ```text
//!   bytes --count by the schema--> parts <= limit --prost--> message
//! ```
//!
//! An empty message in a list takes two bytes on the wire and hundreds in memory, so a bound on the encoded length
//! alone lets a peer take a hundred times as much memory with it. A part is one entry of a list or map.
//!
//! Invariants: counting allocates nothing and reads each byte once a level, and skips payload by its length. What it
//! cannot walk over (a cut field, a group, which no message here has) it refuses, so that nothing passes uncounted.
//!
//! Failure: [`PartsError`].

use std::collections::BTreeMap;
use std::sync::OnceLock;

use prost::Message as _;
use prost::encoding::decode_varint;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};

use crate::v1;

/// The most parts of a request. The largest that is valid is a restore of 64 devices with 64 facts each.
pub const MAX_REQUEST_PARTS: usize = 8192;

/// The most parts of a response: a page of 1000 operations on 64 devices each.
pub const MAX_RESPONSE_PARTS: usize = 80_000;

/// A message was refused before it was decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PartsError {
    /// It has more entries than any valid one.
    #[error("{message} has more than {max} entries in its lists and maps together; send fewer")]
    TooMany {
        /// The name of the message.
        message: String,
        /// How many are taken.
        max: usize,
    },
    /// It is no message.
    #[error("{message} cannot be read: a field is cut off or of a kind that is not used")]
    Malformed {
        /// The name of the message.
        message: String,
    },
}

/// What counting has to know of a field.
#[derive(Debug, Clone)]
struct Field {
    /// It is a list or map, of messages, texts or byte strings.
    repeated: bool,
    /// The message in it.
    message: Option<String>,
}

type Schema = BTreeMap<String, BTreeMap<u32, Field>>;

/// The schema of all messages, by their full names.
fn schema() -> &'static Schema {
    static SCHEMA: OnceLock<Schema> = OnceLock::new();
    SCHEMA.get_or_init(|| {
        let mut schema = Schema::new();
        // Without the descriptors no message is known, and every one is refused. A test sees that they are there.
        let files = FileDescriptorSet::decode(v1::FILE_DESCRIPTOR_SET).unwrap_or_default().file;
        for file in &files {
            for message in &file.message_type {
                add(&mut schema, file.package(), message);
            }
        }
        schema
    })
}

fn add(schema: &mut Schema, scope: &str, descriptor: &DescriptorProto) {
    let name = format!("{scope}.{}", descriptor.name());
    for nested in &descriptor.nested_type {
        add(schema, &name, nested);
    }
    let fields = descriptor.field.iter().filter_map(|field| {
        let message = match field.r#type() {
            Type::Message => Some(field.type_name().trim_start_matches('.').to_owned()),
            Type::String | Type::Bytes => None,
            // Numbers are no larger in memory than a few times what they are here.
            Type::Group
            | Type::Double
            | Type::Float
            | Type::Int64
            | Type::Uint64
            | Type::Int32
            | Type::Fixed64
            | Type::Fixed32
            | Type::Bool
            | Type::Uint32
            | Type::Enum
            | Type::Sfixed32
            | Type::Sfixed64
            | Type::Sint32
            | Type::Sint64 => return None,
        };
        let number = u32::try_from(field.number()).ok()?;
        Some((number, Field { repeated: field.label() == Label::Repeated, message }))
    });
    let fields = fields.collect();
    schema.insert(name, fields);
}

/// Refuses an encoded message that has more than `max` parts, or cannot be walked over.
pub fn check_parts(name: &str, encoded: &[u8], max: usize) -> Result<(), PartsError> {
    let mut left = max;
    match walk(schema(), name, encoded, &mut left) {
        Walk::Within => Ok(()),
        Walk::TooMany => Err(PartsError::TooMany { message: name.to_owned(), max }),
        Walk::Malformed => Err(PartsError::Malformed { message: name.to_owned() }),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Walk {
    Within,
    TooMany,
    Malformed,
}

fn walk(schema: &Schema, name: &str, mut bytes: &[u8], left: &mut usize) -> Walk {
    let Some(fields) = schema.get(name) else { return Walk::Malformed };
    while !bytes.is_empty() {
        let Some((number, content)) = next_field(&mut bytes) else { return Walk::Malformed };
        let (Some(content), Some(field)) = (content, fields.get(&number)) else { continue };
        if field.repeated {
            match left.checked_sub(1) {
                Some(fewer) => *left = fewer,
                None => return Walk::TooMany,
            }
        }
        if let Some(message) = &field.message {
            // No message of this package holds itself, so the schema bounds the depth.
            match walk(schema, message, content, left) {
                Walk::Within => {}
                refused @ (Walk::TooMany | Walk::Malformed) => return refused,
            }
        }
    }
    Walk::Within
}

/// Takes one field off the front: its number, and its content where that has a length.
fn next_field<'a>(bytes: &mut &'a [u8]) -> Option<(u32, Option<&'a [u8]>)> {
    let key = decode_varint(bytes).ok()?;
    let number = u32::try_from(key >> 3).ok()?;
    let length = match key & 7 {
        0 => {
            decode_varint(bytes).ok()?;
            return Some((number, None));
        }
        1 => 8,
        2 => usize::try_from(decode_varint(bytes).ok()?).ok()?,
        5 => 4,
        _ => return None,
    };
    let (content, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some((number, (key & 7 == 2).then_some(content)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MANIFEST: &str = "vfio.checkpoint.v1.CheckpointManifest";

    #[test]
    fn every_message_is_known_and_none_holds_itself() {
        fn depth(name: &str, above: &mut Vec<String>) -> usize {
            assert!(!above.contains(&name.to_owned()), "{name} in {above:?}");
            above.push(name.to_owned());
            let inner: Vec<&Field> = schema()[name].values().collect();
            let deepest =
                inner.iter().filter_map(|f| f.message.as_deref()).map(|name| depth(name, above)).max();
            above.pop();
            deepest.unwrap_or(0) + 1
        }
        let deepest = schema().keys().map(|name| depth(name, &mut Vec::new())).max().unwrap();
        assert!((5..10).contains(&deepest), "{deepest}");
    }

    #[test]
    fn parts_are_counted_at_every_depth() {
        // Two devices, of which the second has two facts: 4 parts.
        let facts = [("a", "b"), ("c", "d")].map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let second =
            v1::DeviceManifest { fingerprint: Some(v1::Fingerprint { facts }), ..Default::default() };
        let devices = vec![v1::DeviceManifest::default(), second];
        let manifest = v1::CheckpointManifest { format_version: 1, devices, ..Default::default() };
        let encoded = manifest.encode_to_vec();
        assert_eq!(check_parts(MANIFEST, &encoded, 4), Ok(()));
        assert_eq!(
            check_parts(MANIFEST, &encoded, 3),
            Err(PartsError::TooMany { message: MANIFEST.into(), max: 3 })
        );
        let request = v1::RestoreRequest {
            manifest: Some(manifest),
            devices: vec![String::new(); 3],
            ..Default::default()
        };
        let encoded = request.encode_to_vec();
        assert_eq!(check_parts("vfio.checkpoint.v1.RestoreRequest", &encoded, 7), Ok(()));
        assert!(check_parts("vfio.checkpoint.v1.RestoreRequest", &encoded, 6).is_err());
    }

    #[test]
    fn what_cannot_be_walked_over_is_refused() {
        let malformed = Err(PartsError::Malformed { message: MANIFEST.into() });
        for bytes in [
            &[0x22, 5, 0][..],   // cut off
            &[0x22],             // no length
            &[0x23, 0x24],       // a group
            &[0x7b, 0x7c],       // an unknown group, which prost would skip
            &[0x80],             // half a key
            &[0x22, 2, 0x2a, 1], // cut off inside
            &[0x0f, 0],          // no such wire type
        ] {
            assert_eq!(check_parts(MANIFEST, bytes, 100), malformed, "{bytes:?}");
        }
        assert!(check_parts("vfio.checkpoint.v1.Nothing", &[], 1).is_err());
        // Unknown fields of a later version are no harm.
        assert_eq!(check_parts(MANIFEST, &[0x7a, 1, 0, 0x78, 1, 0x79, 0, 0, 0, 0, 0, 0, 0, 0], 0), Ok(()));
    }
}
