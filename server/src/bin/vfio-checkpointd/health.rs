//! `healthcheck`.

use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::args::Healthcheck;
use crate::{ExitStatus, complain};

/// Why an agent is not well.
#[derive(Debug, thiserror::Error)]
enum Unwell {
    #[error("no agent answers at {address}")]
    Connect {
        address: std::net::SocketAddr,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("the agent does not say how it is: {}", .0.message())]
    Refused(Box<tonic::Status>),
    #[error("the agent is {0}")]
    NotServing(&'static str),
    #[error("the agent did not answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("the check cannot run")]
    Runtime(#[source] std::io::Error),
}

pub(crate) fn run(arguments: &Healthcheck) -> ExitStatus {
    let checked = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Unwell::Runtime)
        .and_then(|runtime| runtime.block_on(check(arguments)));
    match checked {
        Ok(()) => ExitStatus::Done,
        Err(unwell) => {
            complain("healthcheck", &unwell);
            ExitStatus::Failed
        }
    }
}

async fn check(arguments: &Healthcheck) -> Result<(), Unwell> {
    let asked = async {
        let address = arguments.address;
        let connect = |source| Unwell::Connect { address, source };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(connect)?;
        let channel = endpoint.connect().await.map_err(connect)?;
        let request = HealthCheckRequest { service: arguments.service.clone() };
        let answer = HealthClient::new(channel)
            .check(request)
            .await
            .map_err(|status| Unwell::Refused(Box::new(status)))?;
        match answer.into_inner().status() {
            ServingStatus::Serving => Ok(()),
            ServingStatus::NotServing => Err(Unwell::NotServing("not serving")),
            ServingStatus::Unknown | ServingStatus::ServiceUnknown => {
                Err(Unwell::NotServing("of unknown health"))
            }
        }
    };
    tokio::time::timeout(arguments.timeout, asked).await.unwrap_or(Err(Unwell::Timeout(arguments.timeout)))
}
