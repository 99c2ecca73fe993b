//! Guest memory: the only code that maps RAM, and the only code that touches its bytes.
//!
//! One process runs one guest. Its RAM is mapped once and never unmapped, so the handle is `Copy`
//! and slices need no lifetime. The guest writes these bytes while we read them: they are never a
//! Rust reference, except for the aligned atomics of ring indices.
#![expect(unsafe_code, reason = "maps RAM and accesses it through raw pointers")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU16;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryMmap, GuestRegionMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::range_map::RangeMap;

pub use vm_memory::{Address, GuestAddress};

const SMALL_PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;

/// How RAM is provided by the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// One sealed memfd that other processes can map, in place of private anonymous memory.
    pub shared: bool,
    /// Explicit huge pages from the host's pool, in place of transparent ones.
    pub huge_pages: Option<HugePages>,
    /// Every page is allocated at start.
    pub prealloc: bool,
    /// The host may keep equal pages once (KSM). Only small pages of private memory can be.
    pub mergeable: bool,
}

/// A size of explicit huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// 2 MiB pages.
    Size2M,
    /// 1 GiB pages.
    Size1G,
}

impl HugePages {
    /// Size of one page in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size2M => HUGE_PAGE,
            Self::Size1G => 1 << 30,
        }
    }
}

/// An address range that is not wholly RAM, or not wholly in one range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest address {:#x} with {len} bytes is not RAM", .address.0)]
pub struct NotRam {
    /// First address of the range.
    pub address: GuestAddress,
    /// Its length in bytes.
    pub len: usize,
}

/// The RAM of the guest: cheap to copy, valid until the process ends.
#[derive(Clone, Copy)]
pub struct GuestMemory(&'static Mapping);

struct Mapping {
    regions: RangeMap<Region>,
    backend: GuestMemoryMmap,
    backing: Backing,
}

/// One contiguous range of RAM and where the host has it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// First guest-physical address.
    pub start: GuestAddress,
    /// The host's view of the whole region.
    pub slice: GuestSlice,
    /// Offset of the region in the memfd in bytes; without meaning where memory is private.
    pub file_offset: u64,
}

impl GuestMemory {
    /// Maps RAM at each of `ranges`, which are page aligned and ascending.
    ///
    /// The mapping lives as long as the process.
    pub fn map(ranges: &[Range<u64>], backing: Backing) -> io::Result<Self> {
        Self::map_elastic(ranges, None, backing)
    }

    /// The same with a range behind them, `elastic`, that costs nothing until it is used: memory
    /// that the guest may be given at run time.
    pub fn map_elastic(
        ranges: &[Range<u64>],
        elastic: Option<&Range<u64>>,
        backing: Backing,
    ) -> io::Result<Self> {
        let fixed = ranges.iter().map(|range| (range, flags_of_fixed(backing)));
        let elastic = elastic.into_iter().map(|range| (range, MapFlags::NORESERVE));
        let ranges: Vec<_> = fixed.chain(elastic).collect();
        let total = ranges.iter().map(|(range, _)| range.end - range.start).sum();
        let file =
            if backing.shared { Some(sealed_memfd(total, backing.huge_pages)?) } else { None };
        let mut regions = RangeMap::new();
        let mut backend_regions = Vec::with_capacity(ranges.len());
        let mut file_offset = 0;
        for (range, flags) in ranges {
            let len = range.end - range.start;
            let slice = map_region(len, file.as_ref(), file_offset, backing, flags)?;
            let region = Region { start: GuestAddress(range.start), slice, file_offset };
            backend_regions.push(backend_region(&region, file.as_ref())?);
            regions.insert(range.clone(), region).map_err(io::Error::other)?;
            file_offset += range.end - range.start;
        }
        let backend = GuestMemoryMmap::from_regions(backend_regions).map_err(io::Error::other)?;
        Ok(Self(Box::leak(Box::new(Mapping { regions, backend, backing }))))
    }

    /// The host's view of `len` bytes from `address`.
    #[inline]
    pub fn slice(self, address: GuestAddress, len: usize) -> Result<GuestSlice, NotRam> {
        let not_ram = NotRam { address, len };
        let (range, region) = self.0.regions.get(address.0).ok_or(not_ram)?;
        let offset = usize::try_from(address.0 - range.start).map_err(|_| not_ram)?;
        region.slice.sub_slice(offset, len).ok_or(not_ram)
    }

    /// Reads a value that need not be aligned.
    pub fn read<T: FromBytes>(self, address: GuestAddress) -> Result<T, NotRam> {
        let not_ram = NotRam { address, len: size_of::<T>() };
        self.slice(address, size_of::<T>())?.read(0).ok_or(not_ram)
    }

    /// Writes a value that need not be aligned.
    pub fn write<T: IntoBytes + Immutable>(
        self,
        address: GuestAddress,
        value: &T,
    ) -> Result<(), NotRam> {
        self.slice(address, size_of::<T>())?.copy_from(value.as_bytes());
        Ok(())
    }

    /// Copies `bytes` to `address`.
    pub fn write_bytes(self, address: GuestAddress, bytes: &[u8]) -> Result<(), NotRam> {
        self.slice(address, bytes.len())?.copy_from(bytes);
        Ok(())
    }

    /// All regions in ascending order: one KVM slot, or one vhost region, each.
    pub fn regions(self) -> impl Iterator<Item = Region> {
        self.0.regions.iter().map(|(_, region)| *region)
    }

    /// The same memory as the type that rust-vmm's crates take.
    pub fn backend(self) -> &'static GuestMemoryMmap {
        &self.0.backend
    }

    /// Gives the pages back that are wholly in `slice`, which reads as zeros afterwards, and
    /// returns how many bytes that were.
    ///
    /// Pages have the size in which the host provides them. Where it can take none back (a kernel
    /// before 5.18 with private huge pages) that is an error, and the memory is as before.
    pub fn discard(self, slice: GuestSlice) -> io::Result<usize> {
        let Some(pages) = slice.whole_pages(self.page_bytes()) else { return Ok(0) };
        // MADV_REMOVE also frees the pages of a memfd; private memory knows MADV_DONTNEED only.
        let shared = self.0.backing.shared;
        let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: the range is a mapping of ours and holds no Rust object.
        unsafe { rustix::mm::madvise(pages.pointer.cast(), pages.len, advice)? };
        Ok(pages.len)
    }

    /// Gives every page back to the host; all of RAM reads as zeros afterwards.
    ///
    /// Nothing may use the memory meanwhile: the guest restarts.
    pub fn discard_all(self) -> io::Result<()> {
        self.regions().try_for_each(|region| self.discard(region.slice).map(drop))
    }

    /// Makes the host allocate all of `slice` where it was told to ([`Backing::prealloc`]) or where
    /// a page that is missing later would be the guest's end: explicit huge pages.
    pub fn secure(self, slice: GuestSlice) -> io::Result<()> {
        let Backing { huge_pages, prealloc, .. } = self.0.backing;
        if huge_pages.is_none() && !prealloc {
            return Ok(());
        }
        let Some(pages) = slice.whole_pages(self.page_bytes()) else { return Ok(()) };
        let advice = Advice::LinuxPopulateWrite;
        // SAFETY: the range is a mapping of ours, and the advice changes no content.
        unsafe { rustix::mm::madvise(pages.pointer.cast(), pages.len, advice)? };
        Ok(())
    }

    /// Size in bytes of the pages in which the host gives and takes.
    pub fn page_bytes(self) -> usize {
        let bytes = self.0.backing.huge_pages.map_or(SMALL_PAGE, HugePages::bytes);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}

/// A range of host memory that the guest shares: never a reference, always in bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSlice {
    pointer: *mut u8,
    len: usize,
}

// SAFETY: the memory is mapped for the process' whole life and every access is a raw one;
// concurrent access by the guest is expected.
unsafe impl Send for GuestSlice {}
// SAFETY: as above.
unsafe impl Sync for GuestSlice {}

impl GuestSlice {
    /// Length in bytes.
    #[inline]
    pub const fn len(self) -> usize {
        self.len
    }

    /// The part of `len` bytes from `offset`; `None` when it does not fit.
    #[inline]
    pub fn sub_slice(self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        // SAFETY: offset is at most end, which is within the slice.
        (end <= self.len).then(|| Self { pointer: unsafe { self.pointer.add(offset) }, len })
    }

    /// The first `middle` bytes and the rest; `None` when the slice is shorter.
    #[inline]
    pub fn split_at(self, middle: usize) -> Option<(Self, Self)> {
        let rest = self.len.checked_sub(middle)?;
        Some((self.sub_slice(0, middle)?, self.sub_slice(middle, rest)?))
    }

    /// This slice and `other` as one, where one begins at the end of the other.
    pub fn join(self, other: Self) -> Option<Self> {
        let (first, second) =
            if self.pointer <= other.pointer { (self, other) } else { (other, self) };
        let is_adjacent = first.pointer.wrapping_add(first.len) == second.pointer;
        is_adjacent.then(|| Self { pointer: first.pointer, len: first.len + second.len })
    }

    /// The pages of `page_bytes`, a power of two, that are wholly in the slice; `None` when there
    /// are none.
    fn whole_pages(self, page_bytes: usize) -> Option<Self> {
        let skipped = self.pointer.align_offset(page_bytes);
        let rest = self.sub_slice(skipped, self.len.checked_sub(skipped)?)?;
        self.sub_slice(skipped, rest.len - rest.len % page_bytes).filter(|pages| pages.len > 0)
    }

    /// Reads a value at `offset` exactly once; it need not be aligned. `None` when it does not fit.
    #[inline]
    pub fn read<T: FromBytes>(self, offset: usize) -> Option<T> {
        #[repr(C, packed)]
        struct Unaligned<T>(T);
        let source = self.sub_slice(offset, size_of::<T>())?;
        // SAFETY: the source is as long as T, any bytes are a T, and the packed type needs no
        // alignment.
        Some(unsafe { source.pointer.cast::<Unaligned<T>>().read_volatile() }.0)
    }

    /// Writes a value at `offset`; `None` when it does not fit.
    #[inline]
    pub fn write<T: IntoBytes + Immutable>(self, offset: usize, value: &T) -> Option<()> {
        let target = self.sub_slice(offset, size_of::<T>())?;
        target.copy_from(value.as_bytes());
        Some(())
    }

    /// Copies as many bytes as both sides have, and returns how many that were.
    #[inline]
    pub fn copy_to(self, target: &mut [u8]) -> usize {
        let len = self.len.min(target.len());
        // SAFETY: both sides have `len` bytes and a Rust slice never overlaps guest memory.
        unsafe { ptr::copy_nonoverlapping(self.pointer, target.as_mut_ptr(), len) };
        len
    }

    /// Copies as many bytes as both sides have, and returns how many that were.
    #[inline]
    pub fn copy_from(self, source: &[u8]) -> usize {
        let len = self.len.min(source.len());
        // SAFETY: both sides have `len` bytes and a Rust slice never overlaps guest memory.
        unsafe { ptr::copy_nonoverlapping(source.as_ptr(), self.pointer, len) };
        len
    }

    /// Fills the slice with the bytes of `file` from `offset`, whatever the file's own position is.
    pub fn read_file(self, file: &File, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = self.sub_slice(done, self.len - done).filter(|rest| rest.len > 0) {
            let position = i64::try_from(offset.saturating_add(done as u64))
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            let descriptor = file.as_raw_fd();
            // SAFETY: `rest` is mapped and writable; the kernel writes at most its length.
            let count = unsafe { libc::pread(descriptor, rest.pointer.cast(), rest.len, position) };
            match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => done += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets every byte to `value`.
    pub fn fill(self, value: u8) {
        // SAFETY: the slice is mapped and writable.
        unsafe { ptr::write_bytes(self.pointer, value, self.len) };
    }

    /// The 16-bit word at `offset` as an atomic; `None` when it does not fit or is not aligned.
    #[inline]
    pub fn atomic_u16(self, offset: usize) -> Option<&'static AtomicU16> {
        let word = self.sub_slice(offset, size_of::<u16>())?.pointer.cast::<AtomicU16>();
        // SAFETY: two mapped bytes, aligned, alive for the process' whole life, accessed
        // atomically.
        word.is_aligned().then(|| unsafe { &*word })
    }

    /// The host address, for interfaces that pass it to the kernel.
    #[inline]
    pub const fn as_ptr(self) -> *mut u8 {
        self.pointer
    }
}

/// A memfd of `len` bytes that can neither grow nor shrink, so that a mapping never faults.
fn sealed_memfd(len: u64, huge_pages: Option<HugePages>) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flags = flags
        | match huge_pages {
            None => MemfdFlags::empty(),
            Some(HugePages::Size2M) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Some(HugePages::Size1G) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
    let file: OwnedFd = rustix::fs::memfd_create("guest-memory", flags)?;
    rustix::fs::ftruncate(&file, len)?;
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(File::from(file))
}

/// How memory is mapped that the guest has from its start. Huge pages are set aside for it at once:
/// where there are too few of them, mapping says so.
fn flags_of_fixed(backing: Backing) -> MapFlags {
    let aside = backing.huge_pages.map_or(MapFlags::NORESERVE, |_| MapFlags::empty());
    if backing.prealloc { aside | MapFlags::POPULATE } else { aside }
}

fn map_region(
    len: u64,
    file: Option<&File>,
    file_offset: u64,
    backing: Backing,
    flags: MapFlags,
) -> io::Result<GuestSlice> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let target = aligned_reservation(len, backing.huge_pages)?;
    let flags = flags | MapFlags::FIXED;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: FIXED replaces part of the reservation made for it just now, nothing else.
    let pointer = unsafe {
        match file {
            Some(file) => rustix::mm::mmap(
                target.cast(),
                len,
                protection,
                flags | MapFlags::SHARED,
                file.as_fd(),
                file_offset,
            )?,
            None => {
                let flags = flags | huge_page_flags(backing.huge_pages) | MapFlags::PRIVATE;
                rustix::mm::mmap_anonymous(target.cast(), len, protection, flags)?
            }
        }
    };
    advise(pointer.cast(), len, backing);
    Ok(GuestSlice { pointer: pointer.cast(), len })
}

fn huge_page_flags(huge_pages: Option<HugePages>) -> MapFlags {
    match huge_pages {
        None => MapFlags::empty(),
        Some(HugePages::Size2M) => MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        Some(HugePages::Size1G) => MapFlags::HUGETLB | MapFlags::HUGE_1GB,
    }
}

/// Reserves address space so that guest and host addresses agree modulo the huge page size.
fn aligned_reservation(len: usize, huge_pages: Option<HugePages>) -> io::Result<*mut u8> {
    let alignment = huge_pages.map_or(HUGE_PAGE, HugePages::bytes);
    let alignment = usize::try_from(alignment).map_err(io::Error::other)?;
    let whole = len.checked_add(alignment).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let start =
        unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), whole, ProtFlags::empty(), flags)? };
    let start: *mut u8 = start.cast();
    let padding = start.align_offset(alignment);
    // SAFETY: the padding is less than the alignment, by which the reservation is longer than
    // `len`.
    let (target, tail) = unsafe { (start.add(padding), start.add(padding + len)) };
    for (pointer, len) in [(start, padding), (tail, alignment - padding)] {
        if len > 0 {
            // SAFETY: the ends of the reservation, which nothing uses; what stays is replaced next.
            unsafe { rustix::mm::munmap(pointer.cast(), len)? };
        }
    }
    Ok(target)
}

/// Asks for what the host may refuse without harm: transparent huge pages, merging, and no copy in
/// dumps or children.
fn advise(pointer: *mut u8, len: usize, backing: Backing) {
    let mut wishes = vec![Advice::LinuxDontDump, Advice::LinuxDontFork];
    if backing.huge_pages.is_none() {
        wishes.push(Advice::LinuxHugepage);
    }
    if backing.mergeable {
        wishes.push(Advice::LinuxMergeable);
    }
    for advice in wishes {
        // SAFETY: a mapping of ours; these advices do not change its content.
        let _ = unsafe { rustix::mm::madvise(pointer.cast(), len, advice) };
    }
}

fn backend_region(region: &Region, file: Option<&File>) -> io::Result<GuestRegionMmap> {
    let mut builder = MmapRegionBuilder::new(region.slice.len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, region.file_offset));
    }
    // SAFETY: the mapping is ours, as long as it says, and is never unmapped.
    let mapped = unsafe { builder.with_raw_mmap_pointer(region.slice.pointer) }
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(mapped, region.start)
        .ok_or_else(|| io::Error::other("guest memory region overflows the address space"))
}

#[cfg(test)]
mod test {
    use std::sync::atomic::Ordering;

    use super::*;

    fn two_regions(backing: Backing) -> GuestMemory {
        GuestMemory::map(&[0..0x1_0000, 0x10_0000..0x11_0000], backing).unwrap()
    }

    #[test]
    fn reads_back_what_was_written_unaligned() {
        let memory = two_regions(Backing::default());
        memory.write(GuestAddress(0x1003), &0x1122_3344_5566_7788u64).unwrap();
        assert_eq!(memory.read::<u64>(GuestAddress(0x1003)), Ok(0x1122_3344_5566_7788));
    }

    #[test]
    fn a_slice_may_end_with_its_region_and_not_beyond() {
        let memory = two_regions(Backing::default());
        assert_eq!(memory.slice(GuestAddress(0xfff0), 16).map(GuestSlice::len), Ok(16));
        assert!(memory.slice(GuestAddress(0xfff0), 17).is_err());
        assert!(memory.slice(GuestAddress(0x1_0000), 1).is_err());
        assert!(memory.slice(GuestAddress(u64::MAX), 2).is_err());
        assert!(memory.slice(GuestAddress(0x1000), usize::MAX).is_err());
    }

    #[test]
    fn discarding_leaves_zeros_in_private_and_in_shared_memory() {
        for shared in [false, true] {
            let memory = two_regions(Backing { shared, ..Backing::default() });
            memory.write(GuestAddress(0x10_0000), &7u32).unwrap();
            memory.discard_all().unwrap();
            assert_eq!(memory.read::<u32>(GuestAddress(0x10_0000)), Ok(0));
        }
    }

    #[test]
    fn only_whole_pages_are_given_back_and_they_read_as_zeros() {
        for shared in [false, true] {
            let memory = two_regions(Backing { shared, ..Backing::default() });
            let all = memory.slice(GuestAddress(0), 0x1_0000).unwrap();
            all.fill(7);
            let given = memory.slice(GuestAddress(0x1001), 0x2fff).unwrap();
            assert_eq!(memory.discard(given).unwrap(), 0x2000);
            let bytes = [0x1000, 0x1fff, 0x2000, 0x3fff, 0x4000];
            let bytes = bytes.map(|address| memory.read(GuestAddress(address)));
            assert_eq!(bytes, [Ok(7u8), Ok(7), Ok(0), Ok(0), Ok(7)]);
            for (start, len) in [(0x1001, 0x1ffe), (0, 0xfff), (5, 0), (0xf001, 0xfff)] {
                let less = memory.slice(GuestAddress(start), len).unwrap();
                assert_eq!(memory.discard(less).unwrap(), 0, "{start:#x} and {len:#x} bytes");
            }
        }
    }

    #[test]
    fn memory_is_merged_where_that_is_wanted_and_the_host_can() {
        for mergeable in [false, true] {
            let memory = two_regions(Backing { mergeable, ..Backing::default() });
            let start = memory.regions().next().unwrap().slice.pointer.addr();
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let begins_below = |line: &&str| {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                range.is_some_and(|(first, last)| {
                    let address = |text| usize::from_str_radix(text, 16).ok();
                    address(first).is_some_and(|first| first <= start)
                        && address(last).is_some_and(|last| start < last)
                })
            };
            let mut lines = maps.lines();
            lines.find(begins_below).unwrap();
            let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
            let is_possible = std::path::Path::new("/sys/kernel/mm/ksm/run").exists();
            assert_eq!(flags.contains(" mg"), mergeable && is_possible, "{flags}");
        }
    }

    #[test]
    fn slices_join_where_one_ends_and_the_other_begins() {
        let memory = two_regions(Backing::default());
        let part = |start, len| memory.slice(GuestAddress(start), len).unwrap();
        let (first, second) = (part(0x1000, 0x1000), part(0x2000, 0x800));
        assert_eq!(first.join(second), Some(part(0x1000, 0x1800)));
        assert_eq!(second.join(first), Some(part(0x1000, 0x1800)));
        assert_eq!(first.join(first), None);
        assert_eq!(first.join(part(0x2001, 5)), None);
    }

    #[test]
    fn elastic_memory_is_the_last_region_and_is_not_allocated_at_start() {
        for shared in [false, true] {
            let backing = Backing { shared, prealloc: true, ..Backing::default() };
            let memory =
                GuestMemory::map_elastic(&[0..0x1_0000], Some(&(1 << 40..2 << 40)), backing)
                    .unwrap();
            let region = memory.regions().last().unwrap();
            assert_eq!(region.start, GuestAddress(1 << 40));
            assert_eq!(region.file_offset, 0x1_0000);
            memory.write(GuestAddress((2 << 40) - 4), &5u32).unwrap();
            let last = memory.slice(GuestAddress((2 << 40) - 0x1000), 0x1000).unwrap();
            memory.secure(last).unwrap();
            memory.discard_all().unwrap();
            assert_eq!(memory.read::<u32>(GuestAddress((2 << 40) - 4)), Ok(0));
        }
    }

    #[test]
    fn atomics_are_given_for_aligned_words_only() {
        let slice = two_regions(Backing::default()).slice(GuestAddress(0), 16).unwrap();
        slice.atomic_u16(2).unwrap().store(9, Ordering::Release);
        assert_eq!(slice.read::<u16>(2), Some(9));
        assert!(slice.atomic_u16(3).is_none());
        assert!(slice.atomic_u16(16).is_none());
    }

    #[test]
    fn files_are_read_by_position_and_an_early_end_is_an_error() {
        use std::os::unix::fs::FileExt;
        let memory = two_regions(Backing::default());
        let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(b"0123456789", 0).unwrap();
        let slice = memory.slice(GuestAddress(0x1000), 6).unwrap();
        slice.read_file(&file, 3).unwrap();
        assert_eq!(memory.read::<[u8; 8]>(GuestAddress(0x1000)), Ok(*b"345678\0\0"));
        let error = slice.read_file(&file, 5).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn rust_vmm_crates_see_the_same_bytes() {
        use vm_memory::Bytes;
        let memory = two_regions(Backing { shared: true, ..Backing::default() });
        memory.backend().write_obj(5u32, GuestAddress(0x10_0010)).unwrap();
        assert_eq!(memory.read::<u32>(GuestAddress(0x10_0010)), Ok(5));
    }
}
