//! Where a console or serial port goes.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where a console or serial port goes; an object whose `kind` says which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(try_from = "Keys", into = "Keys")]
pub enum Console {
    /// There is none (`off`).
    Off,
    /// Standard input and output (`stdio`); a terminal is put into raw mode.
    Stdio,
    /// A new pseudoterminal (`pty`), whose name is printed on standard error.
    Pty {
        /// A symbolic link to make to it.
        link: Option<PathBuf>,
    },
    /// A file that receives the output (`file`); there is no input.
    File {
        /// The file: made when it does not exist, appended to otherwise.
        path: PathBuf,
    },
    /// A unix stream socket (`socket`) that one client at a time may join and leave.
    Socket {
        /// Where it listens.
        path: PathBuf,
    },
}

impl Console {
    /// The path that it takes for itself.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Off | Self::Stdio => None,
            Self::Pty { link } => link.as_deref(),
            Self::File { path } | Self::Socket { path } => Some(path),
        }
    }
}

/// A [`Console`] as JSON has it. An enum with fields would let unknown keys pass in kinds without.
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Keys {
    /// Which of them.
    kind: Kind,
    /// The file of kind `file`, or where kind `socket` listens; other kinds take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    /// A symbolic link to make to the pseudoterminal of kind `pty`. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    link: Option<PathBuf>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
enum Kind {
    /// There is none.
    Off,
    /// Standard input and output; a terminal is put into raw mode.
    Stdio,
    /// A new pseudoterminal, whose name is printed on standard error.
    Pty,
    /// A file that receives the output; there is no input.
    File,
    /// A unix stream socket that one client at a time may join and leave.
    Socket,
}

impl TryFrom<Keys> for Console {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, Self::Error> {
        Ok(match (keys.kind, keys.path, keys.link) {
            (Kind::Off, None, None) => Self::Off,
            (Kind::Stdio, None, None) => Self::Stdio,
            (Kind::Pty, None, link) => Self::Pty { link },
            (Kind::File, Some(path), None) => Self::File { path },
            (Kind::Socket, Some(path), None) => Self::Socket { path },
            (Kind::File | Kind::Socket, None, _) => return Err("this kind needs a `path`"),
            (Kind::Off | Kind::Stdio | Kind::Pty, Some(_), _) => {
                return Err("this kind takes no `path`");
            }
            (_, _, Some(_)) => return Err("only kind `pty` takes a `link`"),
        })
    }
}

impl From<Console> for Keys {
    fn from(console: Console) -> Self {
        let (kind, path, link) = match console {
            Console::Off => (Kind::Off, None, None),
            Console::Stdio => (Kind::Stdio, None, None),
            Console::Pty { link } => (Kind::Pty, None, link),
            Console::File { path } => (Kind::File, Some(path), None),
            Console::Socket { path } => (Kind::Socket, Some(path), None),
        };
        Self { kind, path, link }
    }
}
