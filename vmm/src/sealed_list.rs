//! A list that one process hands to another: memory that nobody can change any more, so that who
//! has checked it and who acts on it later read the same, and that never lets a reader wait.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The longest list in bytes: some 50,000 store paths.
pub const BYTES_MAX: u64 = 4 << 20;

/// What a message with a list says besides.
const MESSAGE: &[u8] = b"l";

/// The memory.
#[derive(Debug)]
pub struct SealedList(File);

impl SealedList {
    /// Puts `lines` into such memory.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn new(lines: &[u8]) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(memfd_create("list", flags)?);
        file.write_all(lines)?;
        fcntl_add_seals(&file, seals())?;
        Ok(Self(file))
    }

    /// What somebody else calls such memory.
    ///
    /// # Errors
    ///
    /// It can be changed, or is a file of another kind.
    pub fn check(file: OwnedFd) -> Result<Self> {
        // Other files have no seals, or say that they do not know of any.
        let sealed = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        ensure!(sealed.contains(seals()), "the list is no memfd that is sealed against changes");
        Ok(Self(file.into()))
    }

    /// All of it.
    ///
    /// # Errors
    ///
    /// It is longer than [`BYTES_MAX`].
    pub fn read(&self) -> Result<Vec<u8>> {
        let bytes = self.0.metadata()?.len();
        ensure!(bytes <= BYTES_MAX, "the list is longer than {BYTES_MAX} bytes");
        let mut lines = vec![0; usize::try_from(bytes)?];
        self.0.read_exact_at(&mut lines, 0)?;
        Ok(lines)
    }

    /// Sends it.
    ///
    /// # Errors
    ///
    /// The socket takes nothing now.
    pub(crate) fn send(&self, socket: impl AsFd) -> io::Result<()> {
        let files = [self.0.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(socket, &[IoSlice::new(MESSAGE)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for the next one that comes.
    ///
    /// # Errors
    ///
    /// None will, or what came is none.
    pub(crate) fn receive(socket: impl AsFd) -> Result<Self> {
        let mut bytes = [0; MESSAGE.len()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut bytes)];
        recvmsg(socket, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        files.next().map(|file| Self(file.into())).context("a message without a list")
    }
}

impl AsFd for SealedList {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn seals() -> SealFlags {
    SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_list_arrives_as_it_was_sent_however_long_it_is() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let lines = vec![b'x'; 1 << 20];
        SealedList::new(&lines).unwrap().send(&ours).unwrap();
        assert!(SealedList::receive(&theirs).unwrap().read().unwrap() == lines);
        ours.send(MESSAGE).unwrap();
        assert!(SealedList::receive(&theirs).is_err());
    }

    #[test]
    fn what_could_still_change_or_has_no_end_is_no_list() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let open = memfd_create("list", flags).unwrap();
        fcntl_add_seals(&open, SealFlags::GROW | SealFlags::SHRINK).unwrap();
        let (pipe, _writer) = io::pipe().unwrap();
        let endless = File::open("/dev/zero").unwrap();
        let file = tempfile::tempfile().unwrap();
        for other in [open, pipe.into(), endless.into(), file.into()] {
            assert!(SealedList::check(other).is_err());
        }
        let huge = memfd_create("list", flags).unwrap();
        rustix::fs::ftruncate(&huge, BYTES_MAX + 1).unwrap();
        fcntl_add_seals(&huge, seals()).unwrap();
        assert!(SealedList::check(huge).unwrap().read().is_err());
    }
}
