use super::*;

#[test]
fn consoles_have_a_place_each() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.serial = Console::Stdio,
        "--serial: standard input and output is already the place of --console: \
         give one of them another",
    );
    fixture.refused(
        |config| {
            config.console = Console::File { path: fixture.path("log") };
            config.serial = Console::File { path: fixture.path("log") };
        },
        "--serial: @/log is already the place of --console: give one of them another",
    );
    fixture.refused(
        |config| config.console = Console::File { path: fixture.path("none/log") },
        "--console @/none/log: the folder @/none must exist: \
         No such file or directory (os error 2)",
    );
    fixture.refused(
        |config| config.console = Console::File { path: fixture.folder.path().into() },
        "--console @: a folder, and output needs a file",
    );
    fixture.refused(
        |config| config.serial = Console::Socket { path: fixture.path("kernel") },
        "--serial @/kernel: exists and is no socket: remove it or choose another name",
    );
    fixture.refused(
        |config| config.console = Console::Pty { link: Some(fixture.path("kernel/pty")) },
        "--console @/kernel/pty: @/kernel is no folder",
    );
    fixture.refused(
        |config| config.console = Console::Pty { link: Some(fixture.path("kernel")) },
        "--console @/kernel: exists and is no symbolic link: remove it or choose another name",
    );
    let long = format!("/tmp/{}", "x".repeat(103));
    fixture.refused(
        |config| config.console = Console::Socket { path: (&long).into() },
        &format!(
            "--console {long}: 108 bytes long, and a socket's path has at most 107: \
             use a shorter folder"
        ),
    );
}

#[test]
fn a_control_socket_has_a_place_of_its_own() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.control = Some(fixture.path("kernel")),
        "--control @/kernel: exists and is no socket: remove it or choose another name",
    );
    fixture.refused(
        |config| {
            config.console = Console::Socket { path: fixture.path("socket") };
            config.control = Some(fixture.path("socket"));
        },
        "--control: @/socket is already the place of a console: give one of them another",
    );
}
