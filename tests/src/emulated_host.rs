//! Where do guests run on a machine without usable KVM? In an emulated host: QEMU emulates a
//! machine with AMD's virtualisation, Debian's kernel there has a real `/dev/kvm`, and its root is
//! this machine's file system, so that a program's path is valid inside as it is outside.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use std::{env, io};

use anyhow::{Context, Result, bail};
use rustix::process::geteuid;

use crate::archive::{self, Archive};
use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::packages::{self, Program};
use crate::tool::{self, progress};

/// More than the largest guest of the tests; what no guest touches costs nothing.
const MEMORY: &str = "7G";

/// Modules of the emulated host.
const MODULES: [&str; 13] = [
    "virtio_pci",
    "virtio_console",
    "virtiofs",
    "kvm_amd",
    "tun",
    "macvtap",
    "dummy",
    "vhost_net",
    "vhost_vsock",
    "loop",
    "erofs",
    "squashfs",
    "overlay",
];

/// What they are told. Nested virtualisation is not needed; and who waits for a guest that sleeps
/// does not spin on the only processor, which the guest's waker may need.
const MODULE_PARAMETERS: [(&str, &str); 2] = [("kvm_amd", "nested=0"), ("kvm", "halt_poll_ns=0")];

const INIT: &str = include_str!("../../resources/guest/emulated-host-init.sh");

/// Names the script that the emulated host runs, on its kernel command line.
const SCRIPT_PARAMETER: &str = "testbed.script=";

/// A host whose heart has not beaten for so long hangs: it beats every two seconds, and a busy
/// machine delays that by seconds.
const SILENCE: Duration = Duration::from_secs(90);

/// What virtiofsd may take to listen.
const VIRTIOFSD_START: Duration = Duration::from_secs(20);

/// The same where the clock counts instructions: there the job itself beats, between two steps.
const SILENCE_OF_A_STEP: Duration = Duration::from_secs(400);

/// Names the file whose time of change is the heart of a host that has [`Clock::Instructions`].
pub const HEARTBEAT: &str = "NIXVMM_TESTBED_HEARTBEAT";

/// How often the emulated host is looked at.
const POLL: Duration = Duration::from_millis(100);

/// An emulated host that can be started.
#[derive(Clone, Debug)]
pub struct EmulatedHost {
    emulator: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    runs: PathBuf,
    clock: Clock,
}

/// What moves the clock of an emulated host.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Clock {
    /// Time, as ever; one emulated processor. Two of them, emulated at once, lose translations of
    /// guests with several processors now and then: hosts side by side are the way to use cores.
    Wall,
    /// One instruction is one nanosecond, and waiting takes no time; one emulated processor.
    /// Results repeat within a few thousandths, whatever else this machine does.
    Instructions,
}

/// What runs in the emulated host, and how.
#[derive(Clone, Debug)]
pub struct Job<'a> {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Variables it gets besides this process's own.
    pub environment: Vec<(&'a str, String)>,
    /// Whether it gets this process's standard input and a terminal that it may make raw.
    pub interactive: bool,
    /// After how long the host is ended, whatever it does.
    pub limit: Duration,
}

enum End {
    Exit(u8),
    Hung(String),
}

impl EmulatedHost {
    /// Fetches and builds what the emulated host consists of.
    ///
    /// # Errors
    /// When a package is missing and cannot be installed.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        packages::require(&[Program::Virtiofsd])?;
        let emulator = packages::emulator(cache)?;
        let kernel = Kernel::fetch(cache)?;
        let busybox = packages::busybox(cache)?;
        let modules = MODULES.concat();
        let parameters = format!("{MODULE_PARAMETERS:?}");
        let inputs =
            [&kernel.release, INIT, &modules, &parameters, archive::SOURCE].map(str::as_bytes);
        let folder = cache.entry("emulated-host", &inputs, |folder| {
            let mut archive = Archive::new();
            archive.busybox(&busybox)?;
            archive.program("init", INIT.as_bytes());
            kernel.install_modules(&mut archive, &MODULES, &MODULE_PARAMETERS)?;
            Ok(fs::write(folder.join("initramfs"), archive.finish())?)
        })?;
        let runs = cache.root().join("runs");
        fs::create_dir_all(&runs)?;
        let initramfs = folder.join("initramfs");
        Ok(Self { emulator, kernel: kernel.image, initramfs, runs, clock: Clock::Wall })
    }

    /// The same host with another clock.
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// Runs `job` and returns its exit status. A host that hangs is
    /// started once more.
    ///
    /// # Errors
    /// When the host cannot be started, hangs again, hangs after a failure, or exceeds the limit.
    pub fn run(&self, job: &Job<'_>) -> Result<ExitCode> {
        match self.attempt(job)? {
            End::Exit(status) => return Ok(ExitCode::from(status)),
            End::Hung(what) => progress(&format!("{what}; it is started once more")),
        }
        match self.attempt(job)? {
            End::Exit(status) => Ok(ExitCode::from(status)),
            End::Hung(what) => bail!("{what} again"),
        }
    }

    fn attempt(&self, job: &Job<'_>) -> Result<End> {
        let run = tempfile::tempdir_in(&self.runs)?;
        let folder = run.path();
        fs::write(folder.join("script"), script(folder, job, self.clock)?)?;
        let _file_server = FileServer::start(folder)?;
        let mut host = Process(self.qemu(folder, job)?.spawn().context("QEMU cannot be started")?);
        let output = host.0.stdout.take().map(|output| thread::spawn(move || pass_on(output)));

        let start = Instant::now();
        loop {
            if let Some(status) = host.0.try_wait()? {
                let _ = output.map(thread::JoinHandle::join);
                return ended(folder, &format!("{status}"));
            }
            if start.elapsed() > job.limit {
                bail!("the emulated host exceeded its limit of {} s", job.limit.as_secs());
            }
            if silence(folder, start) > self.silence_limit() {
                return hung(folder, "the emulated host hangs");
            }
            thread::sleep(POLL);
        }
    }

    fn silence_limit(&self) -> Duration {
        match self.clock {
            Clock::Wall => SILENCE,
            Clock::Instructions => SILENCE_OF_A_STEP,
        }
    }

    fn qemu(&self, folder: &Path, job: &Job<'_>) -> Result<Command> {
        let path = |name: &str| folder.join(name).display().to_string();
        let append = format!(
            "console=ttyS0 panic=-1 mitigations=off quiet {SCRIPT_PARAMETER}{}",
            path("script")
        );
        let clock: &[&str] = match self.clock {
            Clock::Wall => &[],
            Clock::Instructions => &["-icount", "shift=0,sleep=off"],
        };
        let mut command = tied_to_this_process(&self.emulator);
        command
            .args(["-machine", "q35", "-cpu", "EPYC,+svm,+npt", "-smp", "1"])
            .args(["-accel", "tcg,thread=single"])
            .args(clock)
            .args(["-m", MEMORY, "-numa", "node,memdev=ram", "-object"])
            .arg(format!("memory-backend-memfd,id=ram,size={MEMORY},share=on"))
            .args(["-device", "vhost-user-fs-pci,chardev=fs,tag=hostroot", "-chardev"])
            .arg(format!("socket,id=fs,path={}", path("fs.socket")))
            .args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"])
            .args(["-chardev", "stdio,id=out,signal=off"])
            .args(["-serial", &format!("file:{}", path("log"))])
            .args(["-display", "none", "-monitor", "none", "-net", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", &append]);
        command.stderr(File::create(folder.join("qemu.log"))?);
        if !job.interactive {
            command.stdin(Stdio::null()).stdout(Stdio::piped());
        }
        Ok(command)
    }
}

/// Whether KVM here runs an unmodified 64-bit kernel: the device opens, and the processor says that
/// it virtualises. `NIXVMM_TESTBED=direct|emulated` decides otherwise.
pub fn is_needed() -> bool {
    match env::var("NIXVMM_TESTBED").as_deref() {
        Ok("direct") => return false,
        Ok("emulated") => return true,
        _ => {}
    }
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualises = processor
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split(' ').any(|flag| flag == "svm" || flag == "vmx"));
    let opens = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    !(virtualises && opens)
}

/// Whether this process runs in an emulated host.
pub fn is_inside() -> bool {
    fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains(SCRIPT_PARAMETER))
}

/// The script that runs in the emulated host as its first process. The job's terminal is the virtio
/// console, its exit status and the host's heartbeat are files.
fn script(folder: &Path, job: &Job<'_>, clock: Clock) -> Result<String> {
    let run = quoted(&folder.display().to_string());
    let mut text = String::from("#!/bin/sh\n");
    let own = env::vars().filter(|(name, _)| name != "TMPDIR");
    let further = job.environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
    for (name, value) in own.chain(further).filter(|(name, _)| is_name(name)) {
        text += &format!("export {name}={}\n", quoted(&value));
    }
    let terminal = match job.interactive {
        true => terminal_size().map_or(String::new(), |(rows, columns)| {
            format!("stty -F /dev/hvc0 rows {rows} cols {columns}\n")
        }),
        false => "stty -F /dev/hvc0 raw -echo\n".to_owned(),
    };
    text += &terminal;
    text += &format!("cd {}\n", quoted(&env::current_dir()?.display().to_string()));
    // Guests larger than the emulated host are sparse.
    text += "echo 1 > /proc/sys/vm/overcommit_memory\n";
    text += "mkdir -p /run/testbed\nexport TMPDIR=/run/testbed\n";
    text += &match clock {
        Clock::Wall => format!("while date > {run}/heartbeat; do sleep 2; done &\n"),
        Clock::Instructions => format!("export {HEARTBEAT}={run}/heartbeat\n"),
    };
    let command: Vec<String> = job.command.iter().map(|word| quoted(word)).collect();
    text += &format!(
        "setsid --ctty --wait {} < /dev/hvc0 > /dev/hvc0 2>&1\necho $? > {run}/status\n",
        command.join(" ")
    );
    // What was written to the console must have left before the machine does.
    text += "sync\nstty -F /dev/hvc0 -echo\nsleep 0.2\necho o > /proc/sysrq-trigger\nsleep 60\n";
    Ok(text)
}

/// Writes what the job says line by line, so that hosts side by side do not break each other's.
fn pass_on(output: impl Read) {
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        // Whoever read this has gone: the exit status still tells.
        let _ = io::stdout().lock().write_all(&line);
        line.clear();
    }
    let _ = io::stdout().flush();
}

fn ended(folder: &Path, how: &str) -> Result<End> {
    match fs::read_to_string(folder.join("status")) {
        Ok(status) => Ok(End::Exit(status.trim().parse().context("the exit status is no number")?)),
        Err(_) => hung(folder, &format!("the emulated host ended early ({how})")),
    }
}

fn hung(folder: &Path, what: &str) -> Result<End> {
    let logs = ["qemu.log", "virtiofsd.log", "log"];
    let tails = logs.map(|name| tool::tail(&fs::read(folder.join(name)).unwrap_or_default(), 1500));
    Ok(End::Hung(format!("{what}; its logs end:\n{}\n", tails.join("\n"))))
}

fn silence(folder: &Path, start: Instant) -> Duration {
    let beaten = folder.join("heartbeat").metadata().and_then(|found| found.modified());
    let since = |beat| SystemTime::now().duration_since(beat).unwrap_or_default();
    beaten.map_or_else(|_| start.elapsed(), since)
}

fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_row > 0).then_some((size.ws_row, size.ws_col))
}

fn is_name(name: &str) -> bool {
    !name.starts_with(|first: char| first.is_ascii_digit())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Shares the whole file system with the emulated host until it is dropped.
struct FileServer {
    _process: Process,
}

impl FileServer {
    fn start(folder: &Path) -> Result<Self> {
        let socket = folder.join("fs.socket");
        let log = File::create(folder.join("virtiofsd.log"))?;
        let mut command = virtiofsd();
        command.arg(format!("--socket-path={}", socket.display()));
        command.args(shared_folder(Path::new("/")));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = Process(command.spawn().context("virtiofsd cannot be started")?);

        let start = Instant::now();
        while !socket.exists() {
            if start.elapsed() > VIRTIOFSD_START {
                let said = fs::read(folder.join("virtiofsd.log")).unwrap_or_default();
                bail!("virtiofsd does not listen:\n{}", tool::tail(&said, 1000));
            }
            thread::sleep(POLL);
        }
        Ok(Self { _process: process })
    }
}

/// What makes a virtiofsd serve `folder`, whichever of the two programs of that name it is.
pub fn shared_folder(folder: &Path) -> Vec<String> {
    let folder = folder.display();
    match is_own_project() {
        true => {
            let source = format!("--shared-dir={folder}");
            vec!["--sandbox=chroot".to_owned(), "--cache=auto".to_owned(), source]
        }
        false => vec!["-o".to_owned(), format!("sandbox=chroot,cache=auto,source={folder}")],
    }
}

/// Virtiofsd wants to be root, if only in a user namespace where this user is.
fn virtiofsd() -> Command {
    let program = tool::find(Program::Virtiofsd.name()).unwrap_or_default();
    if geteuid().is_root() {
        return tied_to_this_process(&program);
    }
    let mut command = tool::command("unshare");
    command.args(["--map-root-user", "--"]);
    command.arg(program);
    command
}

/// A command that the kernel kills when this process was killed, and could not do it itself.
fn tied_to_this_process(program: &Path) -> Command {
    let mut command = tool::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(program);
    command
}

/// QEMU's own virtiofsd takes other arguments than its successor.
fn is_own_project() -> bool {
    tool::find(Program::Virtiofsd.name()).is_some_and(|path| !path.starts_with("/usr/lib/qemu"))
}

/// A process that does not outlive its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
