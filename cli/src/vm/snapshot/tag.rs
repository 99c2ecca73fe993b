//! Names of snapshots: each is a folder.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;

use crate::vm::name::ensure_word;

/// A name that leads nowhere but to its snapshot: no separator, and no dot at its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tag(String);

impl Tag {
    /// The name as it is.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The number that comes behind all numbers among `tags`.
    pub(super) fn next(tags: &[Self]) -> Self {
        let numbers = tags.iter().filter_map(|tag| tag.0.parse::<u64>().ok());
        Self(numbers.max().unwrap_or_default().saturating_add(1).to_string())
    }
}

impl FromStr for Tag {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure_word("snapshot", text, "-.")?;
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::vm::name::LENGTH_MAX;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for bad in ["", ".", "..", ".new-a", "a/b", "/a", "../a", "-a", "a b", "a\n", "\u{e4}"] {
            assert!(bad.parse::<Tag>().is_err(), "{bad:?}");
        }
        assert!("a".repeat(LENGTH_MAX + 1).parse::<Tag>().is_err());
        for good in ["a", "1", "before-24.05", "2026-11-22", &"a".repeat(LENGTH_MAX)] {
            assert_eq!(good.parse::<Tag>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_snapshot_without_a_name_gets_the_next_number() {
        let tags = |names: &[&str]| names.iter().map(|name| Tag((*name).to_owned())).collect();
        let next = |names: &[&str]| Tag::next(&Vec::<Tag>::leak(tags(names))[..]).0.clone();
        assert_eq!(next(&[]), "1");
        assert_eq!(next(&["good", "2", "10", "9a"]), "11");
    }
}
