//! Copies of images: the same extents where the file system can share them, else the bytes that
//! are there and no holes.

use std::fs::{File, Metadata};
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{IFlags, SeekFrom, fstatvfs, ioctl_ficlone, ioctl_getflags, ioctl_setflags, seek};
use rustix::io::Errno;
use vmm::host::{END_REQUESTS, Signals};

use crate::ctl::print::size_text;

/// Bytes that are copied between two looks at whether somebody wants it to end.
const STEP: u64 = 8 << 20;

/// After how long the terminal shows that something takes long, and how often.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes that a copy leaves free, for who else writes there.
const RESERVE: u64 = 64 << 20;

/// Copies images one after the other. From its making on, a request to end this process ends the
/// copy with an error, so that whoever copies can clean up.
pub(super) struct Copier {
    requests: Signals,
    start: Instant,
    shown: u64,
}

impl Copier {
    pub(super) fn new() -> Result<Self> {
        let requests = Signals::block(&END_REQUESTS)?;
        Ok(Self { requests, start: Instant::now(), shown: 0 })
    }

    /// Makes the empty `target` what `source` is now.
    pub(super) fn copy(&mut self, what: &str, source: &File, target: &File) -> Result<()> {
        self.ensure_wanted()?;
        share_kind(source, target);
        match ioctl_ficlone(target, source) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {
                ensure_room(source, target)?;
                let copied = self.copy_bytes(what, source, target);
                self.clear();
                copied
            }
            Err(error) => Err(error).context("it cannot be cloned"),
        }
    }

    fn copy_bytes(&mut self, what: &str, source: &File, target: &File) -> Result<()> {
        let size = source.metadata()?.len();
        target.set_len(size)?;
        let mut end = 0;
        while let Some(start) = data_from(source, end, size)? {
            end = hole_from(source, start, size)?;
            let mut next = start;
            while next < end {
                self.ensure_wanted()?;
                self.show(what, next, size);
                let count = STEP.min(end - next);
                seek(source, SeekFrom::Start(next))?;
                seek(target, SeekFrom::Start(next))?;
                let (mut from, mut to) = (source.take(count), target);
                // Within the kernel, where that can.
                let copied = io::copy(&mut from, &mut to)?;
                ensure!(copied == count, "it has become shorter meanwhile");
                next += count;
            }
        }
        Ok(())
    }

    /// Refuses to go on when this process was asked to end.
    fn ensure_wanted(&self) -> Result<()> {
        if self.requests.take().is_some() {
            bail!("interrupted");
        }
        Ok(())
    }

    fn show(&mut self, what: &str, next: u64, size: u64) {
        let elapsed = self.start.elapsed();
        if elapsed >= PATIENCE && elapsed.as_secs() != self.shown && io::stderr().is_terminal() {
            self.shown = elapsed.as_secs();
            let percent = next.saturating_mul(100) / size.max(1);
            eprint!("\rnixvmm: copying {what}, {percent} % of {} ", size_text(size));
        }
    }

    fn clear(&mut self) {
        if self.shown != 0 {
            self.shown = 0;
            eprint!("\r\x1b[K");
            let _ = io::stderr().flush();
        }
    }
}

/// The next byte from `offset` on that is in no hole.
fn data_from(file: &File, offset: u64, size: u64) -> Result<Option<u64>> {
    if offset >= size {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => Ok(Some(start).filter(|start| *start < size)),
        Err(Errno::NXIO) => Ok(None),
        // A file system that knows no holes has data everywhere.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
        Err(error) => Err(error.into()),
    }
}

/// Where the data at `offset` ends.
fn hole_from(file: &File, offset: u64, size: u64) -> Result<u64> {
    match seek(file, SeekFrom::Hole(offset)) {
        Ok(end) => Ok(end.min(size)),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(size),
        Err(error) => Err(error.into()),
    }
}

/// A file whose extents are written in place (`chattr +C`) shares them with files of its kind only.
fn share_kind(source: &File, target: &File) {
    if let Ok(flags) = ioctl_getflags(source)
        && flags.contains(IFlags::NOCOW)
        && let Ok(fresh) = ioctl_getflags(target)
        && let Err(error) = ioctl_setflags(target, fresh | IFlags::NOCOW)
    {
        log::debug!("a copy cannot be marked as the original is: {error}");
    }
}

/// Bytes that a file takes.
pub(super) fn allocated(metadata: &Metadata) -> u64 {
    // The unit of `st_blocks` (stat(3type)).
    metadata.blocks().saturating_mul(512)
}

/// Refuses a copy that would fill the file system.
fn ensure_room(source: &File, target: &File) -> Result<()> {
    let room = fstatvfs(target)?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    ensure_fits(allocated(&source.metadata()?), free)
}

fn ensure_fits(needed: u64, free: u64) -> Result<()> {
    ensure!(
        needed.saturating_add(RESERVE) <= free,
        "its copy needs {}, and {} are free: remove another snapshot, or keep guests on a file \
         system that can share extents, such as btrfs or xfs",
        size_text(needed),
        size_text(free),
    );
    Ok(())
}

#[cfg(test)]
mod test {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_copy_has_the_same_bytes_and_no_more_blocks() {
        const SIZE: u64 = 64 << 20;
        const PAGE: usize = 4096;
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.set_len(SIZE).unwrap();
        let written = [(0, 1), (9 << 20, 2), (SIZE - PAGE as u64, 3)];
        for (offset, byte) in written {
            source.write_all_at(&[byte; PAGE], offset).unwrap();
        }
        let mut copier = Copier::new().unwrap();
        copier.copy_bytes("x", &source, &target).unwrap();
        let (original, copy) = (source.metadata().unwrap(), target.metadata().unwrap());
        assert_eq!(copy.len(), SIZE);
        assert!(copy.blocks() <= original.blocks() + 64, "{} blocks", copy.blocks());
        for (offset, byte) in written {
            let mut bytes = [0; PAGE];
            target.read_exact_at(&mut bytes, offset).unwrap();
            assert_eq!(bytes, [byte; PAGE]);
        }
    }

    #[test]
    fn an_empty_file_and_one_that_is_a_hole_are_copied() {
        for size in [0, 1 << 30] {
            let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            source.set_len(size).unwrap();
            Copier::new().unwrap().copy_bytes("x", &source, &target).unwrap();
            let copy = target.metadata().unwrap();
            assert_eq!((copy.len(), copy.blocks()), (size, 0));
        }
    }

    #[test]
    fn what_would_fill_the_file_system_is_refused() {
        ensure_fits(1 << 20, RESERVE + (1 << 20)).unwrap();
        let error = ensure_fits(2 << 20, RESERVE + (1 << 20)).unwrap_err().to_string();
        assert!(error.contains("needs 2 MiB, and 65 MiB are free"), "{error}");
    }
}
