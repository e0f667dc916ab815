//! Watches of etcd, held to the port's contract.

use etcd_client::{Client, WatchOptions, WatchResponse};
use futures::stream;

use drumline_ports::store::{Event, Revision, StoreError, WatchBatch, WatchStream};

use super::convert::{self, Namespace};
use super::failure::{Definite, Kind, sort};

struct Watching {
    // Holds the sending half too: without it the server ends the watch.
    stream: etcd_client::WatchStream,
    names: Namespace,
    op: String,
    from: Revision,
    through: Revision,
    ended: bool,
}

/// Opens a watch and waits for etcd's word that it stands.
///
/// It asks for one revision more than needed and drops that one. Asked for exactly the compacted
/// revision, etcd (before 3.4.34 and 3.5.16) neither refuses nor delivers a deletion that lies
/// there; asked for the one before, it refuses.
pub(super) async fn open(
    client: &Client,
    names: &Namespace,
    prefix: &str,
    from: Revision,
) -> Result<WatchStream, StoreError> {
    let op = format!("watch of {prefix:?}");
    let (start, end) = names.span(prefix);
    let ask = from.0.saturating_sub(1).max(1);
    let options = WatchOptions::new().with_range(end).with_start_revision(convert::signed(ask));
    let unavailable = |cause: String| StoreError::unavailable(op.clone(), cause);
    let mut watcher = client.watch_client().max_decoding_message_size(i32::MAX as usize);
    let opened = watcher.watch(start, Some(options)).await;
    let mut stream = opened.map_err(|e| unavailable(sort(&e).1))?;
    let first = stream.message().await.map_err(|e| unavailable(sort(&e).1))?;
    let first = first.ok_or_else(|| unavailable("etcd ended the watch at once".to_owned()))?;
    let watching = Watching {
        stream,
        names: names.clone(),
        op,
        from,
        through: Revision(from.0.saturating_sub(1)),
        ended: false,
    };
    watching.check(&first)?;
    let current = convert::header(&watching.op, first.header())?;
    if from > current.next() {
        return Err(StoreError::FutureRevision { requested: from, current });
    }
    Ok(Box::pin(stream::unfold(watching, |mut watching| async move {
        if watching.ended {
            return None;
        }
        let item = watching.next_batch().await;
        watching.ended = item.is_err();
        Some((item, watching))
    })))
}

impl Watching {
    async fn next_batch(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            let message = match self.stream.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Err(self.lost("etcd ended the watch".to_owned())),
                Err(error) => return Err(self.translate(&error)),
            };
            self.check(&message)?;
            let mut events: Vec<Event> = Vec::with_capacity(message.events().len());
            for event in message.events() {
                let event = self.names.event(&self.op, event)?;
                // Also drops what a server should not repeat.
                if event.revision > self.through {
                    events.push(event);
                }
            }
            if let Some(last) = events.last() {
                self.through = last.revision;
                return Ok(WatchBatch { through: self.through, events });
            }
        }
    }

    /// Fails where the message says that the watch is over.
    fn check(&self, message: &WatchResponse) -> Result<(), StoreError> {
        if message.compact_revision() > 0 {
            let compacted = Revision(convert::unsigned(message.compact_revision()));
            return Err(StoreError::Compacted {
                requested: self.through.next().max(self.from),
                oldest: compacted.next(),
            });
        }
        if message.canceled() {
            return Err(self.lost(format!("etcd cancelled the watch: {}", message.cancel_reason())));
        }
        Ok(())
    }

    fn translate(&self, error: &etcd_client::Error) -> StoreError {
        match sort(error) {
            (Kind::Definite(definite @ Definite::Invalid(_)), _) => definite.of(&self.op),
            (_, cause) => self.lost(cause),
        }
    }

    fn lost(&self, cause: String) -> StoreError {
        StoreError::unavailable(self.op.clone(), cause)
    }
}
