//! A thread with a runtime of its own, for servers that run beside tests of either kind.
use std::io;

use tokio::runtime::{Builder, Runtime};

/// Ends, with what runs on it, when it is dropped; may be made and dropped on any thread.
pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// Sockets that are made on it belong to the network namespace of the calling thread.
    pub fn run(work: impl Future<Output = io::Result<()>> + Send + 'static) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.spawn(work);
        Ok(Self(Some(runtime)))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
