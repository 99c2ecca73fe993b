//! The kernel's command line.

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

/// Whether the command line sets `parameter` (a name like `root`, without `=`).
///
/// Quotes protect spaces and a lone `--` ends the kernel's own parameters, as in Linux.
pub fn has_parameter(command_line: &str, parameter: &str) -> bool {
    parameters(command_line).any(|(name, _)| name == parameter)
}

/// The kernel's own parameters, each as its name and its value.
fn parameters(command_line: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    words(command_line)
        .take_while(|word| *word != "--")
        .map(|word| word.trim_start_matches('"'))
        .map(|word| word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value))))
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
    fn quoted_text_holds_no_parameters() {
        assert!(!has_parameter(r#"a="x root=y z""#, "root"));
    }
}
