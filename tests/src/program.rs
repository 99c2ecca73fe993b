//! Which program do the tests run? The one that cargo builds from this tree, in the profile that is
//! the release's but for the time it takes to build.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::tool::progress;

/// Builds `nixvmm` as it ships, statically linked, and returns its path. `NIXVMM_PROGRAM` names one
/// that is already built.
///
/// # Errors
/// When cargo cannot be run or the build fails.
pub fn build() -> Result<PathBuf> {
    match env::var_os("NIXVMM_PROGRAM") {
        Some(path) => Ok(PathBuf::from(path)),
        None => build_static("nixvmm", "nixvmm", "test-guest"),
    }
}

/// Builds a program of the workspace, statically linked, and returns its path.
///
/// # Errors
/// When cargo cannot be run or the build fails.
pub fn build_static(package: &str, name: &str, profile: &str) -> Result<PathBuf> {
    progress(&format!("building {name}"));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["static", "--quiet", "--package", package, "--bin", name])
        .args(["--profile", profile, "--message-format", "json-render-diagnostics"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    if !output.status.success() {
        bail!("{name} cannot be built: cargo failed with {}", output.status);
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs: Vec<PathBuf> = messages
        .filter_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .collect();
    programs.into_iter().next_back().context("cargo built no program")
}
