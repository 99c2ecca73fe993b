//! What boots? Every kernel format over every transport, and machines of every size.

use std::path::Path;

use anyhow::{Result, ensure};
use tests::guest::Launch;
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("boot::bzimage_over_pci", |testbed| boots(testbed, &testbed.bzimage, "pci", "linux")),
    ("boot::bzimage_over_mmio", |testbed| boots(testbed, &testbed.bzimage, "mmio", "linux")),
    ("boot::elf_over_pci", |testbed| boots(testbed, &testbed.vmlinux, "pci", "linux")),
    ("boot::elf_over_mmio", |testbed| boots(testbed, &testbed.vmlinux, "mmio", "linux")),
    ("boot::pvh_over_pci", |testbed| boots(testbed, &testbed.vmlinux, "pci", "pvh")),
    ("boot::pvh_over_mmio", |testbed| boots(testbed, &testbed.vmlinux, "mmio", "pvh")),
];

fn boots(testbed: &Testbed, kernel: &Path, transport: &str, protocol: &str) -> Result<()> {
    let options = ["--transport", transport, "--boot-protocol", protocol];
    let mut guest = Launch::tiny(testbed, kernel).arguments(options).boot()?;
    let drivers = guest.run("ls /sys/bus/virtio/drivers/virtio_console")?;
    ensure!(drivers.contains("virtio0"), "the console is no virtio device:\n{drivers}");
    guest.power_off()
}
