//! `vfio-user-device`: serves one device on a Unix socket, for a VMM or an agent to attach to.
//!
//! ```text
//!   args.rs    what can be said on the command line
//!   device.rs  a device's name -> an opened device, and the PCI function that clients see
//!   main.rs    socket -> server, until SIGTERM, SIGINT or, with --once, the end of the first client
//! ```
//! Everything that it says goes to standard error. Exit codes are part of the interface; see [`ExitStatus`].

#![allow(clippy::print_stderr, reason = "a command line speaks on its standard streams")]

mod args;
mod device;

use std::process::ExitCode;
use std::thread;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_device::vfio_user::server::{Server, ServerHandle, ServerOptions, SocketFile};

use crate::args::Arguments;

/// How the program ends. Usage errors are clap's, which exits with 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExitStatus {
    /// It was told to end, or its only client is gone.
    Done = 0,
    /// It served, and could not go on.
    Failed = 1,
    /// It cannot work, as things are. Nobody was served.
    Blocked = 3,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitStatus::Done.into(),
        Err((status, reason)) => {
            eprintln!("vfio-user-device: {reason}");
            status.into()
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), (ExitStatus, String)> {
    let blocked = |error: &dyn std::error::Error| (ExitStatus::Blocked, chain(error));
    // Signals are caught before there is a socket that one of them could leave behind.
    let signals = Signals::new([SIGTERM, SIGINT]).map_err(|error| blocked(&error))?;
    let opened = device::open(&arguments.device).map_err(|reason| (ExitStatus::Blocked, reason))?;
    let (file, listener) = SocketFile::bind(&arguments.socket).map_err(|error| blocked(&error))?;
    let options = ServerOptions {
        function: opened.function,
        reset_on_disconnect: !arguments.keep_state,
        once: arguments.once,
        ..ServerOptions::default()
    };
    let server = Server::new(opened.device, listener, options).map_err(|error| blocked(&error))?;
    end_on(signals, server.handle());
    eprintln!("listening on {}", file.path().display());
    // The socket goes with `file`, after the server.
    server.run().map(drop).map_err(|error| (ExitStatus::Failed, chain(&error)))
}

fn end_on(mut signals: Signals, server: ServerHandle) {
    // Not joined: it waits for signals as long as the process lives.
    let _detached = thread::spawn(move || {
        let mut signals = signals.forever();
        if signals.next().is_some() {
            server.stop();
        }
        // The server waits for the device call that it is in. Who asks again does not want to wait, socket or not.
        if let Some(again) = signals.next() {
            let _ = signal_hook::low_level::emulate_default_handler(again);
        }
    });
}
