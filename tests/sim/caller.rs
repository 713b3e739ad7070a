//! What every caller of the simulation does: it connects until it is let in, rests between two attempts, and says in the log
//! what it is told.

use std::fmt::Display;
use std::sync::Arc;

use vfio_checkpoint_client::call::Client;

use crate::dice::Dice;
use crate::log::{Log, say};
use crate::network::SimNetwork;
use crate::pki::{Pki, call_options};

/// A caller, on the host `client`.
pub(crate) struct Caller {
    pub(crate) log: Log,
    pub(crate) pki: Arc<Pki>,
    pub(crate) dice: Arc<Dice>,
}

impl Caller {
    /// A connection to `agent`, or none where it did not come within so many attempts.
    pub(crate) async fn connect_within(&self, agent: &'static str, attempts: u32) -> Option<Client> {
        let network = Arc::new(SimNetwork { host: "client", log: self.log.clone() });
        for _ in 0..attempts {
            match Client::connect(&self.pki.options(agent, network.clone())).await {
                Ok(client) => {
                    say!(self.log, "client", "is let in by {agent}");
                    return Some(client.with_call_options(call_options(Arc::clone(&self.dice))));
                }
                Err(error) => {
                    say!(self.log, "client", "is not let in by {agent}: {}", self.log.short(&error));
                }
            }
            self.rest().await;
        }
        None
    }

    /// A connection to `agent`, which is there sooner or later.
    pub(crate) async fn connect(&self, agent: &'static str) -> Client {
        loop {
            if let Some(client) = self.connect_within(agent, u32::MAX).await {
                return client;
            }
        }
    }

    pub(crate) async fn rest(&self) {
        tokio::time::sleep(self.dice.between(20, 150)).await;
    }

    /// Longer and longer: an agent looks every 30 s after a device that it could not open.
    pub(crate) async fn rest_after(&self, failed: u32) {
        if failed > 0 {
            let ceiling = (100 << failed.min(7)).min(8000);
            tokio::time::sleep(self.dice.between(20, ceiling)).await;
        }
    }

    /// The answer of a call. What went wrong is said, in words that do not change from run to run.
    pub(crate) fn told<T, E: Display>(&self, what: &str, answer: Result<T, E>) -> Option<T> {
        match answer {
            Ok(answer) => {
                say!(self.log, "client", "{what}: ok");
                Some(answer)
            }
            Err(error) => {
                say!(self.log, "client", "{what}: {}", self.log.short(&error));
                None
            }
        }
    }
}
