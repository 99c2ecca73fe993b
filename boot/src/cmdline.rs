//! The kernel's command line.

use arch::memory::{GuestAddress, GuestMemory};
use arch::target::layout::COMMAND_LINE;

/// What fits beside the terminating NUL in the place for command lines, in bytes.
#[expect(clippy::cast_possible_truncation, reason = "64 KiB fit any usize")]
const PLACE_MAX: usize = (COMMAND_LINE.end - COMMAND_LINE.start - 1) as usize;

/// A command line that no kernel would read as it was meant.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel keeps fewer bytes.
    #[error("the command line has {len} bytes, and this kernel takes {limit}: shorten it")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// What the kernel takes, in bytes.
        limit: usize,
    },
    /// NUL would end it, other control characters are never meant.
    #[error("the command line has a control character ({byte:#04x}) at byte {offset}: remove it")]
    ControlCharacter {
        /// The character.
        byte: u8,
        /// Its position in bytes.
        offset: usize,
    },
}

/// Writes the command line where kernels find it; `max` is what the kernel takes, in bytes.
pub(crate) fn write(
    memory: GuestMemory,
    command_line: &str,
    max: usize,
) -> Result<(), crate::Error> {
    check(command_line, max)?;
    let mut bytes = Vec::with_capacity(command_line.len() + 1);
    bytes.extend_from_slice(command_line.as_bytes());
    bytes.push(0);
    memory.write_bytes(GuestAddress(COMMAND_LINE.start), &bytes)?;
    Ok(())
}

fn check(command_line: &str, max: usize) -> Result<(), Error> {
    let (len, limit) = (command_line.len(), max.min(PLACE_MAX));
    if len > limit {
        return Err(Error::TooLong { len, limit });
    }
    let control = |(_, byte): &(usize, u8)| byte.is_ascii_control() && *byte != b'\t';
    match command_line.bytes().enumerate().find(control) {
        Some((offset, byte)) => Err(Error::ControlCharacter { byte, offset }),
        None => Ok(()),
    }
}

/// Whether the command line sets `parameter` (a name like `root`, without `=`).
///
/// As in Linux, quotes protect spaces, a lone `--` ends the kernel's own parameters, and `-` in a
/// name is the same as `_`.
pub fn has_parameter(command_line: &str, parameter: &str) -> bool {
    let underscored = |byte| if byte == b'-' { b'_' } else { byte };
    let wanted = || parameter.bytes().map(underscored);
    parameter_names(command_line).any(|name| name.bytes().map(underscored).eq(wanted()))
}

fn parameter_names(command_line: &str) -> impl Iterator<Item = &str> {
    words(command_line)
        .take_while(|word| *word != "--")
        .map(|word| word.trim_start_matches('"'))
        .map(|word| word.split_once('=').map_or(word, |(name, _)| name))
}

/// Splits at spaces outside double quotes.
fn words(command_line: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    command_line
        .split(move |character: char| {
            quoted ^= character == '"';
            character.is_ascii_whitespace() && !quoted
        })
        .filter(|word| !word.is_empty())
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_line_as_long_as_the_kernel_takes_passes_and_one_byte_more_is_refused() {
        assert_eq!(check(&"a".repeat(2047), 2047), Ok(()));
        let refusal = check(&"a".repeat(2048), 2047).unwrap_err();
        assert_eq!(refusal, Error::TooLong { len: 2048, limit: 2047 });
        let text = refusal.to_string();
        assert!(text.contains("2048") && text.contains("2047"), "{text}");
        assert!(check(&"a".repeat(0x1_0000), usize::MAX).is_err());
    }

    #[test]
    fn control_characters_are_refused_with_their_place() {
        let refusal = |byte, offset| Err(Error::ControlCharacter { byte, offset });
        assert_eq!(check("quiet\0 init=/x", 99), refusal(0, 5));
        assert_eq!(check("quiet\n", 99), refusal(b'\n', 5));
        assert_eq!(check("a\tb=\u{e4}", 99), Ok(()));
    }

    #[test]
    fn finds_parameters_by_their_whole_name() {
        let line = r#"console=hvc0 "root=LABEL=a b" quiet dyndbg="file x root=y" -- init=/no"#;
        assert!(has_parameter(line, "console"));
        assert!(has_parameter(line, "root"));
        assert!(has_parameter(line, "quiet"));
        for absent in ["roo", "LABEL", "init", "hvc0", "file"] {
            assert!(!has_parameter(line, absent), "{absent}");
        }
    }

    #[test]
    fn dashes_and_underscores_in_names_are_the_same() {
        assert!(has_parameter("panic-on_oops=1", "panic_on-oops"));
        assert!(!has_parameter("init=/a_b", "init=/a-b"));
    }

    #[test]
    fn quoted_text_holds_no_parameters() {
        assert!(!has_parameter(r#"a="x root=y z""#, "root"));
    }
}
