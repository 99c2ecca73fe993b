//! What guests do, and ways into them.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::thread;

use serde_json::Value;

use crate::host::{Host, assert_done, assert_refused, text};

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
    let expected = [
        "systemctl start -- nixvmm@web.service nixvmm@db.service",
        "systemctl stop -- nixvmm@web.service nixvmm*@web.service nixvmm@db.service \
         nixvmm*@db.service",
    ];
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
    command.args(["vm", "--state=state", "connect", "web", "22"]).stdin(Stdio::null());
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
