//! The tree that guests read, and what they have been told of it.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::closure::{Closure, ClosureError};
use super::files::{ITSELF, attributes, identify, status};
use super::nodes::{Identity, Nodes};
use super::wire::{Attributes, Entry, Features};

/// In seconds: 136 years, which no kernel's clock overflows by.
pub(super) const FOREVER: u64 = 1 << 32;

/// A tree that guests may read.
#[derive(Debug)]
pub struct Store {
    pub(super) root: OwnedFd,
    pub(super) identity: Identity,
    closure: Option<Mutex<Closure>>,
    nodes: Mutex<Nodes>,
    /// What the session is agreed on; none before it has begun.
    features: AtomicU64,
    /// When the closure was last extended, in nanoseconds.
    extended: AtomicU64,
}

/// No session has begun.
const NO_SESSION: u64 = u64::MAX;

impl Store {
    /// Opens the folder `path`, of which guests see the names of `closure`, or all.
    ///
    /// # Errors
    ///
    /// It is no folder that can be read.
    pub fn open(path: &Path, closure: Option<Closure>) -> io::Result<Self> {
        let root = OwnedFd::from(fs::File::open(path)?);
        let identity = identify(&status(root.as_fd(), ITSELF)?);
        if FileType::from_raw_mode(identity.kind) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Self {
            root,
            identity,
            closure: closure.map(Mutex::new),
            nodes: Mutex::new(Nodes::new(identity)),
            features: AtomicU64::new(NO_SESSION),
            extended: AtomicU64::new(0),
        })
    }

    /// Shows guests more names, all at once; those who have seen the root see them when they look
    /// again. `list` is as for [`Closure::parse`]. A tree that is shown whole has them already.
    ///
    /// # Errors
    ///
    /// The list is none of paths below `store`.
    pub fn extend(&self, list: &[u8], store: &Path) -> Result<(), ClosureError> {
        let Some(closure) = &self.closure else { return Ok(()) };
        lock(closure).extend(list, store)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        // A guest keeps the list of names until the time is another one, however soon that is.
        let later = |before: u64| Some(now.max(before.saturating_add(1)));
        let _ = self.extended.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        Ok(())
    }

    /// How many names of the closure are not in the tree, and the first of them.
    #[must_use]
    pub fn missing(&self) -> Option<(usize, Vec<u8>)> {
        let closure = self.closure()?;
        let is_missing =
            |name: &&[u8]| matches!(status(self.root.as_fd(), *name), Err(Errno::NOENT));
        let mut missing = closure.names().filter(is_missing);
        let first = missing.next()?.to_vec();
        Some((missing.count() + 1, first))
    }

    /// Forgets what a guest was told: its device was reset.
    pub(super) fn end_session(&self) {
        self.features.store(NO_SESSION, Ordering::Relaxed);
        self.nodes().clear();
    }

    pub(super) fn nodes(&self) -> MutexGuard<'_, Nodes> {
        lock(&self.nodes)
    }

    /// The names below the root, where not all are shown.
    pub(super) fn closure(&self) -> Option<MutexGuard<'_, Closure>> {
        self.closure.as_ref().map(lock)
    }

    /// Tells the guest of `name` in `folder`, which is the node `parent`.
    pub(super) fn tell(
        &self,
        parent: u64,
        folder: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<Entry, Errno> {
        let status = status(folder, name)?;
        let node = self.nodes().refer(parent, name, identify(&status))?;
        Ok(Entry {
            node,
            name_valid: FOREVER,
            attributes_valid: FOREVER,
            attributes: attributes(&status, self.identity),
            ..Entry::default()
        })
    }

    /// Begins a session in which these features are agreed on.
    pub(super) fn begin_session(&self, features: Features) {
        self.features.store(features.bits(), Ordering::Relaxed);
    }

    /// Whether a session has begun and not ended.
    pub(super) fn is_in_session(&self) -> bool {
        self.features.load(Ordering::Relaxed) != NO_SESSION
    }

    /// Whether these features are agreed on.
    pub(super) fn has(&self, features: Features) -> bool {
        let agreed = self.features.load(Ordering::Relaxed);
        Features::from_bits_truncate(agreed).contains(features)
    }

    /// What is told of the root: nothing of names that are not shown.
    pub(super) fn root_attributes(&self, status: &Statx) -> Attributes {
        let mut root = attributes(status, self.identity);
        if self.closure.is_some() {
            (root.links, root.bytes, root.blocks) = (1, 0, 0);
            let extended = Duration::from_nanos(self.extended.load(Ordering::Relaxed));
            let modified = (root.modified, root.modified_nanoseconds);
            (root.modified, root.modified_nanoseconds) =
                modified.max((extended.as_secs(), extended.subsec_nanos()));
        }
        root
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
