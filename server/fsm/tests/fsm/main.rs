//! The whole crate as pictures and properties.
//!
//! Snapshots (`tests/snapshots`, `docs/*.mmd`) show every decision the crate can make; a change to one is a
//! change to be read. Properties hold over all of them: the machines are small enough to be explored to the
//! end.

mod device;
mod diagrams;
mod explore;
mod handover;
mod recovery;
mod restore;
mod save;
mod table;
