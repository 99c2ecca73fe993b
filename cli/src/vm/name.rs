//! Names of guests: each is a folder, an instance of units and, with `vm-` before it, a user.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};

/// As long as a host name may be, which a guest's usually is.
pub(super) const LENGTH_MAX: usize = 63;

/// What a user's name has before the guest's.
const USER_PREFIX: &str = "vm-";

/// As long as utmp(5) lets a user's name be, with the NUL behind it.
const USER_LENGTH_MAX: usize = 31;

/// A name that leads nowhere but to its guest: no separator, no dot, no blank, no pattern.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Name(String);

impl Name {
    /// The name as it is.
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The user as which units of nixvmm run the guest.
    pub(super) fn user(&self) -> Result<String> {
        let user = format!("{USER_PREFIX}{self}");
        let longest = USER_LENGTH_MAX - USER_PREFIX.len();
        ensure!(
            user.len() <= USER_LENGTH_MAX,
            "{self}: the guest's user would be {user}, which is too long: choose a name of at most \
             {longest} characters",
        );
        Ok(user)
    }
}

impl FromStr for Name {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure_word("guest", text, "-")?;
        Ok(Self(text.to_owned()))
    }
}

/// Refuses a name of `what` that could lead elsewhere, or with a letter that neither everybody nor
/// `marks` has; none of those is its first.
pub(super) fn ensure_word(what: &str, text: &str, marks: &str) -> Result<()> {
    let is_word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    ensure!(
        text.starts_with(is_word)
            && text.chars().all(|letter| is_word(letter) || marks.contains(letter)),
        "a {what}'s name has letters, digits, `_` and, but not first, any of `{marks}`",
    );
    ensure!(text.len() <= LENGTH_MAX, "a {what}'s name has at most {LENGTH_MAX} characters");
    Ok(())
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn names_that_could_lead_elsewhere_are_refused() {
        for bad in [
            "", ".", "..", "a/b", "/a", "../a", "a.b", "-a", "a b", "a\n", "a%i", "a*", "a@b",
            "a\\x2db", "\u{e4}", "$a", "a;b",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        assert!("a".repeat(LENGTH_MAX + 1).parse::<Name>().is_err());
    }

    #[test]
    fn host_names_are_names() {
        for good in ["a", "web-1", "0", "my_vm", "_x", &"a".repeat(LENGTH_MAX)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_user_that_no_system_takes_is_refused_before_it_is_made() {
        let name = |length| "a".repeat(length).parse::<Name>().unwrap();
        assert_eq!(name(28).user().unwrap().len(), USER_LENGTH_MAX);
        assert!(name(29).user().unwrap_err().to_string().contains("at most 28 characters"));
    }
}
