use super::answer::Failure;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use std::time::Duration;

/// What the shim's calls cost and how they failed. Clones share it.
#[derive(Clone, Debug)]
pub struct Metrics {
    add: Histogram,
    failures: Family<Call, Counter>,
    reaped: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Call {
    call: &'static str,
    code: u32,
}

impl Metrics {
    pub fn new() -> Self {
        Self { add: Histogram::new(ADD_SECONDS), failures: Family::default(), reaped: Counter::default() }
    }

    pub fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "weft_cni_add",
            "From an attachment's reservation to its activation",
            Unit::Seconds,
            self.add.clone(),
        );
        registry.register(
            "weft_cni_failures",
            "Calls of the CNI shim that were refused, by call and CNI code",
            self.failures.clone(),
        );
        registry.register(
            "weft_cni_reaped",
            "Attachments that were taken away without a DEL",
            self.reaped.clone(),
        );
    }

    pub(super) fn added(&self, took: Duration) {
        self.add.observe(took.as_secs_f64());
    }

    pub(super) fn failed(&self, call: &'static str, failure: &Failure) {
        self.failures.get_or_create(&Call { call, code: failure.code as u32 }).inc();
    }

    pub(super) fn reaped(&self) {
        self.reaped.inc();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Upper bounds of the histogram's buckets: around the 30 ms that an ADD may take, up to its deadline.
const ADD_SECONDS: [f64; 11] = [0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0, 5.0, 20.0];
