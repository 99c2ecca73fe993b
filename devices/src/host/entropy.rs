//! Random bytes of the host's kernel.

use std::io;

use arch::memory::GuestSlice;
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

/// Bytes drawn with one call: few calls, little of the stack.
const DRAW_BYTES: usize = 1024;

/// Fills `target` with random bytes.
pub fn fill(mut target: GuestSlice) -> io::Result<()> {
    let mut bytes = [0; DRAW_BYTES];
    while target.len() > 0 {
        let len = target.len().min(DRAW_BYTES);
        let drawn = match rustix::rand::getrandom(&mut bytes[..len], GetRandomFlags::empty()) {
            Ok(drawn) => drawn,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let Some((part, rest)) = target.split_at(drawn) else { break };
        part.copy_from(&bytes);
        target = rest;
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use arch::memory::{Backing, GuestAddress, GuestMemory};

    use super::*;

    #[test]
    fn fills_every_byte_and_none_beyond() {
        let memory = GuestMemory::map(&[0..0x2000], Backing::default()).unwrap();
        let mut seen = [0u8; 0x1800];
        // A byte that random draws leave zero a hundred times over was not filled.
        for _ in 0..100 {
            fill(memory.slice(GuestAddress(0x100), 0x1500).unwrap()).unwrap();
            for (offset, seen) in seen.iter_mut().enumerate() {
                let address = GuestAddress(u64::try_from(offset).unwrap());
                *seen |= memory.read::<u8>(address).unwrap();
            }
        }
        assert!(seen[..0x100].iter().all(|byte| *byte == 0));
        assert!(seen[0x100..0x1600].iter().all(|byte| *byte != 0));
        assert!(seen[0x1600..].iter().all(|byte| *byte == 0));
    }
}
