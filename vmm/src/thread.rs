//! How threads are made.

use std::thread::{Builder, JoinHandle};

use anyhow::{Context as _, Result};

/// Bytes of stack, many times what any thread uses, and less than a huge page: of a longer stack
/// the kernel makes one in time, for the sake of a few pages that are used.
const STACK_SIZE: usize = 512 << 10;

/// Makes a thread of this name that does `work`.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_SIZE)
        .spawn(work)
        .with_context(|| format!("cannot make the thread {name}"))
}
