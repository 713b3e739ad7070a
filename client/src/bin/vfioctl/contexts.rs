//! The contexts file: agents and certificates by name, so that nobody types them twice.
//!
//! ```text
//!   $VFIOCTL_CONFIG, else $XDG_CONFIG_HOME/vfioctl/config.toml, else ~/.config/vfioctl/config.toml
//!     current = "lab"
//!     [contexts.lab]
//!     endpoint = "https://node1:7443"
//!     ca = "/etc/lab/ca.crt"                    relative paths begin at the file's folder
//!     cert = "/etc/lab/me.crt"
//!     key = "/etc/lab/me.key"
//!     server_name = "node1"                     or server_spiffe_id = "spiffe://…"
//! ```
//!
//! Invariants: unknown keys are refused. The file is written whole or not at all, with mode 0600, and what people wrote
//! around the values stays. A file that others may write is not believed: they could send this user's calls elsewhere.
//! Failure paths: every one names the file, and the line where there is one.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml_edit::{DocumentMut, Item, Table, value};

/// The longest file that is read.
const MAX_BYTES: u64 = 1024 * 1024;
/// The longest name of a context.
const MAX_NAME_BYTES: usize = 63;

/// The file, read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Contexts {
    /// The one in use.
    pub(crate) current: Option<String>,
    /// By their names.
    #[serde(default)]
    pub(crate) contexts: BTreeMap<String, Context>,
}

/// One agent, and how to reach it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) endpoint: Option<String>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    pub(crate) server_name: Option<String>,
    pub(crate) server_spiffe_id: Option<String>,
}

/// What is wrong with the contexts file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContextsError {
    #[error("there is no place for the contexts file; set VFIOCTL_CONFIG, XDG_CONFIG_HOME or HOME")]
    NoPlace,
    #[error("cannot {what} the contexts file {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the contexts file {} may be written by others, who could change where calls go; chmod 600 it", path.display())]
    Open { path: PathBuf },
    #[error("the contexts file {} is longer than {MAX_BYTES} bytes; it is something else", path.display())]
    TooLong { path: PathBuf },
    #[error("the contexts file {} is wrong; mend it or write it anew with `vfioctl context set`:\n{problem}", path.display())]
    Syntax { path: PathBuf, problem: String },
    #[error("{name:?} is no name of a context; give 1 to {MAX_NAME_BYTES} letters, digits, '-', '_' and '.'")]
    Name { name: String },
    #[error("there is no context {name:?} in {}; there are: {known}", path.display())]
    Unknown { name: String, path: PathBuf, known: String },
}

/// Where the file is, and what is in it.
#[derive(Debug)]
pub(crate) struct ContextsFile {
    path: PathBuf,
    text: String,
    pub(crate) parsed: Contexts,
}

/// What the environment says about the place.
#[derive(Debug, Default)]
pub(crate) struct Place {
    pub(crate) vfioctl_config: Option<PathBuf>,
    pub(crate) xdg_config_home: Option<PathBuf>,
    pub(crate) home: Option<PathBuf>,
}

impl Place {
    pub(crate) fn from_environment() -> Self {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            vfioctl_config: variable("VFIOCTL_CONFIG"),
            xdg_config_home: variable("XDG_CONFIG_HOME"),
            home: variable("HOME"),
        }
    }

    fn path(self) -> Result<PathBuf, ContextsError> {
        // XDG says that relative paths are to be ignored.
        let xdg = self.xdg_config_home.filter(|path| path.is_absolute());
        self.vfioctl_config
            .or_else(|| xdg.map(|folder| folder.join("vfioctl/config.toml")))
            .or_else(|| self.home.map(|home| home.join(".config/vfioctl/config.toml")))
            .ok_or(ContextsError::NoPlace)
    }
}

impl ContextsFile {
    /// Reads the file. One that is not there is an empty one.
    pub(crate) fn read(place: Place) -> Result<Self, ContextsError> {
        let path = place.path()?;
        let io = |what| {
            let path = path.clone();
            move |source| ContextsError::Io { what, path, source }
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { path, text: String::new(), parsed: Contexts::default() });
            }
            Err(error) => return Err(io("open")(error)),
        };
        let metadata = file.metadata().map_err(io("look at"))?;
        if metadata.permissions().mode() & 0o022 != 0 {
            return Err(ContextsError::Open { path });
        }
        let mut text = String::new();
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(io("read"))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(ContextsError::TooLong { path });
        }
        let parsed = parse(&path, &text)?;
        Ok(Self { path, text, parsed })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The context of this name, its paths absolute.
    pub(crate) fn get(&self, name: &str) -> Result<Context, ContextsError> {
        let found = self.parsed.contexts.get(name).ok_or_else(|| self.unknown(name))?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let absolute = |path: &Option<PathBuf>| path.as_ref().map(|path| folder.join(path));
        Ok(Context {
            ca: absolute(&found.ca),
            cert: absolute(&found.cert),
            key: absolute(&found.key),
            ..found.clone()
        })
    }

    /// Adds a context or changes what is given of it. The first one is the one in use from then on.
    pub(crate) fn set(&mut self, name: &str, change: &Context) -> Result<(), ContextsError> {
        let fits = (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if !fits {
            return Err(ContextsError::Name { name: name.chars().take(64).collect() });
        }
        let mut document = self.document()?;
        let contexts = document.entry("contexts").or_insert(Item::Table(Table::new()));
        if let Some(table) = contexts.as_table_mut() {
            // `[contexts.lab]` says it all; `[contexts]` above it would be noise.
            table.set_implicit(true);
        }
        let context =
            contexts.as_table_like_mut().map(|all| all.entry(name).or_insert(Item::Table(Table::new())));
        let Some(context) = context.and_then(Item::as_table_like_mut) else {
            return Err(self.syntax("contexts are tables"));
        };
        let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let fields = [
            ("endpoint", change.endpoint.clone()),
            ("ca", text(&change.ca)),
            ("cert", text(&change.cert)),
            ("key", text(&change.key)),
            ("server_name", change.server_name.clone()),
            ("server_spiffe_id", change.server_spiffe_id.clone()),
        ];
        for (key, new) in fields {
            if let Some(new) = new {
                context.insert(key, value(new));
            }
        }
        // One of the two says who the agent is.
        if change.server_name.is_some() {
            context.remove("server_spiffe_id");
        } else if change.server_spiffe_id.is_some() {
            context.remove("server_name");
        }
        if self.parsed.contexts.is_empty() {
            document.insert("current", value(name));
        }
        self.write(&document)
    }

    /// Makes a context the one in use.
    pub(crate) fn use_context(&mut self, name: &str) -> Result<(), ContextsError> {
        self.get(name)?;
        let mut document = self.document()?;
        document.insert("current", value(name));
        self.write(&document)
    }

    /// Removes a context.
    pub(crate) fn delete(&mut self, name: &str) -> Result<(), ContextsError> {
        self.get(name)?;
        let mut document = self.document()?;
        if let Some(contexts) = document.get_mut("contexts").and_then(Item::as_table_like_mut) {
            contexts.remove(name);
        }
        if self.parsed.current.as_deref() == Some(name) {
            document.remove("current");
        }
        self.write(&document)
    }

    fn document(&self) -> Result<DocumentMut, ContextsError> {
        self.text.parse().map_err(|error: toml_edit::TomlError| self.syntax(&error.to_string()))
    }

    fn syntax(&self, problem: &str) -> ContextsError {
        ContextsError::Syntax { path: self.path.clone(), problem: problem.to_owned() }
    }

    fn unknown(&self, name: &str) -> ContextsError {
        let known: Vec<&str> = self.parsed.contexts.keys().map(String::as_str).collect();
        ContextsError::Unknown {
            name: name.chars().take(64).collect(),
            path: self.path.clone(),
            known: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
        }
    }

    fn write(&mut self, document: &DocumentMut) -> Result<(), ContextsError> {
        let text = document.to_string();
        let parsed = parse(&self.path, &text)?;
        // Where the file is a link, what it leads to is replaced and the link stays.
        let target = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let io = |what, source| ContextsError::Io { what, path: self.path.clone(), source };
        let folder =
            target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| io("make the folder of", error))?;
        let mut draft = target.clone().into_os_string();
        draft.push(format!(".new-{}", std::process::id()));
        let draft = PathBuf::from(draft);
        let written = write_new(&draft, text.as_bytes()).and_then(|()| fs::rename(&draft, &target));
        if let Err(error) = written {
            // What is left of it is of no use; the old file stands.
            let _gone = fs::remove_file(&draft);
            return Err(io("write", error));
        }
        self.text = text;
        self.parsed = parsed;
        Ok(())
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn parse(path: &Path, text: &str) -> Result<Contexts, ContextsError> {
    let syntax = |problem: String| ContextsError::Syntax { path: path.to_owned(), problem };
    let parsed: Contexts = toml_edit::de::from_str(text).map_err(|error| syntax(error.to_string()))?;
    for (name, context) in &parsed.contexts {
        if context.server_name.is_some() && context.server_spiffe_id.is_some() {
            return Err(syntax(format!(
                "contexts.{name} has both server_name and server_spiffe_id; keep one"
            )));
        }
    }
    if let Some(current) = parsed.current.as_ref().filter(|name| !parsed.contexts.contains_key(*name)) {
        return Err(syntax(format!("current is {current:?}, and there is no context of that name")));
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests;
