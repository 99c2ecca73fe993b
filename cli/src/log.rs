//! Where log lines go: standard error, with priorities where the journal reads it.

use std::fmt::{Display, Write as _};
use std::io::{self, Write as _};

use log::{Level, LevelFilter, Log, Metadata, Record};
use rustix::fs::fstat;

/// Starts logging what is at least as important as `level`.
pub(crate) fn start(level: LevelFilter) {
    let sink = Box::leak(Box::new(Sink { journal: journal_reads_stderr() }));
    if log::set_logger(sink).is_ok() {
        log::set_max_level(level);
    }
}

/// Tells why the program ends, whatever the log level is.
pub(crate) fn report(error: &anyhow::Error) {
    write(&line(journal_reads_stderr(), Level::Error, "nixvmm", &format_args!("{error:#}")));
}

/// How a line that tells of an error begins.
pub(crate) fn error_prefix() -> &'static str {
    if journal_reads_stderr() { "<3>" } else { "nixvmm: error: " }
}

struct Sink {
    journal: bool,
}

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            write(&line(self.journal, record.level(), record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// A message as standard error gets it. For the journal each of its lines has a priority
/// (sd-daemon(3)); elsewhere the program's name says whose it is.
fn line(journal: bool, level: Level, target: &str, message: &dyn Display) -> String {
    let (priority, name) = match level {
        Level::Error => (3, "error"),
        Level::Warn => (4, "warning"),
        Level::Info => (6, "info"),
        Level::Debug | Level::Trace => (7, "debug"),
    };
    let mut text = message.to_string();
    if level >= Level::Debug {
        text.insert_str(0, &format!("{target}: "));
    }
    let mut lines = String::with_capacity(text.len() + 32);
    for part in text.lines() {
        // Writing into a string cannot fail.
        let _ = match (journal, level) {
            (true, _) => writeln!(lines, "<{priority}>{part}"),
            (false, Level::Info) => writeln!(lines, "nixvmm: {part}"),
            (false, _) => writeln!(lines, "nixvmm: {name}: {part}"),
        };
    }
    lines
}

/// One write, so that lines of several threads stay whole. Nobody is left to hear of its failure.
fn write(lines: &str) {
    let _ = io::stderr().lock().write_all(lines.as_bytes());
}

fn journal_reads_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    fstat(io::stderr()).is_ok_and(|file| is_stream(&stream, file.st_dev, file.st_ino))
}

/// Whether `stream` (`DEVICE:INODE`, systemd.exec(5)) names this file.
fn is_stream(stream: &str, device: u64, inode: u64) -> bool {
    stream
        .split_once(':')
        .is_some_and(|(one, other)| one.parse() == Ok(device) && other.parse() == Ok(inode))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_journal_gets_a_priority_on_every_line() {
        assert_eq!(line(true, Level::Error, "vmm", &"a\nb"), "<3>a\n<3>b\n");
        assert_eq!(line(true, Level::Warn, "vmm", &"a"), "<4>a\n");
        assert_eq!(line(true, Level::Info, "vmm", &"a"), "<6>a\n");
        assert_eq!(line(true, Level::Debug, "vmm::vcpu", &"a"), "<7>vmm::vcpu: a\n");
    }

    #[test]
    fn a_person_gets_the_programs_name() {
        assert_eq!(line(false, Level::Error, "vmm", &"a"), "nixvmm: error: a\n");
        assert_eq!(line(false, Level::Warn, "vmm", &"a"), "nixvmm: warning: a\n");
        assert_eq!(line(false, Level::Info, "vmm", &"a"), "nixvmm: a\n");
        assert_eq!(line(false, Level::Trace, "vmm", &"a"), "nixvmm: debug: vmm: a\n");
    }

    #[test]
    fn only_the_journals_own_stream_counts() {
        assert!(is_stream("64512:123", 64512, 123));
        for other in ["64512:124", "1:123", "123", "", "a:b", "64512:123:1"] {
            assert!(!is_stream(other, 64512, 123), "{other}");
        }
    }
}
