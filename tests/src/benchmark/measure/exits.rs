//! What did a guest leave to user space for? KVM's trace, counted.

use std::collections::BTreeMap;

use crate::benchmark::trace::Event;

/// Exits to user space by their kind; port and memory accesses by where they went.
pub(super) fn by_kind(events: &[Event]) -> BTreeMap<String, f64> {
    let mut kinds = BTreeMap::new();
    let mut access = String::new();
    let mut open: Option<String> = None;
    for event in events {
        match event.name.as_str() {
            "kvm_pio" => {
                let place = place(&event.text, "at");
                // A read is traced when its value is there, after the exit.
                match open.take() {
                    Some(kind) if event.text.starts_with("pio_read") => {
                        *kinds.entry(format!("{kind} {place}")).or_default() += 1.0;
                    }
                    _ => access = place,
                }
            }
            "kvm_mmio" => access = place(&event.text, "gpa"),
            "kvm_userspace_exit" => {
                if let Some(kind) = open.take() {
                    *kinds.entry(kind).or_default() += 1.0;
                }
                let reason =
                    event.text.trim_start_matches("reason ").trim_start_matches("KVM_EXIT_");
                let reason = reason.split(' ').next().unwrap_or_default().to_owned();
                match (reason.as_str(), access.is_empty()) {
                    ("IO", true) => open = Some(reason),
                    ("IO" | "MMIO", false) => {
                        *kinds.entry(format!("{reason} {access}")).or_default() += 1.0;
                        access.clear();
                    }
                    _ => *kinds.entry(reason).or_default() += 1.0,
                }
            }
            _ => {}
        }
    }
    kinds
}

/// The number after `word`, without the low bits in which neighbours differ.
fn place(text: &str, word: &str) -> String {
    let mut words = text.split_whitespace().skip_while(|found| *found != word);
    let number = words.nth(1).unwrap_or_default().trim_start_matches("0x");
    match u64::from_str_radix(number, 16) {
        Ok(port) if port <= 0xffff => format!("{port:#x}"),
        Ok(address) => format!("{:#x}", address & !0xfff),
        Err(_) => String::new(),
    }
}
