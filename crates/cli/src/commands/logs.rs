//! `drumline logs`: what ranks wrote, from where the reader stopped, over lost connections and into
//! later attempts.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use drumline_wire::v1;

use crate::client::{Access, Patience};
use crate::commands::describe::get;
use crate::commands::wait::outcome;
use crate::failure::Failure;
use crate::output::{bytes, note};
use crate::told;

/// Show what a job's ranks wrote.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Its id, as `jobs` shows it.
    pub id: String,
    /// Go on until the job has ended, over restarts; the exit code is the job's outcome.
    #[arg(short, long)]
    pub follow: bool,
    /// Only this rank, without prefixes.
    #[arg(long)]
    pub rank: Option<u32>,
    /// Only this attempt; 0 is the present one.
    #[arg(long, default_value_t = 0)]
    pub attempt: u32,
    /// Only the last so many KiB of each rank; 0 shows all.
    #[arg(long, default_value_t = 0, value_name = "KIB")]
    pub tail: u64,
    /// Give up when the cluster could not be reached for this long.
    #[arg(long, default_value = "60s", value_parser = crate::args::duration)]
    pub reconnect: Duration,
}

/// Runs the command.
///
/// # Errors
/// With `--follow` the job's own outcome; the user's mistake for an unknown id; unreachable.
pub async fn run(args: &LogsArgs, access: &Access) -> Result<(), Failure> {
    let mut patience = Patience::new(args.reconnect);
    let mut reader = Reader::new(args.rank.is_none());
    let mut attempt = args.attempt;
    loop {
        let result = one_attempt(args, access, &mut attempt, &mut reader, &mut patience).await;
        let failure = match result {
            Ok(Ended::Job(job)) => {
                reader.flush()?;
                return if args.follow { outcome(&job) } else { Ok(()) };
            }
            Ok(Ended::Stream) => {
                reader.flush()?;
                return Ok(());
            }
            Ok(Ended::Attempt(next)) => {
                reader.flush()?;
                note(&format!("attempt {next}"));
                attempt = next;
                continue;
            }
            Err(failure) => failure,
        };
        // Standard output that is gone is no reason to try again.
        patience.after(failure).await?;
    }
}

/// How the log of one attempt ended.
enum Ended {
    /// All that there is was shown.
    Stream,
    /// The job has ended.
    Job(Box<v1::JobView>),
    /// The job goes on with a later attempt.
    Attempt(u32),
}

async fn one_attempt(
    args: &LogsArgs,
    access: &Access,
    attempt: &mut u32,
    reader: &mut Reader,
    patience: &mut Patience,
) -> Result<Ended, Failure> {
    let client = access.connect().await?;
    if args.follow && *attempt == 0 {
        // The attempt is fixed, so that offsets keep their meaning over a lost connection, and the
        // end of an attempt that was over meanwhile is still shown.
        *attempt = wait_for_start(&client, &args.id).await?;
    }
    let attempt = *attempt;
    let request = v1::LogsRequest {
        id: args.id.clone(),
        rank: args.rank,
        offset: args.rank.map_or(0, |rank| reader.seen(attempt, rank)),
        follow: args.follow,
        attempt,
        tail_bytes: if reader.is_new() { args.tail.saturating_mul(1024) } else { 0 },
    };
    let mut stream = client.call(|mut c| async move { c.logs(request).await }).await?;
    loop {
        match stream.message().await {
            Ok(Some(chunk)) => {
                patience.succeeded();
                reader.take(&chunk)?;
            }
            Ok(None) => break,
            Err(status) => return Err(client.failure(&status)),
        }
    }
    if !args.follow {
        return Ok(Ended::Stream);
    }
    // All ranks of the attempt have ended. The job may have ended with them, or go on.
    loop {
        let job = get(&client, &args.id).await?;
        patience.succeeded();
        if job.has_ended() {
            return Ok(Ended::Job(Box::new(job)));
        }
        if args.attempt == 0 && job.attempt > attempt {
            return Ok(Ended::Attempt(job.attempt));
        }
        if args.attempt != 0 && job.attempt > args.attempt {
            return Ok(Ended::Stream);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until a job has its first attempt, and says once why it does not start.
async fn wait_for_start(client: &crate::client::Client, id: &str) -> Result<u32, Failure> {
    let mut said = String::new();
    loop {
        let job = get(client, id).await?;
        if job.attempt > 0 || job.has_ended() {
            return Ok(job.attempt);
        }
        if said != job.reason {
            note(&format!("{id} is {}: {}", job.phase, told::reason(&job)));
            said = job.reason;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Shows each byte once, whatever is sent again, and whole lines of one rank at a time.
#[derive(Debug)]
struct Reader {
    prefixed: bool,
    /// The end of what was shown, by attempt and rank.
    seen: BTreeMap<(u32, u32), u64>,
    /// Beginnings of lines, by rank.
    open: BTreeMap<u32, Vec<u8>>,
}

/// The longest line that is held back until its end is known.
const LINE_MAX: usize = 64 << 10;

impl Reader {
    fn new(prefixed: bool) -> Self {
        Self { prefixed, seen: BTreeMap::new(), open: BTreeMap::new() }
    }

    fn is_new(&self) -> bool {
        self.seen.is_empty()
    }

    fn seen(&self, attempt: u32, rank: u32) -> u64 {
        self.seen.get(&(attempt, rank)).copied().unwrap_or(0)
    }

    /// Takes a chunk and shows what of it is new.
    fn take(&mut self, chunk: &v1::LogChunk) -> Result<(), Failure> {
        let seen = self.seen.entry((chunk.attempt, chunk.rank)).or_insert(0);
        let end = chunk.offset.saturating_add(chunk.data.len() as u64);
        let skip = usize::try_from(seen.saturating_sub(chunk.offset)).unwrap_or(usize::MAX);
        let fresh = chunk.data.get(skip..).unwrap_or_default();
        *seen = (*seen).max(end);
        if !self.prefixed {
            return if fresh.is_empty() { Ok(()) } else { bytes(fresh) };
        }
        let open = self.open.entry(chunk.rank).or_default();
        open.extend_from_slice(fresh);
        let whole = match open.iter().rposition(|byte| *byte == b'\n') {
            Some(last) => last + 1,
            None if open.len() > LINE_MAX => open.len(),
            None => return Ok(()),
        };
        let lines: Vec<u8> = open.drain(..whole).collect();
        bytes(&prefix(chunk.rank, &lines))
    }

    /// Shows lines that have no end.
    fn flush(&mut self) -> Result<(), Failure> {
        for (rank, open) in std::mem::take(&mut self.open) {
            if !open.is_empty() {
                bytes(&prefix(rank, &open))?;
            }
        }
        Ok(())
    }
}

fn prefix(rank: u32, lines: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(lines.len() + 64);
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        out.extend_from_slice(format!("[{rank}] ").as_bytes());
        out.extend_from_slice(line);
    }
    if out.last() != Some(&b'\n') {
        out.push(b'\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_sent_again_are_shown_once() {
        let mut reader = Reader::new(true);
        let chunk = |offset, data: &str| v1::LogChunk {
            rank: 1,
            attempt: 1,
            offset,
            data: data.as_bytes().to_vec(),
            end: false,
        };
        reader.take(&chunk(0, "abc")).unwrap();
        reader.take(&chunk(0, "abcde")).unwrap();
        reader.take(&chunk(3, "de")).unwrap();
        assert_eq!(reader.seen(1, 1), 5);
        assert_eq!(reader.open[&1], b"abcde");
        assert_eq!(prefix(3, b"a\nb"), b"[3] a\n[3] b\n");
    }
}
