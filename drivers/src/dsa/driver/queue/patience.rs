//! How long the oldest submission has kept the driver waiting: with few looks at the clock, however often one polls.

use std::time::{Duration, Instant};

/// The most polls from one look at the clock to the next.
const POLLS_PER_LOOK: u32 = 64;

/// Polls for one submission, the oldest. Time counts from the first of them that found nothing done.
#[derive(Debug)]
pub(super) struct Patience {
    /// Since the last look.
    polls: u32,
    /// Look again after so many.
    interval: u32,
    /// The first look and the last.
    looks: Option<(Instant, Instant)>,
}

impl Patience {
    /// For a submission that nobody waited for yet.
    pub(super) const fn new() -> Self {
        Self { polls: 0, interval: 1, looks: None }
    }

    /// Counts a poll that did not find it done; says whether it is time to [`look`](Self::look). If the poll found
    /// another one done, time matters less than going on.
    #[inline]
    pub(super) fn polled(&mut self, found_another: bool) -> bool {
        self.polls += 1;
        self.polls >= if found_another { POLLS_PER_LOOK } else { self.interval }
    }

    /// Whether it has been waited for longer than `deadline`.
    pub(super) fn look(&mut self, now: Instant, deadline: Duration) -> bool {
        self.polls = 0;
        let Some((first, last)) = self.looks else {
            self.looks = Some((now, now));
            return deadline.is_zero();
        };
        self.looks = Some((first, now));
        // Where polls come in quick succession, few of them look; where they are rare, each does.
        let is_quick = now.duration_since(last) < deadline / 8;
        self.interval = if is_quick { (self.interval * 2).min(POLLS_PER_LOOK) } else { 1 };
        now.duration_since(first) >= deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_millis(20);

    /// Polls every `gap` until the deadline is noticed: when that was, and how many looks it took.
    fn notice(gap: Duration, found_another: bool) -> (Duration, u32) {
        let begin = Instant::now();
        let (mut patience, mut now, mut looks) = (Patience::new(), begin, 0);
        loop {
            if patience.polled(found_another) {
                looks += 1;
                if patience.look(now, DEADLINE) {
                    return (now - begin, looks);
                }
            }
            now += gap;
            assert!(now - begin < 1000 * DEADLINE, "never noticed");
        }
    }

    #[test]
    fn the_deadline_is_noticed_in_time_however_rare_polls_are() {
        for gap in [1, 10, 100, 1000, 3000, 5000, 19_999, 20_000, 50_000].map(Duration::from_micros) {
            let (noticed, _) = notice(gap, false);
            assert!(noticed >= DEADLINE, "{gap:?}: {noticed:?} is too early");
            assert!(noticed <= DEADLINE + (DEADLINE / 4).max(gap), "{gap:?}: {noticed:?} is late");
        }
    }

    #[test]
    fn quick_polls_seldom_look() {
        let (_, looks) = notice(Duration::from_nanos(100), false);
        assert!(looks <= 200_000 / POLLS_PER_LOOK + 10, "{looks}");
    }

    #[test]
    fn a_submission_that_others_overtake_is_noticed_too() {
        let (noticed, looks) = notice(Duration::from_micros(1), true);
        assert!((DEADLINE..2 * DEADLINE).contains(&noticed), "{noticed:?}");
        assert!(looks <= 20_000 / POLLS_PER_LOOK + 10, "{looks}");
    }
}
