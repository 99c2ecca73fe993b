//! SMBIOS: who the guest is, and strings for it (DSP0134 3.6).
//!
//! systemd in the guest takes credentials from the OEM strings.

use arch::memory::{GuestAddress, GuestMemory};
use arch::platform::Identity;
use arch::target::layout::FIRMWARE_TABLES;
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// Kernels look for the entry point here, up to 1 MiB, on every 16-byte boundary.
const SCAN_START: u64 = 0xF_0000;
const SCAN_STEP: u64 = 16;
/// The last boundary where it fits: tables may grow up to it.
const ENTRY_POINT: u64 = FIRMWARE_TABLES.end - 2 * SCAN_STEP;
const STRUCTURE_ALIGNMENT: u64 = 16;

/// A structure counts its strings in a byte.
const STRINGS_MAX: usize = 255;
/// The type 0 characteristics: "not supported" in the first part, "virtual machine" in the second.
const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
const CHARACTERISTICS_VIRTUAL_MACHINE: u8 = 1 << 4;
/// Woken by the power switch.
const WAKE_UP_POWER_SWITCH: u8 = 6;
/// Linux trusts host bridge windows of firmware from 2008 on.
const RELEASE_DATE: &str = "01/01/2026";
const NAME: &str = "nixvmm";

/// An identity that SMBIOS cannot tell.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Strings end with NUL, and an empty one would end the list.
    #[error("OEM string {index} is empty or holds a NUL character")]
    BadString {
        /// Which one, counted from 0.
        index: usize,
    },
    /// The structures are longer than their place.
    #[error(
        "SMBIOS strings take {len} bytes and have room for {room}: \
         pass large credentials on a disk or a share"
    )]
    NoRoom {
        /// Length of all structures in bytes.
        len: u64,
        /// What is there, in bytes.
        room: u64,
    },
    /// The place for the structures is not RAM.
    #[error("the guest has too little memory for its tables: {0}")]
    NotRam(#[from] arch::memory::NotRam),
}

/// The 64-bit entry point (DSP0134, 5.2.2).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct EntryPoint {
    anchor: [u8; 5],
    checksum: u8,
    len: u8,
    major_version: u8,
    minor_version: u8,
    document_revision: u8,
    entry_point_revision: u8,
    reserved: u8,
    structures_len_max: U32,
    structures: U64,
}

const ENTRY_POINT_LEN: u8 = 24;

const _: () = assert!(size_of::<EntryPoint>() == ENTRY_POINT_LEN as usize);
const _: () = assert!(ENTRY_POINT >= SCAN_START && ENTRY_POINT.is_multiple_of(SCAN_STEP));
const _: () = assert!(ENTRY_POINT + size_of::<EntryPoint>() as u64 <= FIRMWARE_TABLES.end);

/// Writes the entry point, and the structures from `free` on.
pub(crate) fn write(memory: GuestMemory, identity: &Identity, free: u64) -> Result<(), Error> {
    let structures = structures(identity)?;
    let start = free.next_multiple_of(STRUCTURE_ALIGNMENT);
    let len = structures.len() as u64;
    let room = ENTRY_POINT.saturating_sub(start);
    if len > room {
        return Err(Error::NoRoom { len, room });
    }
    memory.write_bytes(GuestAddress(start), &structures)?;
    let entry_point = entry_point(start, u32::try_from(len).unwrap_or(u32::MAX));
    memory.write_bytes(GuestAddress(ENTRY_POINT), entry_point.as_bytes())?;
    Ok(())
}

fn entry_point(structures: u64, len: u32) -> EntryPoint {
    let mut entry_point = EntryPoint {
        anchor: *b"_SM3_",
        checksum: 0,
        len: ENTRY_POINT_LEN,
        major_version: 3,
        minor_version: 6,
        document_revision: 0,
        entry_point_revision: 1,
        reserved: 0,
        structures_len_max: len.into(),
        structures: structures.into(),
    };
    let sum = entry_point.as_bytes().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry_point.checksum = sum.wrapping_neg();
    entry_point
}

/// BIOS, system, OEM strings, end.
fn structures(identity: &Identity) -> Result<Vec<u8>, Error> {
    if let Some(index) = identity.oem_strings.iter().position(|string| !is_representable(string)) {
        return Err(Error::BadString { index });
    }
    let mut list = Structures::default();
    list.add(0, &bios(), &[NAME, env!("CARGO_PKG_VERSION"), RELEASE_DATE]);
    list.add(1, &system(identity.uuid), &[NAME, NAME, env!("CARGO_PKG_VERSION")]);
    for strings in identity.oem_strings.chunks(STRINGS_MAX) {
        let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
        list.add(11, &[u8::try_from(strings.len()).unwrap_or(u8::MAX)], &strings);
    }
    list.add(127, &[], &[]);
    Ok(list.bytes)
}

fn is_representable(string: &str) -> bool {
    !string.is_empty() && !string.contains('\0')
}

/// Type 0 after its header: strings 1 to 3 are vendor, version and release date.
fn bios() -> Vec<u8> {
    let mut fields = vec![1, 2, 0, 0, 3, 0];
    fields.extend_from_slice(&CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
    // Two bytes of characteristics, no release numbers (0xFF), no extended ROM size.
    fields.extend_from_slice(&[0, CHARACTERISTICS_VIRTUAL_MACHINE, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0]);
    fields
}

/// Type 1 after its header: strings 1 to 3 are manufacturer, product and version.
fn system(uuid: Option<[u8; 16]>) -> Vec<u8> {
    let mut fields = vec![1, 2, 3, 0];
    // SMBIOS keeps the first three fields of a UUID in little-endian order; zeros mean none.
    fields.extend_from_slice(&Uuid::from_bytes(uuid.unwrap_or_default()).to_bytes_le());
    fields.extend_from_slice(&[WAKE_UP_POWER_SWITCH, 0, 0]);
    fields
}

/// Structures one after another, each with the next handle.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    handle: u16,
}

impl Structures {
    /// Appends a structure: header, fields, strings, and the NUL that ends them.
    fn add(&mut self, kind: u8, fields: &[u8], strings: &[&str]) {
        const HEADER_LEN: usize = 4;
        let len = u8::try_from(HEADER_LEN + fields.len()).unwrap_or(u8::MAX);
        self.bytes.extend_from_slice(&[kind, len]);
        self.bytes.extend_from_slice(&self.handle.to_le_bytes());
        self.bytes.extend_from_slice(fields);
        for string in strings {
            self.bytes.extend_from_slice(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.handle += 1;
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn strings_of(bytes: &[u8]) -> Vec<String> {
        bytes.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into()).collect()
    }

    fn identity(strings: &[&str]) -> Identity {
        let oem_strings = strings.iter().map(|string| (*string).into()).collect();
        Identity { uuid: None, oem_strings }
    }

    /// Walks the structures as an operating system does: their kinds, fields and strings.
    fn walk(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, len, ..] = bytes {
            let (formatted, rest) = bytes.split_at(usize::from(*len));
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            found.push((*kind, formatted[4..].to_vec(), strings_of(&rest[..end])));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn credentials_arrive_in_oem_strings() {
        let credential = format!("io.systemd.credential:key={}", "x".repeat(8000));
        let found = walk(&structures(&identity(&[&credential, "second"])).unwrap());
        let kinds: Vec<u8> = found.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [0, 1, 11, 127]);
        assert_eq!(found[2].1, [2]);
        assert_eq!(found[2].2, [credential, "second".into()]);
    }

    #[test]
    fn more_strings_than_a_structure_counts_go_into_a_second_one() {
        let strings: Vec<String> = (0..300).map(|number| format!("s{number}")).collect();
        let identity = Identity { uuid: None, oem_strings: strings.clone() };
        let found = walk(&structures(&identity).unwrap());
        let arrived = found.iter().filter(|(kind, ..)| *kind == 11).flat_map(|(.., text)| text);
        assert!(arrived.eq(&strings));
    }

    #[test]
    fn the_uuid_has_its_first_fields_in_little_endian_order() {
        let uuid = Uuid::parse_str("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        let fields = system(Some(uuid.into_bytes()));
        let expected = [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99];
        assert_eq!(fields[4..14], expected);
    }

    #[test]
    fn the_entry_point_sums_to_zero_and_points_to_the_structures() {
        let entry_point = entry_point(0xE_4000, 0x123);
        let sum = entry_point.as_bytes().iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        assert_eq!(entry_point.as_bytes()[16..24], 0xE_4000u64.to_le_bytes());
    }

    #[test]
    fn strings_that_smbios_cannot_hold_are_refused() {
        for bad in ["", "a\0b"] {
            let refusal = structures(&identity(&["good", bad])).unwrap_err();
            assert_eq!(refusal, Error::BadString { index: 1 });
        }
    }
}
