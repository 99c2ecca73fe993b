use arch::entry::EntryMode;
use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};

use super::*;

const SETUP_LEN: usize = 1024;
const CODE_LEN: usize = 2048;

/// A bzImage whose protected-mode code is counted bytes, then `payload`.
pub(crate) fn bzimage_with(payload: &[u8]) -> Vec<u8> {
    bzimage(payload, |_| {})
}

fn bzimage(payload: &[u8], change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let code_len = (CODE_LEN + payload.len()).next_multiple_of(16);
    let mut header = setup_header {
        setup_sects: 1,
        syssize: u32::try_from(code_len / 16).unwrap(),
        boot_flag: 0xAA55,
        jump: 0x6AEB,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20F,
        loadflags: LOADED_HIGH,
        initrd_addr_max: 0x7FFF_FFFF,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        payload_offset: u32::try_from(CODE_LEN).unwrap(),
        payload_length: u32::try_from(payload.len()).unwrap(),
        pref_address: 0x100_0000,
        init_size: 0x100_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0; SETUP_LEN];
    image[0x1F1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    image.extend((0..CODE_LEN).map(|index| u8::try_from(index % 251 + 1).unwrap()));
    image.extend(payload);
    image.resize(SETUP_LEN + code_len, 0);
    image
}

fn changed(change: impl FnOnce(&mut setup_header)) -> Guest {
    Guest::new(&bzimage(b"", change))
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_where_it_prefers_to_be() {
    let guest = changed(|_| {});
    let entry = guest.load().unwrap();
    assert_eq!(entry.mode, EntryMode::Long64);
    assert_eq!(entry.instruction.0, 0x100_0200);
    assert_eq!(entry.argument.0, layout::ZERO_PAGE);
    assert_eq!(guest.bytes(0x100_0000, 4), [1, 2, 3, 4]);
}

#[test]
fn the_zero_page_returns_the_header_with_a_loader_in_it() {
    let guest = changed(|_| {});
    guest.load().unwrap();
    let header = guest.zero_page().hdr;
    let (version, init_size) = (header.version, header.init_size);
    assert_eq!((version, init_size), (0x20F, 0x100_0000));
    assert_eq!(header.type_of_loader, 0xFF);
    assert_eq!(guest.zero_page().sentinel, 0);
}

#[test]
fn a_preferred_address_between_alignments_is_rounded_up() {
    let guest = changed(|header| header.pref_address = 0x100_1000);
    assert_eq!(guest.load().unwrap().instruction.0, 0x120_0200);
    let fixed = changed(|header| {
        header.pref_address = 0x100_1000;
        header.relocatable_kernel = 0;
    });
    assert_eq!(fixed.load().unwrap().instruction.0, 0x100_1200);
}

#[test]
fn the_initrd_is_at_the_top_of_memory_and_page_aligned() {
    let guest = changed(|_| {}).with_initrd(5000);
    guest.load().unwrap();
    let header = guest.zero_page().hdr;
    let (image, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!((u64::from(image), size), (64 * MIB - 8192, 5000));
    assert_eq!(guest.bytes(image.into(), 7), b"initrd\0");
}

#[test]
fn the_initrd_is_kept_out_of_where_the_kernel_unpacks_itself() {
    let init_size = |header: &mut setup_header| header.init_size = 40 << 20;
    assert!(changed(init_size).with_initrd(8 * MIB).load().is_ok());
    let refusal = changed(init_size).with_initrd(8 * MIB + 1).refusal();
    assert!(refusal.ends_with("at least 65 MiB of memory"), "{refusal}");
}

#[test]
fn the_initrd_is_kept_below_the_address_that_the_kernel_says() {
    let guest = changed(|header| header.initrd_addr_max = 0x2FF_FFFF).with_initrd(4096);
    guest.load().unwrap();
    let image = guest.zero_page().hdr.ramdisk_image;
    assert_eq!(image, 0x2FF_F000);
}

#[test]
fn the_kernels_own_limit_of_the_command_line_holds() {
    let mut guest = changed(|header| header.cmdline_size = 100);
    guest.command_line = "a".repeat(100);
    guest.load().unwrap();
    guest.command_line.push('a');
    let refusal = guest.refusal();
    assert!(refusal.contains("101") && refusal.contains("100"), "{refusal}");
}

#[test]
fn kernels_without_a_64_bit_entry_are_refused() {
    for (guest, text) in [
        (changed(|header| header.version = 0x20B), "older than 2.12"),
        (changed(|header| header.xloadflags = 0), "32-bit"),
        (changed(|header| header.loadflags = 0), "zImage"),
        (changed(|_| {}).by(EntryProtocol::Pvh), "unpack-kernel"),
    ] {
        let refusal = guest.refusal();
        assert!(refusal.contains(text), "{refusal}");
    }
}

#[test]
fn a_bzimage_that_ends_early_is_refused() {
    let whole = bzimage_with(b"");
    for len in [whole.len() - 16, SETUP_LEN + 1, SETUP_LEN, 0x211, 0x206] {
        let refusal = Guest::new(&whole[..len]).refusal();
        assert!(refusal.contains("truncated") || refusal.contains("cut short"), "{len}: {refusal}");
    }
}

#[test]
fn a_signature_after_the_code_is_not_loaded() {
    let mut image = bzimage_with(b"");
    let code_len = image.len() - SETUP_LEN;
    image.extend([0xAA; 64]);
    let guest = Guest::new(&image);
    guest.load().unwrap();
    assert_eq!(guest.bytes(0x100_0000 + code_len as u64, 4), [0; 4]);
}

#[test]
fn a_guest_without_room_for_the_kernel_is_told_how_much_is_enough() {
    let refusal = changed(|header| header.init_size = 100 << 20).refusal();
    assert!(refusal.ends_with("give it at least 116 MiB"), "{refusal}");
    let refusal = changed(|header| header.pref_address = u64::MAX - 0x40_0000).refusal();
    assert!(refusal.ends_with("no guest has RAM there"), "{refusal}");
}

#[test]
fn headers_that_no_kernel_has_are_refused() {
    for guest in [
        changed(|header| header.init_size = 0),
        changed(|header| header.kernel_alignment = 0),
        changed(|header| header.kernel_alignment = 3),
        changed(|header| header.pref_address = u64::MAX),
        changed(|header| header.syssize = 0),
        changed(|header| header.syssize = u32::MAX),
    ] {
        assert!(guest.load().is_err());
    }
}
