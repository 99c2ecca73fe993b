//! The built program, seen from outside.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

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
