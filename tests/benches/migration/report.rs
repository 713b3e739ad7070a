//! The document: medians of what the rounds have shown, and what there is one of.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::node::rounded;

/// All of a run.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rounds: BTreeMap<String, Vec<f64>>,
    single: Map<String, Value>,
}

impl Report {
    /// What one round has shown.
    pub(crate) fn add(&mut self, name: &str, value: f64) {
        self.rounds.entry(name.to_owned()).or_default().push(value);
    }

    /// What there is one of.
    pub(crate) fn put(&mut self, name: &str, value: Value) {
        self.single.insert(name.to_owned(), value);
    }

    pub(crate) fn document(self) -> Value {
        let mut document = self.single;
        for (name, values) in self.rounds {
            document.insert(name, rounded(median(values)));
        }
        Value::Object(document)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}
