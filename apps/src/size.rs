//! Sizes in bytes as people write them: `4096`, `4k`, `64KiB`, `1M`.

/// Reads a size. Suffixes are powers of 1024, in any case, with or without `iB`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let shift = match suffix.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err("a size is a number of bytes with k, M, G or T (powers of 1024) behind it".into()),
    };
    let number: u64 = number.parse().map_err(|_| "a size starts with a whole number".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is more than 64 bits can hold".to_owned())
}

/// [`parse`] for what can not be empty.
pub(crate) fn parse_nonzero(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("it must be at least 1 byte".into()),
        bytes => Ok(bytes),
    }
}

/// The shortest exact way to write it.
pub(crate) fn show(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("4096", 4096), ("4k", 4096), ("64KiB", 65536), ("1M", 1 << 20), ("2 GiB", 2 << 30)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "k", "-1", "4x", "1.5M", "99999999T", "18446744073709551616"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse_nonzero("0k").is_err());
    }

    #[test]
    fn sizes_are_shown_exactly() {
        assert_eq!(show(65536), "64 KiB");
        assert_eq!(show(65537), "65537 B");
        assert_eq!(show(0), "0 B");
    }
}
