//! What the ranks of running gangs tell: where they listen, how far they are, why they end.
//!
//! Known, never stored. Each gang is the newest attempt of its job that was heard of.

use std::collections::BTreeMap;

use drumline_wire::v1;
use tokio::sync::oneshot;
use tonic::Status;

/// A service's report is believed for so long, in milliseconds.
const FRESH_MS: u64 = 5_000;
/// The longest error that is kept of a rank, in characters.
const ERROR_MAX: usize = 400;

type Reply = oneshot::Sender<Result<v1::World, Status>>;

/// Names one gang.
#[derive(Debug, Clone, Copy)]
pub struct GangRef<'a> {
    /// The job's uid.
    pub job: &'a str,
    /// The attempt.
    pub attempt: u32,
    /// Its ranks.
    pub ranks: u32,
}

/// What the ranks of one gang have told.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Whether every rank has said where it listens.
    pub is_joined: bool,
    /// The last finished step, and its loss.
    pub step: u64,
    /// The loss of that step, as text with as many digits as people look at.
    pub loss: Option<String>,
    /// What was told with that loss.
    pub train: Option<v1::TrainReport>,
    /// The last loss on the held-out split.
    pub loss_validation: Option<f64>,
    /// When a step was last finished, in milliseconds since 1970; 0: none was seen yet.
    pub progressed_ms: u64,
    /// The step of the newest complete checkpoint.
    pub checkpoint: Option<u64>,
    /// Why ranks say that they end.
    pub errors: BTreeMap<u32, String>,
    /// Where ranks stand within a step.
    pub positions: BTreeMap<u32, String>,
    /// Where the leader serves requests; empty: it serves none.
    pub inference_url: String,
    /// What the leader last told of its service, and when, in milliseconds since 1970.
    pub serving: Option<(v1::ServeReport, u64)>,
    /// Tokens that the service makes each second.
    pub tokens_per_second: f64,
}

impl Told {
    /// Returns the leader's last report, if it is recent enough to believe.
    #[must_use]
    pub fn fresh(&self, now_ms: u64) -> Option<v1::ServeReport> {
        let (report, at) = self.serving.as_ref()?;
        (now_ms.saturating_sub(*at) < FRESH_MS).then_some(*report)
    }
}

#[derive(Debug, Default)]
struct Gang {
    attempt: u32,
    ranks: u32,
    job_id: String,
    joins: BTreeMap<u32, v1::JoinWorld>,
    waiting: BTreeMap<u32, Reply>,
    told: Told,
}

/// Every gang that was heard of.
#[derive(Debug, Default)]
pub struct Worlds {
    gangs: BTreeMap<String, Gang>,
}

impl Worlds {
    /// Returns what the ranks of an attempt have told.
    #[must_use]
    pub fn told(&self, job: &str, attempt: u32) -> Option<&Told> {
        self.gangs.get(job).filter(|gang| gang.attempt == attempt).map(|gang| &gang.told)
    }

    /// Forgets the gangs of jobs that `is_there` does not name.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.gangs.retain(|job, _| is_there(job));
    }

    fn gang(&mut self, of: GangRef<'_>) -> Result<&mut Gang, Status> {
        let gang = self.gangs.entry(of.job.to_owned()).or_default();
        if gang.attempt > of.attempt {
            return Err(Status::failed_precondition(format!("attempt {} is over", of.attempt)));
        }
        if gang.attempt < of.attempt {
            for (_, reply) in std::mem::take(&mut gang.waiting) {
                let _ = reply.send(Err(Status::aborted("this attempt is over")));
            }
            *gang = Gang { attempt: of.attempt, ..Gang::default() };
        }
        gang.ranks = of.ranks;
        Ok(gang)
    }

    /// Takes a rank in. Once all are there, each is told the world. Returns whether it is whole now
    /// and was not before.
    pub fn join(
        &mut self,
        of: GangRef<'_>,
        join: v1::JoinWorld,
        secret: &str,
        reply: Reply,
    ) -> bool {
        let gang = match self.gang(of) {
            Ok(gang) => gang,
            Err(status) => {
                let _ = reply.send(Err(status));
                return false;
            }
        };
        let was_whole = gang.is_whole();
        gang.job_id.clone_from(&join.job);
        if !join.inference_url.is_empty() {
            gang.told.inference_url.clone_from(&join.inference_url);
        }
        let rank = join.rank;
        // Asked again: the answer before was lost, and nobody waits for it any more.
        gang.waiting.insert(rank, reply);
        gang.joins.insert(rank, join);
        if !gang.is_whole() {
            return false;
        }
        gang.told.is_joined = true;
        let world = gang.world(secret);
        for (_, reply) in std::mem::take(&mut gang.waiting) {
            let _ = reply.send(Ok(world.clone()));
        }
        !was_whole
    }

    /// Takes a report. Returns what the rank shall do, and whether something has changed that
    /// should be looked at now rather than in some seconds.
    ///
    /// # Errors
    /// When the attempt is over.
    pub fn report(
        &mut self,
        of: GangRef<'_>,
        report: &v1::RankReport,
        now_ms: u64,
    ) -> Result<(v1::RankCommand, bool), Status> {
        let gang = self.gang(of)?;
        let announce = !gang.joins.contains_key(&report.rank);
        let told = &mut gang.told;
        let mut is_news = false;
        if report.step > told.step || told.progressed_ms == 0 {
            told.step = told.step.max(report.step);
            told.progressed_ms = now_ms;
        }
        if let Some(train) = &report.train
            && report.step >= told.step
            && train.loss.is_finite()
            && train.loss != 0.0
        {
            told.loss = Some(format!("{:.4}", train.loss));
            told.train = Some(*train);
        }
        if let Some(loss) = report.train.as_ref().and_then(|train| train.loss_validation)
            && loss.is_finite()
        {
            told.loss_validation = Some(loss);
        }
        if let Some(checkpoint) = &report.checkpoint {
            told.checkpoint = told.checkpoint.max(Some(checkpoint.step));
        }
        if !report.error.is_empty() {
            let error = report.error.chars().take(ERROR_MAX).collect();
            told.errors.insert(report.rank, error);
        }
        if !report.position.is_empty() {
            told.positions.insert(report.rank, report.position.clone());
        }
        if let Some(serve) = report.serve {
            is_news = told.serving.as_ref().map(|(last, _)| last.ready) != Some(serve.ready);
            if let Some((last, at)) = &told.serving {
                let made =
                    serve.completion_tokens_total.saturating_sub(last.completion_tokens_total);
                let passed = now_ms.saturating_sub(*at).max(1);
                told.tokens_per_second = made as f64 * 1000.0 / passed as f64;
            }
            // A service that answers makes progress, whether or not it has anything to do.
            told.progressed_ms = now_ms;
            told.serving = Some((serve, now_ms));
        }
        Ok((v1::RankCommand { announce, ..v1::RankCommand::default() }, is_news))
    }
}

impl Gang {
    fn is_whole(&self) -> bool {
        self.ranks > 0 && (0..self.ranks).all(|rank| self.joins.contains_key(&rank))
    }

    fn world(&self, secret: &str) -> v1::World {
        let ranks = self.joins.values().map(|join| v1::WorldRank {
            rank: join.rank,
            collective_address: join.collective_address.clone(),
            host: join.host.clone(),
        });
        v1::World {
            job: self.job_id.clone(),
            attempt: self.attempt,
            ranks: ranks.collect(),
            error: String::new(),
            secret: secret.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: GangRef<'_> = GangRef { job: "u", attempt: 1, ranks: 2 };

    fn join(
        worlds: &mut Worlds,
        of: GangRef<'_>,
        rank: u32,
    ) -> oneshot::Receiver<Result<v1::World, Status>> {
        let (reply, answer) = oneshot::channel();
        let join = v1::JoinWorld {
            rank,
            attempt: of.attempt,
            collective_address: format!("10.0.0.{rank}:1"),
            ..v1::JoinWorld::default()
        };
        worlds.join(of, join, "secret", reply);
        answer
    }

    #[test]
    fn a_world_is_told_once_all_have_joined_and_again_to_who_asks_again() {
        let mut worlds = Worlds::default();
        let mut first = join(&mut worlds, PAIR, 0);
        assert!(first.try_recv().is_err(), "nobody else has joined");
        let second = join(&mut worlds, PAIR, 1);
        let worlds_told = [first, second].map(|answer| answer.blocking_recv().unwrap().unwrap());
        assert_eq!(worlds_told[0], worlds_told[1]);
        assert_eq!(worlds_told[0].ranks.len(), 2);
        assert_eq!(worlds_told[0].secret, "secret");
        let again = join(&mut worlds, PAIR, 1).blocking_recv().unwrap().unwrap();
        assert_eq!(again.ranks.len(), 2);
        assert!(worlds.told("u", 1).unwrap().is_joined);
    }

    #[test]
    fn a_later_attempt_ends_the_one_before() {
        let mut worlds = Worlds::default();
        let first = join(&mut worlds, PAIR, 0);
        let next = GangRef { attempt: 2, ..PAIR };
        let _second = join(&mut worlds, next, 0);
        assert_eq!(first.blocking_recv().unwrap().unwrap_err().code(), tonic::Code::Aborted);
        let late = join(&mut worlds, PAIR, 1).blocking_recv().unwrap().unwrap_err();
        assert_eq!(late.code(), tonic::Code::FailedPrecondition);
        assert!(worlds.told("u", 1).is_none());
    }

    #[test]
    fn a_rank_that_is_not_known_is_asked_to_join_again() {
        let mut worlds = Worlds::default();
        let report = |rank, step| v1::RankReport { rank, step, ..v1::RankReport::default() };
        let (command, _) = worlds.report(PAIR, &report(0, 3), 10).unwrap();
        assert!(command.announce);
        let _answer = join(&mut worlds, PAIR, 0);
        let (command, _) = worlds.report(PAIR, &report(0, 4), 20).unwrap();
        assert!(!command.announce);
        worlds.report(PAIR, &report(0, 4), 30).unwrap();
        let told = worlds.told("u", 1).unwrap();
        assert_eq!((told.step, told.progressed_ms), (4, 20), "the same step is no progress");
    }
}
