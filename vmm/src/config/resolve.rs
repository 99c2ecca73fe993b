//! From what the user wrote to a machine that can be built, or to the reason why it cannot.

use anyhow::{Context as _, Result, bail, ensure};
use arch::target::layout;

use super::files::{self, Access};
use super::{ByteSize, Config, Console, Disk, Net, NetLink, Ready, root};

/// Most processors: xAPIC ids are 8 bits wide and 255 addresses all of them at once.
pub const MAX_CPUS: u32 = 254;

/// Least RAM: below it no kernel of today finds room to unpack itself.
pub const MIN_MEMORY: ByteSize = ByteSize(16 << 20);

/// Where systemd in a guest reads what to tell that it has started.
pub(crate) const NOTIFY_SOCKET_CREDENTIAL: &str = "vmm.notify_socket";

/// RAM comes in pages.
const PAGE_BYTES: u64 = 4096;

/// Longest disk serial (virtio 1.3, 5.2.6.1: VIRTIO_BLK_T_GET_ID).
pub const MAX_SERIAL_BYTES: usize = 20;

/// Most OEM strings: their count in SMBIOS type 11 is one byte.
const MAX_OEM_STRINGS: usize = 255;

/// Longest OEM strings together: an SMBIOS structure table of 64 KiB holds them and the rest.
const MAX_OEM_BYTES: usize = 60 << 10;

impl Config {
    /// Checks everything that can be known before the machine is built, makes paths absolute, turns
    /// `root` into the first disk and completes the kernel command line.
    ///
    /// A resolved machine resolves to itself.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with its flag, its value and the remedy.
    pub fn resolve(mut self) -> Result<Self> {
        self.resolve_boot_files()?;
        self.check_command_line()?;
        self.resolve_root()?;
        self.resolve_disks()?;
        self.resolve_pmems()?;
        self.resolve_nets()?;
        self.resolve_shares()?;
        self.resolve_store_share()?;
        self.resolve_vsock()?;
        self.share_memory();
        self.check_processors_and_memory()?;
        self.resolve_consoles()?;
        self.resolve_control()?;
        self.resolve_machined()?;
        self.resolve_credentials()?;
        self.check_smbios()?;
        self.check_readiness()?;
        self.name_console();
        self.name_growth();
        Ok(self)
    }

    fn resolve_boot_files(&mut self) -> Result<()> {
        if self.kernel.as_os_str().is_empty() {
            bail!("no kernel: give --kernel FILE, a bzImage or an ELF vmlinux");
        }
        files::resolve_regular("--kernel", &mut self.kernel)?;
        self.initrd.as_mut().map_or(Ok(()), |path| files::resolve_regular("--initrd", path))
    }

    fn resolve_root(&mut self) -> Result<()> {
        let Some(mut path) = self.root.take() else { return Ok(()) };
        files::resolve_image("--root", &mut path, Access::Read)?;
        let file_system =
            root::file_system(&path).with_context(|| format!("--root {}", path.display()))?;
        if self.initrd.is_none() {
            root::mount(&mut self.cmdline, file_system);
        }
        let serial = Some(root::SERIAL.to_owned());
        self.disks.insert(0, Disk { readonly: true, serial, ..Disk::new(path) });
        Ok(())
    }

    fn resolve_disks(&mut self) -> Result<()> {
        let mut seen = Vec::<(files::Identity, &Disk)>::new();
        for disk in &mut self.disks {
            let access = if disk.readonly { Access::Read } else { Access::ReadWrite };
            let identity = files::resolve_image("--disk", &mut disk.path, access)?;
            let path = disk.path.display();
            check_serial(disk).with_context(|| format!("--disk {path}"))?;
            for (other_identity, other) in &seen {
                ensure!(
                    identity != *other_identity || (disk.readonly && other.readonly),
                    "--disk {path}: a writable disk is given twice, also as {}: \
                     give it once, or readonly each time",
                    other.path.display(),
                );
                ensure!(
                    disk.serial.is_none() || disk.serial != other.serial,
                    "--disk {path}: serial \"{}\" is also that of {}: each disk needs its own",
                    disk.serial.as_deref().unwrap_or_default(),
                    other.path.display(),
                );
            }
            seen.push((identity, disk));
        }
        Ok(())
    }

    fn resolve_pmems(&mut self) -> Result<()> {
        for pmem in &mut self.pmems {
            let access = if pmem.readonly { Access::Read } else { Access::ReadWrite };
            files::resolve_image("--pmem", &mut pmem.file, access)?;
        }
        Ok(())
    }

    /// A process that serves a device needs to see the guest's memory.
    fn share_memory(&mut self) {
        let is_served = |net: &Net| matches!(net.link, NetLink::User | NetLink::VhostUser(_));
        let has_shares = !self.shares.is_empty() || self.store_share.is_some();
        self.memory.shared |= self.nets.iter().any(is_served) || has_shares;
    }

    fn check_processors_and_memory(&self) -> Result<()> {
        ensure!(
            (1..=MAX_CPUS).contains(&self.cpus),
            "--cpus {}: a machine has 1 to {MAX_CPUS} processors",
            self.cpus,
        );
        let size = self.memory.size;
        ensure!(size >= MIN_MEMORY, "--memory {size}: too little, give at least {MIN_MEMORY}");
        let page = self.memory.hugepages.map_or(PAGE_BYTES, |pages| pages.bytes());
        ensure!(
            size.0.is_multiple_of(page),
            "--memory {size}: not a multiple of its pages of {}, the next larger size is {}",
            ByteSize(page),
            ByteSize(size.0.checked_next_multiple_of(page).unwrap_or(u64::MAX - page + 1)),
        );
        let super::Memory { shared, hugepages, mergeable, .. } = self.memory;
        ensure!(
            !mergeable || !shared && hugepages.is_none(),
            "--memory mergeable: the host merges neither huge pages nor memory that other \
             processes map, as those do that serve shares and networks: leave it out",
        );
        self.check_growth()
    }

    /// Memory grows by what both the kernel and the pages of the host can be added in.
    fn check_growth(&self) -> Result<()> {
        let Some(max) = self.memory.max else { return Ok(()) };
        let size = self.memory.size;
        ensure!(max >= size, "--memory max={max}: less than size={size}");
        let page = self.memory.hugepages.map_or(PAGE_BYTES, |pages| pages.bytes());
        let unit = page.max(layout::ELASTIC_GRANULE);
        let growth = max.0 - size.0;
        ensure!(
            growth.is_multiple_of(unit),
            "--memory max={max}: {} more than size={size}, and memory grows by multiples of {}",
            ByteSize(growth),
            ByteSize(unit),
        );
        Ok(())
    }

    /// The kernel shall use memory that comes at run time, unless it is told how: where enough
    /// memory of the other kind is there, as memory that can go again.
    fn name_growth(&mut self) {
        let grows = self.memory.max.is_some_and(|max| max > self.memory.size);
        if grows && !root::has_parameter(&self.cmdline, "memhp_default_state") {
            let policy = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";
            root::append(&mut self.cmdline, policy);
        }
    }

    fn resolve_consoles(&mut self) -> Result<()> {
        for (flag, console) in [("--console", &mut self.console), ("--serial", &mut self.serial)] {
            match console {
                Console::Off | Console::Stdio | Console::Pty { link: None } => {}
                Console::Pty { link: Some(link) } => files::resolve_link(flag, link)?,
                Console::File { path } => files::resolve_output(flag, path)?,
                Console::Socket { path } => files::resolve_socket(flag, path)?,
            }
        }
        let taken = match (&self.console, &self.serial) {
            (Console::Stdio, Console::Stdio) => "standard input and output".to_owned(),
            (one, other) => match (one.path(), other.path()) {
                (Some(one), Some(other)) if one == other => one.display().to_string(),
                _ => return Ok(()),
            },
        };
        bail!("--serial: {taken} is already the place of --console: give one of them another")
    }

    fn resolve_control(&mut self) -> Result<()> {
        let Some(path) = &mut self.control else { return Ok(()) };
        files::resolve_socket("--control", path)?;
        ensure!(
            ![&self.console, &self.serial].iter().any(|console| console.path() == Some(path)),
            "--control: {} is already the place of a console: give one of them another",
            path.display(),
        );
        Ok(())
    }

    fn check_smbios(&self) -> Result<()> {
        let strings = self.oem_strings()?;
        ensure!(
            strings.len() <= MAX_OEM_STRINGS,
            "--oem-string and --credential: {} strings, and SMBIOS has room for {MAX_OEM_STRINGS}",
            strings.len(),
        );
        for string in &strings {
            ensure!(
                !string.is_empty() && !string.contains('\0'),
                "--oem-string \"{}\": SMBIOS can hold no empty string and none with a NUL",
                string.escape_default(),
            );
        }
        let bytes: usize = strings.iter().map(String::len).sum();
        ensure!(
            bytes <= MAX_OEM_BYTES,
            "--oem-string and --credential: {bytes} bytes together, and SMBIOS has room for \
             {MAX_OEM_BYTES}: give large data by a disk",
        );
        Ok(())
    }

    fn check_readiness(&self) -> Result<()> {
        let when = match self.ready {
            Ready::Started => return Ok(()),
            Ready::Booted => "booted",
            Ready::Reachable => "reachable",
        };
        ensure!(
            self.vsock.is_some(),
            "--ready {when}: the guest tells over vsock: add --vsock auto or --vsock socket=PATH",
        );
        ensure!(
            !self.has_credential(NOTIFY_SOCKET_CREDENTIAL),
            "--ready {when}: the credential {NOTIFY_SOCKET_CREDENTIAL} is given already, so that \
             the guest would tell somebody else: leave it out",
        );
        Ok(())
    }

    fn check_command_line(&self) -> Result<()> {
        ensure!(
            !self.cmdline.contains(|letter: char| letter.is_ascii_control()),
            "--cmdline \"{}\": a kernel command line has no control characters",
            self.cmdline.escape_default(),
        );
        ensure!(
            self.cmdline.matches('"').count().is_multiple_of(2),
            "--cmdline '{}': a quote is not closed",
            self.cmdline,
        );
        Ok(())
    }

    /// The kernel shall print on the console that there is, unless it is told where.
    fn name_console(&mut self) {
        if self.console != Console::Off && !root::has_parameter(&self.cmdline, "console") {
            root::append(&mut self.cmdline, "console=hvc0");
        }
    }
}

/// A serial must survive its way into a udev link (`/dev/disk/by-id/virtio-SERIAL`).
fn check_serial(disk: &Disk) -> Result<()> {
    let Some(serial) = &disk.serial else { return Ok(()) };
    ensure!(
        (1..=MAX_SERIAL_BYTES).contains(&serial.len()),
        "serial \"{serial}\": a serial has 1 to {MAX_SERIAL_BYTES} bytes",
    );
    ensure!(
        serial.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/'),
        "serial \"{}\": a serial has printable ASCII without spaces and slashes",
        serial.escape_default(),
    );
    Ok(())
}

#[cfg(test)]
mod test;
