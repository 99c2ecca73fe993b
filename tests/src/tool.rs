//! How is a program of the system run? By name, found also where only root's `PATH` looks, with its
//! own words in the error when it fails.

use std::env;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Folders that a user's `PATH` often lacks and where Debian keeps mke2fs, virtiofsd and others.
const FURTHER_FOLDERS: [&str; 5] =
    ["/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu", "/usr/local/sbin"];

/// How much of what a failed program wrote goes into the error.
const TAIL_LENGTH: usize = 2000;

/// The path of `program`, or `None` when it is not installed.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let further = FURTHER_FOLDERS.iter().map(PathBuf::from);
    let mut candidates = env::split_paths(&path).chain(further).map(|folder| folder.join(program));
    candidates.find(|candidate| is_executable(candidate))
}

/// A command that runs `program`; looking for it again when it is spawned is the caller's loss.
pub fn command(program: &str) -> Command {
    Command::new(find(program).unwrap_or_else(|| PathBuf::from(program)))
}

/// Runs `program` with `arguments` to its end and returns what it wrote to its standard output.
///
/// # Errors
/// When it cannot be started or does not succeed; the error carries the end of its output.
pub fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<Vec<u8>> {
    finish(command(program).args(arguments))
}

/// Runs `command` to its end and returns what it wrote to its standard output.
///
/// # Errors
/// When it cannot be started or does not succeed; the error carries the end of its output.
pub fn finish(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!("{program} failed with {}:\n{}", output.status, tail(&said, TAIL_LENGTH));
    }
    Ok(output.stdout)
}

/// The SHA-256 of `inputs`, each with its length so that no two lists look alike, in hexadecimal.
///
/// # Errors
/// When `sha256sum` (Debian package coreutils) cannot be run.
pub fn digest(inputs: &[&[u8]]) -> Result<String> {
    let mut child = command("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("sha256sum cannot be started")?;
    let mut stdin = child.stdin.take().context("sha256sum has no standard input")?;
    for input in inputs {
        stdin.write_all(&input.len().to_le_bytes())?;
        stdin.write_all(input)?;
    }
    drop(stdin);
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    let digest = text.split_whitespace().next().context("sha256sum printed nothing")?;
    Ok(digest.to_owned())
}

/// The last `length` bytes of `bytes` as text.
pub fn tail(bytes: &[u8], length: usize) -> String {
    let start = bytes.len().saturating_sub(length);
    String::from_utf8_lossy(bytes.get(start..).unwrap_or_default()).into_owned()
}

/// Says on standard error what is being done while it takes long.
pub fn progress(message: &str) {
    eprintln!("testbed: {message}");
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}
