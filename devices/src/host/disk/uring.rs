//! A disk behind io_uring: one system call starts a batch, completions come by themselves.
//!
//! The kernel works on the vectors of a slot until the slot's completion is taken; slots are
//! therefore only reused after it, and the disk is only dropped when none is left.
#![expect(unsafe_code, reason = "io_uring is told of memory by address")]

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use arch::memory::GuestSlice;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::image::Image;
use super::transfer::{Direction, Transfer};
use super::{Completion, Disk, DiskRequest};
use crate::event::Event;

/// Requests that the kernel may have at a time: more than any storage serves at once, and no more
/// than the completion queue has room for, so that it cannot overflow.
const IN_FLIGHT_MAX: u32 = 256;
/// Requests that one system call starts; a larger batch takes several.
const BATCH_MAX: u32 = 64;
/// How often a start is tried while the kernel is out of memory, a millisecond apart.
const START_ATTEMPTS_MAX: u32 = 1000;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// Many requests in flight, one system call for each batch.
pub struct UringDisk {
    image: Arc<Image>,
    /// Dropped by hand: it must outlive every request in the kernel.
    ring: ManuallyDrop<IoUring>,
    /// Likewise: the kernel has the addresses of their vectors.
    slots: ManuallyDrop<Vec<Slot>>,
    free: Vec<u32>,
    completed: VecDeque<Completion>,
    completion: Event,
    /// Requests that the kernel has, or that wait in the ring for the next system call.
    in_flight: u32,
}

/// A request on its way.
struct Slot {
    tag: u32,
    step: Step,
    transfer: Transfer,
}

/// What the kernel was asked to do last for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Move what is left of the transfer; then, if `durable`, flush.
    Transfer {
        durable: bool,
    },
    Flush,
    /// Deallocate a range.
    Discard {
        offset: u64,
        len: u64,
    },
}

impl Disk for UringDisk {
    fn submit(&mut self, tag: u32, request: DiskRequest<'_>) {
        let index = self.take_slot();
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        slot.tag = tag;
        match first_step(&self.image, request, &mut slot.transfer) {
            Ok(step) => {
                slot.step = step;
                self.push(index, Flags::empty());
            }
            Err(outcome) => self.finish(index, outcome),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() { Ok(()) } else { self.enter(0) }
    }

    fn completed(&mut self) -> Option<Completion> {
        if self.completed.is_empty() {
            self.reap();
        }
        self.completed.pop_front()
    }

    fn completion_event(&self) -> Option<&Event> {
        Some(&self.completion)
    }

    fn has_room(&self) -> bool {
        self.in_flight < IN_FLIGHT_MAX
    }

    fn drain(&mut self) {
        while self.in_flight > 0 {
            if let Err(error) = self.enter(1) {
                log::error!("requests to a disk are lost in the kernel: {error}");
                return;
            }
            self.reap();
        }
        self.completed.clear();
    }
}

impl UringDisk {
    /// Sets a ring up for an open image.
    ///
    /// A thread under a seccomp filter cannot do this, and should not: a ring acts on its behalf.
    /// The one made here can do nothing but what a disk needs, whoever gets hold of it.
    pub fn new(image: Arc<Image>) -> io::Result<Self> {
        let completion = Event::new()?;
        let ring = IoUring::builder()
            .setup_cqsize(IN_FLIGHT_MAX)
            .setup_r_disabled()
            .dontfork()
            .build(BATCH_MAX)?;
        ring.submitter().register_eventfd(completion.as_raw_fd())?;
        ring.submitter().register_restrictions(&mut restrictions())?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            image,
            ring: ManuallyDrop::new(ring),
            slots: ManuallyDrop::new(Vec::new()),
            free: Vec::new(),
            completed: VecDeque::new(),
            completion,
            in_flight: 0,
        })
    }

    fn take_slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { tag: 0, step: Step::Flush, transfer: Transfer::new() });
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// Puts a slot's step into the ring.
    fn push(&mut self, index: u32, flags: Flags) {
        let Some(slot) = self.slots.get(index as usize) else { return };
        // Not registered with the ring: the kernel tears rings down late, and would keep the image
        // locked for some time after this process has gone.
        let file = Fd(self.image.as_fd().as_raw_fd());
        let entry = slot.entry(file).flags(flags).user_data(u64::from(index));
        for _ in 0..2 {
            // SAFETY: the file is open as long as the image, and the vectors of the slot stay as
            // they are until its completion is taken: slots are not dropped before, and not loaded
            // again.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.in_flight += 1;
                return;
            }
            // The batch is larger than the ring: start the first part of it.
            let _ = self.enter(0);
        }
        self.finish(index, Err(io::ErrorKind::ResourceBusy.into()));
    }

    /// Hands the ring to the kernel and waits for `completions`.
    fn enter(&mut self, completions: usize) -> io::Result<()> {
        for _ in 0..START_ATTEMPTS_MAX {
            match self.ring.submit_and_wait(completions) {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {
                        thread::sleep(Duration::from_millis(1));
                    }
                    _ => return Err(error),
                },
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Takes what the kernel has completed.
    fn reap(&mut self) {
        let mut again = false;
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            self.in_flight -= 1;
            let index = u32::try_from(entry.user_data()).unwrap_or(u32::MAX);
            let result = match u32::try_from(entry.result()) {
                Ok(count) => Ok(count),
                Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            };
            again |= self.advance(index, result);
        }
        if again {
            // A failure shows again, and is reported, when the next batch is started.
            let _ = self.enter(0);
        }
    }

    /// Notes what a step came to and takes the next one; returns whether there is one.
    fn advance(&mut self, index: u32, result: io::Result<u32>) -> bool {
        let Some(slot) = self.slots.get_mut(index as usize) else { return false };
        let outcome = match result {
            Err(error) if is_transient(&error) => {
                // A thread of the kernel can wait where the ring itself must not.
                self.push(index, Flags::ASYNC);
                return true;
            }
            // A discard is advice: where it is not understood nothing happens.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => match slot.step {
                Step::Discard { .. } => Ok(()),
                _ => Err(error),
            },
            Err(error) => Err(error),
            Ok(count) => match slot.step {
                Step::Transfer { durable } => match slot.transfer.advance(count as usize) {
                    Ok(()) if !slot.transfer.is_done() => {
                        self.push(index, Flags::empty());
                        return true;
                    }
                    Ok(()) if durable => {
                        slot.step = Step::Flush;
                        self.push(index, Flags::empty());
                        return true;
                    }
                    outcome => outcome,
                },
                Step::Flush | Step::Discard { .. } => Ok(()),
            },
        };
        self.finish(index, outcome);
        false
    }

    fn finish(&mut self, index: u32, outcome: io::Result<()>) {
        if let Some(slot) = self.slots.get(index as usize) {
            self.completed.push_back((slot.tag, outcome));
            self.free.push(index);
        }
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        self.drain();
        if self.in_flight > 0 {
            // What the kernel may still use is never freed.
            return;
        }
        // SAFETY: the kernel has no request, so it uses neither; both are dropped here only.
        unsafe {
            ManuallyDrop::drop(&mut self.ring);
            ManuallyDrop::drop(&mut self.slots);
        }
    }
}

impl Slot {
    fn entry(&self, file: Fd) -> Entry {
        let vectors = self.transfer.left();
        match self.step {
            Step::Transfer { .. } => {
                let (pointer, offset) = (vectors.as_ptr(), self.transfer.offset());
                let count = u32::try_from(vectors.len()).unwrap_or(0);
                match self.transfer.direction() {
                    Direction::Read => {
                        opcode::Readv::new(file, pointer, count).offset(offset).build()
                    }
                    Direction::Write => {
                        opcode::Writev::new(file, pointer, count).offset(offset).build()
                    }
                }
            }
            Step::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            Step::Discard { offset, len } => {
                opcode::Fallocate::new(file, len).offset(offset).mode(PUNCH_HOLE).build()
            }
        }
    }
}

/// All that the ring may ever be asked for.
fn restrictions() -> [Restriction; 5] {
    [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Fallocate::CODE),
        Restriction::sqe_flags_allowed(Flags::ASYNC.bits()),
    ]
}

/// Does at once what needs no ring, or else loads what the first step needs and names it.
fn first_step(
    image: &Image,
    request: DiskRequest<'_>,
    transfer: &mut Transfer,
) -> Result<Step, io::Result<()>> {
    let mut load = |direction, offset, slices: &[GuestSlice], durable| {
        if image.must_bounce(slices) {
            let outcome = image.bounce(direction, offset, slices);
            return Err(outcome.and_then(|()| if durable { image.flush() } else { Ok(()) }));
        }
        transfer.load(direction, offset, slices);
        if transfer.is_done() { Err(Ok(())) } else { Ok(Step::Transfer { durable }) }
    };
    match request {
        DiskRequest::Read { offset, into } => load(Direction::Read, offset, into, false),
        DiskRequest::Write { offset, from, durable } => {
            load(Direction::Write, offset, from, durable)
        }
        DiskRequest::Flush if image.is_read_only() => Err(Ok(())),
        DiskRequest::Flush => Ok(Step::Flush),
        DiskRequest::Discard { offset, len } if image.is_regular_file() => {
            Ok(Step::Discard { offset, len })
        }
        DiskRequest::Discard { offset, len } => Err(image.discard(offset, len)),
        // Rare, and several means may have to be tried in turn.
        DiskRequest::WriteZeroes { offset, len, unmap } => {
            Err(image.write_zeroes(offset, len, unmap))
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}
