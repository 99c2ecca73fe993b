use std::path::Path;

use vmm::config::{ByteSize, Engine};

use super::*;

fn parse(arguments: &[&str]) -> Result<Command, clap::Error> {
    let arguments = std::iter::once(&"nixvmm").chain(arguments).map(OsString::from);
    Command::read(with_command(arguments))
}

fn config(arguments: &[&str]) -> Config {
    match parse(arguments).unwrap() {
        Command::Run(machine) => machine.config().unwrap(),
        other => panic!("{other:?}"),
    }
}

/// The first line of what is wrong with `arguments`.
fn refusal(arguments: &[&str]) -> String {
    let error = parse(arguments).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string().lines().next().unwrap().to_owned()
}

#[test]
fn the_definitions_hold_together() {
    CommandLine::command().debug_assert();
    CommandLine::flat().debug_assert();
}

#[test]
fn run_is_the_default_command() {
    assert_eq!(config(&["--kernel", "k"]), config(&["run", "--kernel", "k"]));
    for help in ["--help", "-h"] {
        let error = parse(&[help]).unwrap_err();
        assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp);
        assert!(error.to_string().contains("unpack-kernel"));
    }
    assert_eq!(parse(&["--version"]).unwrap_err().exit_code(), 0);
    assert_eq!(parse(&[]).unwrap_err().exit_code(), 2);
}

#[test]
fn run_read_by_itself_says_what_it_says_among_the_commands() {
    for arguments in [["run", "--help"], ["run", "--cpus=x"], ["run", "--kernl=k"], ["run", "k"]] {
        let words = std::iter::once("nixvmm").chain(arguments);
        let among = CommandLine::try_parse_from(words).unwrap_err();
        let alone = parse(&arguments).unwrap_err();
        assert_eq!(alone.to_string(), among.to_string());
        assert_eq!(alone.exit_code(), among.exit_code());
    }
}

#[test]
fn without_flags_everything_has_its_default() {
    assert_eq!(config(&["run"]), Config::default());
}

#[test]
fn every_flag_reaches_the_machine() {
    let config = config(&[
        "--kernel=k",
        "--initrd=i",
        "--cmdline=quiet",
        "--boot-protocol=pvh",
        "--root=r",
        "--disk=a,readonly",
        "--disk=path=b,engine=sync",
        "--net=vmtap0,vhost=off",
        "--pmem=store.erofs,readonly",
        "--share=home,source=/home,cache=never",
        "--store-share=closure=c,store=/store,tag=s",
        "--vsock=auto",
        "--cpus=4",
        "--memory=1G,shared",
        "--console=pty",
        "--serial=file,path=s",
        "--control=c",
        "--machined=m,socket=s",
        "--rng=off",
        "--balloon=off",
        "--transport=mmio",
        "--uuid=00112233-4455-6677-8899-aabbccddeeff",
        "--oem-string=x",
        "--oem-string=y",
        "--credential=name=value",
        "--ready=booted",
        "--on-reboot=exit",
        "--watchdog=reset",
        "--shutdown-timeout=7",
        "--sandbox=off",
        "--timing",
    ]);
    let text = serde_json::to_string(&config).unwrap();
    let defaults = serde_json::to_value(Config::default()).unwrap();
    let changed = serde_json::to_value(&config).unwrap();
    for (key, value) in defaults.as_object().unwrap() {
        assert_ne!(changed.get(key), Some(value), "{key} in {text}");
    }
    assert_eq!(config.memory.size, ByteSize(1 << 30));
    assert!(config.memory.shared);
    assert_eq!(config.disks[0], Disk { readonly: true, ..Disk::new("a") });
    assert_eq!(config.disks[1], Disk { engine: Engine::Sync, ..Disk::new("b") });
    assert_eq!(config.serial, Console::File { path: "s".into() });
    assert_eq!(config.smbios.oem_strings, ["x", "y"]);
}

#[test]
fn flags_win_over_files_and_lists_add_up() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("guest.json");
    let text = r#"{"kernel": "k", "cpus": 2, "memory": {"size": "2G", "prealloc": true},
                   "disks": [{"path": "a"}], "rng": false}"#;
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let config = config(&["--config", file, "--cpus=3", "--memory=1G", "--disk=b"]);
    assert_eq!(config.kernel, Path::new("k"));
    assert_eq!(config.cpus, 3);
    assert_eq!((config.memory.size, config.memory.prealloc), (ByteSize(1 << 30), true));
    assert_eq!(config.disks, [Disk::new("a"), Disk::new("b")]);
    assert!(!config.rng);
}

#[test]
fn what_is_wrong_is_named_with_flag_value_and_remedy() {
    for (argument, expected) in [
        (
            "--disk=a,redonly",
            "error: invalid value 'a,redonly' for '--disk <[path=]FILE[,readonly][,serial=ID]\
             [,direct][,engine=auto|uring|sync]>': unknown key redonly: did you mean readonly?",
        ),
        (
            "--net=vmtap0,que=2",
            "error: invalid value 'vmtap0,que=2' for '--net <tap=NAME|fd=N[:M…]|\
             type=macvtap,fd=N[:M…]|type=user|vhost-user=SOCKET[,mac=ADDRESS][,queues=PAIRS]\
             [,vhost=auto|on|off][,mtu=BYTES]>': unknown key que: there are tap, fd, type, \
             vhost-user, mac, queues, vhost, mtu",
        ),
        (
            "--memory=4GB",
            "error: invalid value '4GB' for '--memory <[size=]SIZE[,max=SIZE][,shared]\
             [,hugepages=2M|1G][,prealloc][,mergeable]>': size=4GB: not a size: write bytes or a \
             binary unit, as in 4096, 512M or 4GiB",
        ),
        (
            "--cpus=many",
            "error: invalid value 'many' for '--cpus <NUMBER>': invalid digit found in string",
        ),
        (
            "--serial=tty",
            "error: invalid value 'tty' for '--serial <PLACE>': unknown kind tty: \
             there are off, stdio, pty, file,path=FILE and socket,path=FILE",
        ),
        ("--transport=isa", "error: invalid value 'isa' for '--transport <BUS>'"),
        ("--sandbox=no", "error: invalid value 'no' for '--sandbox <on|off>'"),
        ("--kernl=k", "error: unexpected argument '--kernl' found"),
    ] {
        assert_eq!(refusal(&[argument]), expected, "{argument}");
    }
    let error = parse(&["--kernl=k"]).unwrap_err().to_string();
    assert!(error.contains("a similar argument exists: '--kernel'"), "{error}");
    assert_eq!(refusal(&["chek"]), "error: unrecognized subcommand 'chek'");
}

#[test]
fn every_name_that_is_offered_is_understood() {
    for command in ["run", "check"] {
        let definitions = CommandLine::command();
        let flags = definitions.find_subcommand(command).unwrap();
        for flag in flags.get_arguments() {
            for value in flag.get_possible_values() {
                let name = flag.get_long().unwrap();
                if flag.get_num_args().is_some_and(|number| number.takes_values()) {
                    parse(&[command, &format!("--{name}={}", value.get_name())]).unwrap();
                }
            }
        }
    }
}
