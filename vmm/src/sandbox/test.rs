//! Sandboxes are for good, so that each test is a child process: this program runs itself again,
//! with the test `child` alone and what it shall do in the environment.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};

use super::*;
use crate::machined;

const ACTION: &str = "NIXVMM_TEST_SANDBOX";
const FOLDER: &str = "NIXVMM_TEST_SANDBOX_FOLDER";

/// What a child does on a thread of `kind`; it says `done` when it survives.
fn confined(kind: ThreadKind, action: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("run")).unwrap();
    fs::write(folder.path().join("run/socket"), "").unwrap();
    fs::write(folder.path().join("other"), "").unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::test::child", "--ignored", "--nocapture"])
        .env(ACTION, format!("{} {action}", kind.name()))
        .env(FOLDER, folder.path())
        .output()
        .unwrap()
}

#[test]
#[ignore = "only in a child process"]
fn child() {
    let Ok(order) = std::env::var(ACTION) else { return };
    let (kind, action) = order.split_once(' ').unwrap();
    let mut kinds = ThreadKind::ALL.into_iter().chain([ThreadKind::StoreServer]);
    let kind = kinds.find(|other| other.name() == kind).unwrap();
    let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
    let socket = folder.join("run/socket");
    if action == "serve a store" {
        println!("done: {}", serve_store(&folder));
        return;
    }
    if action == "open with landlock alone" {
        println!("done: {}", landlock_alone(&socket));
        return;
    }
    if kind == ThreadKind::StoreServer {
        set_last_words(LastWords { prefix: "last words: ", restore: || () });
        let (open, status) =
            (tempfile::tempfile().unwrap(), File::open("/proc/self/status").unwrap());
        StoreSandbox::enter(&folder).unwrap().close().unwrap();
        println!("done: {}", act(action, &open, &status, &socket));
        return;
    }
    let config = Config { console: Console::Socket { path: socket.clone() }, ..Config::default() };
    set_last_words(LastWords { prefix: "last words: ", restore: || () });
    let sandbox = Sandbox::prepare(&config).unwrap();
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let open = tempfile::tempfile().unwrap();
            let status = File::open("/proc/thread-self/status").unwrap();
            let conversation = machined::test::longest();
            match kind {
                ThreadKind::Main => sandbox.enter_process().unwrap(),
                kind => sandbox.enter_thread(kind).unwrap(),
            }
            if action == "register the guest" {
                conversation();
                return "registered".to_owned();
            }
            act(action, &open, &status, &socket)
        });
        thread.join().unwrap()
    });
    println!("done: {outcome}");
}

fn act(action: &str, mut open: &File, mut status: &File, socket: &Path) -> String {
    match action {
        "getppid" => {
            // SAFETY: this call has no arguments.
            unsafe { libc::syscall(libc::SYS_getppid) }.to_string()
        }
        "open" => format!("{:?}", File::open("/etc/hostname").map(|_| ())),
        "execute" => format!("{:?}", Command::new("/bin/true").status()),
        "make executable memory" => {
            let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: new memory at an address of the kernel's choice.
            let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, all, kind, -1, 0) };
            format!("{memory:?}")
        }
        "signal another process" => {
            // SAFETY: signal 0 is never delivered.
            unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) }.to_string()
        }
        "touch memory that is not there" => {
            let nowhere = std::ptr::without_provenance::<u8>(0x1000);
            // SAFETY: none; the first page is never mapped, and the access ends the process.
            unsafe { nowhere.read_volatile() }.to_string()
        }
        "other request" => {
            // SAFETY: a request without argument, that no file here knows.
            unsafe { libc::ioctl(0, 0xae99) }.to_string()
        }
        "work" => {
            open.write_all(b"text").unwrap();
            let mut memory = vec![0; 1 << 20];
            assert_eq!(open.read(&mut memory).unwrap(), 0);
            let map = std::collections::HashMap::from([(1, memory)]);
            std::thread::yield_now();
            std::thread::sleep(std::time::Duration::from_millis(1));
            format!("{}", map.len())
        }
        "remove" => format!("{:?}", fs::remove_file(socket)),
        "privileges" => {
            let mut text = [0; 4096];
            let length = status.read(&mut text).unwrap();
            let text = std::str::from_utf8(&text[..length]).unwrap();
            let lines = text.lines().filter(|line| {
                ["Cap", "NoNewPrivs", "Seccomp:"].iter().any(|name| line.starts_with(name))
            });
            lines.map(|line| line.replace('\t', " ")).collect::<Vec<_>>().join(", ")
        }
        other => panic!("{other}"),
    }
}

/// What the server of a store finds in `folder`, its store, and beside it.
fn serve_store(folder: &Path) -> String {
    use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

    let (root, proc) = (File::open(folder).unwrap(), File::open("/proc").unwrap());
    StoreSandbox::enter(folder).unwrap().close().unwrap();
    let open = |at: &File, path: &str, flags| {
        openat2(at, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map(drop)
    };
    let read = open(&root, "other", OFlags::RDONLY);
    let written = open(&root, "other", OFlags::WRONLY);
    let beside = open(&proc, "uptime", OFlags::RDONLY);
    let path = folder.join("other");
    let asked = statx(&root, &path, AtFlags::empty(), StatxFlags::BASIC_STATS).map(drop);
    format!("{read:?}, {written:?}, {beside:?}, {asked:?}")
}

/// What landlock lets through without seccomp before it.
fn landlock_alone(socket: &Path) -> String {
    Paths::new(&[socket.into()]).unwrap().enter().unwrap();
    let errors = [
        File::open("/etc/passwd").map(drop),
        File::open(socket).map(drop),
        File::create(socket.with_file_name("new")).map(drop),
        fs::remove_file(socket.with_file_name("../other")),
        fs::remove_file(socket),
    ];
    let kinds = errors.map(|error| error.err().map(|error| error.kind()));
    format!("{kinds:?}")
}

#[track_caller]
fn killed(kind: ThreadKind, action: &str, call: &str) {
    let output = confined(kind, action);
    let errors = String::from_utf8_lossy(&output.stderr);
    let expected = format!("({call}) on a thread of kind {}", kind.name());
    assert!(
        errors.contains("last words: the sandbox refuses system call ")
            && errors.contains(&expected),
        "{kind:?} {action}: {errors}"
    );
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{kind:?} {action}");
}

#[track_caller]
fn survives(kind: ThreadKind, action: &str, expected: &str) {
    let output = confined(kind, action);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(&format!("done: {expected}\n")),
        "{kind:?} {action}: {text} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{kind:?} {action}");
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named_whatever_thread_makes_it() {
    for kind in ThreadKind::ALL {
        killed(kind, "getppid", "getppid");
        killed(kind, "open", "openat");
        killed(kind, "make executable memory", "mmap");
        killed(kind, "signal another process", "tgkill");
        killed(kind, "other request", "ioctl 0xae99");
    }
}

#[test]
fn a_wrong_access_is_named_and_ends_the_process_as_what_it_is() {
    for kind in ThreadKind::ALL {
        let output = confined(kind, "touch memory that is not there");
        let errors = String::from_utf8_lossy(&output.stderr);
        let expected =
            format!("last words: no access to 0x1000 on a thread of kind {}", kind.name());
        assert!(errors.contains(&expected), "{errors}");
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{kind:?}");
    }
}

#[test]
fn no_thread_starts_a_program() {
    for kind in ThreadKind::ALL {
        let output = confined(kind, "execute");
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{kind:?}");
    }
}

#[test]
fn a_confined_thread_works_and_has_no_privilege() {
    for kind in ThreadKind::ALL {
        survives(kind, "work", "1");
        let none = "0000000000000000";
        // The bounding set stays with a user who has no privilege to give up.
        let bounding =
            if rustix::process::geteuid().is_root() { none.to_owned() } else { own_bounding_set() };
        survives(
            kind,
            "privileges",
            &format!(
                "CapInh: {none}, CapPrm: {none}, CapEff: {none}, CapBnd: {bounding}, \
                 CapAmb: {none}, NoNewPrivs: 1, Seccomp: 2"
            ),
        );
    }
}

fn own_bounding_set() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    status.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap().to_owned()
}

#[test]
fn the_main_thread_removes_the_names_that_it_made_and_no_other() {
    survives(ThreadKind::Main, "remove", "Ok(())");
    killed(ThreadKind::Vcpu, "remove", "unlink");
}

#[test]
fn landlock_refuses_every_file_and_lets_names_be_removed() {
    let denied = "Some(PermissionDenied)";
    survives(
        ThreadKind::Main,
        "open with landlock alone",
        &format!("[{denied}, {denied}, {denied}, {denied}, None]"),
    );
}

#[test]
fn the_server_of_a_store_reads_it_and_nothing_else() {
    // Without the right to have another root it can ask about other files.
    let asked = if rustix::process::geteuid().is_root() { "Err(Os { code: 2" } else { "Ok(())" };
    let output = confined(ThreadKind::StoreServer, "serve a store");
    let text = String::from_utf8_lossy(&output.stdout);
    let denied = "Err(Os { code: 13, kind: PermissionDenied, message: \"Permission denied\" })";
    let expected = format!("done: Ok(()), {denied}, {denied}, {asked}");
    assert!(text.contains(&expected), "{text} {}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}

#[test]
fn the_server_of_a_store_works_and_does_nothing_else() {
    let kind = ThreadKind::StoreServer;
    survives(kind, "work", "1");
    killed(kind, "getppid", "getppid");
    killed(kind, "open", "openat");
    killed(kind, "make executable memory", "mmap");
    killed(kind, "signal another process", "tgkill");
    killed(kind, "other request", "ioctl 0xae99");
    killed(kind, "remove", "unlink");
    assert_eq!(confined(kind, "execute").status.signal(), Some(libc::SIGSYS));
}

#[test]
fn without_a_sandbox_nothing_is_confined() {
    let sandbox = Sandbox::prepare(&Config { sandbox: false, ..Config::default() }).unwrap();
    sandbox.enter_thread(ThreadKind::Vcpu).unwrap();
    sandbox.enter_process().unwrap();
    File::open("/proc/self/status").unwrap();
}

#[test]
fn the_main_loop_registers_the_guest() {
    survives(ThreadKind::Main, "register the guest", "registered");
}
