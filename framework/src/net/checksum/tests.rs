//! Against the definition, word by word.

use proptest::prelude::*;

use super::*;

/// RFC 1071, section 4.1, as it stands there.
fn by_definition(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[test]
fn the_rfcs_example_comes_out() {
    // RFC 1071, section 3.
    assert_eq!(Sum::ZERO.plus(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).value(), 0xddf2);
    // RFC 1624, section 4: the field 0x5555 becomes 0x3285.
    assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
}

#[test]
fn carries_are_not_lost() {
    for len in [0, 1, 2, 7, 8, 9, 1500, 65535, 65536] {
        let ones = vec![0xff; len];
        assert_eq!(of(&ones), by_definition(&ones), "{len}");
    }
    let nearly = Sum { total: u64::MAX, odd: false };
    assert_eq!(nearly.plus(&[0, 1]).value(), 1, "u64::MAX is a zero of ones' complement");
}

proptest! {
    #[test]
    fn bytes_sum_up_by_the_definition(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert_eq!(of(&bytes), by_definition(&bytes));
    }

    #[test]
    fn parts_of_any_length_are_as_good_as_the_whole(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        mut cuts in prop::collection::vec(0usize..200, 0..5),
    ) {
        for cut in &mut cuts { *cut = (*cut).min(bytes.len()); }
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let sum = cuts.windows(2).fold(Sum::ZERO, |sum, cut| sum.plus(&bytes[cut[0]..cut[1]]));
        prop_assert_eq!(sum.checksum(), by_definition(&bytes));
    }

    #[test]
    fn a_changed_word_is_followed(mut words in prop::collection::vec(any::<u16>(), 2..50), at in any::<prop::sample::Index>(), new: u16) {
        // A checksum of all zeros has two forms (RFC 1624, section 3); a header is never all zeros.
        words[0] |= 1;
        let at = 1 + at.index(words.len() - 1);
        let bytes = |words: &[u16]| -> Vec<u8> { words.iter().flat_map(|word| word.to_be_bytes()).collect() };
        let before = by_definition(&bytes(&words));
        let updated = update(before, words[at], new);
        words[at] = new;
        prop_assert_eq!(updated, by_definition(&bytes(&words)));
    }
}
