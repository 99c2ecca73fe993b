//! A guest to load into, and small valid kernels.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use arch::entry::Entry;
use arch::memory::{Backing, GuestMemory};
use arch::platform::{Identity, PciHost, Platform, Power, Processors};
use arch::target::layout;
use boot::{EntryProtocol, Error, Source};

/// RAM of the guest in bytes: enough for the kernels below, and soon exceeded.
pub const RAM: u64 = 64 << 20;

/// A file in memory.
pub fn file(content: &[u8]) -> File {
    let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.write_all_at(content, 0).unwrap();
    file
}

/// The same guest memory for all runs, with all bytes zero.
pub fn memory() -> GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    let map = || GuestMemory::map(&[0..RAM], Backing::default()).unwrap();
    let memory = *MEMORY.get_or_init(map);
    memory.discard_all().unwrap();
    memory
}

/// A small machine with PCI.
pub fn platform() -> Platform {
    let ram = vec![0..RAM];
    let power = Power {
        sleep_control_port: layout::POWER_PORTS.start,
        sleep_status_port: layout::POWER_PORTS.start + 1,
        reset_port: layout::POWER_PORTS.start + 2,
        reset_value: 1,
        button_interrupt: layout::POWER_INTERRUPT,
    };
    Platform {
        processors: Processors { count: 2 },
        pci: Some(PciHost {
            ecam: layout::PCI_ECAM_START..layout::PCI_ECAM_START + (1 << 20),
            window_32: layout::PCI_WINDOW_32,
            window_64: layout::pci_window_64(layout::end_of_memory(&ram), 40),
        }),
        ram,
        virtio_mmio: Vec::new(),
        serial: Vec::new(),
        power,
        panic_port: None,
        watchdog: None,
        identity: Identity::default(),
    }
}

/// Loads `kernel` with an initrd of a page, and checks what every entry promises.
pub fn load_kernel(kernel: &[u8], protocol: EntryProtocol) {
    let (kernel, initrd) = (file(kernel), file(&[7; 4096]));
    let command_line = "quiet";
    let source = Source { kernel: &kernel, initrd: Some(&initrd), command_line, protocol };
    check(boot::load(memory(), &platform(), &source));
}

/// A guest that starts, starts in RAM above the first MiB and below 4 GiB.
pub fn check(entry: Result<Entry, Error>) {
    match entry {
        Ok(entry) => {
            assert!((layout::HIGH_MEMORY..RAM).contains(&entry.instruction.0));
            assert!(entry.argument.0 < layout::CONVENTIONAL_MEMORY_END);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// `template` changed by `changes`; where these go on, so does the result.
pub fn changed(mut template: Vec<u8>, changes: &[u8]) -> Vec<u8> {
    if changes.len() > template.len() {
        template.resize(changes.len(), 0);
    }
    for (byte, change) in template.iter_mut().zip(changes) {
        *byte ^= change;
    }
    template
}

/// A valid bzImage: the setup header is at byte 0x1F1, `payload` at byte 0x800.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let payload_length = u32::try_from(payload.len()).unwrap();
    let code_length = (0x400 + payload.len()).next_multiple_of(16);
    let mut image = vec![0; 0x400 + code_length];
    let mut put = |offset: usize, bytes: &[u8]| {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1F1, &[1]);
    put(0x1F4, &u32::try_from(code_length / 16).unwrap().to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x6A]);
    put(0x202, b"HdrS\x0F\x02");
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21, 1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &0x400u32.to_le_bytes());
    put(0x24C, &payload_length.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x100_0000u32.to_le_bytes());
    put(0x800, payload);
    image
}

/// A valid Linux ELF with a text segment, a data segment and a PVH note.
pub fn elf() -> Vec<u8> {
    const TEXT: u64 = 0x100_0000;
    const LINUX_MAP: u64 = 0xFFFF_FFFF_8000_0000;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3E\0\x01\0\0\0".to_vec();
    let words = |image: &mut Vec<u8>, words: &[u64]| {
        image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    };
    words(&mut image, &[TEXT, 64, 0]);
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    for (kind, offset, physical, file_size, memory_size) in [
        (1, 0x100, TEXT, 0x80, 0x80),
        (1, 0x180, TEXT + 0x1000, 0x40, 0x3000),
        (4, 0x1C0, TEXT, 24, 24),
    ] {
        words(&mut image, &[kind, offset, LINUX_MAP + physical, physical]);
        words(&mut image, &[file_size, memory_size, 4]);
    }
    image.resize(0x1C0, 0x90);
    image.extend([4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    image.extend(b"Xen\0");
    words(&mut image, &[TEXT + 0x40]);
    image
}
