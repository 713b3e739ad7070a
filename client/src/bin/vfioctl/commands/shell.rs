//! `vfioctl completion` and `vfioctl man`: what shells and manuals want to know of the command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::outcome::{Exit, Failure};
use crate::render;

/// Print a script that completes commands.
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell
    shell: Shell,
}

/// Print or write the manual pages.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write all pages, a file each, into this folder, which is made where it is missing
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn completion(args: &CompletionArgs) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vfioctl", &mut script);
    print(&script)
}

pub(crate) fn man(args: &ManArgs) -> Result<Exit, Failure> {
    let Some(folder) = &args.dir else {
        let mut page = Vec::new();
        let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
        rendered.map_err(|error| Failure::new(Exit::Failed, error))?;
        return print(&page);
    };
    let written =
        std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(Cli::command(), folder));
    match written {
        Ok(()) => {
            render::say(&format!("the manual pages are in {}", folder.display()));
            Ok(Exit::Done)
        }
        Err(error) => {
            let text = format!("cannot write manual pages into {}: {error}", folder.display());
            Err(Failure::new(Exit::Failed, text))
        }
    }
}

fn print(bytes: &[u8]) -> Result<Exit, Failure> {
    render::put(&String::from_utf8_lossy(bytes))?;
    Ok(Exit::Done)
}
