//! `vfioctl context`: agents and certificates by name.
//!
//! `set` takes the common options, so that what works as options works as a context. Paths are made absolute, because a
//! context is used from anywhere.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_client::tls::SpiffeId;

use crate::cli::Global;
use crate::contexts::{Context, ContextsFile, Place};
use crate::outcome::{Exit, Failure};
use crate::render::{self, Column, usual, wide};

/// Name agents and certificates once.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List the contexts; the one in use has a star
    List,
    /// Use a context from now on
    Use {
        /// Its name
        name: String,
    },
    /// Make a context, or change one, from --endpoint, --ca, --cert, --key and the server's name
    Set {
        /// Its name
        name: String,
        /// Use it from now on
        #[arg(long = "use")]
        is_used: bool,
    },
    /// Delete a context; the files that it names stay
    Delete {
        /// Its name
        name: String,
    },
}

pub(crate) fn run(global: &Global, command: ContextCommand) -> Result<Exit, Failure> {
    let mut file = ContextsFile::read(Place::from_environment()).map_err(Failure::usage)?;
    match command {
        ContextCommand::List => return list(&file, global),
        ContextCommand::Use { name } => {
            file.use_context(&name).map_err(Failure::usage)?;
            render::say(&format!("{name} is in use"));
        }
        ContextCommand::Set { name, is_used } => {
            let change = change(global)?;
            file.set(&name, &change).map_err(Failure::usage)?;
            if is_used {
                file.use_context(&name).map_err(Failure::usage)?;
            }
            let is_used = file.parsed.current.as_deref() == Some(&name);
            let note = if is_used { ", and in use" } else { "" };
            render::say(&format!("{name} is in {}{note}", file.path().display()));
        }
        ContextCommand::Delete { name } => {
            file.delete(&name).map_err(Failure::usage)?;
            render::say(&format!("{name} is deleted"));
        }
    }
    Ok(Exit::Done)
}

fn change(global: &Global) -> Result<Context, Failure> {
    let change = Context {
        endpoint: global.endpoint.clone(),
        ca: global.ca.as_deref().map(absolute).transpose()?,
        cert: global.cert.as_deref().map(absolute).transpose()?,
        key: global.key.as_deref().map(absolute).transpose()?,
        server_name: global.server_name.clone(),
        server_spiffe_id: global.server_spiffe_id.clone(),
    };
    if change == Context::default() {
        let text = "there is nothing to set; give at least one of --endpoint, --ca, --cert, --key, \
            --server-name and --server-spiffe-id";
        return Err(Failure::usage(text));
    }
    if let Some(id) = &change.server_spiffe_id {
        id.parse::<SpiffeId>().map_err(Failure::usage)?;
    }
    if let Some(endpoint) = change.endpoint.as_ref().filter(|endpoint| !endpoint.starts_with("https://")) {
        return Err(Failure::usage(format!(
            "the endpoint {endpoint:?} cannot be used; give https://HOST:PORT"
        )));
    }
    Ok(change)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::usage(format!("the path {} cannot be used: {error}", path.display())))
}

#[derive(Debug, Serialize)]
struct ContextDoc {
    name: String,
    is_current: bool,
    #[serde(flatten)]
    context: Context,
}

const COLUMNS: [Column<ContextDoc>; 7] = [
    usual("", |doc| if doc.is_current { "*" } else { " " }.to_owned()),
    usual("NAME", |doc| printable(&doc.name)),
    usual("ENDPOINT", |doc| printable(doc.context.endpoint.as_deref().unwrap_or_default())),
    usual("SERVER", |doc| {
        let server = doc.context.server_name.as_deref().or(doc.context.server_spiffe_id.as_deref());
        printable(server.unwrap_or_default())
    }),
    wide("CA", |doc| path(doc.context.ca.as_deref())),
    wide("CERT", |doc| path(doc.context.cert.as_deref())),
    wide("KEY", |doc| path(doc.context.key.as_deref())),
];

fn path(path: Option<&Path>) -> String {
    path.map(|path| printable(&path.display().to_string())).unwrap_or_default()
}

fn list(file: &ContextsFile, global: &Global) -> Result<Exit, Failure> {
    let current = global.context.as_deref().or(file.parsed.current.as_deref());
    let mut docs = Vec::new();
    for name in file.parsed.contexts.keys() {
        let context = file.get(name).map_err(Failure::usage)?;
        docs.push(ContextDoc { name: name.clone(), is_current: current == Some(name), context });
    }
    render::print(global.output_format, |detail| render::rows(detail, &COLUMNS, &docs), &docs)?;
    if docs.is_empty() {
        render::say(&format!(
            "there are no contexts in {}; make one with `vfioctl context set`",
            file.path().display()
        ));
    }
    Ok(Exit::Done)
}
