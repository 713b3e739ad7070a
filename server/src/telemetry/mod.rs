//! Logs and traces: tracing spans per call, operation, phase and device move, as text or JSON on stderr.
//!
//! ```text
//!   traceparent in gRPC metadata --> span of the call --> of the operation --> of its phases --> of each arc
//! ```
//! Spans carry W3C trace context, so that what several agents do for one caller is one trace. There is no exporter here:
//! the id is `trace_id` of the spans of calls and operations in every line of the log, and in [`Operation.trace_id`](vfio_checkpoint_proto::v1::Operation).
//!
//! # Invariants
//! - What is logged is one thing, and what an agent answers for another: the filter is of the lines alone. Traces are not
//!   under it, audit lines are not, and what is logged says whose it is.
//! - A span is of a call, an operation, a phase or an arc, never of a chunk: there are as many however much state there is.
//! - Blob bytes and keys are never logged.

mod propagation;
#[cfg(test)]
mod spans;

use std::io;

use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Level, Metadata, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{EnvFilter, FilterExt as _, LevelFilter, ParseError, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use vfio_checkpoint_client::call::TraceParent;

pub use propagation::TraceLayer;

use crate::config::{LogFormat, TelemetryConfig};
use crate::security::audit;

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

/// Which audit lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuditLines {
    /// Each, whatever the filter lets through: of an agent.
    All,
    /// Those that the filter lets through, as of any other line: nobody answers for what is only shown.
    Filtered,
}

/// Sets logging up for this process.
pub fn begin(config: &TelemetryConfig, audit: AuditLines) -> Result<(), TelemetryError> {
    let colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && io::IsTerminal::is_terminal(&io::stderr());
    subscriber(config, audit, colour, io::stderr)?.try_init()?;
    Ok(())
}

/// What takes in spans and events, and writes lines; text with colours where these are wanted.
pub fn subscriber<W>(
    config: &TelemetryConfig,
    audit: AuditLines,
    colour: bool,
    writer: W,
) -> Result<impl Subscriber + Send + Sync + 'static, TelemetryError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let configured = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|source| TelemetryError::Filter { filter: config.log.clone(), source })?;
    let of_traces = filter_fn(is_of_trace).with_max_level_hint(LevelFilter::INFO);
    // The spans as well, or an error would not say in which operation it was.
    let always = filter_fn(move |metadata| {
        is_of_trace(metadata) || audit == AuditLines::All && metadata.target() == audit::TARGET
    })
    .with_max_level_hint(LevelFilter::INFO);
    let tracer = SdkTracerProvider::builder().build().tracer("vfio-checkpointd");
    let spans = tracing_opentelemetry::layer().with_tracer(tracer).with_threads(false).with_location(false);
    let registry = tracing_subscriber::registry().with(spans.with_filter(of_traces));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    let lines = match config.format {
        LogFormat::Text => lines.with_ansi(colour).boxed(),
        // With the list: the ids are in the span of the operation, and most lines are written in one of an arc.
        LogFormat::Json => lines.json().with_span_list(true).boxed(),
    };
    Ok(registry.with(lines.with_filter(configured.or(always))))
}

/// Whether it is one of the spans that carry trace context: those of this project, which are few. The libraries below have
/// spans of each frame.
fn is_of_trace(metadata: &Metadata<'_>) -> bool {
    // The crates and the programs.
    const OURS: &str = "vfio_checkpoint";
    metadata.is_span() && *metadata.level() <= Level::INFO && metadata.target().starts_with(OURS)
}

/// The trace that the current span belongs to, as 32 hexadecimal digits, where there is one.
pub fn current_trace_id() -> Option<String> {
    trace_id_of(&tracing::Span::current())
}

/// The current span as its own parent elsewhere: what another agent does for it is part of the same trace.
pub fn current_trace_parent() -> Option<TraceParent> {
    let context = tracing::Span::current().context();
    let span = context.span().span_context().clone();
    if !span.is_valid() {
        return None;
    }
    let (trace, id, flags) = (span.trace_id(), span.span_id(), span.trace_flags().to_u8());
    format!("00-{trace}-{id}-{flags:02x}").parse().ok()
}

fn trace_id_of(span: &tracing::Span) -> Option<String> {
    let context = span.context();
    let span = context.span().span_context().clone();
    span.is_valid().then(|| span.trace_id().to_string())
}
