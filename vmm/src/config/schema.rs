//! The handbook's reference of `--config` files, as the types have it.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema, schema_for};
use serde_json::{Map, Value};

use super::{ByteSize, Config, Forward, Mac, layers};

/// Set to anything, it has these tests write the files that they otherwise compare.
const WRITE: &str = "NIXVMM_WRITE_REFERENCE";

const INTRODUCTION: &str = "\
# The machine as JSON

<!-- Written by a test from the program's types:
NIXVMM_WRITE_REFERENCE=1 cargo test -p vmm schema -->

`nixvmm check` prints a machine in this form, and `--config FILE` takes it. Each key has the name
of its flag; a key that is left out has its default, and one that does not exist is refused. Of
several files later ones win key by key, lists and consoles as a whole. The same as a [JSON
schema](machine.schema.json), for editors and other programs; nixvmm checks more than a schema can
say.
";

#[test]
fn the_handbook_has_the_schema_of_the_types() {
    let schema = schema();
    let mut text = serde_json::to_string_pretty(&schema).unwrap();
    text.push('\n');
    compare("machine.schema.json", &text);
    compare("reference-machine.md", &page(&schema));
}

#[test]
fn a_misspelt_key_is_compared_with_all_that_the_types_have() {
    let schema = schema();
    assert_eq!(names(&layers::every_key().unwrap()), names(&schema["properties"]));
    for (key, kind) in [
        ("balloon", "Balloon"),
        ("console", "Console"),
        ("credentials", "Credential"),
        ("disks", "Disk"),
        ("machined", "Machined"),
        ("memory", "Memory"),
        ("nets", "Net"),
        ("pmems", "Pmem"),
        ("serial", "Console"),
        ("shares", "Share"),
        ("smbios", "Smbios"),
        ("store-share", "StoreShare"),
        ("vsock", "Vsock"),
    ] {
        let known = layers::every_key().unwrap()[key].take();
        let known = if known.is_array() { known[0].clone() } else { known };
        assert_eq!(names(&known), names(&schema["$defs"][kind]["properties"]), "{key}");
    }
}

#[test]
fn a_list_is_no_object_wherever_the_types_have_one() {
    let schema = schema();
    let objects = objects_in(&schema, &schema, "");
    assert!(objects.len() >= 14, "{objects:?}");
    for (place, kind) in objects {
        let list = kind["properties"].as_object().unwrap().iter().map(|_| Value::Null);
        for list in [Value::Array(Vec::new()), list.collect()] {
            let text = machine_with(&place, list).to_string();
            let error = Config::from_texts(&[(Path::new("m"), &text)]).unwrap_err();
            let error = format!("{error:#}");
            let expected = "invalid type: sequence, expected an object at line";
            let named = if place.is_empty() { String::new() } else { format!("{place}: ") };
            assert!(error.starts_with(&format!("--config m: {named}{expected}")), "{error}");
        }
    }
}

/// The places of objects in a machine, as messages name them, with their schemas.
fn objects_in<'a>(root: &'a Value, schema: &'a Value, place: &str) -> Vec<(String, &'a Value)> {
    if let Some(reference) = schema["$ref"].as_str() {
        let kind = root.pointer(reference.trim_start_matches('#')).unwrap();
        return objects_in(root, kind, place);
    }
    if let Some(kinds) = schema["anyOf"].as_array() {
        return objects_in(root, &kinds[0], place);
    }
    if schema["items"].is_object() {
        return objects_in(root, &schema["items"], &format!("{place}[0]"));
    }
    let Some(keys) = schema["properties"].as_object() else { return Vec::new() };
    let dot = if place.is_empty() { "" } else { "." };
    let inner =
        keys.iter().flat_map(|(key, value)| objects_in(root, value, &format!("{place}{dot}{key}")));
    [(place.to_owned(), schema)].into_iter().chain(inner).collect()
}

/// A machine that has `value` at `place`.
fn machine_with(place: &str, value: Value) -> Value {
    place.rsplit('.').filter(|key| !key.is_empty()).fold(value, |value, key| {
        match key.strip_suffix("[0]") {
            Some(key) => serde_json::json!({ key: [value] }),
            None => serde_json::json!({ key: value }),
        }
    })
}

#[track_caller]
fn compare(name: &str, text: &str) {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/handbook/src");
    let file = Path::new(folder).join(name);
    if std::env::var_os(WRITE).is_some() {
        fs::write(&file, text).unwrap();
    }
    assert!(
        fs::read_to_string(&file).is_ok_and(|committed| committed == text),
        "{name} of the handbook is not what the types say: {WRITE}=1 cargo test -p vmm schema",
    );
}

fn schema() -> Value {
    let mut schema = schema_for!(Config);
    schema.insert("title".to_owned(), "Machine of nixvmm".into());
    unwrapped(schema.to_value())
}

/// Descriptions without the line breaks of comments.
fn unwrapped(mut schema: Value) -> Value {
    match &mut schema {
        Value::Object(keys) => {
            for (name, value) in keys {
                match (name.as_str(), &value) {
                    ("description", Value::String(text)) => *value = text.replace('\n', " ").into(),
                    _ => *value = unwrapped(value.take()),
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                *item = unwrapped(item.take());
            }
        }
        _ => {}
    }
    schema
}

fn names(object: &Value) -> Vec<&str> {
    object.as_object().into_iter().flat_map(Map::keys).map(String::as_str).collect()
}

fn page(schema: &Value) -> String {
    let mut page = INTRODUCTION.to_owned();
    describe(&mut page, "Machine", schema);
    for (name, kind) in schema["$defs"].as_object().unwrap() {
        describe(&mut page, name, kind);
    }
    page
}

/// A section on a kind of value.
fn describe(page: &mut String, name: &str, kind: &Value) {
    write!(page, "\n## {name}\n\n{}\n", text(&kind["description"])).unwrap();
    if let Some(keys) = kind["properties"].as_object() {
        let needed = kind["required"].as_array().cloned().unwrap_or_default();
        page.push_str("\n| key | value | meaning |\n|---|---|---|\n");
        for (key, value) in keys {
            let (kind, meaning) = (value_kind(value), text(&value["description"]));
            let needed = if needed.contains(&Value::from(key.as_str())) { " Needed." } else { "" };
            let needed = if meaning.contains("Needed") { "" } else { needed };
            writeln!(page, "| `{key}` | {kind} | {meaning}{needed} |").unwrap();
        }
    }
    if let Some(choices) = kind["oneOf"].as_array() {
        page.push_str("\n| value | meaning |\n|---|---|\n");
        for choice in choices {
            let (value, meaning) = (text(&choice["const"]), text(&choice["description"]));
            writeln!(page, "| `\"{value}\"` | {meaning} |").unwrap();
        }
    }
}

/// What kind of value a key has, in words.
fn value_kind(value: &Value) -> String {
    if let Some(reference) = value["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(kinds) = value["anyOf"].as_array() {
        return value_kind(&kinds[0]);
    }
    match (&value["type"], &value["format"]) {
        (Value::Array(kinds), format) => {
            let mut kind = value.clone();
            (kind["type"], kind["format"]) = (kinds[0].clone(), format.clone());
            value_kind(&kind)
        }
        (_, Value::String(format)) if format == "uuid" => "UUID".to_owned(),
        (Value::String(kind), _) => match kind.as_str() {
            "string" => "text".to_owned(),
            "integer" => "number".to_owned(),
            "boolean" => "true or false".to_owned(),
            "array" => format!("list of {}", value_kind(&value["items"])),
            kind => kind.to_owned(),
        },
        _ => String::new(),
    }
}

/// A text for the cell of a table.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().replace('|', "\\|")
}

/// A type that is written as one text.
macro_rules! written {
    ($kind:ty, $name:literal, $schema:tt) => {
        impl JsonSchema for $kind {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

written!(ByteSize, "ByteSize", {
    "description": "A number of bytes: as text with a binary unit, such as `\"512M\"` or \
                    `\"4GiB\"`, or as a number.",
    "type": ["string", "integer"],
    "pattern": "^[0-9]+([KMGTP](iB)?)?$",
    "minimum": 0,
});
written!(Mac, "Mac", {
    "description": "The address of a network card, such as `\"52:54:00:12:34:56\"`.",
    "type": "string",
    "pattern": "^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$",
});
written!(Forward, "Forward", {
    "description": "A forwarded port, `\"tcp|udp:[ADDRESS:]PORT:GUESTPORT\"`, such as \
                    `\"tcp:127.0.0.1:2222:22\"`.",
    "type": "string",
    "pattern": "^(tcp|udp):(.+:)?[0-9]+:[0-9]+$",
});
