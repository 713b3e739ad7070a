//! The agent: whether it is reached, how it says it is, and how far its clock is off.

use std::time::{Duration, SystemTime};

use vfio_checkpoint_client::call::{Health, Serving};

use super::finding::{Finding, fail, ok, warn};
use crate::cli::Global;
use crate::connection::Settings;

/// Clocks that differ more make certificates look expired or not yet valid.
const MOST_SKEW: Duration = Duration::from_mins(1);
/// Clocks of machines that are kept right differ less.
const USUAL_SKEW: Duration = Duration::from_secs(5);
/// A `date` has whole seconds.
const GRAIN: Duration = Duration::from_secs(1);

/// Everything about the agent, if this caller has certificates that can be used.
pub(super) async fn check(settings: &Settings, global: &Global, has_pair: bool) -> Vec<Finding> {
    const CHECK: &str = "agent";
    if !has_pair {
        return vec![warn(
            CHECK,
            "it was not called, as there is no key pair to call it with",
            "mend that first",
        )];
    }
    let Some(endpoint) = &settings.endpoint else {
        let mend = "give --endpoint, or make a context with `vfioctl context set`";
        return vec![warn(CHECK, "no endpoint is known", mend)];
    };
    let client = match settings.connect(global).await {
        Ok(client) => client,
        Err(failure) => {
            let (what, mend) = failure.advice();
            let mend = mend.unwrap_or("look at the agent's log");
            return vec![fail(CHECK, what, mend)];
        }
    };
    let mut findings = vec![ok(CHECK, format!("{endpoint} is reached, and lets this caller in"))];
    let before = SystemTime::now();
    match client.health().await {
        Ok(health) => findings.extend(judge(health, before, SystemTime::now())),
        Err(error) => findings.push(fail("agent health", error.to_string(), "look at the agent's log")),
    }
    findings
}

fn judge(health: Health, before: SystemTime, after: SystemTime) -> Vec<Finding> {
    const CHECK: &str = "agent health";
    let serving = match health.serving {
        Serving::Yes => ok(CHECK, "it takes work"),
        Serving::No => fail(
            CHECK,
            "it takes no work: it starts or shuts down",
            "wait a moment; then look at the agent's log",
        ),
        Serving::Unknown => warn(CHECK, "it does not say how it is", "look at the agent's log"),
    };
    vec![serving, clock(health.agent_time, before, after)]
}

/// How far the agent's clock is off, at least: it was read somewhere between `before` and `after`.
fn clock(agent: Option<SystemTime>, before: SystemTime, after: SystemTime) -> Finding {
    const CHECK: &str = "clock";
    let Some(agent) = agent else {
        return warn(CHECK, "the agent does not say what time it is", "compare `date` on both machines");
    };
    let behind = before.duration_since(agent + GRAIN).unwrap_or_default();
    let ahead = agent.duration_since(after).unwrap_or_default();
    let (skew, which) = if behind > ahead { (behind, "behind") } else { (ahead, "ahead of") };
    if skew <= USUAL_SKEW {
        return ok(CHECK, "this machine and the agent agree on the time");
    }
    let text = humantime::format_duration(Duration::from_secs(skew.as_secs()));
    let detail = format!("the agent's clock is {text} {which} this machine's");
    let mend = "let NTP or chrony set both clocks: certificates and deadlines rest on them";
    if skew > MOST_SKEW { fail(CHECK, detail, mend) } else { warn(CHECK, detail, mend) }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::super::finding::Level;
    use super::*;

    #[test]
    fn clocks_are_compared_with_what_a_second_leaves_open() {
        let at = |millis: u64| UNIX_EPOCH + Duration::from_millis(1_800_000_000_000 + millis);
        let level = |agent: u64, before: u64, after: u64| clock(Some(at(agent)), at(before), at(after)).level;
        assert_eq!(level(60_000, 60_900, 61_000), Level::Ok);
        assert_eq!(level(60_000, 65_900, 66_000), Level::Ok);
        assert_eq!(level(60_000, 67_000, 67_100), Level::Warn);
        assert_eq!(level(60_000, 0, 100), Level::Warn);
        assert_eq!(level(0, 62_000, 62_100), Level::Fail);
        assert_eq!(level(62_000, 0, 100), Level::Fail);
        assert!(clock(Some(at(0)), at(62_000), at(62_100)).detail.contains("1m 1s behind"), "which side");
        assert_eq!(clock(None, at(0), at(1)).level, Level::Warn);
    }
}
