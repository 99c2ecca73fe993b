//! A QEMU that delivers each interrupt to a nested guest once.
//!
//! QEMU's emulation of VMRUN (up to 10.0 at least) delivers the interrupt that a hypervisor
//! injects, and leaves it noted as the processor's pending exception. When QEMU's main loop has the
//! processor stop for a reason of its own before the guest is left again, the note is found and
//! the interrupt comes a second time, as an exception, which no cleared interrupt flag holds off:
//! in the middle of its own handler, which waits for a lock that it has. A guest then stands still,
//! or dies of a fault. Without the one instruction that makes the note, nothing is missing.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSection, ObjectSymbol};

/// What decides how a program is mended, to tell one result from another.
pub const SOURCE: &str = include_str!("mended_emulator.rs");

/// The function that emulates VMRUN, and the one that delivers an interrupt.
const VMRUN: &str = "helper_vmrun";
const DELIVER: &str = "do_interrupt_x86_hardirq";

/// The interrupt's number is noted so many bytes before the call at most.
const BEFORE_CALL: usize = 64;

/// An instruction of the length of the note that does nothing.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// Takes the note from the x86-64 program in `file`.
///
/// # Errors
/// When it does not look as expected; it is left as it was then.
pub fn mend(file: &Path) -> Result<()> {
    let mut program = fs::read(file)?;
    let place = place_of_note(&program)?;
    let note = program.get_mut(place..place + NOTHING.len()).context("beyond the file")?;
    note.copy_from_slice(&NOTHING);
    Ok(fs::write(file, program)?)
}

fn place_of_note(program: &[u8]) -> Result<usize> {
    let file = object::File::parse(program)?;
    let symbol = |name: &str| {
        let found = file.dynamic_symbols().find(|symbol| symbol.name() == Ok(name));
        found.with_context(|| format!("it has no symbol {name}"))
    };
    let (vmrun, deliver) = (symbol(VMRUN)?, symbol(DELIVER)?);
    let text = file.section_by_name(".text").context("it has no code")?;
    let (start, _) = text.file_range().context("its code is not in the file")?;
    let code = text.data_range(vmrun.address(), vmrun.size())?.context("VMRUN is not in it")?;
    let offset = usize::try_from(start + (vmrun.address() - text.address()))?;
    Ok(offset + note_in(code, vmrun.address(), deliver.address())?)
}

/// Where the note is in the function that has `code` at `address`: the one store of ESI, which is
/// the number, below a base register, shortly before the one call of the function at `deliver`.
fn note_in(code: &[u8], address: u64, deliver: u64) -> Result<usize> {
    let calls: Vec<usize> = places(code, |bytes| match bytes {
        [0xe8, a, b, c, d, ..] => Some(i32::from_le_bytes([*a, *b, *c, *d])),
        _ => None,
    })
    .filter(|(place, distance)| {
        let next = address + *place as u64 + 5;
        next.wrapping_add_signed(i64::from(*distance)) == deliver
    })
    .map(|(place, _)| place)
    .collect();
    let [call] = calls.as_slice() else { anyhow::bail!("{} calls of {DELIVER}", calls.len()) };

    let first = call.saturating_sub(BEFORE_CALL);
    let before = code.get(first..*call).unwrap_or_default();
    let notes: Vec<usize> = places(before, |bytes| match bytes {
        // A prefix would make it another register.
        [prefix, 0x89, place, _, _, _, 0xff, ..] => {
            let is_esi = place & 0xf8 == 0xb0 && *place != 0xb4;
            (is_esi && prefix & 0xf0 != 0x40).then_some(())
        }
        _ => None,
    })
    .map(|(place, ())| first + place + 1)
    .collect();
    ensure!(notes.len() == 1, "{} stores of the number before the call", notes.len());
    notes.first().copied().context("no store")
}

/// What `look` finds at the places of `code`.
fn places<T>(code: &[u8], look: impl Fn(&[u8]) -> Option<T>) -> impl Iterator<Item = (usize, T)> {
    (0..code.len())
        .filter_map(move |place| Some((place, look(code.get(place..).unwrap_or_default())?)))
}

#[cfg(test)]
mod test {
    use super::*;

    const ADDRESS: u64 = 0x1000;
    const DELIVERY: u64 = 0x9000;

    /// Stores an error code, the number and a flag, and calls what is at `target`.
    fn code(target: u64) -> Vec<u8> {
        let mut code = vec![0x44, 0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff];
        code.extend([0x89, 0xb3, 0x10, 0xd7, 0xff, 0xff]);
        code.extend([0xc7, 0x83, 0xe4, 0x33, 0, 0, 0, 0, 0, 0]);
        let next = ADDRESS + code.len() as u64 + 5;
        code.push(0xe8);
        code.extend(u32::try_from(target - next).unwrap().to_le_bytes());
        code
    }

    #[test]
    fn the_note_before_the_call_is_found_and_no_other() {
        assert_eq!(note_in(&code(DELIVERY), ADDRESS, DELIVERY).unwrap(), 7);
    }

    #[test]
    fn code_that_looks_otherwise_is_left_alone() {
        let refused = |code: &[u8]| note_in(code, ADDRESS, DELIVERY).unwrap_err().to_string();
        assert_eq!(refused(&code(0xa000)), "0 calls of do_interrupt_x86_hardirq");
        let mut mended = code(DELIVERY);
        mended[7..13].copy_from_slice(&NOTHING);
        assert_eq!(refused(&mended), "0 stores of the number before the call");
        assert!(place_of_note(b"no program").is_err());
    }
}
