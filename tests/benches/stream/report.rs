//! The document: medians of what the rounds have shown.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use crate::stored::Kept;

/// What one run of a pair has shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) gib_s: f64,
    pub(crate) giver_cpu_s_per_gib: f64,
    pub(crate) taker_cpu_s_per_gib: f64,
    pub(crate) rss_peak_mib: f64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.3} GiB/s, giver {:.3} and taker {:.3} CPU-s/GiB, peak {:.1} MiB",
            self.gib_s, self.giver_cpu_s_per_gib, self.taker_cpu_s_per_gib, self.rss_peak_mib
        )
    }
}

/// All of a run.
#[derive(Debug)]
pub(crate) struct Report {
    rounds: usize,
    mib: u64,
    samples: BTreeMap<&'static str, Vec<Sample>>,
    kept: Vec<Kept>,
    big: Option<(u64, Sample)>,
}

impl Report {
    pub(crate) fn new(rounds: usize, mib: u64) -> Self {
        Self { rounds, mib, samples: BTreeMap::new(), kept: Vec::new(), big: None }
    }

    pub(crate) fn add(&mut self, kind: &'static str, sample: Sample) {
        self.samples.entry(kind).or_default().push(sample);
    }

    pub(crate) fn kept(&mut self, kept: Kept) {
        self.kept.push(kept);
    }

    pub(crate) fn big(&mut self, mib: u64, sample: Sample) {
        self.big = Some((mib, sample));
    }

    fn of(&self, kind: &str, value: impl Fn(&Sample) -> f64) -> Option<f64> {
        median(self.samples.get(kind)?.iter().map(value).collect())
    }

    fn ratio(&self, kind: &str, to: &str) -> Option<f64> {
        let (ours, base) = (self.samples.get(kind)?, self.samples.get(to)?);
        median(ours.iter().zip(base).map(|(ours, base)| ours.gib_s / base.gib_s).collect())
    }

    pub(crate) fn print(&self, json: bool) {
        let mut document = Map::new();
        let mut put = |name: &str, value: Option<f64>| {
            if let Some(value) = value {
                document.insert(name.to_owned(), json!((value * 1000.0).round() / 1000.0));
            }
        };
        put("raw_rustls_gib_s", self.of("pipe", |sample| sample.gib_s));
        put("default_tonic_gib_s", self.of("plain", |sample| sample.gib_s));
        put("service_gib_s", self.of("service", |sample| sample.gib_s));
        put("ratio_vs_raw_rustls", self.ratio("service", "pipe"));
        put("ratio_vs_default_tonic", self.ratio("service", "plain"));
        put("cpu_s_per_gib_sender", self.of("service", |sample| sample.giver_cpu_s_per_gib));
        put("cpu_s_per_gib_receiver", self.of("service", |sample| sample.taker_cpu_s_per_gib));
        put("raw_rustls_cpu_s_per_gib_sender", self.of("pipe", |sample| sample.giver_cpu_s_per_gib));
        put("raw_rustls_cpu_s_per_gib_receiver", self.of("pipe", |sample| sample.taker_cpu_s_per_gib));
        put("default_tonic_cpu_s_per_gib_sender", self.of("plain", |sample| sample.giver_cpu_s_per_gib));
        put("default_tonic_cpu_s_per_gib_receiver", self.of("plain", |sample| sample.taker_cpu_s_per_gib));
        let kept = |value: fn(&Kept) -> f64| median(self.kept.iter().map(value).collect());
        put("store_save_gib_s", kept(|kept| kept.save));
        put("store_save_again_gib_s", kept(|kept| kept.again));
        put("store_restore_gib_s", kept(|kept| kept.restore));
        if let Some((mib, sample)) = &self.big {
            // The name says what it is for; another size than the usual one is named for what it was.
            let size = if *mib == 8192 { "8gib".to_owned() } else { format!("{mib}mib") };
            put(&format!("rss_peak_mib_{size}"), Some(sample.rss_peak_mib));
            put(&format!("service_gib_s_{size}"), Some(sample.gib_s));
        }
        document.insert("rounds".to_owned(), json!(self.rounds));
        document.insert("round_mib".to_owned(), json!(self.mib));
        if json {
            println!("{}", Value::Object(document));
        } else {
            for (name, value) in &document {
                println!("{name:<40} {value}");
            }
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        even if even % 2 == 0 => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}
