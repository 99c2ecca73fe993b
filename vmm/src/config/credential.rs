//! Credentials for systemd in the guest, by way of SMBIOS: never on the kernel command line, which
//! everybody in the guest can read.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::{Config, files};

/// Longest file: in base64 it fills what SMBIOS has room for.
const MAX_FILE_BYTES: u64 = 44 << 10;

/// Longest name (systemd's `CREDENTIAL_NAME_MAX`).
const MAX_NAME_BYTES: usize = 255;

/// A credential; an object with a `name` and either a `value` or a `file`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(try_from = "Keys", into = "Keys")]
pub struct Credential {
    /// What services in the guest call it.
    pub name: String,
    /// What it says.
    pub content: CredentialContent,
}

/// What a credential says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialContent {
    /// This text (`value`). `nixvmm check` prints it: a secret belongs into a file.
    Value(String),
    /// The bytes of this file (`file`), which is read when the machine starts.
    File(PathBuf),
}

/// A [`Credential`] as JSON has it.
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Keys {
    /// What services in the guest call it.
    name: String,
    /// What it says. `nixvmm check` prints it: a secret belongs into a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    /// The file whose bytes it says, which is read when the machine starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
}

impl TryFrom<Keys> for Credential {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, Self::Error> {
        let content = match (keys.value, keys.file) {
            (Some(value), None) => CredentialContent::Value(value),
            (None, Some(file)) => CredentialContent::File(file),
            _ => return Err("a credential has either a `value` or a `file`"),
        };
        Ok(Self { name: keys.name, content })
    }
}

impl From<Credential> for Keys {
    fn from(credential: Credential) -> Self {
        let (value, file) = match credential.content {
            CredentialContent::Value(value) => (Some(value), None),
            CredentialContent::File(file) => (None, Some(file)),
        };
        Self { name: credential.name, value, file }
    }
}

impl FromStr for Credential {
    type Err = &'static str;

    /// Reads `NAME=VALUE` or `NAME=@FILE`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, value) = text.split_once('=').ok_or("give NAME=VALUE or NAME=@FILE")?;
        let content = match value.strip_prefix('@') {
            Some(file) => CredentialContent::File(file.into()),
            None => CredentialContent::Value(value.to_owned()),
        };
        Ok(Self { name: name.to_owned(), content })
    }
}

impl Config {
    pub(super) fn resolve_credentials(&mut self) -> Result<()> {
        let mut seen = Vec::<&str>::new();
        for credential in &mut self.credentials {
            let name = &credential.name;
            ensure!(
                is_name(name),
                "--credential {}: not a name: use letters, digits and . _ -, at most \
                 {MAX_NAME_BYTES}",
                name.escape_default(),
            );
            ensure!(!seen.contains(&name.as_str()), "--credential {name}: given twice");
            if let CredentialContent::File(path) = &mut credential.content {
                files::resolve_regular("--credential", path)?;
            }
            seen.push(name);
        }
        Ok(())
    }

    /// The strings of SMBIOS type 11: those of the user and the credentials.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is too long.
    pub(crate) fn oem_strings(&self) -> Result<Vec<String>> {
        let mut strings = self.smbios.oem_strings.clone();
        for credential in &self.credentials {
            strings.push(credential.oem_string()?);
        }
        Ok(strings)
    }

    /// Whether the guest gets a credential of this name.
    pub(crate) fn has_credential(&self, name: &str) -> bool {
        let prefixes = ["io.systemd.credential:", "io.systemd.credential.binary:"];
        let is_named = |string: &String| {
            let given = prefixes.iter().find_map(|prefix| string.strip_prefix(prefix));
            given.and_then(|given| given.split_once('=')).is_some_and(|(given, _)| given == name)
        };
        self.credentials.iter().any(|credential| credential.name == name)
            || self.smbios.oem_strings.iter().any(is_named)
    }
}

impl Credential {
    fn oem_string(&self) -> Result<String> {
        let name = &self.name;
        match &self.content {
            // A string of SMBIOS ends at a NUL, and systemd takes it as it is.
            CredentialContent::Value(value) if value.chars().all(is_plain) => {
                Ok(format!("io.systemd.credential:{name}={value}"))
            }
            CredentialContent::Value(value) => Ok(binary(name, value.as_bytes())),
            CredentialContent::File(path) => {
                let bytes = read(path)
                    .with_context(|| format!("--credential {name}=@{}", path.display()))?;
                Ok(binary(name, &bytes))
            }
        }
    }
}

/// Letters that every tool on the way leaves alone.
fn is_plain(letter: char) -> bool {
    letter == ' ' || letter.is_ascii_graphic()
}

fn binary(name: &str, bytes: &[u8]) -> String {
    format!("io.systemd.credential.binary:{name}={}", STANDARD.encode(bytes))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    ensure!(
        bytes.len() as u64 <= MAX_FILE_BYTES,
        "longer than {MAX_FILE_BYTES} bytes, and SMBIOS has room for no more: \
         give large data by a disk",
    );
    Ok(bytes)
}

fn is_name(name: &str) -> bool {
    let is_letter = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    let is_file_name = !["", ".", ".."].contains(&name);
    is_file_name && name.len() <= MAX_NAME_BYTES && name.chars().all(is_letter)
}

#[cfg(test)]
mod test {
    use super::*;

    fn string(text: &str) -> String {
        text.parse::<Credential>().unwrap().oem_string().unwrap()
    }

    #[test]
    fn text_is_given_as_it_is_and_bytes_in_base64() {
        assert_eq!(string("a.b=x y=z"), "io.systemd.credential:a.b=x y=z");
        assert_eq!(string("empty="), "io.systemd.credential:empty=");
        assert_eq!(string("lines=a\nb"), "io.systemd.credential.binary:lines=YQpi");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0, 255, 10, 13]).unwrap();
        let text = format!("key=@{}", file.path().display());
        assert_eq!(string(&text), "io.systemd.credential.binary:key=AP8KDQ==");
    }

    #[test]
    fn a_credential_in_a_file_stays_a_reference_in_json() {
        let credential: Credential = "key=@/run/secret".parse().unwrap();
        let text = serde_json::to_string(&credential).unwrap();
        assert_eq!(text, r#"{"name":"key","file":"/run/secret"}"#);
        assert_eq!(serde_json::from_str::<Credential>(&text).unwrap(), credential);
        for wrong in [r#"{"name":"a"}"#, r#"{"name":"a","value":"","file":"f"}"#] {
            assert!(serde_json::from_str::<Credential>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_file_names() {
        for name in ["", ".", "..", "a/b", "a b", "ä", &"x".repeat(256)] {
            assert!(!is_name(name), "{name}");
        }
        assert!(is_name("ssh.authorized_keys.root"));
    }

    #[test]
    fn a_file_that_is_too_long_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0; 49 << 10]).unwrap();
        let credential: Credential = format!("k=@{}", file.path().display()).parse().unwrap();
        let error = format!("{:#}", credential.oem_string().unwrap_err());
        assert!(error.contains("longer than 45056 bytes"), "{error}");
    }

    #[test]
    fn a_credential_is_known_however_it_is_given() {
        let mut config = Config::default();
        assert!(!config.has_credential("vmm.notify_socket"));
        config.smbios.oem_strings = vec!["io.systemd.credential:vmm.notify_socket=x".into()];
        assert!(config.has_credential("vmm.notify_socket"));
        config.smbios.oem_strings.clear();
        config.credentials = vec!["vmm.notify_socket=x".parse().unwrap()];
        assert!(config.has_credential("vmm.notify_socket"));
    }
}
