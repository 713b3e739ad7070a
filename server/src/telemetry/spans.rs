//! Which spans there are, and whose child each is.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tracing::Instrument as _;
use tracing::Subscriber;
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::operation::{self, Alone, BoxError, PrecopyPolicy, SaveTerms, StateSink};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::{ConfigCapture, DeviceLane, Driver, Inline};
use vfio_checkpoint_fsm::{AfterSave, Cutover, SaveRequest};

/// Notes the path of each new span.
#[derive(Clone, Default)]
struct Paths(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Paths {
    fn on_new_span(&self, _attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let path: Vec<&str> = span.scope().from_root().map(|span| span.name()).collect();
        self.0.lock().unwrap().push(path.join("/"));
    }
}

struct Nowhere;

impl StateSink for Nowhere {
    async fn chunk(&mut self, _device: usize, _bytes: Bytes) -> Result<(), BoxError> {
        Ok(())
    }

    async fn seal(&mut self, _config: &[Option<ConfigCapture>]) -> Result<(), BoxError> {
        Ok(())
    }

    async fn mark_inconsistent(&mut self) -> Result<(), BoxError> {
        Ok(())
    }

    async fn discard(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
}

/// The spans of a save of a device with so much memory.
async fn spans_of_save(memory_bytes: u64) -> Vec<String> {
    let executor = Inline::new(1);
    let config = SimConfig { memory_bytes, ..SimConfig::default() };
    let sim = SimDevice::new(config, executor.time()).unwrap();
    let driver = Driver::new(Box::new(sim.open().unwrap()));
    let lane = DeviceLane::new(driver, Arc::new(executor), DEFAULT_CALL_LIMIT).unwrap();
    let terms = SaveTerms {
        request: SaveRequest { pre_copy: false, cutover: Cutover::Auto, after: AfterSave::Resume },
        policy: PrecopyPolicy::default(),
        cutover_limit: DEFAULT_CALL_LIMIT,
        hold_limit: DEFAULT_CALL_LIMIT,
        stop_limit: None,
        limits_commit: true,
    };
    let paths = Paths::default();
    let subscriber = tracing_subscriber::registry().with(paths.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    operation::save(&[lane], terms, &Alone, &mut Nowhere)
        .instrument(tracing::info_span!("operation"))
        .await
        .unwrap();
    paths.0.lock().unwrap().clone()
}

#[tokio::test]
async fn an_arc_is_in_its_phase_and_that_in_its_operation() {
    let paths = spans_of_save(1 << 20).await;
    assert_eq!(paths.first().map(String::as_str), Some("operation"));
    assert!(paths.contains(&"operation/phase/arc".to_owned()), "{paths:?}");
    let strays: Vec<&String> = paths.iter().filter(|path| !path.starts_with("operation")).collect();
    assert!(strays.is_empty(), "{strays:?}");
}

/// They are kept whatever is logged, so that none may be of a chunk.
#[tokio::test]
async fn more_state_is_no_more_spans() {
    assert_eq!(spans_of_save(1 << 20).await, spans_of_save(32 << 20).await);
}
