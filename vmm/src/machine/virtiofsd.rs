//! virtiofsd: folders of the host for a guest that mounts them.
//!
//! Two programs have this name: a project of its own, and what QEMU brought until version 7. What
//! one prints as its help tells which it is, and what it can do. Both take a socket that listens;
//! ours has one connection waiting, which is our own, and nobody finds it by a name any more.

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use devices::host::child;
use rustix::io::FdFlags;
use serde::Serialize;

use super::file_server::{FileServer, waiting_connection};
use crate::config::{Share, ShareCache, ShareSandbox};

const PROGRAM: &str = "virtiofsd";

/// Where distributions keep it, out of `PATH`.
const PLACES: [&str; 4] = [
    "/usr/libexec/virtiofsd",
    "/usr/lib/virtiofsd",
    "/usr/lib/qemu/virtiofsd",
    "/usr/bin/virtiofsd",
];

/// Starts one that serves `source` as `share` says.
pub(super) fn start(share: &Share, source: &Path) -> Result<FileServer> {
    let program = match &share.program {
        Some(program) => program.clone(),
        None => find().context(
            "virtiofsd is neither in PATH nor where distributions keep it: install the package \
             virtiofsd (Debian 12: qemu-system-common), or name it by program=FILE",
        )?,
    };
    let arguments = Dialect::of(&program)
        .and_then(|dialect| dialect.arguments(share, source))
        .with_context(|| program.display().to_string())?;
    let (listener, socket) = waiting_connection().context("cannot make a socket for virtiofsd")?;
    rustix::io::fcntl_setfd(&listener, FdFlags::empty())?;
    let mut command = Command::new(&program);
    command
        .arg(format!("--fd={}", listener.as_raw_fd()))
        .args(arguments)
        .args(&share.arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // Keys that end a guest in a terminal shall not end its files first.
        .process_group(0);
    child::end_with_us(&mut command);
    let child =
        command.spawn().with_context(|| format!("{} cannot be started", program.display()))?;
    let (tag, program) = (share.tag.clone(), PROGRAM.to_owned());
    Ok(FileServer { tag, program, child, socket })
}

/// The first one in `PATH` or in [`PLACES`].
fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join(PROGRAM));
    in_path.chain(PLACES.map(PathBuf::from)).find(|program| program.is_file())
}

/// What a virtiofsd understands.
#[derive(Debug)]
enum Dialect {
    /// The project of its own, with its help.
    Own(String),
    /// QEMU's.
    Qemu,
}

impl Dialect {
    fn of(program: &Path) -> Result<Self> {
        let help = Command::new(program).arg("--help").stdin(Stdio::null()).output()?;
        Self::from_help(&String::from_utf8_lossy(&[help.stdout, help.stderr].concat()))
    }

    fn from_help(help: &str) -> Result<Self> {
        if help.contains("--shared-dir") {
            Ok(Self::Own(help.to_owned()))
        } else if help.contains("-o source=") {
            Ok(Self::Qemu)
        } else {
            bail!("its help is not that of a virtiofsd")
        }
    }

    /// What makes it serve `source` as `share` says.
    fn arguments(&self, share: &Share, source: &Path) -> Result<Vec<OsString>> {
        match self {
            Self::Own(help) => own_arguments(help, share, source),
            Self::Qemu => qemu_arguments(share, source),
        }
    }
}

fn own_arguments(help: &str, share: &Share, source: &Path) -> Result<Vec<OsString>> {
    let mut flags = Vec::new();
    let mut add = |flag: &'static str, value: Option<String>| flags.push((flag, value));
    if share.readonly {
        add("--readonly", None);
    }
    if share.xattr || share.posix_acl {
        add("--xattr", None);
    }
    if share.posix_acl {
        add("--posix-acl", None);
    }
    for (flag, value) in [
        ("--cache", share.cache.map(name)),
        ("--sandbox", share.sandbox.map(name)),
        ("--uid-map", share.uid_map.clone()),
        ("--gid-map", share.gid_map.clone()),
        ("--translate-uid", share.translate_uid.clone()),
        ("--translate-gid", share.translate_gid.clone()),
    ] {
        if let Some(value) = value {
            add(flag, Some(value));
        }
    }
    let is_quiet = !share.arguments.iter().any(|word| word.starts_with("--log-level"));
    if is_quiet && has(help, "--log-level") {
        add("--log-level", Some("warn".to_owned()));
    }
    let mut arguments = vec![joined("--shared-dir=", source.as_os_str())];
    for (flag, value) in flags {
        ensure!(has(help, flag), "has no {flag}: install a later virtiofsd, or leave that key out");
        let value = value.map_or_else(String::new, |value| format!("={value}"));
        arguments.push(format!("{flag}{value}").into());
    }
    Ok(arguments)
}

/// Whether a help tells of a flag.
fn has(help: &str, flag: &str) -> bool {
    help.split([' ', '\n', '=', ',', '[']).any(|word| word == flag)
}

fn qemu_arguments(share: &Share, source: &Path) -> Result<Vec<OsString>> {
    let lacks = [
        ("readonly", share.readonly),
        ("cache=metadata", share.cache == Some(ShareCache::Metadata)),
        ("sandbox=none", share.sandbox == Some(ShareSandbox::None)),
        ("uid-map", share.uid_map.is_some()),
        ("gid-map", share.gid_map.is_some()),
        ("translate-uid", share.translate_uid.is_some()),
        ("translate-gid", share.translate_gid.is_some()),
    ];
    for (key, is_wanted) in lacks {
        ensure!(
            !is_wanted,
            "{key}: QEMU's virtiofsd cannot do that: install virtiofsd 1.11 or later (Debian 13), \
             or leave it out",
        );
    }
    let mut options = vec![joined("source=", &escaped(source.as_os_str()))];
    // What it is told later wins.
    options.push("log_level=warn".into());
    let mut add = |option: String| options.push(option.into());
    match share.cache {
        Some(ShareCache::Never) => add("cache=none".to_owned()),
        Some(cache) => add(format!("cache={}", name(cache))),
        None => {}
    }
    if let Some(sandbox) = share.sandbox {
        add(format!("sandbox={}", name(sandbox)));
    }
    if share.xattr || share.posix_acl {
        add("xattr".to_owned());
    }
    if share.posix_acl {
        add("posix_acl".to_owned());
    }
    Ok(options.into_iter().flat_map(|option| ["-o".into(), option]).collect())
}

/// The name that JSON, flags and virtiofsd have for a value.
fn name(value: impl Serialize) -> String {
    let name = serde_json::to_value(value).ok();
    name.as_ref().and_then(|name| name.as_str()).unwrap_or_default().to_owned()
}

fn joined(flag: &str, value: &OsStr) -> OsString {
    let mut argument = OsString::from(flag);
    argument.push(value);
    argument
}

/// A value among options that commas divide.
fn escaped(value: &OsStr) -> OsString {
    let mut bytes = Vec::new();
    for byte in value.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            bytes.push(b'\\');
        }
        bytes.push(*byte);
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod test {
    use super::*;

    /// Lines of the help of virtiofsd 1.10.
    const OWN: &str = "\
        Usage: virtiofsd [OPTIONS]\n\
        --shared-dir <SHARED_DIR>\n--cache <CACHE>\n--sandbox <SANDBOX>\n--xattr\n--posix-acl\n\
        --uid-map=<UID_MAP>\n--gid-map=<GID_MAP>\n--fd <FD>\n";

    fn share() -> Share {
        Share { tag: "files".into(), ..Share::default() }
    }

    fn every_key_of_old() -> Share {
        Share {
            cache: Some(ShareCache::Never),
            posix_acl: true,
            sandbox: Some(ShareSandbox::Chroot),
            ..share()
        }
    }

    fn words(dialect: &Dialect, share: &Share, source: &str) -> String {
        let arguments = dialect.arguments(share, Path::new(source)).unwrap();
        let words: Vec<_> = arguments.iter().map(|word| word.to_str().unwrap()).collect();
        words.join(" ")
    }

    fn refusal(dialect: &Dialect, share: &Share) -> String {
        dialect.arguments(share, Path::new("/")).unwrap_err().to_string()
    }

    #[test]
    fn the_project_of_its_own_is_told_by_flags_that_it_knows() {
        let dialect = Dialect::from_help(OWN).unwrap();
        assert_eq!(words(&dialect, &share(), "/a b"), "--shared-dir=/a b");
        let all = Share {
            uid_map: Some(":0:1000:1:".into()),
            gid_map: Some(":0:100:1:".into()),
            ..every_key_of_old()
        };
        assert_eq!(
            words(&dialect, &all, "/a"),
            "--shared-dir=/a --xattr --posix-acl --cache=never --sandbox=chroot \
             --uid-map=:0:1000:1: --gid-map=:0:100:1:"
        );
        let refused = refusal(&dialect, &Share { readonly: true, ..share() });
        assert!(refused.starts_with("has no --readonly: install a later virtiofsd"), "{refused}");
        let refused = refusal(&dialect, &Share { translate_uid: Some("x".into()), ..share() });
        assert!(refused.starts_with("has no --translate-uid"), "{refused}");
        let later = Dialect::from_help(&format!("{OWN}--readonly\n--log-level <LEVEL>\n")).unwrap();
        let readonly = Share { readonly: true, ..share() };
        assert_eq!(words(&later, &readonly, "/a"), "--shared-dir=/a --readonly --log-level=warn");
        let later = format!("{OWN}--translate-uid <TRANSLATE_UID>\n--translate-gid <ID>\n");
        let later = Dialect::from_help(&later).unwrap();
        let (uid, gid) = ("squash-host:0:1000:65536", "map:100:200:1");
        let translated =
            Share { translate_uid: Some(uid.into()), translate_gid: Some(gid.into()), ..share() };
        assert_eq!(
            words(&later, &translated, "/a"),
            format!("--shared-dir=/a --translate-uid={uid} --translate-gid={gid}")
        );
        let later = Dialect::from_help(&format!("{OWN}--readonly\n--log-level <LEVEL>\n")).unwrap();
        let loud = Share { arguments: vec!["--log-level=debug".into()], ..share() };
        assert_eq!(words(&later, &loud, "/a"), "--shared-dir=/a");
    }

    #[test]
    fn qemus_is_told_by_options_and_cannot_do_everything() {
        let dialect = Dialect::from_help("    -o source=PATH             shared tree\n").unwrap();
        assert_eq!(words(&dialect, &share(), "/a,b\\c"), "-o source=/a\\,b\\\\c -o log_level=warn");
        assert_eq!(
            words(&dialect, &every_key_of_old(), "/a"),
            "-o source=/a -o log_level=warn -o cache=none -o sandbox=chroot -o xattr -o posix_acl"
        );
        for (share, key) in [
            (Share { readonly: true, ..share() }, "readonly"),
            (Share { cache: Some(ShareCache::Metadata), ..share() }, "cache=metadata"),
            (Share { sandbox: Some(ShareSandbox::None), ..share() }, "sandbox=none"),
            (Share { uid_map: Some(":0:1:1:".into()), ..share() }, "uid-map"),
        ] {
            let refused = refusal(&dialect, &share);
            assert!(refused.starts_with(&format!("{key}: QEMU's virtiofsd")), "{refused}");
        }
    }

    #[test]
    fn a_program_that_is_no_virtiofsd_is_refused() {
        let error = Dialect::from_help("Usage: cat [FILE]").unwrap_err().to_string();
        assert_eq!(error, "its help is not that of a virtiofsd");
        let share = Share { program: Some("/bin/true".into()), ..share() };
        let error = format!("{:#}", start(&share, Path::new("/")).err().unwrap());
        assert_eq!(error, "/bin/true: its help is not that of a virtiofsd");
    }
}
