//! The style and the direction of dependencies, as tests: no guest, no emulated host.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Failed, Trial};

const COLUMNS_MAX: usize = 100;
const FILE_CODE_LINES_MAX: usize = 400;
const FUNCTION_LINES_MAX: usize = 60;

/// Files and folders that may be unsafe; everywhere else the word is forbidden.
const UNSAFE_ROOMS: &[&str] = &[
    "arch/src/memory.rs",
    "arch/src/x86_64/start.rs",
    "cli/src/terminal.rs",
    "cli/src/vm/vsock.rs",
    "devices/src/event.rs",
    "devices/src/host/",
    "devices/src/test/independent.rs",
    "tests/src/bin/benchmark-guest.rs",
    "vmm/src/kvm.rs",
    "vmm/src/sandbox/",
    "vmm/src/vcpu.rs",
];

/// The arrows of the design: each crate and what it may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("arch", &[]),
    ("boot", &["arch"]),
    ("devices", &["arch"]),
    ("vmm", &["arch", "boot", "devices"]),
    ("nixvmm", &["boot", "vmm"]),
    ("tests", &[]),
];

/// What a room must not know: the words that would show that it does.
const ABSENCES: &[(&str, &[&str])] = &[
    ("arch/src/", &["virtio_queue", "virtio_bindings", "kvm_ioctls", "linux_loader"]),
    ("boot/src/", &["kvm_ioctls", "kvm_bindings", "virtio_queue"]),
    ("devices/src/", &["kvm_ioctls", "kvm_bindings"]),
    ("devices/src/host/", &["crate::virtio", "virtio_queue", "virtio_bindings"]),
    ("devices/src/virtio/", &["File::open", "OpenOptions", "rustix::fs::open"]),
];

/// Where the handbook's pages are.
const HANDBOOK: &str = "resources/handbook/src";

/// Looks for what breaks a rule and says where.
type Check = fn() -> Vec<String>;

/// All checks of this file.
pub(crate) fn trials() -> Vec<Trial> {
    let checks: &[(&str, Check)] = &[
        ("tidy::crates_depend_along_the_designs_arrows", wrong_arrows),
        ("tidy::one_vm_memory_is_in_the_tree", duplicate_vm_memory),
        ("tidy::no_dependency_comes_from_git", git_dependencies),
        ("tidy::unsafe_stays_in_its_rooms", stray_unsafe),
        ("tidy::rooms_do_not_know_what_they_must_not", broken_absences),
        ("tidy::lines_fit_and_files_and_functions_stay_short", oversized),
        ("tidy::nothing_is_left_to_do_at_run_time", unfinished),
        ("tidy::every_page_of_the_handbook_is_in_its_summary", unlisted_pages),
        ("tidy::links_between_documents_lead_somewhere", broken_links),
    ];
    checks.iter().map(|(name, check)| Trial::test(*name, move || verdict(&check()))).collect()
}

fn verdict(findings: &[String]) -> Result<(), Failed> {
    if findings.is_empty() { Ok(()) } else { Err(findings.join("\n").into()) }
}

fn wrong_arrows() -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--no-deps", "--format-version=1"])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == name) else {
            findings.push(format!("{name} is no crate of the design"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let to = dependency["name"].as_str().expect("name");
            let ours = dependency["path"].is_string();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            if ours && !for_tests && !allowed.contains(&to) {
                findings.push(format!("{name} depends on {to} against the design"));
            }
        }
    }
    findings
}

fn duplicate_vm_memory() -> Vec<String> {
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    match lock.lines().filter(|line| *line == "name = \"vm-memory\"").count() {
        1 => Vec::new(),
        count => vec![format!("vm-memory is in Cargo.lock {count} times")],
    }
}

fn git_dependencies() -> Vec<String> {
    let lock = fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock");
    lock.lines().filter(|line| line.contains("source = \"git+")).map(str::to_owned).collect()
}

fn stray_unsafe() -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in sources() {
        if UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) || path.starts_with("tests/") {
            continue;
        }
        for (number, line) in code_lines(&text) {
            if words(line).any(|word| word == "unsafe") {
                findings.push(format!("{path}:{number}: unsafe outside its rooms"));
            }
        }
    }
    findings
}

fn broken_absences() -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in sources() {
        let product = &text[..product_end(&text)];
        for (room, forbidden) in ABSENCES.iter().filter(|(room, _)| path.starts_with(room)) {
            for (number, line) in code_lines(product) {
                if let Some(word) = forbidden.iter().find(|word| line.contains(**word)) {
                    findings.push(format!("{path}:{number}: {room} must not know {word}"));
                }
            }
        }
    }
    findings
}

fn oversized() -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in sources() {
        for (number, line) in text.lines().enumerate() {
            if line.chars().count() > COLUMNS_MAX {
                findings.push(format!("{path}:{}: longer than {COLUMNS_MAX} columns", number + 1));
            }
        }
        if path.ends_with("/test.rs") || path.contains("/test/") {
            continue;
        }
        let product = &text[..product_end(&text)];
        let count = code_lines(product).count();
        if count > FILE_CODE_LINES_MAX {
            findings.push(format!("{path}: {count} code lines, at most {FILE_CODE_LINES_MAX}"));
        }
        findings.extend(long_functions(&path, product));
    }
    findings
}

fn long_functions(path: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut findings = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let is_function = trimmed.starts_with("fn ")
            || (trimmed.starts_with("pub") || trimmed.starts_with("extern"))
                && trimmed.contains(" fn ")
                && !trimmed.contains('=');
        if !is_function || trimmed.ends_with(';') {
            continue;
        }
        let indent = &line[..line.len() - trimmed.len()];
        let closing = format!("{indent}}}");
        let end = lines[start..].iter().position(|line| *line == closing).unwrap_or(0);
        let length = code_lines(&lines[start..start + end].join("\n")).count();
        if length > FUNCTION_LINES_MAX {
            findings.push(format!("{path}:{}: function of {length} code lines", start + 1));
        }
    }
    findings
}

fn unfinished() -> Vec<String> {
    let mut findings = Vec::new();
    for (path, text) in sources() {
        if path == "tests/it/tidy.rs" {
            continue;
        }
        for (number, line) in code_lines(&text[..product_end(&text)]) {
            if ["todo!(", "unimplemented!(", "dbg!("].iter().any(|word| line.contains(word)) {
                findings.push(format!("{path}:{number}: {}", line.trim()));
            }
        }
    }
    findings
}

fn unlisted_pages() -> Vec<String> {
    let folder = root().join(HANDBOOK);
    let summary = fs::read_to_string(folder.join("SUMMARY.md")).expect("SUMMARY.md");
    let mut findings = Vec::new();
    for entry in fs::read_dir(folder).expect("the handbook") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        let is_page = name.ends_with(".md") && name != "SUMMARY.md";
        if is_page && !summary.contains(&format!("({name})")) {
            findings.push(format!("{HANDBOOK}/{name} is not in SUMMARY.md"));
        }
    }
    findings
}

fn broken_links() -> Vec<String> {
    let handbook = fs::read_dir(root().join(HANDBOOK)).expect("the handbook");
    let pages = handbook.map(|entry| entry.expect("an entry").path());
    let pages = pages.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    let others = ["README.md", "ARCHITECTURE.md"].map(|name| root().join(name));
    let mut findings = Vec::new();
    let mut count = 0;
    for page in pages.chain(others) {
        let text = fs::read_to_string(&page).expect("a page is text");
        for link in links(&text).filter(|link| !link.contains("://")) {
            count += 1;
            if !leads_somewhere(&page, &text, link) {
                findings.push(format!("{}: {link} leads nowhere", page.display()));
            }
        }
    }
    assert!(count > 20, "only {count} links were found");
    findings
}

/// What stands in `[…](…)`, outside code.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.lines().filter(|line| !line.starts_with("    "));
    prose.flat_map(|line| {
        line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
    })
}

fn leads_somewhere(page: &Path, text: &str, link: &str) -> bool {
    let (file, heading) = link.split_once('#').unwrap_or((link, ""));
    let target = page.with_file_name(file);
    if file.is_empty() {
        return has_heading(text, heading);
    }
    match fs::read_to_string(&target) {
        Ok(text) => heading.is_empty() || has_heading(&text, heading),
        Err(_) => target.is_dir() && heading.is_empty(),
    }
}

/// Whether a heading has this anchor, as mdBook and forges make it.
fn has_heading(text: &str, anchor: &str) -> bool {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| line.trim_start_matches('#').trim()).any(|heading| {
        let letters = heading.chars().map(|letter| if letter == ' ' { '-' } else { letter });
        let is_kept = |letter: &char| letter.is_alphanumeric() || matches!(letter, '-' | '_');
        letters.filter(is_kept).flat_map(char::to_lowercase).collect::<String>() == anchor
    })
}

/// Every Rust source of the project: its path from the root, and its text.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    for crate_folder in ["arch", "boot", "devices", "vmm", "cli", "tests"] {
        collect(&root().join(crate_folder), &mut files);
    }
    assert!(files.len() > 20, "the sources are where this test looks for them");
    files
        .into_iter()
        .map(|file| {
            let text = fs::read_to_string(&file).expect("a source is text");
            let path = file.strip_prefix(root()).expect("a file of the tree");
            (path.to_string_lossy().into_owned(), text)
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        let skipped = path.ends_with("target") || path.ends_with("tests/fuzz");
        if path.is_dir() && !skipped {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Where the tests of a file start, or its end.
fn product_end(text: &str) -> usize {
    text.find("\n#[cfg(test)]\nmod ").unwrap_or(text.len())
}

/// Numbered lines that are neither blank nor comments.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_code = |line: &str| !line.is_empty() && !line.starts_with("//");
    text.lines()
        .enumerate()
        .filter(move |(_, line)| is_code(line.trim_start()))
        .map(|(index, line)| (index + 1, line))
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    let code: Range<usize> = 0..line.find("//").unwrap_or(line.len());
    line[code].split(|character: char| !character.is_alphanumeric() && character != '_')
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace holds this crate")
}
