//! The Nix files: do they parse, are they formatted, and do they evaluate to what they shall?

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tests::cache::Cache;
use tests::packages::{self, Program};
use tests::program;

use crate::{HostTest, host_trial};

/// Names the folder `lib` of nixpkgs; without it, `NIX_PATH` may lead to nixpkgs.
const LIBRARY: &str = "NIXPKGS_LIB";

/// Names a tree of microvm.nix, beside whose modules ours are evaluated too.
const UPSTREAM: &str = "MICROVM_NIX";

/// Finds names that nobody uses, of crates.io.
const DEADNIX: &str = "1.3.1";

/// Set to anything, it has files formatted that are otherwise complained of.
const WRITE: &str = "NIXVMM_FORMAT_NIX";

/// Files that the evaluated machines name, in the folder that they have in place of the store.
const STORE: &[&str] = &[
    "data.img",
    "initrd/initrd",
    "microvm-store-disk.erofs",
    "named.img",
    "virtiofsd/bin/virtiofsd",
    "vmlinux-6.12/vmlinux",
];

pub(crate) fn trials() -> Vec<Trial> {
    let checks: &[HostTest] = &[
        ("nix::every_file_parses", parse),
        ("nix::every_file_is_formatted_as_nixfmt_wants", format),
        ("nix::every_name_is_used", lint),
    ];
    let evaluated: &[HostTest] =
        &[("nix::modules_evaluate_to_what_is_expected_and_nixvmm_takes_their_machines", evaluate)];
    checks.iter().map(host_trial).chain(evaluated.iter().map(evaluated_trial)).collect()
}

/// A test that evaluates the modules. It is ignored where there is no library of nixpkgs.
pub(crate) fn evaluated_trial(test: &HostTest) -> Trial {
    host_trial(test).with_ignored_flag(library().is_none())
}

/// Says aloud what is not looked at here.
pub(crate) fn say_what_is_ignored() {
    if library().is_none() {
        eprintln!(
            "\nNOT CHECKED: the NixOS modules are not evaluated, because {LIBRARY} does not name \
             the folder `lib` of nixpkgs and NIX_PATH has no nixpkgs"
        );
    } else if std::env::var_os(UPSTREAM).is_none() {
        eprintln!("\nNOT CHECKED: the adapter for microvm.nix; {UPSTREAM} names its tree");
    }
}

fn parse() -> Result<()> {
    packages::require(&[Program::NixInstantiate])?;
    let output = Command::new("nix-instantiate").arg("--parse").args(&nix_files()?).output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{complaints}");
    Ok(())
}

/// What `nix fmt` would leave as it is, whether Nix is installed or not.
fn format() -> Result<()> {
    let mut unformatted = Vec::new();
    for file in nix_files()? {
        let shown = file.display().to_string();
        let text = fs::read_to_string(&file).with_context(|| shown.clone())?;
        let formatted = nixfmt_rs::format(&text)
            .map_err(|error| anyhow!("{}", nixfmt_rs::format_error(&text, Some(&shown), &error)))?;
        if formatted != text {
            if std::env::var_os(WRITE).is_some() {
                fs::write(&file, formatted)?;
            } else {
                unformatted.push(shown);
            }
        }
    }
    ensure!(
        unformatted.is_empty(),
        "`nix fmt` has them otherwise, and so has {WRITE}=1 cargo test -p tests --test it -- \
         nix::every_file_is: {}",
        unformatted.join(" "),
    );
    Ok(())
}

/// Names that nobody uses.
fn lint() -> Result<()> {
    let deadnix = packages::from_crates(&Cache::open()?, "deadnix", DEADNIX)?.join("deadnix");
    let output = Command::new(deadnix).arg("--fail").args(nix_files()?).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

fn evaluate() -> Result<()> {
    let store = tempfile::tempdir()?;
    let evaluated = evaluated(store.path())?;
    for name in STORE {
        let path = store.path().join(name);
        fs::create_dir_all(path.parent().context("a parent")?)?;
        fs::write(path, [0; 512])?;
    }
    let count = evaluated["count"].as_u64().unwrap_or_default();
    ensure!(count > 40, "only {count} cases were evaluated");
    let failures = evaluated["failures"].as_array().context("failures")?;
    ensure!(failures.is_empty(), "{}", serde_json::to_string_pretty(failures)?);
    let machines = evaluated["machines"].as_object().context("machines")?;
    ensure!(machines.len() >= 3, "only {} machines", machines.len());
    for (name, machine) in machines {
        check_machine(store.path(), machine).with_context(|| format!("machine {name}"))?;
    }
    Ok(())
}

/// What becomes of the modules' tests, with `store` in the store's place.
pub(crate) fn evaluated(store: &Path) -> Result<Value> {
    packages::require(&[Program::NixInstantiate])?;
    let library = library().with_context(|| format!("{LIBRARY} is not set"))?;
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/nix/tests");
    let mut command = Command::new("nix-instantiate");
    command.args(["--eval", "--strict", "--json"]).arg(tests);
    command.args(["--arg", "lib", &library]).arg("--argstr").arg("store").arg(store);
    if let Some(upstream) = std::env::var_os(UPSTREAM) {
        command.args(["--arg", "upstream"]).arg(upstream);
    }
    let output = command.output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{complaints}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The program that is tested takes the machine as it is.
fn check_machine(folder: &Path, machine: &Value) -> Result<()> {
    let file = folder.join("machine.json");
    fs::write(&file, serde_json::to_vec(machine)?)?;
    let output = Command::new(program::build()?)
        .args(["check", "--config"])
        .arg(&file)
        .current_dir(folder)
        .output()?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nixvmm check: {complaints}");
    Ok(())
}

/// nixpkgs' library as an expression, where there is one.
fn library() -> Option<String> {
    if let Ok(path) = std::env::var(LIBRARY) {
        return Some(format!("import {path}"));
    }
    let has_nixpkgs = std::env::var("NIX_PATH").is_ok_and(|path| path.contains("nixpkgs"));
    has_nixpkgs.then(|| "import <nixpkgs/lib>".to_owned())
}

fn nix_files() -> Result<Vec<PathBuf>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = vec![root.join("flake.nix")];
    find_nix_files(&root.join("resources/nix"), &mut files)?;
    ensure!(files.len() > 20, "only {} Nix files found", files.len());
    Ok(files)
}

fn find_nix_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            find_nix_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "nix") {
            files.push(path);
        }
    }
    Ok(())
}
