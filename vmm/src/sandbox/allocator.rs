//! The allocator opens no file once threads are confined.
#![expect(unsafe_code, reason = "the allocator's limits have no safe interface")]

/// Has all threads allocate from one heap. Of its own accord glibc makes one for each thread, and
/// before the ninth it reads from /sys how many processors there are, which no filter allows. One
/// is enough: nothing on the way of data allocates, and every other would be memory of its own.
pub(super) fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: this sets a number of the allocator's own, under its own lock.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        log::debug!("the allocator does not keep to one heap");
    }
}

#[cfg(test)]
mod test {
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    /// In glibc's own words: every heap is an element there.
    #[cfg(target_env = "gnu")]
    fn heaps() -> usize {
        let mut text = vec![0_u8; 1 << 20];
        // SAFETY: the stream writes to the buffer, within its length, until it is closed here.
        unsafe {
            let stream = libc::fmemopen(text.as_mut_ptr().cast(), text.len(), c"w".as_ptr());
            assert!(!stream.is_null() && libc::malloc_info(0, stream) == 0);
            libc::fclose(stream);
        }
        text.windows(6).filter(|word| word == b"<heap ").count()
    }

    #[cfg(target_env = "gnu")]
    #[test]
    fn many_threads_that_allocate_share_the_heaps_that_there_are() {
        share_one_heap();
        let before = heaps();
        let all_have_allocated = Arc::new(Barrier::new(32));
        let allocate = || {
            let all_have_allocated = Arc::clone(&all_have_allocated);
            thread::spawn(move || {
                let memory = vec![1_u8; 4096];
                all_have_allocated.wait();
                memory.len()
            })
        };
        let threads: Vec<_> = (0..32).map(|_| allocate()).collect();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap() == 4096));
        assert_eq!(heaps(), before);
    }
}
