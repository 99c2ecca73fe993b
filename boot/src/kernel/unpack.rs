//! Turns a bzImage into the ELF inside it, so that no guest has to.

use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};

use lzma_rust2::XzReader;
use miniz_oxide::inflate::stream::{InflateState, inflate};
use miniz_oxide::{DataFormat, MZError, MZFlush, MZStatus};
use ruzstd::decoding::StreamingDecoder;

use super::{bzimage, elf};

/// x86_64 Linux maps its image in 1 GiB at the most (KERNEL_IMAGE_SIZE), so no ELF is longer.
const ELF_LEN_MAX: u64 = 1 << 30;
/// Kernels are packed with windows of up to 128 MiB (`zstd --ultra -22`).
const ZSTD_WINDOW_MAX: u64 = 128 << 20;
/// As above for xz' dictionary, with room for its other tables.
const XZ_MEMORY_MAX_KIB: u32 = 160 << 10;
/// A block of LZ4's legacy frame holds up to 8 MiB.
const LZ4_BLOCK_MAX: usize = 8 << 20;
const LZ4_PACKED_MAX: usize = lz4_flex::block::get_maximum_output_size(LZ4_BLOCK_MAX);
/// Read, decompressed and written at a time.
const CHUNK: usize = 128 << 10;
/// The build appends the ELF's length to what the compressor wrote; gzip does so itself.
const LENGTH_LEN: u64 = size_of::<u32>() as u64;

/// How a bzImage's payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Zstandard.
    Zstd,
    /// LZ4 in its legacy frame.
    Lz4,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
}

impl Format {
    /// Its usual name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
        }
    }
}

/// Why no ELF came out of a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no bzImage with a payload.
    #[error(transparent)]
    BzImage(#[from] super::Error),
    /// The bzImage cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The ELF cannot be written.
    #[error("the unpacked kernel cannot be written: {0}")]
    Write(#[source] io::Error),
    /// A compression that is known and not supported.
    #[error("is compressed with {0}, which is not supported: build it with zstd, lz4, gzip or xz")]
    UnsupportedCompression(&'static str),
    /// A compression that is not known.
    #[error("is compressed in an unknown way (it starts with {0:02x?}): use zstd, lz4, gzip or xz")]
    UnknownCompression([u8; 6]),
    /// The payload breaks the rules of its format.
    #[error("its {} data are damaged: {source}", .format.name())]
    Damaged {
        /// The format.
        format: Format,
        /// What is wrong.
        source: io::Error,
    },
    /// Something else than an x86_64 ELF came out.
    #[error("does not contain an x86_64 ELF file")]
    NotElf,
    /// More came out than any kernel has.
    #[error("unpacks to more than 1 GiB, which is more than Linux can map")]
    TooLarge,
    /// The length differs from what the build recorded.
    #[error("is damaged: it unpacks to {unpacked} bytes and should to {recorded}")]
    WrongLength {
        /// Bytes that came out.
        unpacked: u64,
        /// What the bzImage says, modulo 2^32.
        recorded: u32,
    },
}

/// Writes the ELF inside `bzimage` to `out`, and says how it was compressed.
///
/// Memory is bounded by the formats' windows: 300 MiB for zstd, 160 MiB for xz, 20 MiB otherwise.
/// What was written before an error is of no use.
pub fn unpack_kernel(
    bzimage: &mut (impl Read + Seek),
    out: &mut impl Write,
) -> Result<Format, Error> {
    let (start, len) = bzimage::payload(bzimage)?;
    let format = recognise(bzimage, start, len)?;
    let recorded = recorded_length(bzimage, start, len)?;

    bzimage.seek(SeekFrom::Start(start)).map_err(Error::Read)?;
    let packed_len = if format == Format::Gzip { len } else { len - LENGTH_LEN };
    let mut packed = BufReader::with_capacity(CHUNK, bzimage.take(packed_len));
    let mut elf = ElfWriter { out, written: 0, head: Vec::with_capacity(ELF_HEAD_LEN) };
    match format {
        Format::Zstd => unpack_zstd(packed, &mut elf)?,
        Format::Lz4 => unpack_lz4(&mut packed, &mut elf)?,
        Format::Gzip => unpack_gzip(&mut packed, &mut elf)?,
        Format::Xz => {
            let memory_max = XZ_MEMORY_MAX_KIB;
            copy(format, &mut XzReader::new_mem_limit(packed, false, memory_max), &mut elf)?;
        }
    }
    elf.finish(recorded)?;
    Ok(format)
}

fn recognise(bzimage: &mut (impl Read + Seek), start: u64, len: u64) -> Result<Format, Error> {
    let mut magic = [0; 6];
    if len < magic.len() as u64 + LENGTH_LEN {
        return Err(Error::NotElf);
    }
    read_at(bzimage, start, &mut magic)?;
    match magic {
        [0x28, 0xB5, 0x2F, 0xFD, ..] => Ok(Format::Zstd),
        [0x02, 0x21, 0x4C, 0x18, ..] => Ok(Format::Lz4),
        [0x1F, 0x8B, ..] => Ok(Format::Gzip),
        [0xFD, b'7', b'z', b'X', b'Z', 0] => Ok(Format::Xz),
        [b'B', b'Z', b'h', ..] => Err(Error::UnsupportedCompression("bzip2")),
        [0x5D, 0, 0, ..] => Err(Error::UnsupportedCompression("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => Err(Error::UnsupportedCompression("lzo")),
        _ => Err(Error::UnknownCompression(magic)),
    }
}

fn recorded_length(bzimage: &mut (impl Read + Seek), start: u64, len: u64) -> Result<u32, Error> {
    let mut recorded = [0; size_of::<u32>()];
    read_at(bzimage, start + len - LENGTH_LEN, &mut recorded)?;
    Ok(u32::from_le_bytes(recorded))
}

fn read_at(file: &mut (impl Read + Seek), offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
    file.seek(SeekFrom::Start(offset)).map_err(Error::Read)?;
    file.read_exact(bytes).map_err(Error::Read)
}

fn unpack_zstd(packed: impl Read, elf: &mut ElfWriter<'_, impl Write>) -> Result<(), Error> {
    let mut decoder = StreamingDecoder::new_with_max_window_size(packed, ZSTD_WINDOW_MAX)
        .map_err(|error| damaged(Format::Zstd, io::Error::other(error)))?;
    copy(Format::Zstd, &mut decoder, elf)
}

/// The legacy frame is a magic number and blocks, each after its packed length.
fn unpack_lz4(packed: &mut impl BufRead, elf: &mut ElfWriter<'_, impl Write>) -> Result<(), Error> {
    let damaged = |error| damaged(Format::Lz4, error);
    let mut word = [0; 4];
    packed.read_exact(&mut word).map_err(damaged)?;
    let mut block = Vec::new();
    let mut unpacked = vec![0; LZ4_BLOCK_MAX];
    while !packed.fill_buf().map_err(damaged)?.is_empty() {
        packed.read_exact(&mut word).map_err(damaged)?;
        let len = usize::try_from(u32::from_le_bytes(word)).unwrap_or(usize::MAX);
        if len > LZ4_PACKED_MAX {
            return Err(damaged(io::Error::other("a block is longer than 8 MiB")));
        }
        block.resize(len, 0);
        packed.read_exact(&mut block).map_err(damaged)?;
        let len = lz4_flex::block::decompress_into(&block, &mut unpacked)
            .map_err(|error| damaged(io::Error::other(error)))?;
        elf.write(unpacked.get(..len).unwrap_or(&unpacked))?;
    }
    Ok(())
}

/// One gzip member (RFC 1952).
fn unpack_gzip(
    packed: &mut impl BufRead,
    elf: &mut ElfWriter<'_, impl Write>,
) -> Result<(), Error> {
    let damaged = |error| damaged(Format::Gzip, error);
    skip_gzip_header(packed).map_err(damaged)?;
    let mut state = InflateState::new_boxed(DataFormat::Raw);
    let mut chunk = vec![0; CHUNK];
    let mut checksum = Crc32::new();
    loop {
        let input = packed.fill_buf().map_err(damaged)?;
        let at_end = input.is_empty();
        let result = inflate(&mut state, input, &mut chunk, MZFlush::None);
        packed.consume(result.bytes_consumed);
        let unpacked = chunk.get(..result.bytes_written).unwrap_or(&chunk);
        checksum.add(unpacked);
        elf.write(unpacked)?;
        match result.status {
            Ok(MZStatus::StreamEnd) => break,
            Ok(_) | Err(MZError::Buf) if !at_end => {}
            Ok(_) if result.bytes_written > 0 => {}
            Ok(_) => return Err(damaged(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err(damaged(io::Error::other(format!("{error:?}")))),
        }
    }
    let mut recorded = [0; 4];
    packed.read_exact(&mut recorded).map_err(damaged)?;
    if checksum.value() != u32::from_le_bytes(recorded) {
        return Err(damaged(io::Error::other("the checksum differs")));
    }
    Ok(())
}

fn skip_gzip_header(packed: &mut impl BufRead) -> io::Result<()> {
    const HAS_CHECKSUM: u8 = 1 << 1;
    const HAS_EXTRA: u8 = 1 << 2;
    const HAS_NAME: u8 = 1 << 3;
    const HAS_COMMENT: u8 = 1 << 4;
    let mut header = [0; 10];
    packed.read_exact(&mut header)?;
    let [_, _, _, flags, ..] = header;
    let mut word = [0; 2];
    if flags & HAS_EXTRA != 0 {
        packed.read_exact(&mut word)?;
        let len = u64::from(u16::from_le_bytes(word));
        io::copy(&mut packed.by_ref().take(len), &mut io::sink())?;
    }
    for flag in [HAS_NAME, HAS_COMMENT] {
        if flags & flag != 0 {
            packed.skip_until(0)?;
        }
    }
    if flags & HAS_CHECKSUM != 0 {
        packed.read_exact(&mut word)?;
    }
    Ok(())
}

fn copy(
    format: Format,
    from: &mut impl Read,
    elf: &mut ElfWriter<'_, impl Write>,
) -> Result<(), Error> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) => elf.write(chunk.get(..len).unwrap_or(&chunk))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(damaged(format, error)),
        }
    }
}

const fn damaged(format: Format, source: io::Error) -> Error {
    Error::Damaged { format, source }
}

/// As much of an ELF header as tells the processor.
const ELF_HEAD_LEN: usize = 20;
/// Class, byte order and machine of an x86_64 ELF file, with their offsets.
const ELF_X86_64: [(usize, u8); 4] = [(4, 2), (5, 1), (18, 62), (19, 0)];

/// Passes on what is the beginning of an x86_64 ELF, and counts.
struct ElfWriter<'a, W> {
    out: &'a mut W,
    written: u64,
    head: Vec<u8>,
}

impl<W: Write> ElfWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.written += bytes.len() as u64;
        if self.written > ELF_LEN_MAX {
            return Err(Error::TooLarge);
        }
        if self.head.len() < ELF_HEAD_LEN {
            self.head.extend(bytes.iter().take(ELF_HEAD_LEN - self.head.len()));
            if self.head.len() == ELF_HEAD_LEN && !self.is_elf() {
                return Err(Error::NotElf);
            }
        }
        self.out.write_all(bytes).map_err(Error::Write)
    }

    fn is_elf(&self) -> bool {
        self.head.starts_with(elf::MAGIC)
            && ELF_X86_64.iter().all(|(offset, byte)| self.head.get(*offset) == Some(byte))
    }

    #[expect(clippy::cast_possible_truncation, reason = "the length is recorded modulo 2^32")]
    fn finish(self, recorded: u32) -> Result<(), Error> {
        if !self.is_elf() {
            return Err(Error::NotElf);
        }
        let unpacked = self.written;
        if unpacked as u32 != recorded {
            return Err(Error::WrongLength { unpacked, recorded });
        }
        self.out.flush().map_err(Error::Write)
    }
}

/// The checksum of gzip (RFC 1952, section 8).
struct Crc32(u32);

impl Crc32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0u32;
        while index < 256 {
            let mut value = index;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 0 { value >> 1 } else { 0xEDB8_8320 ^ (value >> 1) };
                bit += 1;
            }
            table[index as usize] = value;
            index += 1;
        }
        table
    };

    const fn new() -> Self {
        Self(!0)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let [low, ..] = self.0.to_le_bytes();
            self.0 = Self::TABLE[usize::from(low ^ byte)] ^ (self.0 >> 8);
        }
    }

    const fn value(self) -> u32 {
        !self.0
    }
}

#[cfg(test)]
mod test;
