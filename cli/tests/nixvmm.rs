//! The built program, seen from outside.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

fn nixvmm(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nixvmm"))
        .current_dir(folder)
        .env_remove("JOURNAL_STREAM")
        .args(arguments)
        .output()
        .unwrap()
}

#[track_caller]
fn text(output: &[u8]) -> &str {
    std::str::from_utf8(output).unwrap()
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vmlinux"), "no kernel").unwrap();
    fs::write(folder.path().join("data.img"), [0; 4096]).unwrap();
    folder
}

#[test]
fn check_prints_a_machine_that_config_takes_back_unchanged() {
    let folder = folder();
    let flags = ["check", "--kernel", "vmlinux", "--disk", "data.img,serial=data", "--memory=1G"];
    let first = nixvmm(folder.path(), &flags);
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert_eq!(text(&first.stderr), "");
    assert!(text(&first.stdout).contains("\"size\": \"1G\""));
    fs::write(folder.path().join("guest.json"), &first.stdout).unwrap();
    let second = nixvmm(folder.path(), &["check", "--config", "guest.json"]);
    assert_eq!(text(&second.stdout), text(&first.stdout));
}

#[test]
fn a_wrong_command_line_or_file_ends_with_2_and_says_why_on_standard_error() {
    let folder = folder();
    fs::write(folder.path().join("guest.json"), "{\"kernl\": 1}").unwrap();
    for (arguments, expected) in [
        (&["--cpus", "x"][..], "error: invalid value 'x' for '--cpus <NUMBER>'"),
        (&["--cpus", "2"], "nixvmm: error: no kernel: give --kernel FILE"),
        (&["check", "--kernel", "none"], "nixvmm: error: --kernel none: No such file"),
        (
            &["--config", "guest.json"],
            "nixvmm: error: --config guest.json: line 1: unknown key \"kernl\": \
             did you mean \"kernel\"?",
        ),
    ] {
        let output = nixvmm(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(text(&output.stdout), "");
        assert!(text(&output.stderr).starts_with(expected), "{}", text(&output.stderr));
    }
}

#[test]
fn what_cannot_run_ends_with_1() {
    let folder = folder();
    let output = nixvmm(folder.path(), &["--kernel", "vmlinux", "--console", "off"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nixvmm: error: "), "{}", text(&output.stderr));
}

#[test]
fn a_kernel_that_cannot_be_unpacked_leaves_nothing_behind() {
    let folder = folder();
    let output = nixvmm(folder.path(), &["unpack-kernel", "data.img", "out"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "nixvmm: error: cannot unpack data.img: ";
    assert!(text(&output.stderr).starts_with(expected), "{}", text(&output.stderr));
    let mut names: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["data.img", "vmlinux"]);
    let output = nixvmm(folder.path(), &["unpack-kernel", "none", "-"]);
    assert_eq!(
        text(&output.stderr),
        "nixvmm: error: cannot open none: No such file or directory (os error 2)\n"
    );
}

#[test]
fn the_manual_and_the_completions_know_every_flag() {
    let folder = folder();
    let page = nixvmm(folder.path(), &["man"]);
    let page = text(&page.stdout);
    for section in ["EXIT STATUS", "FILES", "EXAMPLES", "OPTIONS", "COMMANDS"] {
        assert!(
            page.contains(&format!(".SH \"{section}\""))
                || page.contains(&format!(".SH {section}")),
            "{section}: {page}"
        );
    }
    let help = nixvmm(folder.path(), &["run", "--help"]);
    let flags = text(&help.stdout).split_whitespace().filter(|word| word.starts_with("--"));
    let bash = nixvmm(folder.path(), &["completions", "bash"]);
    let mut count = 0;
    for flag in flags {
        assert!(text(&bash.stdout).contains(flag), "{flag}");
        assert!(page.contains(&flag.replace('-', "\\-")), "{flag} in {page}");
        count += 1;
    }
    assert!(count > 15, "{count} flags");
    for shell in ["zsh", "fish"] {
        assert!(nixvmm(folder.path(), &["completions", shell]).status.success());
    }
}

/// Serves one client of a control socket: takes a call, answers with `reply`, and says more until
/// the client has said `farewell`.
fn serve_once(
    folder: &Path,
    reply: &'static [u8],
    farewell: &'static str,
) -> thread::JoinHandle<String> {
    let listener = UnixListener::bind(folder.join("control")).unwrap();
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut from_client = BufReader::new(client.try_clone().unwrap());
        let mut call = Vec::new();
        from_client.read_until(0, &mut call).unwrap();
        client.write_all(reply).unwrap();
        let mut said = vec![0; farewell.len()];
        from_client.read_exact(&mut said).unwrap();
        assert_eq!(text(&said), farewell);
        client.write_all(b" and the rest").unwrap();
        text(&call).to_owned()
    })
}

#[test]
fn ctl_prints_replies_for_people_and_refusals_on_standard_error() {
    let folder = folder();
    let reply =
        b"{\"parameters\":{\"disks\":[{\"name\":\"data\",\"size\":1572864,\"readOnly\":false}]}}\0";
    let server = serve_once(folder.path(), reply, "");
    let output = nixvmm(folder.path(), &["ctl", "control", "disks"]);
    assert_eq!(text(&output.stdout), "DISK  SIZE     ACCESS\ndata  1.5 MiB  read-write\n");
    assert!(server.join().unwrap().contains("io.nixvmm.Machine.ListDisks"));

    fs::remove_file(folder.path().join("control")).unwrap();
    let reply = b"{\"error\":\"io.nixvmm.Machine.NoSuchDisk\",\"parameters\":{\"disk\":\"x\"}}\0";
    let server = serve_once(folder.path(), reply, "");
    let output = nixvmm(folder.path(), &["ctl", "control", "resize", "x", "1G"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = "nixvmm: error: there is no disk x: `disks` lists them\n";
    assert_eq!(text(&output.stderr), expected);
    assert!(server.join().unwrap().contains("\"size\":1073741824"));
}

#[test]
fn ctl_console_carries_bytes_both_ways_until_the_machine_ends() {
    let folder = folder();
    let server = serve_once(folder.path(), b"{\"parameters\":{}}\0early", "typed");
    let mut process = Command::new(env!("CARGO_BIN_EXE_nixvmm"))
        .current_dir(folder.path())
        .args(["ctl", "control", "console"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its end ends nothing else.
    process.stdin.take().unwrap().write_all(b"typed").unwrap();
    let output = process.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "early and the rest");
    assert!(output.status.success());
    let call = server.join().unwrap();
    assert!(call.contains("\"upgrade\":true") && call.contains("AttachConsole"), "{call}");
}
