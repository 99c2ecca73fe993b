//! Which store paths a guest is shown.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

/// What a file system takes as a name (`NAME_MAX`).
pub(super) const NAME_MAX: usize = 255;

/// More than the largest store has.
const ENTRIES_MAX: usize = 1 << 22;

/// A line of a closure that is no path of the store.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ClosureError {
    /// Neither the store nor one name below it.
    #[error("line {line} is no path in {store}: expected the lines of closureInfo's store-paths")]
    NotInStore {
        /// Counted from 1.
        line: usize,
        /// The store.
        store: PathBuf,
    },
    /// It does not end.
    #[error("more than {ENTRIES_MAX} store paths: this is no closure")]
    TooLong,
}

/// Names in the store, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Closure {
    names: Vec<Arc<[u8]>>,
    known: HashSet<Arc<[u8]>>,
}

impl Closure {
    /// Reads a list of store paths, one a line, as closureInfo writes it to `store-paths`.
    ///
    /// # Errors
    ///
    /// A line that is no path directly below `store`, or too many.
    pub fn parse(list: &[u8], store: &Path) -> Result<Self, ClosureError> {
        let mut closure = Self::default();
        closure.extend(list, store)?;
        Ok(closure)
    }

    /// Adds another list; names that are known already stay where they are.
    ///
    /// # Errors
    ///
    /// As for [`Closure::parse`]; nothing has been added then.
    pub fn extend(&mut self, list: &[u8], store: &Path) -> Result<(), ClosureError> {
        let prefix = store.as_os_str().as_encoded_bytes();
        let prefix = prefix.strip_suffix(b"/").unwrap_or(prefix);
        let mut names = Vec::new();
        for (index, line) in list.split(|byte| *byte == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let name = line.strip_prefix(prefix).and_then(|rest| rest.strip_prefix(b"/"));
            let Some(name) = name.filter(|name| is_name(name)) else {
                return Err(ClosureError::NotInStore { line: index + 1, store: store.to_owned() });
            };
            names.push(name);
            if self.names.len() + names.len() > ENTRIES_MAX {
                return Err(ClosureError::TooLong);
            }
        }
        for name in names {
            let name = Arc::<[u8]>::from(name);
            if self.known.insert(Arc::clone(&name)) {
                self.names.push(name);
            }
        }
        Ok(())
    }

    /// How many names there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.names.iter().map(|name| &**name)
    }

    pub(super) fn contains(&self, name: &[u8]) -> bool {
        self.known.contains(name)
    }

    /// The name that came as number `index`.
    pub(super) fn name(&self, index: usize) -> Option<Arc<[u8]>> {
        self.names.get(index).cloned()
    }
}

/// Says whether a directory can have this as the name of something below it.
pub(super) fn is_name(name: &[u8]) -> bool {
    let is_short = !name.is_empty() && name.len() <= NAME_MAX;
    is_short && name != b"." && name != b".." && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn store_paths_become_names_once_each() {
        let store = Path::new("/nix/store");
        let mut closure = Closure::parse(b"/nix/store/b\n/nix/store/a\n\n/nix/store/b\n", store);
        let closure = closure.as_mut().unwrap();
        assert_eq!(closure.name(0).as_deref(), Some(&b"b"[..]));
        closure.extend(b"/nix/store/a\n/nix/store/c", store).unwrap();
        assert_eq!(closure.name(2).as_deref(), Some(&b"c"[..]));
        assert_eq!(closure.len(), 3);
        assert!(closure.contains(b"a") && !closure.contains(b"d") && !closure.contains(b""));
    }

    #[test]
    fn whatever_is_not_directly_in_the_store_is_refused() {
        let store = Path::new("/nix/store");
        for line in [
            "/nix/store",
            "/nix/store/",
            "/nix/store/..",
            "/nix/store/.",
            "/nix/store/a/b",
            "/nix/storehouse/a",
            "/etc/passwd",
            "nix/store/a",
            "/nix/store/a\0",
        ] {
            let list = format!("/nix/store/first\n{line}");
            let mut closure = Closure::default();
            assert_eq!(
                closure.extend(list.as_bytes(), store),
                Err(ClosureError::NotInStore { line: 2, store: store.to_owned() }),
                "{line:?}"
            );
            assert_eq!(closure.len(), 0);
        }
        let long = format!("/nix/store/{}", "x".repeat(256));
        assert!(Closure::parse(long.as_bytes(), store).is_err());
    }
}
