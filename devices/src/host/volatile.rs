//! Files read straight into memory that a guest shares with us.
#![expect(unsafe_code, reason = "the kernel writes guest memory through raw iovecs")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use vm_memory::VolatileSlice;

/// The kernel takes no more vectors in one call (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 1024;

/// Fills `into` with what `file` has at `offset`, and returns how many bytes those were: fewer only
/// at the end of the file, or before bytes that cannot be read.
///
/// # Errors
///
/// Nothing can be read.
pub(crate) fn read_at(
    file: BorrowedFd<'_>,
    offset: u64,
    into: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = into
        .iter()
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect();
    let mut left = &mut vectors[..];
    let mut total = 0;
    while !left.is_empty() {
        let count = libc::c_int::try_from(left.len().min(VECTORS_MAX)).map_err(io::Error::other)?;
        let at = offset.checked_add(total as u64).and_then(|at| i64::try_from(at).ok());
        let Some(at) = at else { return Ok(total) };
        // SAFETY: the vectors are the slices, which stay mapped while they are borrowed and are
        // memory that others change at any time anyway.
        let moved = unsafe { libc::preadv(file.as_raw_fd(), left.as_ptr(), count, at) };
        match usize::try_from(moved) {
            Ok(0) => return Ok(total),
            Ok(moved) => {
                total += moved;
                left = advance(left, moved);
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                _ if total > 0 => return Ok(total),
                error => return Err(error),
            },
        }
    }
    Ok(total)
}

/// What is left when the first `count` bytes are filled.
fn advance(mut vectors: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    while let Some(length) = vectors.first().map(|first| first.iov_len) {
        if count < length {
            break;
        }
        count -= length;
        vectors = vectors.get_mut(1..).unwrap_or_default();
    }
    if let Some(first) = vectors.first_mut() {
        first.iov_len -= count;
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(count).cast();
    }
    vectors
}

#[cfg(test)]
mod test {
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn slices_are_filled_in_order_until_the_file_ends() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (mut first, mut second, mut third) = ([0; 3], [0; 4], [0; 8]);
        let slices = [
            VolatileSlice::from(&mut first[..]),
            VolatileSlice::from(&mut second[..]),
            VolatileSlice::from(&mut third[..]),
        ];
        assert_eq!(read_at(file.as_fd(), 1, &slices).unwrap(), 9);
        assert_eq!(read_at(file.as_fd(), 10, &slices).unwrap(), 0);
        assert_eq!(read_at(file.as_fd(), u64::MAX, &slices).unwrap(), 0);
        assert_eq!(read_at(file.as_fd(), 0, &[]).unwrap(), 0);
        assert_eq!((&first, &second, &third[..3]), (b"123", b"4567", &b"89\0"[..]));
    }

    #[test]
    fn parts_that_were_filled_are_left_out() {
        let mut bytes = [0_u8; 6];
        let base: *mut u8 = bytes.as_mut_ptr();
        let vector = |at, iov_len| libc::iovec { iov_base: base.wrapping_add(at).cast(), iov_len };
        let mut vectors = [vector(0, 2), vector(2, 0), vector(2, 4)];
        let left = advance(&mut vectors, 3);
        assert_eq!((left.len(), left[0].iov_len), (1, 3));
        assert!(advance(left, 3).is_empty());
    }
}
