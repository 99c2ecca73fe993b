//! How does nixvmm compare? The same kernel, initramfs, disk, memory and processors for nixvmm and
//! for its peers, side by side in one emulated host whose clock counts instructions.
//!
//! `mark` is what the guest tells, `vmm` what each VMM is told, `stage` where they run, `trace` and
//! `memory` how the host's kernel is asked, `traffic` what goes over a network, `measure` the
//! measurements, `store` those of a guest's files, and `report` the table.

pub mod mark;
pub mod measure;
pub mod memory;
pub mod report;
pub mod stage;
pub mod store;
pub mod trace;
pub mod traffic;
pub mod vmm;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::archive::Archive;
use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::packages::{self, Program};
use crate::{program, tool};
use vmm::{Link, Programs, Vmm};

/// The peer from crates.io, pinned.
const ALIOTH: &str = "0.12.0";

/// What the guest needs for its disk and its console, on either transport.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console"];

/// What it loads besides where a network is measured.
const NETWORK_MODULES: [&str; 2] = ["virtio_net", "vmw_vsock_virtio_transport"];

/// What it loads besides both where it has every device.
const FURTHER_MODULES: [&str; 7] = [
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "nd_pmem",
    "virtiofs",
    "virtio_rng",
    "wdat_wdt",
];

/// What can be measured.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
pub enum Topic {
    /// Instructions from exec to the guest's first.
    Start,
    /// Boot to user space, bzImage and ELF.
    Boot,
    /// Exits to the VMM until user space, by kind.
    Exits,
    /// Memory besides the guest's, idle.
    Memory,
    /// The same with one of each kind of device that nixvmm has.
    Devices,
    /// Random reads and writes of 4 KiB, in instructions.
    Block,
    /// The same in time, by alternating pairs on two processors.
    Pairs,
    /// Lists, searches and starts of programs from a store, by who serves it.
    Store,
    /// From exec to a store that is served, on this machine and without a guest.
    StoreStart,
    /// Bytes and round trips over taps and sockets, by instructions.
    Net,
    /// What the host does for a MiB and a round trip over each: exits by reason, and who runs.
    NetExits,
    /// Where the time of nixvmm's start and of the guest's kernel goes.
    Profile,
}

/// What is measured, for the process in the emulated host.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Plan {
    /// The VMMs' programs.
    pub programs: Programs,
    /// Debian's kernel as it ships.
    pub bzimage: PathBuf,
    /// The ELF inside it.
    pub vmlinux: PathBuf,
    /// The guest's initramfs.
    pub initrd: PathBuf,
    /// The same with the drivers of every device, which others would only load.
    pub initrd_of_devices: PathBuf,
    /// For its `chroot`.
    pub busybox: PathBuf,
    /// What reads from a store are measured with, where they are.
    pub store: Option<store::Store>,
    /// What to measure.
    pub topics: Vec<Topic>,
    /// Whom to measure.
    pub vmms: Vec<Vmm>,
    /// What they have with their host where a network is measured.
    pub links: Vec<Link>,
    /// Who serves the store that is measured.
    pub servers: Vec<store::Server>,
    /// The file for the [`Figures`].
    pub results: PathBuf,
}

/// One number of one VMM.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Figure {
    /// What was measured.
    pub row: String,
    /// Of which VMM.
    pub vmm: Vmm,
    /// The unit of all values.
    pub unit: String,
    /// The median of the runs.
    pub value: f64,
    /// What each run gave.
    pub runs: Vec<f64>,
    /// Its parts, where it has some.
    pub parts: BTreeMap<String, f64>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Figures {
    /// The numbers.
    pub figures: Vec<Figure>,
    /// Where time goes, for people.
    pub notes: Vec<String>,
}

impl Plan {
    /// Fetches and builds everything, which takes minutes the first time.
    ///
    /// # Errors
    /// What could not be fetched, installed or built.
    pub fn prepare(
        cache: &Cache,
        topics: Vec<Topic>,
        vmms: Vec<Vmm>,
        links: Vec<Link>,
        servers: Vec<store::Server>,
    ) -> Result<Self> {
        packages::require(&[Program::Qemu, Program::MakeExt4, Program::Ip])?;
        let qemu = tool::find(Program::Qemu.name()).context("QEMU was just installed")?;
        let alioth = packages::from_crates(cache, "alioth-cli", ALIOTH)?.join("alioth");
        let nixvmm = match env::var_os("NIXVMM_PROGRAM") {
            Some(path) => PathBuf::from(path),
            None => program::build_static("nixvmm", "nixvmm", "release")?,
        };
        let guest = program::build_static("tests", "benchmark-guest", "test-guest")?;
        let kernel = Kernel::fetch(cache)?;
        let vmlinux = vmlinux(cache, &kernel, &nixvmm)?;
        let lists = [("modules/order", &MODULES[..]), ("modules/network", &NETWORK_MODULES)];
        let initrd = initramfs(cache, &kernel, &guest, &lists)?;
        let further = [&lists[..], &[("modules/further", &FURTHER_MODULES)]].concat();
        let initrd_of_devices = initramfs(cache, &kernel, &guest, &further)?;
        let busybox = packages::busybox(cache)?;
        let store = topics.contains(&Topic::Store).then(|| store::Store::prepare(cache, &nixvmm));
        let store = store.transpose()?;
        let programs = Programs { nixvmm, qemu, alioth };
        let (bzimage, results) = (kernel.image, PathBuf::new());
        Ok(Self {
            programs,
            bzimage,
            vmlinux,
            initrd,
            initrd_of_devices,
            busybox,
            store,
            topics,
            vmms,
            links,
            servers,
            results,
        })
    }
}

impl Figures {
    /// Adds what `runs` gave.
    pub fn add(&mut self, row: &str, vmm: Vmm, unit: &str, mut runs: Vec<f64>) -> &mut Figure {
        let taken = runs.clone();
        runs.sort_by(f64::total_cmp);
        let value = runs.get(runs.len() / 2).copied().unwrap_or(f64::NAN);
        let (row, unit) = (row.to_owned(), unit.to_owned());
        let figure = Figure { row, vmm, unit, value, runs: taken, parts: BTreeMap::new() };
        self.figures.push(figure);
        let last = self.figures.len() - 1;
        &mut self.figures[last]
    }

    /// The value of `row` for `vmm`.
    pub fn value(&self, row: &str, vmm: Vmm) -> Option<f64> {
        let mut found = self.figures.iter().filter(|figure| figure.row == row);
        found.find(|figure| figure.vmm == vmm).map(|figure| figure.value)
    }

    /// Notes why `what` was not measured, or not to its end, where it was not.
    pub fn note_failure(&mut self, what: &str, measured: Result<()>) {
        if let Err(error) = measured {
            self.notes.push(format!("{what}: {error:#}"));
        }
    }

    /// Writes them to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Adds those in `path`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let read: Self = serde_json::from_str(&text)?;
        self.figures.extend(read.figures);
        self.notes.extend(read.notes);
        Ok(())
    }
}

fn vmlinux(cache: &Cache, kernel: &Kernel, nixvmm: &Path) -> Result<PathBuf> {
    let folder = cache.entry("vmlinux", &[kernel.release.as_bytes()], |folder| {
        let mut unpack = tool::command(&nixvmm.to_string_lossy());
        unpack.arg("unpack-kernel").arg(&kernel.image).arg(folder.join("vmlinux"));
        tool::finish(&mut unpack).map(drop)
    })?;
    Ok(folder.join("vmlinux"))
}

/// The guest's program, and modules by lists of what they are for.
fn initramfs(
    cache: &Cache,
    kernel: &Kernel,
    guest: &Path,
    lists: &[(&str, &[&str])],
) -> Result<PathBuf> {
    let init = fs::read(guest).with_context(|| guest.display().to_string())?;
    let names = format!("{lists:?}");
    let inputs = [kernel.release.as_bytes(), &init, names.as_bytes()];
    let folder = cache.entry("benchmark-guest", &inputs, |folder| {
        let mut archive = Archive::new();
        archive.program("init", &init);
        archive.folder("modules");
        let mut seen = Vec::new();
        for (list, names) in lists {
            let mut order = String::new();
            for module in kernel.load_order(names)? {
                if seen.contains(&module.name) {
                    continue;
                }
                let path = format!("modules/{}.ko", module.name);
                archive.file(&path, &module.content);
                order += &format!("/{path}\n");
                seen.push(module.name);
            }
            archive.file(list, order.as_bytes());
        }
        Ok(fs::write(folder.join("initramfs"), archive.finish())?)
    })?;
    Ok(folder.join("initramfs"))
}
