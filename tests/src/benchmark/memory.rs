//! How much memory does a VMM take besides the guest's? The proportional set size of all its
//! mappings but the guest's RAM (the kernel's Documentation/filesystems/proc.rst, smaps).

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};

/// KiB of the process `id` outside a guest's RAM of `ram` KiB, and the same by mapping.
///
/// # Errors
/// When the process is gone or has no mapping as large as the RAM.
pub fn outside_ram(id: u32, ram: u64) -> Result<(u64, BTreeMap<String, u64>)> {
    let path = format!("/proc/{id}/smaps");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let mappings = mappings(&text);
    let (outside, inside): (Vec<_>, Vec<_>) =
        mappings.into_iter().partition(|mapping| mapping.size < ram / 2);
    ensure!(!inside.is_empty(), "{path} has no mapping for the guest's RAM");
    let mut by_name = BTreeMap::new();
    for mapping in &outside {
        *by_name.entry(mapping.name.clone()).or_default() += mapping.resident;
    }
    Ok((outside.iter().map(|mapping| mapping.resident).sum(), by_name))
}

struct Mapping {
    name: String,
    size: u64,
    resident: u64,
}

fn mappings(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), mappings.last_mut()) {
            (["Size:", size, "kB"], Some(last)) => last.size = size.parse().unwrap_or(0),
            (["Pss:", size, "kB"], Some(last)) => last.resident = size.parse().unwrap_or(0),
            ([range, access, _, _, _, name @ ..], _) if range.contains('-') => {
                let name = name.first().copied().unwrap_or("anonymous");
                let name = format!("{} {access}", name.rsplit('/').next().unwrap_or(name));
                mappings.push(Mapping { name, size: 0, resident: 0 });
            }
            _ => {}
        }
    }
    mappings
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn mappings_are_read_with_their_names_and_sizes() {
        let text = "7f00-7f01 r-xp 00001000 08:01 12   /usr/bin/vmm\nSize: 8 kB\nPss: 4 kB\n\
            Pss_Dirty: 1 kB\n7fff-8000 rw-p 00000000 00:00 0\nSize: 400 kB\nPss: 100 kB\n";
        let found: Vec<_> =
            mappings(text).into_iter().map(|m| (m.name, m.size, m.resident)).collect();
        assert_eq!(found[0], ("vmm r-xp".to_owned(), 8, 4));
        assert_eq!(found[1], ("anonymous rw-p".to_owned(), 400, 100));
    }
}
