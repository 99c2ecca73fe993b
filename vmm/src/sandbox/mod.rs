//! The sandbox: what a thread gives up before a guest runs.
//!
//! Each thread confines itself when everything that it needs is open: capabilities are dropped,
//! landlock lets it open no file, and seccomp leaves it the system calls of its kind. The process
//! ends at the first call that is not among them.
#![expect(unsafe_code, reason = "signal handlers and signal masks")]

mod allocator;
mod capabilities;
mod filter;
mod names;
mod paths;
mod requests;
mod system_calls;
mod violation;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use seccompiler::{BpfProgram, apply_filter, apply_filter_all_threads};

use self::paths::Paths;
pub use self::violation::{LastWords, set_last_words};
use crate::config::{Config, Console};

/// The kinds of thread, each with its own system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main loop: console, entropy and signals; builds and restarts the machine.
    Main,
    /// A virtual processor.
    Vcpu,
    /// The worker of a disk.
    Block,
    /// A worker of a network card.
    Net,
    /// The worker of a socket device.
    Vsock,
    /// Who speaks to a vhost-user process, or watches the time meanwhile.
    VhostUser,
    /// Any thread of the process that serves a store.
    StoreServer,
}

impl ThreadKind {
    /// All of a machine.
    const ALL: [Self; 6] =
        [Self::Main, Self::Vcpu, Self::Block, Self::Net, Self::Vsock, Self::VhostUser];

    /// Its name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Block => "block",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::VhostUser => "vhost-user",
            Self::StoreServer => "store-server",
        }
    }
}

/// The sandbox of a machine; clones are the same.
#[derive(Clone)]
pub struct Sandbox(Option<Arc<Rules>>);

struct Rules {
    /// In the order of [`ThreadKind::ALL`].
    filters: Vec<BpfProgram>,
    removed: Vec<PathBuf>,
}

impl Sandbox {
    /// Compiles the rules, and gives up what threads would inherit. Call it before there is a
    /// second thread. Without a sandbox in `config` this and everything else does nothing.
    ///
    /// # Errors
    ///
    /// A kernel without seccomp filters, or one that refuses.
    pub fn prepare(config: &Config) -> Result<Self> {
        if !config.sandbox {
            log::warn!("--sandbox off: nothing stands between this process and the host");
            return Ok(Self(None));
        }
        let filters = ThreadKind::ALL.into_iter().map(filter::compile).collect::<Result<_>>()?;
        let rules = Rules { filters, removed: removed_at_end(config) };
        allocator::share_one_heap();
        violation::handle()?;
        capabilities::give_up_inheritance()?;
        Ok(Self(Some(Arc::new(rules))))
    }

    /// Confines the calling thread for good; it must have what it needs.
    ///
    /// # Errors
    ///
    /// The kernel refuses: the thread must not go on.
    pub fn enter_thread(&self, kind: ThreadKind) -> Result<()> {
        let Some(rules) = &self.0 else { return Ok(()) };
        block_signals().context("cannot block signals")?;
        rules.confine(kind, &[])
    }

    /// Confines the main thread and closes the process, when every other thread has been started.
    ///
    /// # Errors
    ///
    /// As for [`Sandbox::enter_thread`].
    pub fn enter_process(&self) -> Result<()> {
        let Some(rules) = &self.0 else { return Ok(()) };
        capabilities::close_process()?;
        rules.confine(ThreadKind::Main, &rules.removed)
    }
}

/// The sandbox of a process that serves a store, half closed.
pub(crate) struct StoreSandbox(BpfProgram);

impl StoreSandbox {
    /// Leaves this thread, and those that it makes, only the files below `store`, to be read. Call
    /// it before there is a second thread. Who may changes the root to it as well.
    pub(crate) fn enter(store: &Path) -> Result<Self> {
        let program = filter::compile(ThreadKind::StoreServer)?;
        allocator::share_one_heap();
        violation::handle()?;
        violation::name_thread(ThreadKind::StoreServer);
        capabilities::give_up_inheritance()?;
        capabilities::close_process()?;
        let paths = Paths::reading(store)?;
        paths::make_root(store)?;
        paths.enter()?;
        capabilities::give_up()?;
        Ok(Self(program))
    }

    /// Leaves all threads the system calls that serving takes.
    pub(crate) fn close(self) -> Result<()> {
        apply_filter_all_threads(&self.0)
            .context("cannot confine the threads of the store's server")
    }
}

impl Rules {
    fn confine(&self, kind: ThreadKind, removed: &[PathBuf]) -> Result<()> {
        let context = || format!("cannot confine a thread of kind {}", kind.name());
        violation::name_thread(kind);
        Paths::new(removed).and_then(Paths::enter).with_context(context)?;
        capabilities::give_up().with_context(context)?;
        let filter = self.filters.get(kind as usize).with_context(context)?;
        apply_filter(filter).with_context(context)
    }
}

/// Names that the machine makes and takes away.
fn removed_at_end(config: &Config) -> Vec<PathBuf> {
    let consoles = [&config.console, &config.serial]
        .into_iter()
        .filter(|console| matches!(console, Console::Pty { .. } | Console::Socket { .. }))
        .filter_map(|console| console.path().map(PathBuf::from));
    let vsock = config.vsock.as_ref().and_then(|vsock| vsock.socket.clone());
    consoles.chain(vsock).chain(config.control.clone()).collect()
}

/// Leaves the signals of people and other processes to the main thread. Real-time signals kick
/// processors, and those of faults are the thread's own.
fn block_signals() -> std::io::Result<()> {
    // SAFETY: all zeroes is a signal set, which is filled below.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `signals` is a signal set, and the numbers are signals.
    let error = unsafe {
        libc::sigemptyset(&raw mut signals);
        for signal in [
            libc::SIGHUP,
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGTERM,
            libc::SIGTSTP,
            libc::SIGCONT,
            libc::SIGTTIN,
            libc::SIGTTOU,
            libc::SIGPIPE,
            libc::SIGALRM,
            libc::SIGCHLD,
            libc::SIGUSR1,
            libc::SIGUSR2,
            libc::SIGWINCH,
        ] {
            libc::sigaddset(&raw mut signals, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut())
    };
    match error {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod test;
