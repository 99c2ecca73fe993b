//! Who knows a name that nobody else does? The smallest name server (RFC 1035): it knows one name.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The name that is known.
pub const NAME: &str = "known-to-the-host.nixvmm.test";

/// Its addresses.
pub const FOUR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// Its addresses.
pub const SIX: Ipv6Addr = Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 0x53);

/// Bytes in front of the question, and of its kind and class.
const HEADER: usize = 12;
const KIND_AND_CLASS: usize = 4;

/// Kinds of what is asked for.
const A: [u8; 2] = [0, 1];
const AAAA: [u8; 2] = [0, 28];

/// Says that it is an answer, asked for with recursion and given so, and how it ended.
const FOUND: [u8; 2] = [0x81, 0x80];
const NO_SUCH_NAME: [u8; 2] = [0x81, 0x83];

/// The name of an answer: the question's, by its offset.
const SAME_NAME: [u8; 2] = [0xC0, 12];
const INTERNET: [u8; 2] = [0, 1];
const SECONDS: [u8; 4] = [0, 0, 0, 60];

/// Answers a query of one question; `None` for what is none.
pub fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let (header, rest) = query.split_at_checked(HEADER)?;
    let (name, length) = name(rest)?;
    let question = rest.get(..length + KIND_AND_CLASS)?;
    let kind: [u8; 2] = rest.get(length..length + 2)?.try_into().ok()?;
    let is_known = name.eq_ignore_ascii_case(NAME);
    let address = match kind {
        A if is_known => FOUR.octets().to_vec(),
        AAAA if is_known => SIX.octets().to_vec(),
        _ => Vec::new(),
    };
    let answers = [0, u8::from(!address.is_empty())];
    let mut message = header.get(..2)?.to_vec();
    message.extend(if is_known { FOUND } else { NO_SUCH_NAME });
    message.extend([[0, 1], answers, [0; 2], [0; 2]].concat());
    message.extend(question);
    if !address.is_empty() {
        message.extend([SAME_NAME, kind, INTERNET].concat());
        message.extend(SECONDS);
        message.extend([0, u8::try_from(address.len()).ok()?]);
        message.extend(address);
    }
    Some(message)
}

/// The name at the beginning of `bytes`, with dots between its labels, and its length there.
fn name(bytes: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        let label = bytes.get(at + 1..at + 1 + length)?;
        at += 1 + length;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        labels.push(str::from_utf8(label).ok()?.to_owned());
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn query(name: &str, kind: [u8; 2]) -> Vec<u8> {
        let mut query = vec![7, 8, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            query.push(u8::try_from(label.len()).unwrap());
            query.extend(label.as_bytes());
        }
        query.push(0);
        query.extend([kind, INTERNET].concat());
        query
    }

    #[test]
    fn the_name_has_its_addresses_and_no_other_name_has_any() {
        for (kind, address) in [(A, FOUR.octets().to_vec()), (AAAA, SIX.octets().to_vec())] {
            let said = answer(&query(&NAME.to_uppercase(), kind)).unwrap();
            assert_eq!(said[..8], [7, 8, 0x81, 0x80, 0, 1, 0, 1]);
            assert!(said.ends_with(&address), "{said:?}");
        }
        let mail = answer(&query(NAME, [0, 15])).unwrap();
        assert_eq!(mail[2..8], [0x81, 0x80, 0, 1, 0, 0]);
        let other = answer(&query("other.nixvmm.test", A)).unwrap();
        assert_eq!(other[2..8], [0x81, 0x83, 0, 1, 0, 0]);
        let whole = query(NAME, A);
        for length in 0..whole.len() {
            assert_eq!(answer(&whole[..length]), None, "{length} bytes");
        }
    }
}
