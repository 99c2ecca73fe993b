//! Images are copied and come back.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};

use rustix::fs::{FlockOperation, fcntl_lock};
use serde_json::Value;

use crate::host::{Host, assert_done, assert_refused, text};

const MACHINE: &str = r#"{
    "control": "to",
    "disks": [
        { "path": "state.img" },
        { "path": "/opt/store.img", "readonly": true },
        { "path": "images/data.img" }
    ]
}"#;

/// A host with the guest `web`, which writes to two images.
fn host() -> Host {
    let host = Host::with_web();
    for runner in ["runner-1", "runner-2"] {
        let share = host.path(runner).join("share/microvm");
        fs::create_dir_all(&share).unwrap();
        fs::write(share.join("machine.json"), MACHINE).unwrap();
    }
    fs::create_dir_all(host.web("images")).unwrap();
    write(&host, "first");
    host
}

fn write(host: &Host, word: &str) {
    for image in ["state.img", "images/data.img"] {
        fs::write(host.web(image), format!("{word} in {image}")).unwrap();
    }
}

#[track_caller]
fn assert_has(host: &Host, word: &str) {
    for image in ["state.img", "images/data.img"] {
        let content = fs::read_to_string(host.web(image)).unwrap();
        assert_eq!(content, format!("{word} in {image}"));
    }
}

fn listed(host: &Host) -> Vec<Value> {
    let output = host.vm(&["snapshots", "web", "--json"]);
    assert_done(&output);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Stands in for the machine of `web`: replies to calls of one connection and returns their names;
/// `paused` is called before a pause is reported.
fn machine(host: &Host, paused: impl FnOnce() + Send + 'static) -> JoinHandle<Vec<String>> {
    let control = UnixListener::bind(host.web("to")).unwrap();
    let machine: Value = serde_json::from_str(MACHINE).unwrap();
    thread::spawn(move || {
        let (mut client, _) = control.accept().unwrap();
        let calls = BufReader::new(client.try_clone().unwrap()).split(0);
        let (mut names, mut paused) = (Vec::new(), Some(paused));
        for call in calls {
            let call: Value = serde_json::from_slice(&call.unwrap()).unwrap();
            let name = call["method"].as_str().unwrap().rsplit_once('.').unwrap().1.to_owned();
            let reply = match name.as_str() {
                "GetState" => serde_json::json!({ "state": "running" }),
                "GetConfiguration" => serde_json::json!({ "configuration": machine }),
                "Pause" => {
                    paused.take().unwrap()();
                    serde_json::json!({})
                }
                _ => serde_json::json!({}),
            };
            write!(client, "{}\0", serde_json::json!({ "parameters": reply })).unwrap();
            names.push(name);
        }
        names
    })
}

#[test]
fn a_stopped_guest_gets_back_what_it_had_and_can_undo_that() {
    let host = host();
    fs::set_permissions(host.web("state.img"), fs::Permissions::from_mode(0o640)).unwrap();
    assert_done(&host.vm(&["snapshot", "web", "good"]));
    write(&host, "second");
    let output = host.vm(&["restore", "web", "good"]);
    assert_done(&output);
    assert!(text(&output.stderr).contains("what was there is the snapshot 1"));
    assert_has(&host, "first");
    assert_eq!(fs::metadata(host.web("state.img")).unwrap().mode() & 0o777, 0o640);
    assert_eq!(host.entries("state/web"), ["current", "flake", "images", "state.img"]);
    assert_eq!(host.entries("state/web/images"), ["data.img"]);

    let snapshots = listed(&host);
    let tags: Vec<_> = snapshots.iter().map(|snapshot| snapshot["tag"].as_str().unwrap()).collect();
    assert_eq!(tags.len(), 2);
    let kept = snapshots.iter().find(|snapshot| snapshot["tag"] == "1").unwrap();
    assert_eq!(kept["note"], "before good was restored");
    assert_eq!((&kept["link"], &kept["running"]), (&"current".into(), &false.into()));
    assert_eq!(kept["runner"].as_str(), host.path("runner-1").to_str());
    assert_eq!(kept["images"][1]["path"], "images/data.img");

    assert_done(&host.vm(&["restore", "web", "1", "--discard"]));
    assert_has(&host, "second");
    assert_eq!(listed(&host).len(), 2);
    assert_eq!(fs::metadata(host.path("state/.snapshots")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn a_running_guest_rests_while_its_images_are_copied() {
    let host = host();
    symlink(host.path("runner-2"), host.web("booted")).unwrap();
    let image = host.web("state.img");
    // What is written when the pause is reported is in the copy.
    let machine = machine(&host, move || fs::write(image, "last words").unwrap());
    assert_done(&host.vm(&["snapshot", "web"]));
    assert_eq!(machine.join().unwrap(), ["GetState", "GetConfiguration", "Pause", "Resume"]);
    let copy = fs::read_to_string(host.path("state/.snapshots/web/1/0.img")).unwrap();
    assert_eq!(copy, "last words");
    let snapshots = listed(&host);
    assert_eq!((&snapshots[0]["link"], &snapshots[0]["running"]), (&"booted".into(), &true.into()));
    assert_eq!(snapshots[0]["runner"].as_str(), host.path("runner-2").to_str());
}

#[test]
fn a_snapshot_that_is_interrupted_leaves_nothing_and_lets_the_guest_go_on() {
    let host = host();
    let (identity, wanted) = std::sync::mpsc::channel::<u32>();
    let machine = machine(&host, move || {
        let process = i32::try_from(wanted.recv().unwrap()).unwrap();
        let process = rustix::process::Pid::from_raw(process).unwrap();
        rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    });
    let mut command = host.command(env!("CARGO_BIN_EXE_nixvmm"));
    command.args(["vm", "--state=state", "snapshot", "web", "good"]);
    let child: Child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    identity.send(child.id()).unwrap();
    assert_refused(&child.wait_with_output().unwrap(), 1, &["state.img: interrupted"]);
    assert_eq!(machine.join().unwrap().last().unwrap(), "Resume");
    assert_eq!(host.entries("state/.snapshots/web"), [""; 0]);
}

#[test]
fn a_guest_that_runs_is_not_restored_and_one_without_a_socket_not_copied() {
    let host = host();
    assert_done(&host.vm(&["snapshot", "web", "good"]));
    write(&host, "second");
    host.has_unit("nixvmm@web.service", "active");
    let output = host.vm(&["restore", "web", "good"]);
    assert_refused(&output, 1, &["web: runs", "nixvmm vm stop web"]);
    host.has_unit("nixvmm@web.service", "inactive");
    // A machine that nobody knows of.
    let image = File::options().write(true).open(host.web("state.img")).unwrap();
    fcntl_lock(&image, FlockOperation::NonBlockingLockExclusive).unwrap();
    for verb in [&["restore", "web", "good"][..], &["snapshot", "web", "other"]] {
        assert_refused(&host.vm(verb), 1, &["web: state.img is in use by a machine"]);
    }
    assert_has(&host, "second");
    assert_eq!(host.entries("state/.snapshots/web"), ["good"]);
}

#[test]
fn what_a_guest_puts_into_its_folder_leads_nowhere() {
    let host = host();
    assert_done(&host.vm(&["snapshot", "web", "good"]));
    fs::write(host.path("secret"), "secret").unwrap();
    fs::remove_file(host.web("state.img")).unwrap();
    symlink(host.path("secret"), host.web("state.img")).unwrap();
    let output = host.vm(&["snapshot", "web", "linked"]);
    assert_done(&output);
    assert!(text(&output.stderr).contains("state.img is no file of the guest's folder"));
    assert_eq!(listed(&host)[1]["images"].as_array().unwrap().len(), 1);
    // A restore replaces the link and not what it leads to.
    assert_done(&host.vm(&["restore", "web", "good"]));
    assert_eq!(fs::read_to_string(host.path("secret")).unwrap(), "secret");
    assert_has(&host, "first");

    fs::rename(host.web("images"), host.path("elsewhere")).unwrap();
    symlink(host.path("elsewhere"), host.web("images")).unwrap();
    write(&host, "second");
    assert_refused(&host.vm(&["restore", "web", "good"]), 1, &["cannot restore images/data.img"]);
    assert_has(&host, "second");
}

#[test]
fn a_record_that_leads_elsewhere_is_refused() {
    let host = host();
    assert_done(&host.vm(&["snapshot", "web", "good"]));
    let record = host.path("state/.snapshots/web/good/snapshot.json");
    let text = fs::read_to_string(&record).unwrap();
    for path in ["../other/state.img", "/etc/passwd", "..", ""] {
        fs::write(&record, text.replace("images/data.img", path)).unwrap();
        assert_refused(&host.vm(&["restore", "web", "good"]), 1, &["web: cannot"]);
    }
    fs::write(&record, "{").unwrap();
    assert_refused(&host.vm(&["restore", "web", "good"]), 1, &["snapshot.json"]);
    assert_done(&host.vm(&["snapshots", "web", "--remove", "good"]));
    assert_eq!(host.entries("state/.snapshots/web"), [""; 0]);
}

#[test]
fn snapshots_have_names_of_their_own_and_go_with_their_guest() {
    let host = host();
    for name in ["../x", "..", ".", "", "a/b", ".new-a", "-a"] {
        for verb in
            [&["snapshot", "web"][..], &["restore", "web"], &["snapshots", "web", "--remove"]]
        {
            let output = host.vm(&[verb, &[name]].concat());
            assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output.stderr));
        }
    }
    assert_done(&host.vm(&["snapshot", "web", "good"]));
    assert_refused(&host.vm(&["snapshot", "web", "good"]), 1, &["--remove good"]);
    assert_done(&host.vm(&["snapshot", "web"]));
    let table = host.vm(&["snapshots", "web"]);
    assert!(text(&table.stdout).starts_with("SNAPSHOT  AGE"), "{}", text(&table.stdout));
    assert_done(&host.vm(&["snapshots", "web", "--remove", "good"]));
    assert_refused(&host.vm(&["restore", "web", "good"]), 1, &["nixvmm vm snapshots web"]);
    assert_refused(&host.vm(&["snapshots", "web", "--remove", "good"]), 1, &["no snapshot good"]);
    assert_done(&host.vm(&["destroy", "web"]));
    assert_eq!(host.entries("state/.snapshots/web"), ["1"]);
    assert_done(&host.vm(&["destroy", "web", "--remove-state"]));
    assert_eq!(host.entries("state/.snapshots"), [""; 0]);
}

#[test]
fn a_layer_of_the_instance_can_name_the_images() {
    let host = host();
    fs::create_dir_all(host.web("machine.d")).unwrap();
    let layer = "{\"disks\": [{ \"path\": \"only.img\" }]}";
    fs::write(host.web("machine.d/1.json"), layer).unwrap();
    fs::write(host.web("only.img"), "only").unwrap();
    assert_done(&host.vm(&["snapshot", "web"]));
    let images = &listed(&host)[0]["images"];
    assert_eq!(images.as_array().unwrap().len(), 1);
    assert_eq!((&images[0]["path"], &images[0]["size"]), (&"only.img".into(), &4.into()));
}
