//! `path=disk.img,readonly,serial=data`: one parser for every device flag.

use std::fmt::Display;
use std::str::FromStr;

use vmm::config::nearest;

/// What a flag's value says: keys, each with or without a value.
///
/// The first item may be a value alone; it belongs to the flag's first key. A comma inside a value
/// is written twice.
#[derive(Debug)]
pub(crate) struct KeyValues {
    keys: &'static [&'static str],
    items: Vec<(&'static str, Option<String>)>,
}

impl KeyValues {
    /// Reads `text` for a flag that has `keys`.
    pub(crate) fn parse(text: &str, keys: &'static [&'static str]) -> Result<Self, String> {
        let mut items = Vec::<(&'static str, Option<String>)>::new();
        for item in split(text) {
            if item.is_empty() {
                return Err("an item is empty: write a comma inside a value twice".into());
            }
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (item.as_str(), None),
            };
            let (key, value) = match keys.iter().find(|key| **key == name) {
                Some(key) => (*key, value),
                None => match keys.first() {
                    Some(first) if items.is_empty() && value.is_none() => (*first, Some(item)),
                    _ => return Err(unknown(name, keys)),
                },
            };
            if value.as_deref() == Some("") {
                return Err(format!("{key} has an empty value"));
            }
            if items.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key} is given twice"));
            }
            items.push((key, value));
        }
        Ok(Self { keys, items })
    }

    /// The value of `key`, where it is given.
    pub(crate) fn value<T: FromStr<Err: Display>>(&self, key: &str) -> Result<Option<T>, String> {
        match self.find(key) {
            None => Ok(None),
            Some(None) => Err(format!("{key} needs a value: {key}=VALUE")),
            Some(Some(text)) => {
                text.parse().map(Some).map_err(|error| format!("{key}={text}: {error}"))
            }
        }
    }

    /// The value of a `key` that must be given.
    pub(crate) fn required<T: FromStr<Err: Display>>(&self, key: &str) -> Result<T, String> {
        self.value(key)?.ok_or_else(|| format!("{key} is missing: {key}=VALUE"))
    }

    /// Whether `key` is on: given alone or as `on`. `None` where it is not given.
    pub(crate) fn switch(&self, key: &str) -> Result<Option<bool>, String> {
        match self.find(key) {
            None => Ok(None),
            Some(None) => Ok(Some(true)),
            Some(Some(value)) => {
                on_or_off(value).map(Some).map_err(|e| format!("{key}={value}: {e}"))
            }
        }
    }

    fn find(&self, key: &str) -> Option<Option<&str>> {
        debug_assert!(self.keys.contains(&key), "{key} is no key of this flag");
        self.items.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_deref())
    }
}

/// Reads `on` or `off`.
pub(crate) fn on_or_off(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("neither on nor off"),
    }
}

/// Splits at single commas; two in a row are one that belongs to the item.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(letter);
        }
    }
    items
}

fn unknown(name: &str, keys: &[&str]) -> String {
    match nearest(name, keys.iter().copied()) {
        Some(key) => format!("unknown key {name}: did you mean {key}?"),
        None => format!("unknown key {name}: there are {}", keys.join(", ")),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const KEYS: &[&str] = &["path", "readonly", "size"];

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        assert_eq!(KeyValues::parse(text, KEYS).unwrap_err(), expected);
    }

    fn parse(text: &str) -> KeyValues {
        KeyValues::parse(text, KEYS).unwrap()
    }

    #[test]
    fn keys_have_values_or_are_switches() {
        let items = parse("path=a=b,readonly,size=5");
        assert_eq!(items.required::<String>("path").unwrap(), "a=b");
        assert_eq!(items.value::<u8>("size").unwrap(), Some(5));
        assert_eq!(items.switch("readonly").unwrap(), Some(true));
        assert_eq!(parse("readonly=off").switch("readonly").unwrap(), Some(false));
        assert_eq!(parse("a").switch("readonly").unwrap(), None);
    }

    #[test]
    fn the_first_item_may_be_the_first_keys_value() {
        assert_eq!(parse("disk.img,readonly").required::<String>("path").unwrap(), "disk.img");
        assert_eq!(parse("readonly,path=x").switch("readonly").unwrap(), Some(true));
        refused("readonly,x", "unknown key x: there are path, readonly, size");
        refused("x,path=y", "path is given twice");
    }

    #[test]
    fn two_commas_are_one_in_the_value() {
        assert_eq!(parse("path=a,,b,size=1").required::<String>("path").unwrap(), "a,b");
        assert_eq!(parse("a,,,,b,,").required::<String>("path").unwrap(), "a,,b,");
        assert_eq!(parse("a,,,size=1").required::<String>("path").unwrap(), "a,");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        refused("", "an item is empty: write a comma inside a value twice");
        refused("path=a,", "an item is empty: write a comma inside a value twice");
        refused("path=", "path has an empty value");
        refused("path=a,path=b", "path is given twice");
        refused("path=a,read-only", "unknown key read-only: did you mean readonly?");
        refused("cache=none", "unknown key cache: there are path, readonly, size");
        assert_eq!(
            parse("readonly").required::<u8>("size").unwrap_err(),
            "size is missing: size=VALUE"
        );
        assert_eq!(
            parse("size").value::<u8>("size").unwrap_err(),
            "size needs a value: size=VALUE"
        );
        assert_eq!(
            parse("size=x").value::<u8>("size").unwrap_err(),
            "size=x: invalid digit found in string"
        );
        assert_eq!(
            parse("readonly=yes").switch("readonly").unwrap_err(),
            "readonly=yes: neither on nor off"
        );
    }
}
