//! How an agent says it is: `grpc.health.v1.Health`, and the `date` that HTTP sends along.

use std::time::SystemTime;

use tonic::Response;
use tonic_health::pb::HealthCheckResponse;
use tonic_health::pb::health_check_response::ServingStatus;

/// What an agent says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Whether it takes work.
    pub serving: Serving,
    /// Its clock when it answered, in whole seconds. None where the answer has no date.
    pub agent_time: Option<SystemTime>,
}

/// Whether an agent takes work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    /// It does.
    Yes,
    /// It does not: it starts, or shuts down.
    No,
    /// It does not say.
    Unknown,
}

impl Health {
    pub(super) fn read(answer: &Response<HealthCheckResponse>) -> Self {
        let serving = match answer.get_ref().status() {
            ServingStatus::Serving => Serving::Yes,
            ServingStatus::NotServing => Serving::No,
            ServingStatus::Unknown | ServingStatus::ServiceUnknown => Serving::Unknown,
        };
        let date = answer.metadata().get("date").and_then(|date| date.to_str().ok());
        Self { serving, agent_time: date.and_then(|date| httpdate::parse_http_date(date).ok()) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    fn answer(status: ServingStatus, date: &'static str) -> Health {
        let mut answer = Response::new(HealthCheckResponse { status: status.into() });
        answer.metadata_mut().insert("date", date.parse().unwrap());
        Health::read(&answer)
    }

    #[test]
    fn the_date_is_the_clock_of_the_agent() {
        let health = answer(ServingStatus::Serving, "Fri, 15 Jan 2027 08:00:00 GMT");
        assert_eq!(health.agent_time, Some(UNIX_EPOCH + Duration::from_hours(500_000)));
        assert_eq!(health.serving, Serving::Yes);
    }

    #[test]
    fn what_makes_no_sense_is_not_known() {
        let health = answer(ServingStatus::ServiceUnknown, "yesterday");
        assert_eq!(health, Health { serving: Serving::Unknown, agent_time: None });
        assert_eq!(answer(ServingStatus::NotServing, "").serving, Serving::No);
    }
}
