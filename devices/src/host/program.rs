//! This process's own program, as memory.
#![expect(unsafe_code, reason = "asks where the program is, and the kernel to forget parts of it")]

use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::ptr;

use rustix::mm::{Advice, madvise};

/// Bytes below the caller's frame that stay: what a call uses while it asks for the release.
const FRAMES: usize = 16 << 10;

/// Bytes of stack below the caller that are released. The kernel puts nothing within 1 MiB below
/// a stack, however short the stack is.
const STACK_BELOW: usize = 512 << 10;

/// Gives back what only the start-up needed: code, stack and heap. To be called by the main thread.
pub fn release_start_up() {
    release_code();
    release_stack();
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator gives back what nobody has allocated, under its own lock.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Unmaps the program's code and constants until they are needed again.
///
/// The kernel maps code by the 64 KiB, so that after start-up nearly the whole program is counted
/// as this process's memory, although a running guest needs a small part. That part comes back from
/// the page cache at once.
fn release_code() {
    for segment in constant_segments() {
        let start = ptr::with_exposed_provenance_mut(segment.start);
        // SAFETY: the range is a mapping of the program's file that nobody writes to; its pages are
        // read from there again when they are touched.
        let released = unsafe { madvise(start, segment.len(), Advice::LinuxDontNeed) };
        if let Err(error) = released {
            log::debug!("the program's code stays mapped: {error}");
        }
    }
}

/// Forgets the main thread's stack below this call: reading the command line and the configuration
/// took the most of it.
#[inline(never)]
fn release_stack() {
    let frame = 0_u8;
    let top = ((&raw const frame).expose_provenance() - FRAMES) & !(page_size() - 1);
    let bottom = ptr::with_exposed_provenance_mut(top - STACK_BELOW);
    // SAFETY: what is below this frame and those of the calls made here is no longer, or not yet,
    // anybody's; below the stack's mapping there is nothing for 1 MiB, which the kernel skips.
    let _ = unsafe { madvise(bottom, STACK_BELOW, Advice::LinuxDontNeed) };
}

/// Addresses of the program's segments that nobody writes to, in whole pages. What lies between
/// two of them is not the program's: the kernel may have put any mapping there.
fn constant_segments() -> Vec<Range<usize>> {
    let mut segments = Vec::new();
    // SAFETY: the callback is as this function wants it, and takes a list of segments.
    unsafe { libc::dl_iterate_phdr(Some(list_segments), (&raw mut segments).cast()) };
    segments
}

/// Lists the segments of the first program, which is this one, and ends the walk there.
unsafe extern "C" fn list_segments(
    program: *mut libc::dl_phdr_info,
    _size: usize,
    segments: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr() lends a description of a program for the time of this call, and
    // passes on the list that `constant_segments` gave it.
    let (program, segments) = unsafe { (&*program, &mut *segments.cast::<Vec<Range<usize>>>()) };
    // SAFETY: the description counts its headers.
    let headers =
        unsafe { std::slice::from_raw_parts(program.dlpi_phdr, program.dlpi_phnum.into()) };
    let constant = headers
        .iter()
        .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    segments.extend(constant.filter_map(|header| {
        let start = usize::try_from(program.dlpi_addr.checked_add(header.p_vaddr)?).ok()?;
        let end = start.checked_add(usize::try_from(header.p_memsz).ok()?)?;
        Some(start & !(page_size() - 1)..end)
    }));
    1
}

/// The C library knows it without asking the kernel, which the sandbox may not let it.
fn page_size() -> usize {
    // SAFETY: asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod test {
    use std::fs;

    use super::*;

    #[test]
    fn the_program_goes_on_when_its_start_up_is_released() {
        let (on_the_stack, on_the_heap) = ([7_u8; 4096], vec![7_u8; 1 << 20]);
        drop(vec![1_u8; 1 << 16]);
        release_start_up();
        assert!(on_the_stack.iter().chain(&on_the_heap).all(|byte| *byte == 7));
    }

    #[test]
    fn nothing_but_the_programs_own_mappings_is_released() {
        let program = fs::read_link("/proc/self/exe").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let own: Vec<Range<usize>> = maps
            .lines()
            .filter(|line| line.ends_with(program.to_str().unwrap()) && !line.contains(" rw"))
            .map(|line| {
                let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                let address = |text| usize::from_str_radix(text, 16).unwrap();
                address(start)..address(end)
            })
            .collect();
        let segments = constant_segments();
        assert!(segments.len() >= 2, "{segments:x?}");
        for segment in segments {
            let is_own = own.iter().any(|own| own.start <= segment.start && segment.end <= own.end);
            assert!(is_own, "{segment:x?} is not within {own:x?}");
        }
    }
}
