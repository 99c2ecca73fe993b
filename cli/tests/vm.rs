//! `nixvmm vm` as a user sees it: the built program, a state folder, and programs in place of
//! systemd's and Nix's that write down what they were called with.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use serde_json::Value;

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
    stop) sed -i 's/=active/=inactive/' "$HOST/units/$unit" ;;
    esac
done
"#;

struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
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
    fn with_web() -> Self {
        let host = Self::new();
        host.has_unit("nixvmm@web.service", "inactive");
        let output = host.vm(&["create", "web", "--flake", "/etc/x"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    /// A file or link of the guest `web`.
    fn web(&self, path: &str) -> PathBuf {
        self.path("state/web").join(path)
    }

    /// What nix builds from now on.
    fn builds(&self, number: &str) {
        let runner = self.path(&format!("runner-{number}"));
        fs::write(self.path("built"), runner.to_str().unwrap()).unwrap();
    }

    fn has_unit(&self, unit: &str, state: &str) {
        let text = format!("Id={unit}\nLoadState=loaded\nActiveState={state}\nExecMainStatus=0\n");
        fs::write(self.path("units").join(unit), text).unwrap();
    }

    fn command(&self, program: impl AsRef<Path>) -> Command {
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

    fn vm(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(env!("CARGO_BIN_EXE_nixvmm"));
        command.args(["vm", "--state", "state"]).args(arguments).output().unwrap()
    }

    /// What the other programs were called with since the last time, without questions.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        let acts = |call: &&str| !call.starts_with("systemctl show");
        calls.lines().filter(acts).map(str::to_owned).collect()
    }

    fn runner(&self, link: &str) -> String {
        let target = fs::read_link(self.web(link)).unwrap();
        target.file_name().unwrap().to_str().unwrap().to_owned()
    }

    fn entries(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[track_caller]
fn text(output: &[u8]) -> &str {
    std::str::from_utf8(output).unwrap()
}

#[track_caller]
fn assert_done(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// Asserts that it ended with `status` and a message that has all `words`.
#[track_caller]
fn assert_refused(output: &Output, status: i32, words: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} in {message}");
    }
}

#[test]
fn create_builds_the_guest_and_puts_all_of_it_in_place() {
    let host = Host::with_web();
    assert_eq!(host.entries("state"), ["web"]);
    assert_eq!(host.entries("state/web"), ["current", "flake"]);
    assert_eq!(host.runner("current"), "runner-1");
    assert_eq!(fs::read_to_string(host.web("flake")).unwrap(), "/etc/x\n");
    let roots = ["booted-web", "old-web", "web"];
    assert_eq!(host.entries("nix/gcroots/microvm"), roots);
    let root = fs::read_link(host.path("nix/gcroots/microvm/web")).unwrap();
    assert_eq!(root, host.web("current"));
    let calls = host.calls();
    let [build, user] = calls.as_slice() else { panic!("{calls:?}") };
    let installable = "/etc/x#nixosConfigurations.\"web\".config.microvm.declaredRunner";
    assert!(build.starts_with("nix ") && build.ends_with(installable), "{build}");
    assert_eq!(user, "systemd-sysusers --inline u vm-web - \"Guest web\"");
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    let host = Host::new();
    host.has_unit("nixvmm@web.service", "inactive");
    fs::write(host.path("nix-fails"), "").unwrap();
    let output = host.vm(&["create", "web", "--flake", "/etc/x"]);
    assert_refused(&output, 1, &["it does not evaluate", "web: cannot be built from /etc/x"]);
    assert_eq!(host.entries("state"), [""; 0]);
    assert_eq!(host.entries("nix/gcroots/microvm"), [""; 0]);

    fs::remove_file(host.path("nix-fails")).unwrap();
    fs::remove_dir_all(host.path("runner-1/bin")).unwrap();
    let output = host.vm(&["create", "web", "--flake", "/etc/x"]);
    assert_refused(&output, 1, &["is no runner", "bin/microvm-run"]);
    assert_eq!(host.entries("state"), [""; 0]);

    host.builds("2");
    let sysusers = host.path("programs/systemd-sysusers");
    fs::write(&sysusers, "#!/bin/sh\nexit 1\n").unwrap();
    let output = host.vm(&["create", "web", "--flake", "/etc/x"]);
    assert_refused(&output, 1, &["web: its user vm-web cannot be made"]);
    assert_eq!(host.entries("state"), [""; 0]);
}

#[test]
fn create_goes_on_where_an_interrupted_one_left_something() {
    let host = Host::new();
    fs::create_dir_all(host.path("state/.create-web")).unwrap();
    symlink("/nowhere", host.path("state/.create-web/current")).unwrap();
    assert_eq!(text(&host.vm(&["list"]).stdout), "");
    assert_done(&host.vm(&["create", "web"]));
    assert_eq!(host.entries("state"), ["web"]);
    assert_eq!(host.runner("current"), "runner-1");
}

#[test]
fn create_takes_no_place_of_a_guest_that_exists() {
    let host = Host::with_web();
    host.builds("2");
    let output = host.vm(&["create", "web"]);
    assert_refused(&output, 1, &["web: ", "has a guest", "nixvmm vm update web"]);
    assert_eq!(host.runner("current"), "runner-1");
}

#[test]
fn a_runner_needs_no_nix_and_takes_over_the_state_that_is_there() {
    let host = Host::new();
    fs::create_dir_all(host.web("")).unwrap();
    fs::write(host.web("data.img"), "precious").unwrap();
    fs::remove_dir_all(host.path("nix")).unwrap();
    fs::remove_file(host.path("programs/nix")).unwrap();
    assert_done(&host.vm(&["create", "web", "--runner", "runner-2"]));
    assert_eq!(host.entries("state"), ["web"]);
    assert_eq!(host.entries("state/web"), ["current", "data.img"]);
    assert_eq!(host.runner("current"), "runner-2");
    let output = host.vm(&["run", "web"]);
    assert_eq!(PathBuf::from(text(&output.stdout).trim()), fs::canonicalize(host.web("")).unwrap());
}

#[test]
fn names_that_lead_elsewhere_are_refused_by_every_verb() {
    let host = Host::with_web();
    host.calls();
    for name in ["../web", "..", ".", "", "a/b", "a b", "a.b", "a%b", "-web", "web\n"] {
        for verb in ["create", "update", "rollback", "start", "stop", "destroy", "console", "run"] {
            let output = host.vm(&[verb, "--", name]);
            assert_eq!(output.status.code(), Some(2), "{verb} {name:?}");
        }
    }
    assert_eq!(host.calls(), [""; 0]);
    assert_eq!(host.entries("state"), ["web"]);
    let output = host.vm(&["start", "db"]);
    assert_refused(&output, 1, &["db: there is no such guest in ", "nixvmm vm create db"]);
}

#[test]
fn update_without_a_change_says_so_and_restarts_nothing() {
    let host = Host::with_web();
    host.has_unit("nixvmm@web.service", "active");
    symlink(host.path("runner-1"), host.web("booted")).unwrap();
    host.calls();
    let output = host.vm(&["update", "web", "--restart"]);
    assert_done(&output);
    assert!(text(&output.stderr).contains("web: nothing has changed"));
    assert_eq!(host.entries("state/web"), ["booted", "current", "flake"]);
    assert_eq!(host.calls().len(), 1);
}

#[test]
fn an_update_is_what_the_next_start_runs_and_rollback_undoes_it() {
    let host = Host::with_web();
    host.has_unit("nixvmm@web.service", "active");
    symlink(host.path("runner-1"), host.web("booted")).unwrap();
    host.builds("2");
    let output = host.vm(&["update", "web"]);
    assert_done(&output);
    assert!(text(&output.stderr).contains("nixvmm vm restart web"), "{}", text(&output.stderr));
    assert_eq!(
        (host.runner("current"), host.runner("old")),
        ("runner-2".into(), "runner-1".into())
    );
    assert_eq!(host.entries("state/web"), ["booted", "current", "flake", "old"]);
    assert!(text(&host.vm(&["list"]).stdout).contains("nixvmm vm restart web"));

    assert_done(&host.vm(&["rollback", "web"]));
    assert_eq!(
        (host.runner("current"), host.runner("old")),
        ("runner-1".into(), "runner-2".into())
    );
    host.calls();
    assert_done(&host.vm(&["rollback", "web", "-R"]));
    assert_eq!(host.runner("current"), "runner-2");
    assert_eq!(host.calls(), ["systemctl restart -- nixvmm@web.service"]);
}

#[test]
fn an_update_that_fails_changes_nothing_and_keeps_others_from_nothing() {
    let host = Host::with_web();
    assert_done(&host.vm(&["create", "db", "--runner", "runner-1"]));
    host.builds("2");
    let output = host.vm(&["update", "db", "web"]);
    assert_refused(&output, 1, &["db: ", "has no file `flake`"]);
    assert_eq!(host.runner("current"), "runner-2");

    fs::write(host.path("nix-fails"), "").unwrap();
    host.builds("1");
    assert_refused(&host.vm(&["update", "--all"]), 1, &["web: cannot be built"]);
    assert_eq!(
        (host.runner("current"), host.runner("old")),
        ("runner-2".into(), "runner-1".into())
    );
    assert_eq!(host.entries("state/web"), ["current", "flake", "old"]);
}

#[test]
fn what_the_hosts_configuration_has_is_neither_updated_nor_destroyed() {
    let host = Host::with_web();
    symlink("/nowhere", host.web("toplevel")).unwrap();
    host.has_unit("install-microvm-web.service", "active");
    assert_refused(&host.vm(&["update", "web"]), 1, &["the host's configuration has it"]);
    let output = host.vm(&["destroy", "web", "--remove-state"]);
    assert_refused(&output, 1, &["the host's configuration has it"]);
    fs::remove_file(host.path("units/install-microvm-web.service")).unwrap();
    assert_done(&host.vm(&["destroy", "web", "--remove-state"]));
    assert_eq!(host.entries("state"), [""; 0]);
}

#[test]
fn there_is_nothing_to_roll_back_to_before_the_first_update() {
    let host = Host::with_web();
    assert_refused(&host.vm(&["rollback", "web"]), 1, &["web: there is nothing to go back to"]);
    assert_eq!(host.runner("current"), "runner-1");
}

#[test]
fn list_tells_programs_and_people_the_same() {
    let host = Host::with_web();
    assert_done(&host.vm(&["create", "db", "--runner", "runner-2"]));
    let failed = "Id=nixvmm@web.service\nLoadState=loaded\nActiveState=failed\n\
                  Result=exit-code\nExecMainStatus=4\n";
    fs::write(host.path("units/nixvmm@web.service"), failed).unwrap();
    host.has_unit("microvm@db.service", "active");
    fs::create_dir_all(host.path("state/lost+found")).unwrap();
    host.builds("2");

    let output = host.vm(&["list"]);
    let expected = "NAME  STATE    FROM      NOTE\n\
                    db    running  a runner\n\
                    web   failed   /etc/x    its kernel panicked\n";
    assert_eq!(text(&output.stdout), expected);
    let output = host.vm(&["list", "--json", "--outdated"]);
    let guests: Value = serde_json::from_slice(&output.stdout).unwrap();
    let [db, web] = guests.as_array().unwrap().as_slice() else { panic!("{guests}") };
    assert_eq!(
        (db["name"].as_str(), db["unit"].as_str()),
        (Some("db"), Some("microvm@db.service"))
    );
    assert_eq!((&db["outdated"], &db["flake"]), (&Value::Null, &Value::Null));
    assert_eq!((&web["state"], &web["outdated"]), (&"failed".into(), &true.into()));
    assert_eq!(web["current"].as_str(), host.path("runner-1").to_str());
    assert_eq!((&web["declared"], &web["needsRestart"]), (&false.into(), &false.into()));

    assert_eq!(host.vm(&["status", "db"]).status.code(), Some(0));
    let status = host.vm(&["status", "web"]);
    assert_eq!(status.status.code(), Some(3));
    assert!(text(&status.stdout).contains("its kernel panicked"), "{}", text(&status.stdout));
}

#[test]
fn guests_start_and_stop_together() {
    let host = Host::with_web();
    host.has_unit("nixvmm@db.service", "inactive");
    assert_done(&host.vm(&["create", "db", "--runner", "runner-1", "--start"]));
    assert!(host.calls().contains(&"systemctl start -- nixvmm@db.service".to_owned()));
    assert_done(&host.vm(&["start", "web", "db"]));
    assert_done(&host.vm(&["stop", "web", "db"]));
    let units = "nixvmm@web.service nixvmm@db.service";
    let expected = [format!("systemctl start -- {units}"), format!("systemctl stop -- {units}")];
    assert_eq!(host.calls(), expected);
}

#[test]
fn a_start_that_fails_says_why() {
    let host = Host::with_web();
    let failed = "Id=nixvmm@web.service\nLoadState=loaded\nActiveState=failed\n\
                  Result=exit-code\nExecMainStatus=1\nStatusText=emergency mode\n";
    fs::write(host.path("start-fails"), failed).unwrap();
    host.calls();
    let output = host.vm(&["start", "web"]);
    assert_refused(&output, 1, &["last words", "web did not come up", "it said: emergency mode"]);
    fs::remove_file(host.path("start-fails")).unwrap();
    host.calls();
    assert_done(&host.vm(&["start", "web"]));
    let expected =
        ["systemctl reset-failed -- nixvmm@web.service", "systemctl start -- nixvmm@web.service"];
    assert_eq!(host.calls(), expected);
}

#[test]
fn a_start_without_units_says_how_to_have_them() {
    let host = Host::new();
    assert_done(&host.vm(&["create", "web", "--runner", "runner-1"]));
    let output = host.vm(&["start", "web"]);
    assert_refused(&output, 1, &["nixvmm@web.service nor microvm@web.service", "daemon-reload"]);
}

#[test]
fn destroy_stops_the_guest_and_keeps_what_it_wrote_unless_told_otherwise() {
    let host = Host::with_web();
    fs::write(host.web("data.img"), "precious").unwrap();
    let unit =
        "Id=nixvmm@web.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n";
    fs::write(host.path("units/nixvmm@web.service"), unit).unwrap();
    host.calls();
    assert_done(&host.vm(&["destroy", "web"]));
    let expected =
        ["systemctl stop -- nixvmm@web.service", "systemctl disable -- nixvmm@web.service"];
    assert_eq!(host.calls(), expected);
    assert_eq!(host.entries("state/web"), ["data.img"]);
    assert_eq!(host.entries("nix/gcroots/microvm"), [""; 0]);
    assert_eq!(text(&host.vm(&["list", "--json"]).stdout), "[]\n");

    assert_done(&host.vm(&["create", "web"]));
    assert_eq!(host.entries("state/web"), ["current", "data.img", "flake"]);
    assert_done(&host.vm(&["destroy", "web", "--remove-state"]));
    assert_eq!(host.entries("state"), [""; 0]);
    assert_refused(&host.vm(&["destroy", "web"]), 1, &["there is no such guest"]);
}

#[test]
fn a_guests_log_is_the_journal_of_its_units() {
    let host = Host::with_web();
    host.calls();
    assert_done(&host.vm(&["logs", "web", "-f", "-n", "5", "--", "--since=today"]));
    let expected = "journalctl --unit nixvmm*@web.service --follow --lines=5 --since=today";
    assert_eq!(host.calls(), [expected]);
}

#[test]
fn a_shell_is_ssh_through_the_guests_vsock() {
    let host = Host::with_web();
    let output = host.vm(&["shell", "web"]);
    assert_refused(&output, 1, &["web: how to reach it is not known", "nixvmm vm start web"]);
    fs::create_dir_all(host.path("runner-1/share/microvm")).unwrap();
    fs::write(host.path("runner-1/share/microvm/vsock-cid"), "7\n").unwrap();
    symlink(host.path("runner-1"), host.web("booted")).unwrap();
    let output = host.vm(&["shell", "--user", "me", "web", "ls", "-l"]);
    assert_done(&output);
    let state = host.path("state");
    let proxy = format!("vm --state '{}' connect web 22\n", state.display());
    let printed = text(&output.stdout);
    assert!(printed.contains(&proxy), "{printed}");
    assert!(printed.contains("User=me\n") && printed.ends_with("\nweb\nls\n-l\n"), "{printed}");
}

#[test]
fn connect_carries_bytes_both_ways_through_the_socket_that_the_machine_names() {
    let host = Host::with_web();
    fs::create_dir_all(host.path("runner-1/share/microvm")).unwrap();
    fs::write(host.path("runner-1/share/microvm/machine.json"), "{\"control\": \"to\"}").unwrap();
    let control = UnixListener::bind(host.web("to")).unwrap();
    let vsock = UnixListener::bind(host.web("vsock")).unwrap();
    let machine = thread::spawn(move || {
        let (mut client, _) = control.accept().unwrap();
        let mut call = Vec::new();
        BufReader::new(client.try_clone().unwrap()).read_until(0, &mut call).unwrap();
        let reply = "{\"parameters\":{\"configuration\":{\"vsock\":{\"socket\":\"vsock\"}}}}\0";
        client.write_all(reply.as_bytes()).unwrap();
        let (mut client, _) = vsock.accept().unwrap();
        let mut from_client = BufReader::new(client.try_clone().unwrap());
        let mut line = String::new();
        from_client.read_line(&mut line).unwrap();
        client.write_all(b"OK 1024\nguest first").unwrap();
        from_client.read_to_string(&mut line).unwrap();
        line
    });
    let mut command = host.command(env!("CARGO_BIN_EXE_nixvmm"));
    command
        .args(["vm", "--state=state", "connect", "web", "22"])
        .stdin(std::process::Stdio::null());
    let output = command.output().unwrap();
    assert_eq!(text(&output.stdout), "guest first");
    assert_done(&output);
    assert_eq!(machine.join().unwrap(), "CONNECT 22\n");
}

#[test]
fn called_microvm_it_takes_what_upstream_takes() {
    let host = Host::new();
    let microvm = host.path("microvm");
    symlink(env!("CARGO_BIN_EXE_nixvmm"), &microvm).unwrap();
    let run = |arguments: &[&str]| {
        host.command(&microvm).args(["--state", "state"]).args(arguments).output().unwrap()
    };
    assert_done(&run(&["-f", "/etc/x", "-c", "web"]));
    assert_eq!(fs::read_to_string(host.web("flake")).unwrap(), "/etc/x\n");
    host.builds("2");
    let output = run(&["-l"]);
    assert!(text(&output.stdout).contains("outdated"), "{}", text(&output.stderr));
    assert_done(&run(&["-Ru", "web"]));
    assert_eq!(host.runner("current"), "runner-2");
    assert_done(&run(&["-r", "web"]));
    assert_eq!(run(&["-c", "../web"]).status.code(), Some(2));
    let output = host.command(&microvm).args(["list", "--state", "state"]).output().unwrap();
    assert!(text(&output.stdout).contains("web"), "{}", text(&output.stderr));
}
