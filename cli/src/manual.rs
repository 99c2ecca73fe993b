//! The manual page and shell completions, from the definitions of the command line.

use std::io::{self, Write};

use anyhow::Result;
use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::args::CommandLine;

/// Prints completions for `shell`.
pub(crate) fn print_completions(shell: Shell) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut CommandLine::flat(), "nixvmm", &mut text);
    Ok(io::stdout().lock().write_all(&text)?)
}

/// Prints the manual page.
pub(crate) fn print_page() -> Result<()> {
    Ok(io::stdout().lock().write_all(&page()?)?)
}

fn page() -> io::Result<Vec<u8>> {
    let man = Man::new(CommandLine::flat());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    synopsis().to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    commands().to_writer(&mut page)?;
    sections().to_writer(&mut page)?;
    man.render_version_section(&mut page)?;
    Ok(page)
}

/// What is typed.
pub(crate) const SYNOPSIS: [(&str, &str); 8] = [
    ("nixvmm [run]", "--kernel FILE [OPTIONS]"),
    ("nixvmm check", "[OPTIONS]"),
    ("nixvmm ctl", "SOCKET VERB [ARGUMENTS] [--json]"),
    ("nixvmm vm", "VERB [NAME] [ARGUMENTS] [--state DIR]"),
    (
        "microvm",
        "-c NAME [-f FLAKE | -i EXISTING] | -u [-R] NAME... | -r NAME | -s NAME [COMMAND] | -l",
    ),
    ("nixvmm unpack-kernel", "BZIMAGE VMLINUX"),
    ("nixvmm completions", "SHELL"),
    ("nixvmm man", ""),
];

fn synopsis() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    for (command, arguments) in SYNOPSIS {
        roff.text([bold(command), roman(" "), roman(arguments)]);
        roff.control("br", []);
    }
    roff
}

fn commands() -> Roff {
    let mut roff = Roff::new();
    let mut command_line = CommandLine::command();
    command_line.build();
    roff.control("SH", ["COMMANDS"]);
    for command in command_line.get_subcommands() {
        describe(&mut roff, command);
    }
    for (name, title) in [("ctl", "VERBS OF nixvmm ctl"), ("vm", "VERBS OF nixvmm vm")] {
        roff.control("SH", [title]);
        let command = command_line.find_subcommand(name);
        for verb in command.into_iter().flat_map(clap::Command::get_subcommands) {
            describe(&mut roff, verb);
            flags(&mut roff, verb);
        }
    }
    roff
}

/// A command with its arguments and what it does.
fn describe(roff: &mut Roff, command: &clap::Command) {
    let arguments: String = command
        .get_positionals()
        .map(|argument| {
            let name = argument.get_id().as_str().to_uppercase();
            if argument.is_required_set() { format!(" {name}") } else { format!(" [{name}]") }
        })
        .collect();
    roff.control("TP", []);
    roff.text([bold(command.get_name()), roman(arguments)]);
    roff.text([roman(command.get_about().map(ToString::to_string).unwrap_or_default())]);
}

/// The flags that a verb has for itself.
fn flags(roff: &mut Roff, command: &clap::Command) {
    let own = |flag: &&clap::Arg| {
        !flag.is_positional() && !flag.is_global_set() && flag.get_id() != "help"
    };
    for flag in command.get_arguments().filter(own) {
        let short = flag.get_short().map(|short| format!("-{short}, ")).unwrap_or_default();
        let long = flag.get_long().unwrap_or_default();
        let takes_value = flag.get_action().takes_values();
        let values = flag.get_value_names().filter(|_| takes_value).unwrap_or_default();
        let values: String = values.iter().map(|value| format!(" {value}")).collect();
        roff.control("RS", []);
        roff.control("TP", []);
        roff.text([bold(format!("{short}--{long}")), roman(values)]);
        roff.text([roman(flag.get_help().map(ToString::to_string).unwrap_or_default())]);
        roff.control("RE", []);
    }
}

/// What each section says: paragraphs with or without a term before them.
pub(crate) const SECTIONS: [(&str, &[(&str, &str)]); 4] = [
    (
        "SIGNALS",
        &[
            (
                "SIGTERM, SIGINT, SIGHUP, SIGRTMIN+4",
                "Press the guest's power button until it ends; a second signal ends it at once. \
                 The last one is what `machinectl poweroff` sends.",
            ),
            (
                "SIGUSR1",
                "The guest is told the sizes that the images of all disks have by now, as \
                 `nixvmm ctl SOCKET resize DISK` does for one.",
            ),
        ],
    ),
    (
        "EXIT STATUS",
        &[
            ("0", "The guest powered off, or the command did what it was asked for."),
            ("1", "The machine could not be built, or could not go on."),
            ("2", "The command line or a configuration file is wrong."),
            (
                "3",
                "The guest rebooted, with --on-reboot exit; `nixvmm vm status` found that it does \
                 not run.",
            ),
            ("4", "The guest's kernel panicked."),
            ("5", "A processor of the guest met a triple fault."),
            (
                "6",
                "The guest did not power off in time after it was asked to, or the machine was \
                 ended at once by Ctrl-A x, a second signal or `nixvmm ctl SOCKET stop`.",
            ),
            ("7", "The guest's watchdog expired, with --watchdog exit."),
            (
                "another's",
                "`nixvmm vm` becomes ssh for `shell`, journalctl for `logs`, the runner for `run`.",
            ),
            (
                "159 (SIGSYS)",
                "The sandbox ended the process, and its last line on standard error names the \
                 system call.",
            ),
        ],
    ),
    (
        "FILES",
        &[
            ("/dev/kvm", "Must be open to the user for reading and writing."),
            (
                "SOCKET",
                "Where a machine with --control listens, open to its owner only. It speaks \
                 varlink: `varlinkctl introspect SOCKET io.nixvmm.Machine` lists all calls. A \
                 socket that a service manager passes under the name control \
                 (FileDescriptorName=control) is used in its place.",
            ),
            (
                "/run/systemd/machine/io.systemd.Machine",
                "Where systemd-machined listens, for --machined.",
            ),
            (
                "/var/lib/microvms/NAME",
                "A guest of `nixvmm vm` and its units: `current` leads to the runner that the next \
                 start runs, `booted` to what runs, `old` to what a rollback goes back to, `flake` \
                 says what it is built from; `toplevel` marks one that the host's configuration \
                 has. Its images and sockets are there too.",
            ),
            (
                "/nix/var/nix/gcroots/microvm",
                "Links that keep all three from the garbage collector.",
            ),
            (
                "FILE.json",
                "A machine, as `nixvmm check` prints it. Each key has the name of its flag; keys \
                 that are left out have their defaults, unknown ones are refused. Of several files \
                 later ones win key by key, lists and consoles as a whole.",
            ),
        ],
    ),
    (
        "EXAMPLES",
        &[
            (
                "nixvmm --kernel bzImage --initrd initrd --root store.erofs",
                "A guest on this terminal; Ctrl-A x ends it.",
            ),
            (
                "nixvmm --kernel vmlinux --memory 4G,hugepages=2M --cpus 4 --disk \
                 data.img,serial=data --console socket,path=/run/guest/console",
                "A guest with a volume, whose console waits for a client.",
            ),
            (
                "nixvmm vm create web --flake github:example/guests --start",
                "A guest that is a unit, built from nixosConfigurations.web of a flake.",
            ),
            (
                "nixvmm check --config guest.json --cpus 8 > resolved.json",
                "What a configuration and a flag come to.",
            ),
        ],
    ),
];

fn sections() -> Roff {
    let mut roff = Roff::new();
    for (title, paragraphs) in SECTIONS {
        roff.control("SH", [title]);
        for (term, text) in paragraphs {
            roff.control("TP", []);
            roff.text([bold(*term)]);
            roff.text([roman(*text)]);
        }
    }
    roff
}
