//! W3C trace context in gRPC metadata, taken from a call. The client library hands it on with its own.

use std::task::{Context, Poll};

use http::header::HeaderName;
use http::{HeaderMap, Request};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tower::{Layer, Service};
use tracing::Instrument as _;
use tracing::instrument::Instrumented;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

/// Puts each call into a span that continues the caller's trace.
#[derive(Debug, Clone, Copy, Default)]
pub struct TraceLayer;

impl<S> Layer<S> for TraceLayer {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner }
    }
}

/// A service whose calls are in spans.
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Traced<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let span =
            tracing::info_span!("rpc", method = request.uri().path(), trace_id = tracing::field::Empty);
        let parent = TraceContextPropagator::new().extract(&Headers(request.headers()));
        // Without a subscriber that traces there is nothing to continue.
        let _ = span.set_parent(parent);
        if let Some(trace_id) = super::trace_id_of(&span) {
            span.record("trace_id", trace_id);
        }
        let _entered = span.enter();
        self.inner.call(request).instrument(span.clone())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use http::HeaderValue;
    use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_goes_through() {
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let subscriber =
            tracing_subscriber::registry().with(tracing_opentelemetry::layer().with_tracer(tracer));
        tracing::subscriber::with_default(subscriber, || {
            let asked = tower::service_fn(|_: Request<()>| async {
                Ok::<_, std::convert::Infallible>(crate::telemetry::current_trace_id())
            });
            let ask = |request: Request<()>| {
                TraceLayer.layer(asked).call(request).now_or_never().unwrap().unwrap().unwrap()
            };
            let request = || Request::builder().uri("/a.Service/Method");
            let with_parent = request().header("traceparent", PARENT).body(()).unwrap();
            assert_eq!(ask(with_parent), "0af7651916cd43dd8448eb211c80319c");
            // Without one it begins its own, each its own.
            let [one, another] = [ask(request().body(()).unwrap()), ask(request().body(()).unwrap())];
            assert_eq!(one.len(), 32);
            assert_ne!(one, another);
        });
    }

    #[test]
    fn nonsense_begins_a_new_trace() {
        for value in ["", "00-00000000000000000000000000000000-0000000000000000-00", "x", "00-zz-yy-01"] {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_static(value));
            let context = TraceContextPropagator::new().extract(&Headers(&headers));
            assert!(!context.span().span_context().is_valid(), "{value}");
        }
    }
}
