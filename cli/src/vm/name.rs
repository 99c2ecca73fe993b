//! Names of guests: each is a folder, an instance of units and, with `vm-` before it, a user.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};

/// As long as a host name may be, which a guest's usually is.
const LENGTH_MAX: usize = 63;

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
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        ensure!(
            text.bytes().next().is_some_and(is_word)
                && text.bytes().all(|byte| is_word(byte) || byte == b'-'),
            "a guest's name has letters, digits, `_` and `-`, and does not begin with `-`",
        );
        ensure!(text.len() <= LENGTH_MAX, "a guest's name has at most {LENGTH_MAX} characters");
        Ok(Self(text.to_owned()))
    }
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
