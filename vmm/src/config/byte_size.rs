//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;

/// A number of bytes; written as `512M`, `4G`, `1GiB` or a plain number of bytes.
///
/// Units are binary (K is 1024). It is shown in the largest unit that divides it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// Why a text is no size.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ByteSizeError {
    /// There is no number, or the unit is unknown.
    #[error("not a size: write bytes or a binary unit, as in 4096, 512M or 4GiB")]
    Malformed,
    /// More than 2⁶⁴ - 1 bytes.
    #[error("too large for a size: at most 16383P")]
    TooLarge,
}

/// Units from the largest to the smallest, each with its power of two.
const UNITS: [(char, u32); 5] = [('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ByteSize {
    type Err = ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(ByteSizeError::Malformed);
        }
        let number: u64 = number.parse().map_err(|_| ByteSizeError::TooLarge)?;
        let mut letters = unit.chars();
        let shift = match (letters.next(), letters.as_str()) {
            (None, _) => 0,
            (Some(letter), "" | "iB") => UNITS
                .iter()
                .find(|(name, _)| *name == letter)
                .map(|(_, shift)| *shift)
                .ok_or(ByteSizeError::Malformed)?,
            _ => return Err(ByteSizeError::Malformed),
        };
        number.checked_mul(1 << shift).map(Self).ok_or(ByteSizeError::TooLarge)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift)) {
            Some((letter, shift)) => write!(formatter, "{}{letter}", self.0 >> shift),
            None => write!(formatter, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ByteSizeVisitor)
    }
}

struct ByteSizeVisitor;

impl Visitor<'_> for ByteSizeVisitor {
    type Value = ByteSize;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a size such as \"512M\", or a number of bytes")
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
        Ok(ByteSize(bytes))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
        text.parse().map_err(|error| E::custom(format_args!("\"{text}\": {error}")))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn units_are_binary_and_case_matters() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("512M", 512 << 20),
            ("4G", 4 << 30),
            ("1GiB", 1 << 30),
            ("2T", 2 << 40),
            ("1PiB", 1 << 50),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "M", "4g", "4GB", "4GiBs", "4 G", "-1", "1.5G", "0x10", "4İ"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ByteSizeError::Malformed), "{text}");
        }
        for text in ["18446744073709551616", "16384P", "99999999999999999999G"] {
            assert_eq!(text.parse::<ByteSize>(), Err(ByteSizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn the_largest_exact_unit_is_shown() {
        for (bytes, text) in
            [(0, "0"), (1, "1"), (1 << 20, "1M"), (3 << 29, "1536M"), ((3 << 30) + 1, "3221225473")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    #[test]
    fn json_has_text_and_takes_numbers_too() {
        let size: ByteSize = serde_json::from_str("\"2G\"").unwrap();
        assert_eq!(size, ByteSize(2 << 30));
        assert_eq!(serde_json::to_string(&size).unwrap(), "\"2G\"");
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap(), ByteSize(4096));
        let error = serde_json::from_str::<ByteSize>("\"4GB\"").unwrap_err().to_string();
        assert!(error.starts_with("\"4GB\": not a size"), "{error}");
    }
}
