//! Which files may still be opened: by landlock none, but for what is removed at the end.

use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context as _, Result};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetStatus,
};
use rustix::io::Errno;

/// Rights that are known here; what an older kernel lacks is left out.
const KNOWN: ABI = ABI::V5;

/// Leaves the process no path outside `folder`, where it may: landlock lets any file be asked about
/// that is not opened. A namespace of its own would give everybody the right to, and would show the
/// files of other users as nobody's.
pub(super) fn make_root(folder: &Path) -> Result<()> {
    let context = || format!("cannot make {} the root", folder.display());
    rustix::process::chdir(folder).with_context(context)?;
    match rustix::process::chroot(".") {
        Err(Errno::PERM) => Ok(()),
        outcome => outcome.with_context(context),
    }
}

/// The rules of one thread.
pub(super) struct Paths(RulesetCreated);

impl Paths {
    /// Rules by which no file can be opened, made or changed, but sockets and links whose names are
    /// in `removed` can be taken away.
    pub(super) fn new(removed: &[PathBuf]) -> Result<Self> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .create()
            .context("landlock")?;
        for path in removed {
            let folder = path.parent().unwrap_or(Path::new("/"));
            let right: BitFlags<_> = AccessFs::RemoveFile.into();
            ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(folder)?, right))?;
        }
        Ok(Self(ruleset))
    }

    /// Rules by which files below `folder` can be read, and nothing else.
    pub(super) fn reading(folder: &Path) -> Result<Self> {
        let Self(ruleset) = Self::new(&[])?;
        let rights: BitFlags<_> = AccessFs::ReadFile | AccessFs::ReadDir;
        Ok(Self(ruleset.add_rule(PathBeneath::new(PathFd::new(folder)?, rights))?))
    }

    /// Confines the calling thread, and threads that it makes later, for good.
    pub(super) fn enter(self) -> Result<()> {
        let status = self.0.restrict_self().context("landlock")?;
        if status.ruleset == RulesetStatus::NotEnforced {
            static ONCE: Once = Once::new();
            ONCE.call_once(|| {
                log::warn!(
                    "this kernel has no landlock: only seccomp keeps files from being opened"
                );
            });
        }
        Ok(())
    }
}
