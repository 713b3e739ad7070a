//! The inputs of a target, between a file with a line of hexadecimal digits each and a folder with a file each.
//!
//! `corpus unpack FILE FOLDER`, `corpus pack FOLDER FILE`

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs, io};

#[path = "../corpus.rs"]
mod corpus;

fn unpack(file: &Path, folder: &Path) -> io::Result<()> {
    let lines = if file.exists() { fs::read_to_string(file)? } else { String::new() };
    for (number, input) in corpus::inputs(&lines).enumerate() {
        fs::write(folder.join(number.to_string()), input)?;
    }
    Ok(())
}

fn pack(folder: &Path, file: &Path) -> io::Result<()> {
    let mut inputs = Vec::new();
    for entry in fs::read_dir(folder)? {
        inputs.push(fs::read(entry?.path())?);
    }
    inputs.sort_by(|one, other| (one.len(), one).cmp(&(other.len(), other)));
    inputs.dedup();
    let mut text = String::new();
    for input in inputs {
        for byte in input {
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    fs::write(file, text)
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["unpack", file, folder] => unpack(file.as_ref(), folder.as_ref()),
        ["pack", folder, file] => pack(folder.as_ref(), file.as_ref()),
        _ => Err(io::Error::other("corpus unpack FILE FOLDER, or corpus pack FOLDER FILE")),
    }
}
