//! Chance that repeats: the same seed gives the same decisions.

/// A generator of pseudo-random numbers (`SplitMix64`: Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", OOPSLA 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence of a queue pair: each has its own.
    pub(super) fn new(seed: u64, pair: usize) -> Self {
        let mut seeds = Self(seed.wrapping_add(pair as u64));
        Self(seeds.next())
    }

    #[inline]
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`. Biased by less than `end` in 2^32.
    #[inline]
    pub(super) fn below(&mut self, end: u32) -> u32 {
        ((u64::from(end) * (self.next() >> 32)) >> 32) as u32
    }

    /// Whether something happens that has this chance.
    #[inline]
    pub(super) fn happens(&mut self, chance: Chance) -> bool {
        chance.0 != 0 && self.next() >> 32 < chance.0
    }
}

/// How likely something is, in units of 2^-32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chance(u64);

impl Chance {
    /// From percent, 0 to 100.
    pub(super) fn from_percent(percent: f64) -> Option<Self> {
        #[allow(clippy::cast_sign_loss, reason = "it is not negative")]
        let units = |percent: f64| (percent / 100.0 * (f64::from(u32::MAX) + 1.0)) as u64;
        (0.0..=100.0).contains(&percent).then(|| Self(units(percent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_are_what_they_are_said_to_be() {
        for (percent, least, most) in
            [(0.0, 0, 0), (0.1, 60, 140), (25.0, 24_500, 25_500), (100.0, 100_000, 100_000)]
        {
            let (mut random, chance) = (Random::new(7, 3), Chance::from_percent(percent).unwrap());
            let happened = (0..100_000).filter(|_| random.happens(chance)).count();
            assert!((least..=most).contains(&happened), "{percent} %: {happened} of 100000");
        }
        assert_eq!(Chance::from_percent(100.1), None);
        assert_eq!(Chance::from_percent(-0.1), None);
        assert_eq!(Chance::from_percent(f64::NAN), None);
    }
}
