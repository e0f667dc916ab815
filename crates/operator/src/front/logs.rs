//! Logs of ranks: those that the kubelets keep of their pods.

use std::time::Duration;

use drumline_wire::v1;
use futures::AsyncReadExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, LogParams};
use tokio::sync::mpsc::Sender;
use tonic::Status;

use crate::front::{Front, refused};
use crate::gang::{Member, Standing};

/// Bytes of one message.
const CHUNK_BYTES: usize = 32 << 10;
/// Between two looks at a pod that does not run yet.
const LOOK: Duration = Duration::from_millis(500);
/// Times that a log is asked for again without a new byte.
const TRIES_MAX: u32 = 20;
/// Ranks whose logs are read at once when none is named.
pub(crate) const RANKS_MAX: u32 = 64;

/// The log of one rank.
pub(crate) struct RankLog {
    /// The pod's name.
    pub(crate) pod: String,
    /// Its job's attempt.
    pub(crate) attempt: u32,
    /// Its rank.
    pub(crate) rank: u32,
    /// Bytes that the reader has.
    pub(crate) seen: u64,
    /// Whether to go on until the pod has ended.
    pub(crate) follow: bool,
    /// Only the last so many bytes; 0: all.
    pub(crate) tail_bytes: u64,
}

type Out = Sender<Result<v1::LogChunk, Status>>;

impl RankLog {
    fn chunk(&self, offset: u64, data: Vec<u8>, end: bool) -> v1::LogChunk {
        v1::LogChunk { rank: self.rank, attempt: self.attempt, offset, data, end }
    }
}

impl Front {
    /// Sends a rank's log, to its end where it is followed.
    pub(crate) async fn read_log(&self, log: &RankLog, out: &Out) -> Result<(), Status> {
        let pods = self.pods();
        // What was sent, counted from the log's start.
        let mut sent = log.seen;
        let mut tries = 0;
        loop {
            let standing = Self::standing(&pods, log).await?;
            let before = sent;
            let waits = matches!(standing, Some(Standing::Unbound | Standing::Bound));
            if !waits {
                match Self::copy(&pods, log, &mut sent, out).await {
                    Ok(()) => {}
                    // It was deleted meanwhile, or its container does not run yet after all.
                    Err(kube::Error::Api(answer))
                        if log.follow && matches!(answer.code, 400 | 404) => {}
                    Err(error) => return Err(refused(&error)),
                }
            }
            let has_ended = matches!(standing, None | Some(Standing::Succeeded | Standing::Failed));
            if has_ended {
                let _ = out.send(Ok(log.chunk(sent, Vec::new(), true))).await;
            }
            tries = if waits || sent > before { 0 } else { tries + 1 };
            if !log.follow || has_ended || tries > TRIES_MAX || out.is_closed() {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// `None`: the pod is gone, which ends a log that is followed and is an error of one that is not.
    async fn standing(pods: &Api<Pod>, log: &RankLog) -> Result<Option<Standing>, Status> {
        let pod = pods.get_opt(&log.pod).await.map_err(|error| refused(&error))?;
        match pod.as_ref().and_then(Member::read) {
            Some(member) => Ok(Some(member.standing)),
            None if log.follow => Ok(None),
            None => Err(Status::not_found(format!(
                "pod {} is gone, and its log with it; pods of the newest attempt only are kept",
                log.pod
            ))),
        }
    }

    /// Copies what the kubelet has beyond what was sent, until it ends the stream.
    async fn copy(
        pods: &Api<Pod>,
        log: &RankLog,
        sent: &mut u64,
        out: &Out,
    ) -> Result<(), kube::Error> {
        // A tail is known only at the end of what there is: it is read first, and followed then.
        let wants_tail = log.tail_bytes > 0 && *sent == log.seen;
        let params = LogParams {
            container: Some("rank".to_owned()),
            follow: log.follow && !wants_tail,
            ..LogParams::default()
        };
        let mut stream = std::pin::pin!(pods.log_stream(&log.pod, &params).await?);
        let mut at = 0u64;
        let mut tail = Vec::new();
        let mut buffer = vec![0u8; CHUNK_BYTES];
        // A kubelet that goes away cuts the stream: the next look says what became of the pod.
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            let start = at;
            at += read as u64;
            let skip = sent.saturating_sub(start).min(read as u64) as usize;
            let new = &buffer[skip..read];
            if new.is_empty() {
                continue;
            }
            if wants_tail {
                tail.extend_from_slice(new);
                let surplus = tail.len().saturating_sub(log.tail_bytes as usize);
                tail.drain(..surplus);
                continue;
            }
            *sent = at;
            let chunk = log.chunk(at - new.len() as u64, new.to_vec(), false);
            if out.send(Ok(chunk)).await.is_err() {
                break;
            }
        }
        if !tail.is_empty() {
            let chunk = log.chunk(at - tail.len() as u64, tail, false);
            let _ = out.send(Ok(chunk)).await;
            *sent = at;
        }
        Ok(())
    }
}
