//! This process's own program, as memory.
#![expect(
    unsafe_code,
    reason = "asks the linker where the program is, and the kernel to forget it"
)]

use rustix::mm::{Advice, madvise};

unsafe extern "C" {
    // Both from the linker: the first byte of the program, and the one after its code.
    static __executable_start: u8;
    static etext: u8;
}

/// Unmaps the program's code until it is needed again.
///
/// The kernel maps code by the 64 KiB, so that after start-up nearly the whole program is counted
/// as this process's memory, although a running guest needs a small part. That part comes back from
/// the page cache at once.
pub fn release_code() {
    let start = (&raw const __executable_start).cast_mut();
    // The kernel rounds up to whole pages, and code shares none with what is written to.
    let size = (&raw const etext).addr().saturating_sub(start.addr());
    // SAFETY: the range is a mapping of the program's file that nobody writes to; its pages are
    // read from there again when they are touched.
    let released = unsafe { madvise(start.cast(), size, Advice::LinuxDontNeed) };
    if let Err(error) = released {
        log::debug!("the program's code stays mapped: {error}");
    }
}

#[cfg(test)]
mod test {
    #[test]
    fn the_program_goes_on_when_its_code_is_released() {
        super::release_code();
        assert_eq!("still here".len(), 10);
    }
}
