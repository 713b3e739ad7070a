//! Compiles the .proto files with protox: no protoc is needed on the user's machine.
//!
//! Maps become `BTreeMap`, so that one message has one encoding: request digests are made of it.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use protox::prost::Message as _;
use tonic_prost_build::Config;

const FILES: [&str; 8] = [
    "vfio/checkpoint/v1/checkpoint_service.proto",
    "vfio/checkpoint/v1/device_service.proto",
    "vfio/checkpoint/v1/migration_service.proto",
    "vfio/checkpoint/v1/operation_service.proto",
    "vfio/checkpoint/v1/checkpoint.proto",
    "vfio/checkpoint/v1/device.proto",
    "vfio/checkpoint/v1/reason.proto",
    "vfio/checkpoint/v1/stream.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=vfio");
    let commented = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // With comments, for the tests that walk over them.
    fs::write(out.join("descriptors_with_comments.bin"), commented.encode_to_vec())?;
    // Without, for server reflection: comments triple its size and no client reads them there.
    let mut bare = commented.clone();
    for file in &mut bare.file {
        file.source_code_info = None;
    }
    fs::write(out.join("descriptors.bin"), bare.encode_to_vec())?;
    // Messages know their names: the codec counts by them.
    let mut config = Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .build_transport(false)
        .codec_path("crate::codec::BoundedCodec")
        .bytes(".")
        .btree_map(".")
        .compile_fds_with_config(commented, config)?;
    Ok(())
}
