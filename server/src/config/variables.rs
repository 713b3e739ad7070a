//! The environment as a source of the configuration.
//!
//! Where a key is a text (a name, an address, a time), what its variable says is that text: `007` is a name, and no number.

use figment::value::{Dict, Map, Value};
use figment::{Error, Metadata, Profile, Provider};
use serde::de::Error as _;

use super::{AgentConfig, ENVIRONMENT};

/// Variables, each a name and what it says. Those that do not begin with [`ENVIRONMENT`] are passed over.
pub(super) struct Variables(pub(super) Vec<(String, String)>);

impl Variables {
    /// Those of this process. What is not Unicode is nobody's configuration.
    pub(super) fn of_the_process() -> Self {
        let unicode = std::env::vars_os()
            .filter_map(|(name, says)| Some((name.into_string().ok()?, says.into_string().ok()?)));
        Self(unicode.collect())
    }
}

impl Provider for Variables {
    fn metadata(&self) -> Metadata {
        Metadata::named(format!("{ENVIRONMENT}*"))
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        let usual = Value::serialize(AgentConfig::default())?;
        let mut all = Dict::new();
        for (name, says) in &self.0 {
            let Some(name) = name.strip_prefix(ENVIRONMENT) else { continue };
            let key: Vec<String> = name.split("__").map(str::to_lowercase).collect();
            // That of the flag which says where the file is.
            if key == ["config"] {
                continue;
            }
            if key.iter().any(String::is_empty) {
                return Err(Error::custom(format!("`{ENVIRONMENT}{name}` names no key")));
            }
            let is_text = usual.find_ref(&key.join(".")).is_some_and(|usual| usual.as_str().is_some());
            let value = if is_text {
                Value::from(says.as_str())
            } else {
                says.parse().unwrap_or_else(|never: std::convert::Infallible| match never {})
            };
            insert(&mut all, &key, value);
        }
        Ok(Profile::Default.collect(all))
    }
}

/// Puts a value where its key says; a section that is in the way is replaced.
fn insert(section: &mut Dict, key: &[String], value: Value) {
    let Some((first, rest)) = key.split_first() else { return };
    if rest.is_empty() {
        section.insert(first.clone(), value);
        return;
    }
    let inner = section.entry(first.clone()).or_insert_with(|| Value::from(Dict::new()));
    if !matches!(inner, Value::Dict(..)) {
        *inner = Value::from(Dict::new());
    }
    if let Value::Dict(_, inner) = inner {
        insert(inner, rest, value);
    }
}
