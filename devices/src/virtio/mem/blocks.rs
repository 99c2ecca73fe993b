//! Which blocks are plugged: one bit for each.

/// The blocks of a range of memory.
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u64,
    plugged: u64,
}

/// Blocks next to each other, at least one and all of them there.
pub(super) struct Range {
    start: u64,
    count: u64,
}

impl Range {
    /// The first block.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    fn indices(&self) -> impl Iterator<Item = (usize, u64)> {
        let index =
            |block: u64| (usize::try_from(block / 64).unwrap_or(usize::MAX), 1 << (block % 64));
        (self.start..self.start + self.count).map(index)
    }
}

impl Blocks {
    /// As many blocks, none of them plugged.
    pub(super) fn new(len: u64) -> Self {
        let words = usize::try_from(len.div_ceil(64)).unwrap_or(0);
        Self { words: vec![0; words], len, plugged: 0 }
    }

    /// The `count` blocks from `start`; `None` when they are not all there, or there are none.
    pub(super) fn range(&self, start: u64, count: u64) -> Option<Range> {
        let end = start.checked_add(count)?;
        (count > 0 && end <= self.len).then_some(Range { start, count })
    }

    /// How many blocks are plugged.
    pub(super) fn all_plugged(&self) -> u64 {
        self.plugged
    }

    /// How many blocks of `range` are plugged.
    pub(super) fn plugged(&self, range: &Range) -> u64 {
        let is_plugged = |(index, bit): &(usize, u64)| {
            self.words.get(*index).is_some_and(|word| word & bit != 0)
        };
        range.indices().filter(is_plugged).count() as u64
    }

    /// Makes all blocks of `range` plugged or unplugged.
    pub(super) fn set(&mut self, range: &Range, plugged: bool) {
        let before = self.plugged(range);
        for (index, bit) in range.indices() {
            if let Some(word) = self.words.get_mut(index) {
                *word = if plugged { *word | bit } else { *word & !bit };
            }
        }
        self.plugged = self.plugged - before + if plugged { range.count } else { 0 };
    }

    /// Makes all blocks unplugged.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.plugged = 0;
    }
}
