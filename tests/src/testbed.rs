//! What does a test boot? Everything that is fetched or built, as paths: made once before the first
//! guest, and handed as a file to the process that runs the tests in the emulated host.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::emulated_host::{EmulatedHost, Job};
use crate::kernel::Kernel;
use crate::nixos_guest::NixosGuest;
use crate::packages::{self, Program};
use crate::{program, ssh_server, tiny_guest, tool};

/// Names the file with the prepared testbed, for a process in the emulated host.
pub const PREPARED: &str = "NIXVMM_TESTBED_PREPARED";

/// What tests run in the host.
const NEEDED: [Program; 4] =
    [Program::MakeExt4, Program::Ip, Program::Virtiofsd, Program::SecureShell];

/// Bytes of the largest block of a disk.
const BLOCK: usize = 4096;

/// All that guests are made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Testbed {
    /// The built `nixvmm`.
    pub program: PathBuf,
    /// Either end of a connection, of as many bytes as a disk may have.
    pub stream_end: PathBuf,
    /// A load on the files of a folder.
    pub file_load: PathBuf,
    /// Debian's kernel as it is shipped.
    pub bzimage: PathBuf,
    /// The ELF inside it, taken out by `nixvmm unpack-kernel`.
    pub vmlinux: PathBuf,
    /// The tiny guest's initramfs.
    pub tiny: PathBuf,
    /// The NixOS-shaped guest.
    pub nixos: NixosGuest,
    /// A folder with a `passt` that speaks vhost-user.
    pub passt: PathBuf,
    /// A folder with a `virtiofsd` that needs no root.
    pub virtiofsd: PathBuf,
    /// A folder with systemd's proxy for `ssh` and its client of varlink.
    pub systemd: PathBuf,
    /// A disk with what `ssh` reaches in a guest.
    pub ssh_server: PathBuf,
}

impl Testbed {
    /// Fetches and builds everything, which may take minutes the first time.
    ///
    /// # Errors
    /// What could not be fetched, installed or built.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        packages::require(&NEEDED)?;
        let kernel = Kernel::fetch(cache)?;
        let program = program::build()?;
        let stream_end = as_disk(cache, "stream-end")?;
        let file_load = program::build_static("tests", "file-load", "test-guest")?;
        let vmlinux = cache.root().join(format!("vmlinux-{}", kernel.release));
        let unpack = [Path::new("unpack-kernel"), &kernel.image, &vmlinux];
        let _ = fs::remove_file(&vmlinux);
        tool::finish(tool::command(&program.to_string_lossy()).args(unpack))
            .context("the kernel's ELF cannot be unpacked")?;
        let tiny = tiny_guest::initramfs(cache, &kernel)?;
        let nixos = NixosGuest::prepare(cache, &kernel)?;
        let passt = packages::passt(cache)?;
        let virtiofsd = packages::virtiofsd(cache)?;
        let systemd = packages::systemd(cache)?;
        let ssh_server = ssh_server::disk(cache, &systemd)?;
        let bzimage = kernel.image;
        Ok(Self {
            program,
            stream_end,
            file_load,
            bzimage,
            vmlinux,
            tiny,
            nixos,
            passt,
            virtiofsd,
            systemd,
            ssh_server,
        })
    }

    /// Runs this program again in an emulated host, with `arguments`, and returns its exit status.
    /// It finds this testbed in the file that [`PREPARED`] names. `environment`, `interactive` and
    /// `limit` are a [`Job`]'s.
    ///
    /// # Errors
    /// When the emulated host cannot be prepared or does not come to an end.
    pub fn run_again(
        &self,
        cache: &Cache,
        arguments: &[String],
        environment: Vec<(&str, String)>,
        interactive: bool,
        limit: Duration,
    ) -> Result<ExitCode> {
        let host = EmulatedHost::prepare(cache)?;
        let folder = tempfile::tempdir_in(cache.root())?;
        let prepared = folder.path().join("testbed.json");
        self.save(&prepared)?;
        let own = env::current_exe()?.canonicalize()?;
        let mut command = vec![own.to_str().context("a path that is no UTF-8")?.to_owned()];
        command.extend_from_slice(arguments);
        let mut environment = environment;
        environment.push((PREPARED, prepared.display().to_string()));
        host.run(&Job { command, environment, interactive, limit })
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read or is not of this version.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }
}

/// Builds a program for guests, which may have it as a disk: its length is a multiple of every
/// block size.
fn as_disk(cache: &Cache, name: &str) -> Result<PathBuf> {
    let mut content = fs::read(program::build_static("tests", name, "test-guest")?)?;
    content.resize(content.len().next_multiple_of(BLOCK), 0);
    let folder = cache.entry(name, &[&content], |folder| {
        let path = folder.join(name);
        fs::write(&path, &content)?;
        Ok(fs::set_permissions(path, Permissions::from_mode(0o755))?)
    })?;
    Ok(folder.join(name))
}
