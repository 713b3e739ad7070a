//! Logs and traces: tracing spans per call, operation, phase and device move, as text or JSON on stderr.
//!
//! ```text
//!   traceparent in gRPC metadata --> span of the call --> of the operation --> of its phases --> of each arc
//! ```
//! Spans carry W3C trace context, so that what several agents do for one caller is one trace. There is no exporter here:
//! the ids are in the logs, and in [`Operation.trace_id`](vfio_checkpoint_proto::v1::Operation).
//!
//! Blob bytes and keys are never logged.

mod propagation;
#[cfg(test)]
mod spans;

use std::io;

use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

pub use propagation::TraceLayer;

use crate::config::{LogFormat, TelemetryConfig};

/// Why logging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error(
        "telemetry.log is `{filter}`, which is no filter such as `info` or `vfio_checkpoint_server=debug,info`"
    )]
    Filter {
        /// What it is.
        filter: String,
        /// Why not.
        #[source]
        source: ParseError,
    },
    /// Something else in this process logs already.
    #[error("logging was set up already")]
    Twice(#[from] TryInitError),
}

/// Sets logging up for this process.
pub fn begin(config: &TelemetryConfig) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|source| TelemetryError::Filter { filter: config.log.clone(), source })?;
    let tracer = SdkTracerProvider::builder().build().tracer("vfio-checkpointd");
    let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_threads(false).with_location(false);
    let registry = tracing_subscriber::registry().with(filter).with(spans);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match config.format {
        LogFormat::Text => {
            let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
                && io::IsTerminal::is_terminal(&io::stderr());
            registry.with(lines.with_ansi(colour)).try_init()?;
        }
        LogFormat::Json => registry.with(lines.json().with_span_list(false)).try_init()?,
    }
    Ok(())
}

/// The trace that the current span belongs to, as 32 hexadecimal digits, where there is one.
pub fn current_trace_id() -> Option<String> {
    let context = tracing::Span::current().context();
    let span = context.span().span_context().clone();
    span.is_valid().then(|| span.trace_id().to_string())
}
