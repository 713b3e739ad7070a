//! The client against a real server on loopback: TLS 1.3, HTTP/2 and gRPC as they are. Only what the server answers is
//! written by the tests.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the parts of a test binary that are no test functions assert by panicking too"
)]

mod calls;
mod commands;
mod devices;
mod devices_of_agent;
mod handshakes;
mod migrations;
mod moves;
mod offline;
mod pki;
mod refused;
mod resolutions;
mod server;
mod setup;
mod shelf;
mod stores;
mod streams;
