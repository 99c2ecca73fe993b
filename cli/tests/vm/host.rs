//! A host with programs in place of systemd's and Nix's that write down what they were called with.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Writes its arguments down, one call a line.
const RECORD: &str = "echo \"$(basename \"$0\") $*\" >> \"$HOST/calls\"\n";

/// Links to the runner that the file `built` names, and fails where there is a file `nix-fails`.
const NIX: &str = r#"
case "$*" in
*diff-closures*) exit ;;
*" eval "*) cat "$HOST/built"; exit ;;
esac
while [ "$1" != --out-link ]; do shift; done
ln -s -f -n "$(cat "$HOST/built")" "$2"
if [ -e "$HOST/nix-fails" ]; then echo "error: it does not evaluate" >&2; exit 1; fi
"#;

/// Knows the units that have a file each.
const SYSTEMCTL: &str = r#"
verb=$1; shift
while [ "$1" != -- ]; do shift; done; shift
for unit; do
    case "$verb" in
    show)
        absent="Id=$unit\nLoadState=not-found\n"
        cat "$HOST/units/$unit" 2>/dev/null || printf "$absent"
        echo ;;
    start|restart)
        [ ! -e "$HOST/start-fails" ] || { cp "$HOST/start-fails" "$HOST/units/$unit"; exit 1; }
        sed -i s/inactive/active/ "$HOST/units/$unit" ;;
    stop) [ ! -e "$HOST/units/$unit" ] || sed -i 's/=active/=inactive/' "$HOST/units/$unit" ;;
    esac
done
"#;

/// A host, and its folder.
pub(super) struct Host {
    pub(super) folder: tempfile::TempDir,
}

impl Host {
    pub(super) fn new() -> Self {
        let host = Self { folder: tempfile::tempdir().unwrap() };
        for folder in ["programs", "units", "nix/gcroots"] {
            fs::create_dir_all(host.path(folder)).unwrap();
        }
        for (program, script) in [
            ("nix", NIX),
            ("systemctl", SYSTEMCTL),
            ("journalctl", "echo last words"),
            ("ssh", "printf '%s\\n' \"$@\""),
            ("systemd-sysusers", ""),
        ] {
            let path = host.path("programs").join(program);
            fs::write(&path, format!("#!/bin/sh\n{RECORD}{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for number in ["1", "2"] {
            let program = host.path(&format!("runner-{number}/bin/microvm-run"));
            fs::create_dir_all(program.parent().unwrap()).unwrap();
            fs::write(&program, "#!/bin/sh\npwd\n").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        host.builds("1");
        host
    }

    /// A host that has made the guest `web`, whose unit is installed.
    pub(super) fn with_web() -> Self {
        let host = Self::new();
        host.has_unit("nixvmm@web.service", "inactive");
        let output = host.vm(&["create", "web", "--flake", "/etc/x"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        host
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    /// A file or link of the guest `web`.
    pub(super) fn web(&self, path: &str) -> PathBuf {
        self.path("state/web").join(path)
    }

    /// What nix builds from now on.
    pub(super) fn builds(&self, number: &str) {
        let runner = self.path(&format!("runner-{number}"));
        fs::write(self.path("built"), runner.to_str().unwrap()).unwrap();
    }

    pub(super) fn has_unit(&self, unit: &str, state: &str) {
        let text = format!("Id={unit}\nLoadState=loaded\nActiveState={state}\nExecMainStatus=0\n");
        fs::write(self.path("units").join(unit), text).unwrap();
    }

    pub(super) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        let path = std::env::var("PATH").unwrap();
        command
            .current_dir(&self.folder)
            .env_remove("JOURNAL_STREAM")
            .env("PATH", format!("{}:{path}", self.path("programs").display()))
            .env("HOST", self.folder.path())
            .env("NIX_STATE_DIR", self.path("nix"));
        command
    }

    pub(super) fn vm(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(env!("CARGO_BIN_EXE_nixvmm"));
        command.args(["vm", "--state", "state"]).args(arguments).output().unwrap()
    }

    /// What the other programs were called with since the last time, without questions.
    pub(super) fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        let acts = |call: &&str| !call.starts_with("systemctl show");
        calls.lines().filter(acts).map(str::to_owned).collect()
    }

    pub(super) fn runner(&self, link: &str) -> String {
        let target = fs::read_link(self.web(link)).unwrap();
        target.file_name().unwrap().to_str().unwrap().to_owned()
    }

    pub(super) fn entries(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[track_caller]
pub(super) fn text(output: &[u8]) -> &str {
    std::str::from_utf8(output).unwrap()
}

#[track_caller]
pub(super) fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// Asserts that it ended with `status` and a message that has all `words`.
#[track_caller]
pub(super) fn assert_refused(output: &Output, status: i32, words: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} in {message}");
    }
}
