//! Turns a bzImage into the ELF inside it, so that no guest has to.

use std::io::{Read, Seek, Write};

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

/// Why no ELF came out of a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the bzImage or writing the ELF.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Writes the ELF inside `bzimage` to `out` and says how it was compressed.
pub fn unpack_kernel(
    _bzimage: &mut (impl Read + Seek),
    _out: &mut impl Write,
) -> Result<Format, Error> {
    Err(std::io::Error::from(std::io::ErrorKind::Unsupported).into())
}
