//! Guests come, change and go.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::host::{Host, assert_done, assert_refused, text};

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
fn an_instance_has_the_system_of_another_guest_and_nothing_is_built() {
    let host = Host::with_web();
    host.calls();
    let output = host.vm(&["create", "db", "--instance-of", "web"]);
    assert_done(&output);
    assert!(text(&output.stderr).contains("state/db/machine.d/*.json"), "{}", text(&output.stderr));
    assert_eq!(host.entries("state/db"), ["current"]);
    let runner = fs::canonicalize(host.path("runner-1")).unwrap();
    assert_eq!(fs::read_link(host.path("state/db/current")).unwrap(), runner);
    assert_eq!(host.calls(), [""; 0]);
    // What becomes of the one is nothing to the other.
    assert_done(&host.vm(&["destroy", "web"]));
    assert_eq!(fs::read_link(host.path("state/db/current")).unwrap(), runner);
    let output = host.vm(&["create", "other", "-i", "web"]);
    assert_refused(&output, 1, &["web: there is no such guest"]);
    assert_eq!(host.entries("state"), ["db", "web"]);
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
fn destroy_stops_the_guest_and_keeps_what_it_wrote_unless_told_otherwise() {
    let host = Host::with_web();
    fs::write(host.web("data.img"), "precious").unwrap();
    let unit =
        "Id=nixvmm@web.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n";
    fs::write(host.path("units/nixvmm@web.service"), unit).unwrap();
    host.calls();
    assert_done(&host.vm(&["destroy", "web"]));
    let expected = [
        "systemctl stop -- nixvmm@web.service nixvmm*@web.service",
        "systemctl disable -- nixvmm@web.service",
    ];
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
