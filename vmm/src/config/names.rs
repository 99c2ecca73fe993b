//! Names of values, and names that were probably meant.

use std::str::FromStr;

use serde::Deserialize as _;
use serde::de::IntoDeserializer as _;
use serde::de::value::Error;

use super::{
    BootProtocol, Engine, HugePages, LinkKind, OnReboot, Ready, ShareCache, ShareSandbox,
    Transport, VhostNet, Watchdog,
};

/// Reads the names that JSON has, so that flags have the same.
macro_rules! parse_by_name {
    ($($kind:ty),*) => {$(
        impl FromStr for $kind {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self, Error> {
                Self::deserialize(name.into_deserializer())
            }
        }
    )*};
}

parse_by_name!(
    Ready,
    BootProtocol,
    Engine,
    HugePages,
    LinkKind,
    OnReboot,
    ShareCache,
    ShareSandbox,
    Transport,
    VhostNet,
    Watchdog
);

/// Furthest that a misspelt name may be from what was meant, in letters changed, added or left out.
const MAX_DISTANCE: usize = 2;

/// The candidate that `name` was probably meant to be.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|&(distance, candidate)| distance <= MAX_DISTANCE && distance < candidate.len())
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// The Levenshtein distance, row by row.
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (index, letter) in from.chars().enumerate() {
        let mut diagonal = index;
        let mut left = index + 1;
        for (cell, other) in row.iter_mut().zip(std::iter::once(None).chain(to.chars().map(Some))) {
            let above = *cell;
            *cell = match other {
                None => left,
                Some(other) => {
                    (diagonal + usize::from(letter != other)).min(above + 1).min(left + 1)
                }
            };
            diagonal = above;
            left = *cell;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn distances_are_counted_in_letters() {
        for (from, to, expected) in
            [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ä", "a", 1)]
        {
            assert_eq!(distance(from, to), expected, "{from} {to}");
        }
    }

    #[test]
    fn only_a_near_name_is_proposed() {
        let keys = ["path", "readonly", "serial"];
        assert_eq!(nearest("read-only", keys.into_iter()), Some("readonly"));
        assert_eq!(nearest("pth", keys.into_iter()), Some("path"));
        assert_eq!(nearest("cache", keys.into_iter()), None);
        assert_eq!(nearest("x", ["ab"].into_iter()), None);
    }

    #[test]
    fn flags_have_the_names_of_json() {
        assert_eq!("pvh".parse(), Ok(BootProtocol::Pvh));
        assert_eq!("uring".parse(), Ok(Engine::Uring));
        assert_eq!("1G".parse(), Ok(HugePages::Size1G));
        assert_eq!("exit".parse(), Ok(OnReboot::Exit));
        let error = "isa".parse::<Transport>().unwrap_err().to_string();
        assert_eq!(error, "unknown variant `isa`, expected `pci` or `mmio`");
    }
}
