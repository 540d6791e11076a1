//! One way to a peer, to one of its endpoints or by a relay: is it good for anything, how fast is it, what does it take.
//!
//! ```text
//!            3 rounds lost (6 while packets still come from the peer)
//!   untried ─────────────────────────────────▶ down ◀──▶ up
//!      └───────────── one answered ─▶ up         2 answered
//! ```
//! A round is one probe, or several of different sizes; it is lost when none is answered.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use super::mtu::{Search, Sizes};
use arrayvec::ArrayVec;
use std::time::{Duration, Instant};

#[derive(Clone, Debug)]
pub(super) struct Leg {
    state: State,
    round: Option<Round>,
    /// What was sent in rounds before: a late answer shows that the way is only slow.
    late: ArrayVec<Sent, LATE>,
    /// Rounds in a row that were lost, and answered.
    missed: u32,
    answered: u32,
    /// When the last round was begun or made unnecessary.
    last: Option<Instant>,
    hurry: bool,
    rtt: Option<Duration>,
    loss: f32,
    down_since: Option<Instant>,
    search: Search,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Untried,
    Up,
    Down,
}

/// How a way is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watch {
    /// As one that is or might be needed at any moment.
    pub close: bool,
    /// Packets of full size are on their way.
    pub full: bool,
    /// Packets came from the peer lately.
    pub heard: bool,
}

#[derive(Clone, Debug)]
struct Round {
    begun: Instant,
    probes: ArrayVec<Sent, { super::mtu::VOLLEY }>,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    size: u16,
    at: Instant,
    answered: bool,
}

impl Leg {
    pub fn new(search: Search) -> Self {
        Self {
            state: State::Untried,
            round: None,
            late: ArrayVec::new(),
            missed: 0,
            answered: 0,
            last: None,
            hurry: false,
            rtt: None,
            loss: 0.0,
            down_since: None,
            search,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The mean of its round trips; none where there was none lately.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt.filter(|_| self.state == State::Up)
    }

    /// The same, where the latest probe was answered.
    pub fn sure_rtt(&self) -> Option<Duration> {
        self.rtt().filter(|_| self.missed == 0)
    }

    /// The part of rounds that were lost of late, 0 to 1.
    pub fn loss(&self) -> f32 {
        self.loss
    }

    pub fn mtu(&self) -> u16 {
        self.search.mtu()
    }

    pub fn down_since(&self) -> Option<Instant> {
        self.down_since
    }

    /// Rounds are being lost.
    pub fn is_in_doubt(&self) -> bool {
        self.missed > 0 && self.state != State::Down
    }

    /// When to call [`Leg::wake`].
    pub fn next_wake(&self, watch: Watch, now: Instant) -> Instant {
        let due = match (&self.round, self.last) {
            (Some(round), _) => round.begun + self.patience(),
            (None, None) => return now,
            (None, Some(_)) if self.hurry => return now,
            (None, Some(last)) => last + self.pause(watch),
        };
        match self.search.raise() {
            Some(raise) if self.round.is_none() && self.state == State::Up => due.min(raise),
            _ => due,
        }
    }

    /// Ends a round that has waited for long enough, and gives the sizes of the next one's probes, if one is due.
    pub fn wake(&mut self, watch: Watch, now: Instant) -> Option<Sizes> {
        if self.round.as_ref().is_some_and(|round| now >= round.begun + self.patience()) {
            self.end_round(watch, now);
        }
        if self.round.is_some() || now < self.next_wake(watch, now) {
            return None;
        }
        (self.last, self.hurry) = (Some(now), false);
        self.round = Some(Round { begun: now, probes: ArrayVec::new() });
        Some(self.search.sizes(watch.full, now))
    }

    /// One of the sizes that [`Leg::wake`] gave was sent under that number.
    pub fn sent(&mut self, number: u64, size: u16, now: Instant) {
        if let Some(round) = &mut self.round {
            // As many as sizes were given.
            let _ = round.probes.try_push(Sent { number, size, at: now, answered: false });
        }
    }

    /// An answer came; whether it was one to a probe on this way.
    pub fn answer(&mut self, number: u64, watch: Watch, now: Instant) -> bool {
        if let Some(sent) = self.late.iter_mut().find(|sent| sent.number == number) {
            let took = now.duration_since(sent.at);
            self.late.retain(|sent| sent.number != number);
            self.measured(took);
            self.missed = 0;
            return true;
        }
        let Some(round) = &mut self.round else { return false };
        let Some(sent) = round.probes.iter_mut().find(|sent| sent.number == number) else { return false };
        let (took, first) = (now.duration_since(sent.at), !sent.answered);
        sent.answered = true;
        let all = round.probes.iter().all(|sent| sent.answered);
        if first {
            self.measured(took);
        }
        if self.state == State::Untried {
            (self.state, self.missed) = (State::Up, 0);
        }
        if all {
            self.end_round(watch, now);
        }
        true
    }

    /// The peer has said that our answers reach it, and after what time: as good as an answer to us. It keeps the lead:
    /// or both would probe at once, again and again.
    pub fn confirmed(&mut self, rtt: Duration, watch: Watch, now: Instant) {
        if self.state != State::Up {
            self.hurry = true;
        } else if self.round.is_none() && !watch.full && !self.search.is_open() {
            self.last = Some(now + LEAD);
            self.measured(rtt);
        }
    }

    /// Something has changed: probes now.
    pub fn hurry(&mut self) {
        self.hurry = true;
    }

    fn end_round(&mut self, watch: Watch, now: Instant) {
        let Some(round) = self.round.take() else { return };
        let sizes = |answered| {
            round.probes.iter().filter(move |sent| sent.answered == answered).map(|sent| sent.size)
        };
        let answered = sizes(true).max();
        let lost = sizes(false).filter(|size| answered.is_none_or(|answered| *size > answered)).min();
        self.search.outcome(answered, lost, now);
        for sent in round.probes.iter().filter(|sent| !sent.answered) {
            if self.late.is_full() {
                self.late.remove(0);
            }
            self.late.push(*sent);
        }
        self.loss += (if answered.is_some() { 0.0 } else { 1.0 } - self.loss) / SMOOTH as f32;
        if answered.is_some() {
            (self.missed, self.answered) = (0, self.answered + 1);
            match self.state {
                State::Down if self.answered < ANSWERS => self.hurry = true,
                _ => (self.state, self.down_since) = (State::Up, None),
            }
            return;
        }
        (self.missed, self.answered) = (self.missed + 1, 0);
        let most = if watch.heard { LOSSES_HEARD } else { LOSSES };
        if self.missed >= most && self.state != State::Down {
            (self.state, self.down_since) = (State::Down, Some(now));
        }
    }

    fn measured(&mut self, took: Duration) {
        self.rtt = Some(match self.rtt {
            Some(rtt) => (rtt * (SMOOTH - 1) + took) / SMOOTH,
            None => took,
        });
    }

    /// How long to wait for answers.
    fn patience(&self) -> Duration {
        let untried = if self.rtt.is_none() { SLOWEST / 2 } else { Duration::ZERO };
        (self.rtt.unwrap_or_default() * 3).max(untried).clamp(ANSWER, SLOWEST)
    }

    /// From the beginning of one round to the next.
    fn pause(&self, watch: Watch) -> Duration {
        match self.state {
            // Again at once, until it is clear.
            State::Up | State::Untried if self.missed > 0 => Duration::ZERO,
            _ if self.search.is_open() && self.state == State::Up => Duration::ZERO,
            State::Untried => Duration::ZERO,
            _ if watch.close => PROBE,
            _ => RARELY,
        }
    }
}

/// How often a way is probed that is watched closely, when nothing else shows that it is good.
const PROBE: Duration = Duration::from_millis(300);
/// How much later we probe than a peer whose probes tell enough.
const LEAD: Duration = Duration::from_millis(75);
/// How often others are.
const RARELY: Duration = Duration::from_secs(60);
/// How long to wait for an answer at least; three times the mean round trip, if that is longer; and at most.
const ANSWER: Duration = Duration::from_millis(200);
const SLOWEST: Duration = Duration::from_secs(1);
/// Rounds in a row after which a way is down; and if packets come from the peer all the same.
const LOSSES: u32 = 3;
const LOSSES_HEARD: u32 = 6;
/// Rounds in a row after which it is up again.
const ANSWERS: u32 = 2;
/// How much of a mean the latest value makes: one in so many (RFC 6298, section 2).
const SMOOTH: u32 = 8;
/// Unanswered probes that are remembered.
const LATE: usize = 16;

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;

    const CLOSE: Watch = Watch { close: true, full: false, heard: false };
    const RTT: Duration = Duration::from_millis(2);

    struct Bench {
        leg: Leg,
        now: Instant,
        probes: u64,
        watch: Watch,
    }

    impl Bench {
        fn new(watch: Watch) -> Self {
            let leg = Leg::new(Search::new(576, 1440, 1440));
            Self { leg, now: Instant::now(), probes: 0, watch }
        }

        /// Goes on until `until` holds; a probe is answered where `answers` says so of its size.
        fn run(&mut self, answers: impl Fn(u16) -> bool, until: impl Fn(&Leg) -> bool) -> Duration {
            let start = self.now;
            while !until(&self.leg) {
                self.step(&answers);
                assert!(self.now - start < Duration::from_secs(1000), "{:?}", self.leg);
            }
            self.now - start
        }

        /// How many probes go out in that time.
        fn pass(&mut self, time: Duration, answers: impl Fn(u16) -> bool) -> u64 {
            let (before, end) = (self.probes, self.now + time);
            while self.leg.next_wake(self.watch, self.now) < end {
                self.step(&answers);
            }
            self.now = self.now.max(end);
            self.probes - before
        }

        fn step(&mut self, answers: &impl Fn(u16) -> bool) {
            self.now = self.now.max(self.leg.next_wake(self.watch, self.now));
            let Some(sizes) = self.leg.wake(self.watch, self.now) else { return };
            let first = self.probes;
            for size in &sizes {
                self.leg.sent(self.probes, *size, self.now);
                self.probes += 1;
            }
            let back = self.now + RTT;
            for (number, size) in (first..).zip(sizes) {
                if answers(size) {
                    self.now = back;
                    assert!(self.leg.answer(number, self.watch, self.now));
                }
            }
        }
    }

    #[test]
    fn a_dead_way_is_noticed_in_a_second_and_a_healed_one_sooner() {
        let mut bench = Bench::new(CLOSE);
        assert_eq!(bench.run(|_| true, |leg| leg.state == State::Up), RTT);
        let took = bench.run(|_| false, |leg| leg.state == State::Down);
        assert!(took <= Duration::from_millis(1100), "{took:?}");
        assert_eq!(bench.leg.rtt(), None);
        bench.pass(Duration::from_secs(300), |_| false);
        let took = bench.run(|_| true, |leg| leg.state == State::Up);
        assert!(took <= Duration::from_millis(400), "{took:?}");
        assert_eq!(bench.leg.rtt(), Some(RTT));
    }

    #[test]
    fn what_still_comes_from_a_peer_is_worth_some_patience() {
        let mut bench = Bench::new(Watch { heard: true, ..CLOSE });
        bench.run(|_| true, |leg| leg.state == State::Up);
        let took = bench.run(|_| false, |leg| leg.state == State::Down);
        assert!((Duration::from_millis(1400)..Duration::from_millis(1900)).contains(&took), "{took:?}");
    }

    #[test]
    fn a_good_way_costs_few_probes_and_a_peers_own_cost_none() {
        let mut bench = Bench::new(CLOSE);
        bench.run(|_| true, |leg| leg.state == State::Up);
        let probes = bench.pass(Duration::from_secs(30), |_| true);
        assert!((95..=101).contains(&probes), "{probes}");
        bench.watch.close = false;
        let probes = bench.pass(Duration::from_secs(600), |_| true);
        assert!((9..=11).contains(&probes), "{probes}");
        bench.watch = CLOSE;
        for _ in 0..100 {
            bench.leg.confirmed(RTT, CLOSE, bench.now);
            assert_eq!(bench.pass(Duration::from_millis(250), |_| true), 0);
        }
    }

    #[test]
    fn a_slow_way_is_not_a_dead_one() {
        let mut bench = Bench::new(CLOSE);
        let slow = Duration::from_millis(400);
        for round in 0..20 {
            bench.now = bench.now.max(bench.leg.next_wake(CLOSE, bench.now));
            let sizes = bench.leg.wake(CLOSE, bench.now).unwrap();
            bench.leg.sent(round, sizes[0], bench.now);
            let back = bench.now + slow;
            while bench.leg.round.is_some() && bench.leg.next_wake(CLOSE, bench.now) < back {
                bench.now = bench.leg.next_wake(CLOSE, bench.now);
                assert!(bench.leg.wake(CLOSE, bench.now).is_none_or(|sizes| !sizes.is_empty()));
            }
            bench.now = back;
            assert!(bench.leg.answer(round, CLOSE, bench.now), "round {round}");
            assert_eq!(bench.leg.state, State::Up);
        }
        assert_eq!(bench.leg.rtt(), Some(slow));
    }

    #[test]
    fn a_way_under_load_that_shrinks_is_noticed_in_two_seconds() {
        let mut bench = Bench::new(Watch { full: true, ..CLOSE });
        bench.pass(Duration::from_secs(5), |_| true);
        let took = bench.run(|size| size <= 1240, |leg| leg.mtu() < 1440);
        assert!(took <= Duration::from_millis(1500) && bench.leg.mtu() <= 1240, "{took:?}");
        let took = bench.run(|size| size <= 1240, |leg| leg.mtu() == 1240);
        assert!(took <= Duration::from_secs(1), "{took:?}");
        assert_eq!(bench.leg.state, State::Up);
        let took = bench.run(|_| true, |leg| leg.mtu() == 1440);
        assert!(took <= Duration::from_secs(11), "{took:?}");
    }
}
