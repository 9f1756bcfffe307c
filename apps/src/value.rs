//! Numbers and times as values of options.

use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;
use std::time::Duration;

/// A whole number that is not 0.
pub(crate) fn positive<N: FromStr<Err = ParseIntError> + Default + PartialEq>(
    text: &str,
) -> Result<N, String> {
    match text.parse() {
        Ok(number) if number == N::default() => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err("that is too large".into()),
        Err(_) => Err("it is a whole number".into()),
    }
}

/// A time in seconds, more than none.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is a number of seconds: 2 or 0.5".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        _ if seconds.is_nan() => Err("it is a number of seconds: 2 or 0.5".into()),
        Ok(time) if !time.is_zero() => Ok(time),
        Err(_) if seconds > 0.0 => {
            Err("that is too long; leave it out or name a number of seconds: 60".into())
        }
        _ => Err("it must be more than 0".into()),
    }
}
