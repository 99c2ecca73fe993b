//! The systemd units, as far as systemd's own tool can tell without running them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use tests::packages::{self, Program};

use crate::{HostTest, host_trial};

/// Where systemd-analyze's opinion of a unit's exposure must end, in tenths: it goes from 0 to 100.
const EXPOSURE_MAX_TENTHS: u32 = 20;

/// What each guest's folder has in `current` and `booted`.
const PROGRAMS: &[&str] =
    &["microvm-run", "microvm-shutdown", "tap-up", "tap-down", "macvtap-up", "macvtap-down"];

/// The state folder that units name.
const STATE: &str = "/var/lib/microvms/%i";

pub(crate) fn trials() -> Vec<Trial> {
    let checks: &[HostTest] = &[
        ("units::systemd_finds_no_mistake_in_them", verify),
        ("units::none_is_exposed_by_more_than_two_points", exposure),
        ("units::only_the_network_helpers_have_a_capability_and_nothing_runs_as_root", privileges),
    ];
    checks.iter().map(host_trial).collect()
}

fn verify() -> Result<()> {
    let folder = instances()?;
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(units(folder.path())?)
        .output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && complaints.is_empty(),
        "systemd-analyze says:\n{complaints}"
    );
    Ok(())
}

fn exposure() -> Result<()> {
    let folder = instances()?;
    for unit in units(folder.path())?.iter().filter(|unit| is_service(unit)) {
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=yes", "--no-pager"])
            .arg(format!("--threshold={EXPOSURE_MAX_TENTHS}"))
            .arg(unit)
            .output()?;
        let table = String::from_utf8_lossy(&output.stdout);
        ensure!(table.contains("Overall exposure level"), "no verdict: {table}");
        ensure!(
            output.status.success(),
            "more exposed than {EXPOSURE_MAX_TENTHS} tenths:\n{table}"
        );
    }
    Ok(())
}

fn privileges() -> Result<()> {
    for unit in units(&source())?.iter().filter(|unit| is_service(unit)) {
        let text = fs::read_to_string(unit)?;
        let name = unit.file_name().and_then(|name| name.to_str()).context("name")?;
        ensure!(text.contains("\nUser=vm-%i\n"), "{name} has no user of its guest's own");
        ensure!(!text.contains("=+") && !text.contains("=!"), "{name} runs something as root");
        let expected = match name {
            "nixvmm-tap@.service" => "CAP_NET_ADMIN",
            "nixvmm-macvtap@.service" => "CAP_NET_ADMIN CAP_CHOWN",
            _ => "",
        };
        let bounding = format!("\nCapabilityBoundingSet={expected}\n");
        ensure!(text.contains(&bounding), "{name} has other capabilities than {expected:?}");
    }
    Ok(())
}

/// Each unit as that of a guest whose state is in the folder.
fn instances() -> Result<tempfile::TempDir> {
    packages::require(&[Program::SystemdAnalyze])?;
    let folder = tempfile::tempdir()?;
    let state = folder.path().join("state");
    for link in ["current", "booted"] {
        let programs = state.join(link).join("bin");
        fs::create_dir_all(&programs)?;
        for program in PROGRAMS {
            let program = programs.join(program);
            fs::write(&program, "#!/bin/sh\n")?;
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        }
    }
    let state = state.to_str().context("a path that is no UTF-8")?;
    for unit in units(&source())? {
        let text = fs::read_to_string(&unit)?.replace(STATE, state);
        let name = unit.file_name().and_then(|name| name.to_str()).context("name")?;
        fs::write(folder.path().join(name.replace('@', "@guest")), text)?;
    }
    Ok(folder)
}

fn units(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut units = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("service" | "target")) {
            units.push(path);
        }
    }
    ensure!(!units.is_empty(), "no units in {}", folder.display());
    units.sort();
    Ok(units)
}

fn is_service(unit: &Path) -> bool {
    unit.extension().is_some_and(|extension| extension == "service")
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/systemd")
}
