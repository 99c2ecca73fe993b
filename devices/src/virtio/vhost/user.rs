//! Rings that a process serves, which speaks vhost-user.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arch::memory::{GuestAddress, GuestMemory, NotRam};
use vhost::vhost_user::Frontend;

use super::{BackEnd, Exchange};
use crate::host::vhost::user::UserVhost;
use crate::virtio::counters::Totals;

/// What is counted of a process: what it does with its rings, only it could tell.
pub type Conversations = Totals<3>;

/// A process as a back end.
pub struct UserRings {
    vhost: UserVhost,
    on_presence: Box<dyn FnMut(bool) + Send>,
    conversations: Arc<Conversations>,
}

impl UserRings {
    /// The rings of the process behind `vhost`; `on_presence` is told on the loop's thread when it
    /// is lost and when it is back.
    pub fn new(vhost: UserVhost, on_presence: impl FnMut(bool) + Send + 'static) -> Self {
        let conversations = Arc::new(Totals::new(["connections", "losses", "set_ups"]));
        conversations.add(&mut [1, 0, 0]);
        Self { vhost, on_presence: Box::new(on_presence), conversations }
    }

    /// How often the process was connected to, was lost, and was given memory and rings.
    pub fn conversations(&self) -> Arc<Conversations> {
        Arc::clone(&self.conversations)
    }

    /// The conversation with the process.
    pub fn vhost(&mut self) -> &mut UserVhost {
        &mut self.vhost
    }
}

impl BackEnd for UserRings {
    type Vhost = Frontend;

    fn exchange(&mut self, work: &mut Exchange<'_, Frontend>) -> io::Result<()> {
        self.vhost.exchange(work)
    }

    fn accepted_features(&self, agreed: u64) -> u64 {
        self.vhost.accepted_features(agreed)
    }

    fn ring_address(&self, memory: GuestMemory, address: GuestAddress) -> Result<u64, NotRam> {
        Ok(memory.slice(address, 1)?.as_ptr().addr() as u64)
    }

    fn start(&mut self, rings: &[usize]) -> io::Result<()> {
        self.conversations.add(&mut [0, 0, 1]);
        self.vhost.enable(rings)
    }

    fn stop(&mut self, rings: &[usize]) {
        if let Err(error) = self.vhost.stop(rings) {
            crate::warn_limited!("vhost-user: cannot stop a device: {error}");
        }
    }

    /// Who does not answer may hold on to guest memory; nobody but a child's parent can help that.
    fn give_up(&mut self, _: &[usize]) {
        self.vhost.hang_up();
    }

    fn lifeline(&self) -> Option<BorrowedFd<'_>> {
        Some(self.vhost.socket())
    }

    fn may_come_back(&self) -> bool {
        self.vhost.may_come_back()
    }

    fn reconnect(&mut self) -> io::Result<()> {
        self.vhost.reconnect()?;
        self.conversations.add(&mut [1, 0, 0]);
        Ok(())
    }

    fn set_presence(&mut self, is_present: bool) {
        if !is_present {
            self.conversations.add(&mut [0, 1, 0]);
        }
        (self.on_presence)(is_present);
    }
}
