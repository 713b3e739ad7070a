//! The .proto files as a client's author finds them: self-contained, and every part of them documented.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;

use prost::Message as _;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use vfio_checkpoint_proto::v1;

const WITH_COMMENTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors_with_comments.bin"));

/// The files of this package.
fn ours(set: &FileDescriptorSet) -> Vec<&FileDescriptorProto> {
    set.file.iter().filter(|file| file.package() == "vfio.checkpoint.v1").collect()
}

#[test]
fn the_files_import_well_known_types_and_one_another_only() {
    let set = FileDescriptorSet::decode(v1::FILE_DESCRIPTOR_SET).unwrap();
    let own: BTreeSet<&str> = ours(&set).iter().map(|file| file.name()).collect();
    assert_eq!(own.len(), 9, "{own:?}");
    let mut imports = 0;
    for file in ours(&set) {
        for import in &file.dependency {
            imports += 1;
            let well_known = ["google/protobuf/duration.proto", "google/protobuf/timestamp.proto"];
            assert!(
                own.contains(import.as_str()) || well_known.contains(&import.as_str()),
                "{} imports {import}",
                file.name()
            );
        }
        assert!(file.public_dependency.is_empty() && file.weak_dependency.is_empty(), "{}", file.name());
    }
    assert!(imports > 0);
}

#[test]
fn the_set_for_reflection_is_whole_and_has_no_comments() {
    let set = FileDescriptorSet::decode(v1::FILE_DESCRIPTOR_SET).unwrap();
    let names: BTreeSet<&str> = set.file.iter().map(FileDescriptorProto::name).collect();
    for file in &set.file {
        assert!(file.source_code_info.is_none(), "{}", file.name());
        assert!(file.dependency.iter().all(|import| names.contains(import.as_str())), "{}", file.name());
    }
    let services: BTreeSet<String> =
        ours(&set).iter().flat_map(|file| &file.service).map(|service| service.name().to_owned()).collect();
    assert_eq!(
        services,
        ["CheckpointService", "DeviceService", "MigrationService", "OperationService"]
            .map(String::from)
            .into()
    );
}

/// Paths of one file's elements by the numbers of descriptor.proto, and which of them have a comment.
struct Elements<'a> {
    file: &'a str,
    comments: BTreeMap<&'a [i32], &'a str>,
    seen: usize,
    bare: Vec<String>,
}

impl Elements<'_> {
    fn expect(&mut self, path: &[i32], name: &str) {
        self.seen += 1;
        let comment = self.comments.get(path).copied().unwrap_or_default().trim();
        if !comment.ends_with(['.', ':']) {
            self.bare.push(format!("{}: {name}: {comment:?}", self.file));
        }
    }

    fn enumeration(&mut self, path: &[i32], descriptor: &EnumDescriptorProto) {
        self.expect(path, descriptor.name());
        for (index, value) in (0..).zip(&descriptor.value) {
            self.expect(&[path, &[2, index]].concat(), value.name());
        }
    }

    fn message(&mut self, path: &[i32], descriptor: &DescriptorProto) {
        if descriptor.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry) {
            return;
        }
        self.expect(path, descriptor.name());
        let name = |member: &str| format!("{}.{member}", descriptor.name());
        for (index, field) in (0..).zip(&descriptor.field) {
            self.expect(&[path, &[2, index]].concat(), &name(field.name()));
        }
        for (index, oneof) in (0..).zip(&descriptor.oneof_decl) {
            self.expect(&[path, &[8, index]].concat(), &name(oneof.name()));
        }
        for (index, nested) in (0..).zip(&descriptor.nested_type) {
            self.message(&[path, &[3, index]].concat(), nested);
        }
        for (index, nested) in (0..).zip(&descriptor.enum_type) {
            self.enumeration(&[path, &[4, index]].concat(), nested);
        }
    }
}

#[test]
fn every_message_field_value_service_and_rpc_says_what_it_is() {
    let set = FileDescriptorSet::decode(WITH_COMMENTS).unwrap();
    let (mut seen, mut bare) = (0, Vec::new());
    for file in ours(&set) {
        let locations = &file.source_code_info.as_ref().unwrap().location;
        let comments = locations.iter().map(|at| (at.path.as_slice(), at.leading_comments())).collect();
        let mut elements = Elements { file: file.name(), comments, seen: 0, bare: Vec::new() };
        for (index, message) in (0..).zip(&file.message_type) {
            elements.message(&[4, index], message);
        }
        for (index, descriptor) in (0..).zip(&file.enum_type) {
            elements.enumeration(&[5, index], descriptor);
        }
        for (index, service) in (0..).zip(&file.service) {
            elements.expect(&[6, index], service.name());
            for (rpc, method) in (0..).zip(&service.method) {
                elements.expect(&[6, index, 2, rpc], method.name());
            }
        }
        seen += elements.seen;
        bare.append(&mut elements.bare);
    }
    assert!(bare.is_empty(), "without a comment that ends a sentence:\n{}", bare.join("\n"));
    assert!(seen > 300, "{seen}");
    let _ = writeln!(std::io::stdout(), "\nfigures: contract: {seen} elements, all documented");
}
