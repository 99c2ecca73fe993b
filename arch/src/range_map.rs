//! Values by disjoint address range: RAM, buses, PCI windows.

use std::ops::Range;

/// A sorted list of disjoint, non-empty ranges, each with a value.
#[derive(Clone, Debug)]
pub struct RangeMap<T> {
    entries: Vec<(Range<u64>, T)>,
}

/// A range was empty or overlapped one that is already there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address range {:#x}..{:#x} is empty or overlaps another", .0.start, .0.end)]
pub struct Overlap(pub Range<u64>);

impl<T> RangeMap<T> {
    /// Makes an empty map.
    pub const fn new() -> Self {
        Self { entries: Vec::new() }
    }

    /// Adds a value for `range`.
    pub fn insert(&mut self, range: Range<u64>, value: T) -> Result<(), Overlap> {
        let position = self.entries.partition_point(|(entry, _)| entry.start < range.start);
        let before = position.checked_sub(1).and_then(|index| self.entries.get(index));
        let overlaps = before.is_some_and(|(entry, _)| entry.end > range.start)
            || self.entries.get(position).is_some_and(|(entry, _)| entry.start < range.end);
        if range.is_empty() || overlaps {
            return Err(Overlap(range));
        }
        self.entries.insert(position, (range, value));
        Ok(())
    }

    /// The range that holds `address`, and its value.
    #[inline]
    pub fn get(&self, address: u64) -> Option<(&Range<u64>, &T)> {
        let position = self.entries.partition_point(|(entry, _)| entry.start <= address);
        let (range, value) = self.entries.get(position.checked_sub(1)?)?;
        (address < range.end).then_some((range, value))
    }

    /// All ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (&Range<u64>, &T)> {
        self.entries.iter().map(|(range, value)| (range, value))
    }
}

impl<T> Default for RangeMap<T> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn finds_the_range_that_holds_an_address() {
        let mut map = RangeMap::new();
        map.insert(0x1000..0x2000, 'b').unwrap();
        map.insert(0..0x1000, 'a').unwrap();
        assert_eq!(map.get(0xfff), Some((&(0..0x1000), &'a')));
        assert_eq!(map.get(0x1000), Some((&(0x1000..0x2000), &'b')));
        assert_eq!(map.get(0x2000), None);
    }

    #[test]
    fn refuses_overlaps_and_empty_ranges() {
        let mut map = RangeMap::new();
        map.insert(0x1000..0x2000, ()).unwrap();
        for range in [0..0x1001, 0x1fff..0x3000, 0x1400..0x1500, 0..0x4000, 5..5] {
            assert_eq!(map.insert(range.clone(), ()), Err(Overlap(range)));
        }
    }
}
