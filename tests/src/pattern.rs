//! Did what was sent arrive? Bytes in which whatever is lost, repeated or moved shows, and which
//! cost neither end more than a copy: a gibibyte of them is affordable in an emulated guest.

use std::io::{self, Read, Write};

/// After so many bytes they repeat. It is a prime, so that no number of segments, pages or buffers
/// is a multiple of it but what many of them are.
const PERIOD: usize = 65_521;

/// Writes `bytes` of the pattern.
///
/// # Errors
/// Those of `stream`.
pub fn write(stream: &mut impl Write, bytes: u64) -> io::Result<()> {
    let period = periods(1);
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(PERIOD).min(PERIOD);
        stream.write_all(&period[..length])?;
        left -= length as u64;
    }
    Ok(())
}

/// Reads to the end, and expects `bytes` of the pattern.
///
/// # Errors
/// Those of `stream`; [`io::ErrorKind::InvalidData`] when something else came.
pub fn check(stream: &mut impl Read, bytes: u64) -> io::Result<()> {
    let expected = periods(2);
    let mut chunk = vec![0; PERIOD];
    let mut done = 0;
    let other = |text: String| Err(io::Error::new(io::ErrorKind::InvalidData, text));
    loop {
        let start = usize::try_from(done % PERIOD as u64).unwrap_or_default();
        let length = match stream.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            length => length?,
        };
        if length == 0 {
            break;
        }
        if chunk[..length] != expected[start..start + length] {
            return other(format!("of {bytes} bytes others came after {done}"));
        }
        done += length as u64;
    }
    if done != bytes {
        return other(format!("{done} of {bytes} bytes came"));
    }
    Ok(())
}

/// So many periods of the pattern: a linear congruential generator's better bytes.
fn periods(count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    let period: Vec<u8> = std::iter::repeat_with(next).take(PERIOD).collect();
    period.repeat(count)
}

#[cfg(test)]
mod test {
    use super::*;

    const BYTES: u64 = 300_000;

    fn written() -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        write(&mut bytes, BYTES)?;
        Ok(bytes)
    }

    #[test]
    fn what_arrives_whole_is_right_however_it_is_cut() -> io::Result<()> {
        let bytes = written()?;
        assert_eq!(bytes.len() as u64, BYTES);
        let (first, second) = bytes.split_at(100_001);
        check(&mut first.chain(second), BYTES)
    }

    #[test]
    fn what_is_changed_lost_moved_or_more_is_seen() -> io::Result<()> {
        let bytes = written()?;
        let mut changed = bytes.clone();
        changed[200_000] ^= 1;
        assert!(check(&mut changed.as_slice(), BYTES).is_err());
        assert!(check(&mut &bytes[..bytes.len() - 1], BYTES).is_err());
        assert!(check(&mut bytes.chain(&[0][..]), BYTES).is_err());
        for length in [1, 1448, 4096, 65_536] {
            let lost = bytes[..4096].chain(&bytes[4096 + length..]);
            assert!(check(&mut lost.take(BYTES), BYTES - length as u64).is_err(), "{length} lost");
            let mut moved = bytes.clone();
            let (first, second) = moved.split_at_mut(65_536);
            first[..length].swap_with_slice(&mut second[..length]);
            assert!(check(&mut moved.as_slice(), BYTES).is_err(), "{length} moved");
        }
        Ok(())
    }
}
