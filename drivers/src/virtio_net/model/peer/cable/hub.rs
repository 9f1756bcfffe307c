//! Which ends of cables are plugged in, in all of this process. They come and go in any order.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use underpass::{Error, ErrorKind, Result};

use super::Lane;

static ENDS: Mutex<Vec<End>> = Mutex::new(Vec::new());

/// One end, as the other finds it.
struct End {
    name: String,
    to: String,
    lanes: Vec<Arc<Lane>>,
    link: Arc<Link>,
}

/// What both ends of a cable look at.
#[derive(Default)]
struct Link(AtomicU64);

/// The state of a link: how often an end came or went, and, in the lowest bit, whether there are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct State(u64);

impl State {
    #[inline]
    pub(super) fn is_up(self) -> bool {
        self.0 & 1 != 0
    }
}

impl Link {
    /// An end came or went. Only under the lock.
    fn change(&self, is_up: bool) {
        let changes = (self.0.load(Ordering::Relaxed) >> 1) + 1;
        self.0.store(changes << 1 | u64::from(is_up), Ordering::Relaxed);
    }

    /// No ordering: what belongs to a state is read under the lock.
    #[inline]
    fn state(&self) -> State {
        State(self.0.load(Ordering::Relaxed))
    }
}

/// An end that is plugged in until it is dropped.
pub(super) struct Plug {
    name: String,
    to: String,
    link: Arc<Link>,
}

impl Plug {
    /// Plugs in an end that sends on `lanes`.
    pub(super) fn insert(name: &str, to: &str, lanes: Vec<Arc<Lane>>) -> Result<Self> {
        let mut ends = ends();
        for end in ends.iter() {
            check(name, to, end)?;
        }
        let other = ends.iter().find(|end| end.name == to);
        let link = other.map_or_else(Arc::default, |other| Arc::clone(&other.link));
        link.change(other.is_some());
        let end = End { name: name.to_owned(), to: to.to_owned(), lanes, link: Arc::clone(&link) };
        ends.push(end);
        Ok(Self { name: name.to_owned(), to: to.to_owned(), link })
    }

    #[inline]
    pub(super) fn state(&self) -> State {
        self.link.state()
    }

    /// The state, and the lanes on which the other end sends, if it is there.
    pub(super) fn other_end(&self) -> (State, Option<Vec<Arc<Lane>>>) {
        let ends = ends();
        (self.state(), ends.iter().find(|end| end.name == self.to).map(|end| end.lanes.clone()))
    }
}

impl Drop for Plug {
    fn drop(&mut self) {
        let mut ends = ends();
        ends.retain(|end| end.name != self.name);
        self.link.change(false);
    }
}

/// Whether a cable from `name` to `to` can be there beside `end`'s.
fn check(name: &str, to: &str, end: &End) -> Result<()> {
    let cannot = |kind, why: String, mend: String| {
        Err(Error::new(kind, format!("plug a cable into port {name}"), why).mend(mend))
    };
    if end.name == name {
        cannot(
            ErrorKind::Busy,
            format!("there is a port named {name} already, and its cable goes to {}", end.to),
            "give each port a name of its own".to_owned(),
        )
    } else if end.name == to && end.to != name {
        cannot(
            ErrorKind::Busy,
            format!("the cable of port {to} goes to {}", end.to),
            format!("make its peer={name}, or choose another peer here"),
        )
    } else if end.to == name && end.name != to {
        cannot(
            ErrorKind::Busy,
            format!("the cable of port {} goes to {name} already", end.name),
            format!("make peer={} here, or choose another peer there", end.name),
        )
    } else {
        Ok(())
    }
}

fn ends() -> MutexGuard<'static, Vec<End>> {
    // Each change of the list is one call: a thread that panicked left it whole.
    ENDS.lock().unwrap_or_else(PoisonError::into_inner)
}
