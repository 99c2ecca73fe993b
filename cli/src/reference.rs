//! The handbook's reference of the command line, from the definitions that parse it.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use clap::{Arg, Command, CommandFactory as _};

use crate::args::CommandLine;
use crate::manual::{SECTIONS, SYNOPSIS};
use crate::vm::Microvm;

/// Set to anything, it has this test write the page that it otherwise compares.
const WRITE: &str = "NIXVMM_WRITE_REFERENCE";

const INTRODUCTION: &str = "\
# The command line

<!-- Written by a test from the program's definitions:
NIXVMM_WRITE_REFERENCE=1 cargo test -p nixvmm reference -->

What `nixvmm man` shows, and `--help` of each command. Standard output has data only; messages go
to standard error.
";

/// The examples are in other pages, with more words about them.
const LEFT_OUT: &str = "EXAMPLES";

#[test]
fn the_handbook_has_the_command_line_as_it_is_parsed() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/handbook/src");
    let file = Path::new(folder).join("reference-cli.md");
    let page = page();
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, &page).unwrap();
    }
    assert!(
        fs::read_to_string(&file).is_ok_and(|committed| committed == page),
        "reference-cli.md of the handbook is not what the program takes: \
         {WRITE}=1 cargo test -p nixvmm reference",
    );
}

fn page() -> String {
    let mut page = INTRODUCTION.to_owned();
    page.push('\n');
    for (command, arguments) in SYNOPSIS {
        writeln!(page, "    {}", format!("{command} {arguments}").trim_end()).unwrap();
    }
    let mut nixvmm = CommandLine::command();
    nixvmm.build();
    for command in nixvmm.get_subcommands().filter(|command| !command.is_hide_set()) {
        let title = format!("nixvmm {}", command.get_name());
        writeln!(page, "\n## {title}").unwrap();
        if command.get_name() == "check" {
            writeln!(page, "\n{} The flags are those of `run`.", about(command)).unwrap();
        } else {
            describe(&mut page, command, &title);
        }
    }
    let mut microvm = Microvm::command();
    microvm.build();
    page.push_str("\n## microvm\n");
    describe(&mut page, &microvm, "microvm");
    for (title, paragraphs) in SECTIONS.iter().filter(|(title, _)| *title != LEFT_OUT) {
        let (first, rest) = title.split_at(1);
        write!(page, "\n## {first}{}\n\n| | |\n|---|---|\n", rest.to_lowercase()).unwrap();
        for (term, text) in *paragraphs {
            writeln!(page, "| `{term}` | {} |", cell(text)).unwrap();
        }
    }
    page
}

/// What a command does, its arguments and flags, and its verbs in sections of their own.
fn describe(page: &mut String, command: &Command, title: &str) {
    writeln!(page, "\n{}", about(command)).unwrap();
    // A flag of all verbs stands at the command that has them.
    let is_verb = command.get_subcommands().next().is_none();
    let is_elsewhere = |argument: &&Arg| {
        matches!(argument.get_id().as_str(), "help" | "version")
            || is_verb && argument.is_global_set()
    };
    let arguments: Vec<_> =
        command.get_arguments().filter(|argument| !is_elsewhere(argument)).collect();
    if !arguments.is_empty() {
        page.push_str("\n| argument | meaning |\n|---|---|\n");
    }
    for argument in arguments {
        let meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
        writeln!(page, "| {} | {} |", cell(&written(argument)), cell(&meaning)).unwrap();
    }
    for verb in command.get_subcommands() {
        let title = format!("{title} {}", verb.get_name());
        writeln!(page, "\n### {title}").unwrap();
        // These are verbs of `nixvmm ctl`.
        if verb.has_subcommands() {
            writeln!(page, "\n{}", about(verb)).unwrap();
        } else {
            describe(page, verb, &title);
        }
    }
}

fn about(command: &Command) -> String {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let end = if about.ends_with('.') { "" } else { "." };
    let aliases: Vec<_> = command.get_visible_aliases().map(|name| format!("`{name}`")).collect();
    match aliases.is_empty() {
        true => format!("{about}{end}"),
        false => format!("{about}{end} Also called {}.", aliases.join(", ")),
    }
}

/// An argument as it is typed.
fn written(argument: &Arg) -> String {
    let values = argument.get_value_names().unwrap_or_default().join(" ");
    if argument.is_positional() {
        return if argument.is_required_set() {
            format!("`{values}`")
        } else {
            format!("`[{values}]`")
        };
    }
    let short = argument.get_short().map(|short| format!("-{short}"));
    let long = argument.get_long().map(|long| format!("--{long}"));
    let names: Vec<_> = short.into_iter().chain(long).collect();
    let takes_value = argument.get_action().takes_values();
    let value = if takes_value { format!(" {values}") } else { String::new() };
    format!("`{}{value}`", names.join(", "))
}

/// A text for the cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
