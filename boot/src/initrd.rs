//! Where the initrd goes and how it gets there.

use std::fs::File;
use std::io;
use std::ops::Range;

use arch::memory::{GuestAddress, GuestMemory};
use arch::platform::Platform;
use arch::target::layout::{HIGH_MEMORY, HOLE, PAGE_SIZE};

use crate::kernel::Kernel;

/// An initrd that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is empty, a pipe, a device…
    #[error("is empty or not a regular file")]
    NotAFile,
    /// No free range of RAM is long enough.
    #[error(
        "has {size} bytes, which do not fit between the kernel and address {end_max:#x}: \
         {}", enough(*.memory_enough)
    )]
    NoRoom {
        /// Its size in bytes.
        size: u64,
        /// Where the kernel wants it to end, at the latest.
        end_max: u64,
        /// How much memory would be enough, in bytes, where any amount is.
        memory_enough: Option<u64>,
    },
    /// It cannot be read, or became shorter meanwhile.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

fn enough(memory: Option<u64>) -> String {
    match memory {
        Some(bytes) => {
            format!("give the guest at least {} MiB of memory", bytes.div_ceil(1 << 20))
        }
        None => "it is too large for this kernel".into(),
    }
}

/// Reads the initrd as high in memory as the kernel allows, and returns where it is.
///
/// The kernel unpacks itself from its start upwards, so the top is what it overwrites last.
pub(crate) fn load(
    memory: GuestMemory,
    platform: &Platform,
    file: &File,
    kernel: &Kernel,
) -> Result<Range<u64>, Error> {
    let metadata = file.metadata()?;
    let size = metadata.len();
    if !metadata.is_file() || size == 0 {
        return Err(Error::NotAFile);
    }
    let end_max = kernel.initrd_end_max.min(HOLE.start);
    let no_room =
        || Error::NoRoom { size, end_max, memory_enough: memory_enough(size, kernel.end, end_max) };
    let range = place(&platform.ram, size, kernel.end, end_max).ok_or_else(no_room)?;
    let len = usize::try_from(size).map_err(|_| no_room())?;
    let target = memory.slice(GuestAddress(range.start), len).map_err(|_| no_room())?;
    target.read_file(file, 0)?;
    Ok(range)
}

/// The highest page-aligned place for `size` bytes of RAM above `start_min` and below `end_max`.
fn place(ram: &[Range<u64>], size: u64, start_min: u64, end_max: u64) -> Option<Range<u64>> {
    let start_min = start_min.max(HIGH_MEMORY);
    ram.iter().rev().find_map(|ram| {
        let start = ram.end.min(end_max).checked_sub(size)? & !(PAGE_SIZE - 1);
        (start >= ram.start.max(start_min)).then(|| start..start + size)
    })
}

/// RAM in bytes with which there would have been a place.
fn memory_enough(size: u64, start_min: u64, end_max: u64) -> Option<u64> {
    let end = start_min.max(HIGH_MEMORY).checked_next_multiple_of(PAGE_SIZE)?.checked_add(size)?;
    let end = end.checked_next_multiple_of(PAGE_SIZE)?;
    (end <= end_max).then_some(end)
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn goes_to_the_top_of_what_the_kernel_allows() {
        let ram = [0..3 << 30, 4 << 30..8 << 30];
        assert_eq!(place(&ram, 5000, MIB, 0x8000_0000), Some(0x7FFF_E000..0x7FFF_F388));
        assert_eq!(place(&ram, 4096, MIB, u64::MAX), Some((8 << 30) - 4096..8 << 30));
        assert_eq!(place(&ram[..1], 4096, MIB, u64::MAX), Some((3 << 30) - 4096..3 << 30));
    }

    #[test]
    fn never_goes_below_the_kernels_end() {
        let ram = [0..128 * MIB];
        assert_eq!(place(&ram, 28 * MIB, 100 * MIB, u64::MAX), Some(100 * MIB..128 * MIB));
        assert_eq!(place(&ram, 28 * MIB, 100 * MIB + 1, u64::MAX), None);
        assert_eq!(place(&ram, 28 * MIB + 1, 100 * MIB, u64::MAX), None);
    }

    #[test]
    fn a_refusal_says_how_much_memory_is_enough() {
        let memory_enough = memory_enough(50 * MIB + 1, 100 * MIB, 1 << 31);
        let error = Error::NoRoom { size: 50 * MIB + 1, end_max: 1 << 31, memory_enough };
        assert!(
            error.to_string().ends_with("give the guest at least 151 MiB of memory"),
            "{error}"
        );
    }

    #[test]
    fn a_refusal_says_when_no_memory_is_enough() {
        assert_eq!(memory_enough(2 << 30, 16 * MIB, 1 << 31), None);
        assert_eq!(memory_enough(u64::MAX, 16 * MIB, 1 << 31), None);
    }

    proptest! {
        #[test]
        fn memory_that_is_said_to_be_enough_is_enough(
            size in 1..1u64 << 31, start_min in 0..1u64 << 31, end_max in 0..HOLE.start,
        ) {
            if let Some(enough) = memory_enough(size, start_min, end_max) {
                let ram = [0..enough];
                let place = place(&ram, size, start_min, end_max).unwrap();
                prop_assert!(place.start >= start_min && place.end <= end_max.min(enough));
            }
        }
    }
}
