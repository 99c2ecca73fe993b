//! Configuration files: one machine from several layers.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{Config, Disk, Machined, Pmem, Share, Smbios, StoreShare, Vsock, nearest};
use crate::object::Object;

/// Longest configuration file, so that a wrong path does not fill memory. A machine with hundreds
/// of disks needs a tenth of it.
const MAX_FILE_BYTES: u64 = 1 << 20;

impl Config {
    /// The machine that `files` describe, each layer over the ones before it.
    ///
    /// Objects are laid over each other key by key. Everything else replaces what was there: lists,
    /// and consoles, whose keys belong to their `kind`. Keys that no file has keep their defaults.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is not JSON, an unknown key (with its path and the nearest key
    /// that exists), a value of the wrong type.
    pub fn from_files<P: AsRef<Path>>(files: &[P]) -> Result<Self> {
        let mut texts = Vec::with_capacity(files.len());
        for file in files {
            let file = file.as_ref();
            let text = read(file).with_context(|| format!("--config {}", file.display()))?;
            texts.push((file, text));
        }
        let texts: Vec<_> = texts.iter().map(|(file, text)| (*file, text.as_str())).collect();
        Self::from_texts(&texts)
    }

    /// The machine that texts describe, each with the name of its file.
    ///
    /// # Errors
    ///
    /// As for [`Config::from_files`].
    pub fn from_texts(texts: &[(&Path, &str)]) -> Result<Self> {
        let mut config = Self::default();
        let mut layers: Option<Value> = None;
        for (file, text) in texts {
            config = parse(text).with_context(|| format!("--config {}", file.display()))?;
            if texts.len() > 1 {
                let layer = serde_json::from_str(text)?;
                match &mut layers {
                    None => layers = Some(layer),
                    Some(below) => lay_over(below, layer),
                }
            }
        }
        match layers {
            Some(layers) => parse(&layers.to_string()),
            None => Ok(config),
        }
    }
}

fn read(file: &Path) -> Result<String> {
    let mut text = String::new();
    File::open(file)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        bail!("longer than {MAX_FILE_BYTES} bytes: is this a configuration file?");
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Config> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let Object(config) = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        if let Some(refusal) = unknown_key(text) {
            return refusal.context(format!("line {}", error.inner().line()));
        }
        let path = error.path().to_string();
        let error = anyhow::Error::new(error.into_inner());
        // A text that is no JSON, or no object, is wrong in no key.
        if path == "." { error } else { error.context(path) }
    })?;
    deserializer.end()?;
    Ok(config)
}

fn lay_over(below: &mut Value, layer: Value) {
    match (below, layer) {
        (Value::Object(below), Value::Object(layer)) if !layer.contains_key("kind") => {
            for (key, value) in layer {
                lay_over(below.entry(key).or_insert(Value::Null), value);
            }
        }
        (below, layer) => *below = layer,
    }
}

/// Names the first key of `text` that the schema does not have. Only asked after a refusal, since
/// it builds the whole schema as a value.
fn unknown_key(text: &str) -> Option<anyhow::Error> {
    let value: Value = serde_json::from_str(text).ok()?;
    let (path, key, known) = find_unknown(&every_key()?, &value, "")?;
    let mut message = format!("unknown key \"{path}{key}\"");
    match nearest(&key, known.iter().map(String::as_str)) {
        Some(name) => message += &format!(": did you mean \"{path}{name}\"?"),
        None => message += &format!(": there are {}", known.join(", ")),
    }
    Some(anyhow::Error::msg(message))
}

/// A machine in which every key that exists is present.
pub(super) fn every_key() -> Option<Value> {
    let mut machine = serde_json::to_value(Config {
        disks: vec![Disk::new("")],
        pmems: vec![Pmem { file: "".into(), readonly: false }],
        shares: vec![Share::default()],
        store_share: Some(StoreShare::default()),
        vsock: Some(Vsock::default()),
        machined: Some(Machined::new("")),
        smbios: Smbios::default(),
        ..Config::default()
    })
    .ok()?;
    *machine.get_mut("nets")? = serde_json::json!([{
        "type": null, "tap": null, "fd": null, "vhost-user": null, "mac": null, "queues": null,
        "vhost": null, "mtu": null, "forwards": null,
    }]);
    *machine.get_mut("credentials")? =
        serde_json::json!([{ "name": null, "value": null, "file": null }]);
    let console = serde_json::json!({ "kind": null, "path": null, "link": null });
    for key in ["console", "serial"] {
        *machine.get_mut(key)? = console.clone();
    }
    Some(machine)
}

/// The path, name and siblings of the first key of `value` that `schema` lacks.
fn find_unknown(
    schema: &Value,
    value: &Value,
    path: &str,
) -> Option<(String, String, Vec<String>)> {
    match (schema, value) {
        (Value::Object(known), Value::Object(keys)) => {
            keys.iter().find_map(|(key, value)| match known.get(key) {
                Some(schema) => find_unknown(schema, value, &format!("{path}{key}.")),
                None => Some((path.to_owned(), key.clone(), known.keys().cloned().collect())),
            })
        }
        (Value::Array(known), Value::Array(items)) => {
            let parent = path.trim_end_matches('.');
            let schema = known.first()?;
            items.iter().enumerate().find_map(|(index, item)| {
                find_unknown(schema, item, &format!("{parent}[{index}]."))
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::config::{ByteSize, Console};

    fn layers(texts: &[&str]) -> Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<_> = texts
            .iter()
            .enumerate()
            .map(|(index, text)| {
                let file = folder.path().join(format!("{index}.json"));
                std::fs::write(&file, text).unwrap();
                file
            })
            .collect();
        Config::from_files(&files)
    }

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        let error = format!("{:#}", layers(&[text]).unwrap_err());
        assert!(error.starts_with("--config /") && error.ends_with(expected), "{error}");
    }

    #[test]
    fn later_layers_win_key_by_key_and_lists_are_replaced() {
        let config = layers(&[
            r#"{"kernel": "k", "memory": {"size": "1G", "shared": true},
                "disks": [{"path": "a"}, {"path": "b"}],
                "console": {"kind": "file", "path": "f"}}"#,
            r#"{"memory": {"size": 2097152}, "disks": [{"path": "c"}],
                "console": {"kind": "pty"}}"#,
            r#"{"cpus": 4}"#,
        ])
        .unwrap();
        assert_eq!(config.kernel, Path::new("k"));
        assert_eq!((config.memory.size, config.memory.shared), (ByteSize(2 << 20), true));
        assert_eq!(config.disks, [Disk::new("c")]);
        assert_eq!(config.console, Console::Pty { link: None });
        assert_eq!(config.cpus, 4);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_path_and_the_nearest_key() {
        refused(
            "{\n\"kernl\": \"k\"}",
            "/0.json: line 2: unknown key \"kernl\": did you mean \"kernel\"?",
        );
        refused(
            r#"{"memory": {"sise": 1}}"#,
            "unknown key \"memory.sise\": did you mean \"memory.size\"?",
        );
        refused(
            r#"{"disks": [{"path": "a"}, {"path": "b", "read-only": true}]}"#,
            "unknown key \"disks[1].read-only\": did you mean \"disks[1].readonly\"?",
        );
        refused(
            r#"{"smbios": {"asset": "x"}}"#,
            "unknown key \"smbios.asset\": there are oem-strings, uuid",
        );
        refused(
            r#"{"serial": {"kind": "pty", "lnik": "x"}}"#,
            "unknown key \"serial.lnik\": did you mean \"serial.link\"?",
        );
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_place() {
        refused(
            r#"{"cpus": "four"}"#,
            "/0.json: cpus: invalid type: string \"four\", expected u32 at line 1 column 15",
        );
        refused(
            r#"{"memory": {"size": "4GB"}}"#,
            "/0.json: memory.size: \"4GB\": not a size: write bytes or a binary unit, as in \
             4096, 512M or 4GiB at line 1 column 25",
        );
        refused(
            r#"{"transport": "isa"}"#,
            "/0.json: transport: unknown variant `isa`, expected `pci` or `mmio` \
             at line 1 column 19",
        );
        refused(
            r#"{"console": {"kind": "file"}}"#,
            "/0.json: console: this kind needs a `path` at line 1 column 29",
        );
        refused(
            r#"{"disks": [{"path": "a"}, {"path": "b", "readonly": "no"}]}"#,
            "/0.json: disks[1].readonly: invalid type: string \"no\", expected a boolean \
             at line 1 column 56",
        );
        refused(
            r#"{"nets": [{"type": "user", "mac": 1}]}"#,
            "/0.json: nets[0].mac: invalid type: integer `1`, expected a string \
             at line 1 column 35",
        );
        refused(
            r#"{"disks": [{}]}"#,
            "/0.json: disks[0]: missing field `path` at line 1 column 13",
        );
        refused(r#"{"cpus": 1, "cpus": 2}"#, "duplicate field `cpus` at line 1 column 18");
        refused(
            r#"{"memory": "1G"}"#,
            "/0.json: memory: invalid type: string \"1G\", expected an object at line 1 column 15",
        );
        refused("{} x", "/0.json: trailing characters at line 1 column 4");
        refused("", "EOF while parsing a value at line 1 column 0");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = format!("{:#}", Config::from_files(&["/no/such.json"]).unwrap_err());
        assert_eq!(error, "--config /no/such.json: No such file or directory (os error 2)");
        refused(&" ".repeat(1 << 21), "longer than 1048576 bytes: is this a configuration file?");
    }
}
