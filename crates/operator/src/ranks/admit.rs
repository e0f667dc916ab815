//! Between the listener and the core: no call reaches the core whose pod is not known.

use std::sync::Arc;

use drumline_wire::rank_host::RankCall;
use tokio::sync::{Semaphore, mpsc};
use tonic::Status;

use crate::ranks::callers::{Callers, PodRef};

/// Calls that are looked at at a time.
const AT_A_TIME: usize = 64;

/// A call, and the pod that made it.
#[derive(Debug)]
pub struct Admitted {
    /// Who.
    pub pod: PodRef,
    /// What.
    pub call: RankCall,
}

/// Finds out who calls, until nobody can call any more.
pub async fn run(
    mut calls: mpsc::Receiver<RankCall>,
    admitted: mpsc::Sender<Admitted>,
    callers: Callers,
) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    while let Some(call) = calls.recv().await {
        // The semaphore is never closed.
        let place = places.clone().acquire_owned().await;
        let (callers, admitted) = (callers.clone(), admitted.clone());
        tokio::spawn(async move {
            let _place = place;
            match callers.pod(call.secret()).await {
                Ok(pod) => {
                    if let Err(refused) = admitted.send(Admitted { pod, call }).await {
                        refused.0.call.refuse(Status::unavailable("the operator is stopping"));
                    }
                }
                Err(status) => call.refuse(status),
            }
        });
    }
}
