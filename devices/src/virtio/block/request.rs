//! What a driver may ask of a disk (virtio 1.3, sections 5.2.4 to 5.2.6).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::chain::Chain;
use crate::host::disk::image::{Blocks, SECTOR_BYTES};

/// Data of one request. Covers every request that keeps to `size_max` and `seg_max`; one that does
/// not could name the same memory over and over and keep the disk busy with terabytes.
pub(super) const REQUEST_BYTES_MAX: u64 = 256 << 20;
/// One segment; 254 of them are a request.
pub(super) const SEGMENT_BYTES_MAX: u32 = 1 << 20;
/// Data segments of one request: a queue's descriptors without those of header and status.
pub(super) const SEGMENTS_MAX: u32 = super::QUEUE_SIZE as u32 - 2;
/// Sectors of one discard: 2 GiB, so that even a fragmented file is done with it soon.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Sectors of one write of zeros: 32 MiB, for where zeros must really be written.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 16;

pub(super) const FEATURE_SIZE_MAX: u64 = 1 << 1;
pub(super) const FEATURE_SEG_MAX: u64 = 1 << 2;
pub(super) const FEATURE_RO: u64 = 1 << 5;
pub(super) const FEATURE_BLK_SIZE: u64 = 1 << 6;
pub(super) const FEATURE_FLUSH: u64 = 1 << 9;
pub(super) const FEATURE_TOPOLOGY: u64 = 1 << 10;
pub(super) const FEATURE_CONFIG_WCE: u64 = 1 << 11;
pub(super) const FEATURE_MQ: u64 = 1 << 12;
pub(super) const FEATURE_DISCARD: u64 = 1 << 13;
pub(super) const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

/// Length of the string that GET_ID answers.
pub(super) const ID_BYTES: usize = 20;

const REQUEST_IN: u32 = 0;
const REQUEST_OUT: u32 = 1;
const REQUEST_FLUSH: u32 = 4;
const REQUEST_GET_ID: u32 = 8;
const REQUEST_DISCARD: u32 = 11;
const REQUEST_WRITE_ZEROES: u32 = 13;

const RANGE_UNMAP: u32 = 1;

/// Configuration space.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Config {
    pub(super) capacity_sectors: u64,
    size_max: u32,
    seg_max: u32,
    cylinders: u16,
    heads: u8,
    sectors: u8,
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_blocks: u16,
    opt_io_blocks: u32,
    pub(super) writeback: u8,
    unused: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    padding: [u8; 3],
    max_secure_erase_sectors: u32,
}

impl Config {
    /// Offset of `writeback`, the only field that a driver writes.
    pub(super) const WRITEBACK: usize = std::mem::offset_of!(Self, writeback);

    pub(super) fn new(capacity_sectors: u64, blocks: Blocks, num_queues: u16) -> Self {
        let ratio = (blocks.physical_bytes / blocks.logical_bytes.max(1)).max(1);
        Self {
            capacity_sectors,
            size_max: SEGMENT_BYTES_MAX,
            seg_max: SEGMENTS_MAX,
            cylinders: 0,
            heads: 0,
            sectors: 0,
            blk_size: blocks.logical_bytes,
            physical_block_exp: u8::try_from(ratio.ilog2()).unwrap_or(0),
            alignment_offset: 0,
            min_io_blocks: u16::try_from(ratio).unwrap_or(1),
            opt_io_blocks: 0,
            writeback: 1,
            unused: 0,
            num_queues,
            max_discard_sectors: DISCARD_SECTORS_MAX,
            max_discard_seg: 1,
            discard_sector_alignment: blocks.physical_bytes / 512,
            max_write_zeroes_sectors: WRITE_ZEROES_SECTORS_MAX,
            max_write_zeroes_seg: 1,
            write_zeroes_may_unmap: 1,
            padding: [0; 3],
            max_secure_erase_sectors: 0,
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// The one range of a discard or a write of zeros.
#[derive(Clone, Copy, FromBytes, IntoBytes)]
#[repr(C)]
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// The last byte of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request that keeps every rule; offsets and lengths are bytes within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    Identify,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// What a request is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) features: u64,
    pub(super) is_read_only: bool,
    pub(super) capacity_sectors: u64,
}

impl Rules {
    /// Takes the header off a chain, from which the status byte is split off already, and judges
    /// it.
    ///
    /// After it the chain's readable part, or its writable one, is the data of the command.
    pub(super) fn parse(self, chain: &mut Chain) -> Result<Command, Status> {
        let header: Header = chain.take().ok_or(Status::IoError)?;
        let sector = u64::from_le(header.sector);
        match u32::from_le(header.kind) {
            REQUEST_IN => {
                let offset = self.data(sector, chain.writable_len(), chain.readable_len())?;
                Ok(Command::Read { offset })
            }
            REQUEST_OUT => {
                self.check_writable()?;
                let offset = self.data(sector, chain.readable_len(), chain.writable_len())?;
                Ok(Command::Write { offset })
            }
            REQUEST_FLUSH => Ok(Command::Flush),
            REQUEST_GET_ID => {
                let fits = chain.writable_len() >= ID_BYTES && chain.readable_len() == 0;
                if fits { Ok(Command::Identify) } else { Err(Status::IoError) }
            }
            REQUEST_DISCARD if self.has(FEATURE_DISCARD) => {
                let (offset, len, flags) = self.range(chain, DISCARD_SECTORS_MAX)?;
                if flags == 0 {
                    Ok(Command::Discard { offset, len })
                } else {
                    Err(Status::Unsupported)
                }
            }
            REQUEST_WRITE_ZEROES if self.has(FEATURE_WRITE_ZEROES) => {
                let (offset, len, flags) = self.range(chain, WRITE_ZEROES_SECTORS_MAX)?;
                let unmap = flags & RANGE_UNMAP != 0;
                if flags & !RANGE_UNMAP == 0 {
                    Ok(Command::WriteZeroes { offset, len, unmap })
                } else {
                    Err(Status::Unsupported)
                }
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Judges `len` bytes of data at `sector`, beside which there is nothing else; returns the
    /// offset.
    fn data(self, sector: u64, len: usize, others: usize) -> Result<u64, Status> {
        let len = u64::try_from(len).map_err(|_| Status::IoError)?;
        if others > 0 || len > REQUEST_BYTES_MAX || !len.is_multiple_of(SECTOR_BYTES) {
            return Err(Status::IoError);
        }
        self.within(sector, len / SECTOR_BYTES)
    }

    fn range(self, chain: &mut Chain, sectors_max: u32) -> Result<(u64, u64, u32), Status> {
        self.check_writable()?;
        if chain.readable_len() != size_of::<Range>() || chain.writable_len() > 0 {
            return Err(Status::IoError);
        }
        let range: Range = chain.take().ok_or(Status::IoError)?;
        let sectors = u32::from_le(range.sectors);
        if sectors == 0 || sectors > sectors_max {
            return Err(Status::IoError);
        }
        let offset = self.within(u64::from_le(range.sector), u64::from(sectors))?;
        Ok((offset, u64::from(sectors) * SECTOR_BYTES, u32::from_le(range.flags)))
    }

    /// The offset of `sector` in bytes if `sectors` from it are within the disk.
    fn within(self, sector: u64, sectors: u64) -> Result<u64, Status> {
        let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
        if end > self.capacity_sectors {
            return Err(Status::IoError);
        }
        sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)
    }

    fn check_writable(self) -> Result<(), Status> {
        if self.is_read_only { Err(Status::IoError) } else { Ok(()) }
    }

    fn has(self, feature: u64) -> bool {
        self.features & feature != 0
    }
}
