//! A load on the files of a folder, the same for the same seed: `file-load SEED STEPS FOLDER`.
//!
//! Writes to a few files at random places, cuts, grows, maps, punches and renames them. What it
//! reads it compares with what it remembers, at each step and, when the kernel has forgotten what
//! it had of them, at the end. What it leaves in one file system it leaves in any other.
#![expect(unsafe_code, reason = "no safe interface maps files that change")]

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

const FILES: usize = 4;

/// Longest file in bytes.
const FILE_MAX: usize = 400_000;

/// Most bytes that one step reads or writes.
const STEP_MAX: usize = 70_000;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [seed, steps, folder] => load(seed, steps, Path::new(folder)),
        _ => Err(anyhow::anyhow!("give SEED STEPS FOLDER")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn load(seed: &str, steps: &str, folder: &Path) -> Result<()> {
    let (mut random, steps) = (Random(seed.parse()?), steps.parse::<u32>()?);
    let mut files: Vec<Tracked> =
        (0..FILES).map(|number| Tracked::new(folder, number)).collect::<Result<_>>()?;
    for step in 0..steps {
        let file = random.below(FILES);
        let file = files.get_mut(file).context("no such file")?;
        file.step(&mut random).with_context(|| format!("step {step}"))?;
    }
    for file in &files {
        file.file.sync_all()?;
    }
    // Only who may makes the kernel forget; what is compared then comes from whoever serves it.
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
    files.into_iter().try_for_each(|file| file.finish(&mut random))
}

/// A file and what should be in it.
struct Tracked {
    folder: PathBuf,
    name: String,
    renames: u32,
    file: File,
    content: Vec<u8>,
}

impl Tracked {
    fn new(folder: &Path, number: usize) -> Result<Self> {
        let name = format!("file{number}");
        let file = open(&folder.join(&name), true)?;
        Ok(Self { folder: folder.to_owned(), name, renames: 0, file, content: Vec::new() })
    }

    fn step(&mut self, random: &mut Random) -> Result<()> {
        match random.below(16) {
            0..4 => self.write(random),
            4 => self.append(random),
            5 => self.cut_or_grow(random),
            6..10 => self.read(random),
            10 | 11 => self.read_mapping(random),
            12 => self.write_mapping(random),
            13 => self.punch(random),
            14 => self.reopen(),
            _ => self.rename(),
        }
    }

    fn write(&mut self, random: &mut Random) -> Result<()> {
        let start = random.below(FILE_MAX - STEP_MAX);
        let bytes = random.bytes();
        self.file.write_all_at(&bytes, start as u64).context("write")?;
        self.remember(start, &bytes);
        Ok(())
    }

    fn append(&mut self, random: &mut Random) -> Result<()> {
        let bytes = random.bytes();
        if self.content.len() + bytes.len() > FILE_MAX {
            return self.set_len(bytes.len() / 2);
        }
        let start = self.content.len();
        self.file.write_all_at(&bytes, start as u64).context("append")?;
        self.remember(start, &bytes);
        Ok(())
    }

    fn cut_or_grow(&mut self, random: &mut Random) -> Result<()> {
        self.set_len(random.below(FILE_MAX))
    }

    fn set_len(&mut self, len: usize) -> Result<()> {
        self.file.set_len(len as u64).context("set length")?;
        self.content.resize(len, 0);
        let told = self.file.metadata()?.len();
        ensure!(told == len as u64, "{}: {told} bytes, not {len}", self.name);
        Ok(())
    }

    fn read(&self, random: &mut Random) -> Result<()> {
        let range = random.range(self.content.len());
        // A byte more than there is, and so the end as well.
        let mut bytes = vec![0; range.len() + 1];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, (range.start + filled) as u64).context("read")? {
                0 => break,
                count => filled += count,
            }
        }
        let end = (range.end + 1).min(self.content.len());
        self.compare("read", range.start, bytes.get(..filled).unwrap_or_default(), end)
    }

    fn read_mapping(&self, random: &mut Random) -> Result<()> {
        let range = random.range(self.content.len());
        let copied = self.with_mapping(ProtFlags::READ, |bytes| {
            // SAFETY: the mapping is as long as the file, which nobody else changes.
            unsafe { std::slice::from_raw_parts(bytes, self.content.len()) }
                .get(range.clone())
                .map(<[u8]>::to_vec)
        })?;
        self.compare("read mapping", range.start, &copied.flatten().unwrap_or_default(), range.end)
    }

    fn write_mapping(&mut self, random: &mut Random) -> Result<()> {
        let (range, value) = (random.range(self.content.len()), random.byte());
        self.with_mapping(ProtFlags::READ | ProtFlags::WRITE, |bytes| {
            // SAFETY: the range is in the mapping, which is as long as the file.
            unsafe { bytes.add(range.start).write_bytes(value, range.len()) };
        })?;
        let remembered = self.content.get_mut(range).context("no such range")?;
        remembered.fill(value);
        Ok(())
    }

    /// Maps the file, unless it is empty, and writes back what `act` changed.
    fn with_mapping<T>(
        &self,
        protection: ProtFlags,
        act: impl FnOnce(*mut u8) -> T,
    ) -> Result<Option<T>> {
        let len = self.content.len();
        if len == 0 {
            return Ok(None);
        }
        let nowhere = std::ptr::null_mut();
        // SAFETY: a mapping at an address of the kernel's choice.
        let bytes = unsafe { mmap(nowhere, len, protection, MapFlags::SHARED, &self.file, 0) };
        let bytes = bytes.context("mmap")?;
        let done = act(bytes.cast());
        // SAFETY: this is the mapping that was made above, and nothing refers to it any more.
        unsafe {
            msync(bytes, len, MsyncFlags::SYNC).context("msync")?;
            munmap(bytes, len).context("munmap")?;
        }
        Ok(Some(done))
    }

    fn punch(&mut self, random: &mut Random) -> Result<()> {
        let range = random.range(self.content.len());
        if range.is_empty() {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = fallocate(&self.file, flags, range.start as u64, range.len() as u64);
        match punched {
            // Not every file system has holes; zeroes are as good.
            Err(rustix::io::Errno::OPNOTSUPP) => {
                self.file.write_all_at(&vec![0; range.len()], range.start as u64)?;
            }
            punched => punched.context("punch a hole")?,
        }
        self.content.get_mut(range).context("no such range")?.fill(0);
        Ok(())
    }

    fn reopen(&mut self) -> Result<()> {
        self.file = open(&self.path(), false)?;
        Ok(())
    }

    fn rename(&mut self) -> Result<()> {
        let before = self.path();
        self.renames += 1;
        fs::rename(before, self.path()).context("rename")
    }

    fn path(&self) -> PathBuf {
        match self.renames {
            0 => self.folder.join(&self.name),
            times => self.folder.join(format!("{}-{times}", self.name)),
        }
    }

    fn remember(&mut self, start: usize, bytes: &[u8]) {
        let end = start + bytes.len();
        if self.content.len() < end {
            self.content.resize(end, 0);
        }
        if let Some(remembered) = self.content.get_mut(start..end) {
            remembered.copy_from_slice(bytes);
        }
    }

    fn compare(&self, what: &str, start: usize, seen: &[u8], end: usize) -> Result<()> {
        let expected = self.content.get(start..end).context("no such range")?;
        let differs = expected.iter().zip(seen).position(|(expected, seen)| expected != seen);
        let at = differs.unwrap_or(expected.len().min(seen.len()));
        ensure!(
            expected == seen,
            "{what} of {}, {start}..{end} of {}: {} bytes, other at {}: {:?}, not {:?}",
            self.name,
            self.content.len(),
            seen.len(),
            start + at,
            seen.get(at),
            expected.get(at),
        );
        Ok(())
    }

    /// Compares all of it, read anew, and gives the file its first name back.
    fn finish(mut self, random: &mut Random) -> Result<()> {
        self.reopen()?;
        let bytes = fs::read(self.path())?;
        self.compare("last read", 0, &bytes, self.content.len())?;
        self.read_mapping(random)?;
        Ok(fs::rename(self.path(), self.folder.join(&self.name))?)
    }
}

fn open(path: &Path, create: bool) -> Result<File> {
    let opened: io::Result<File> =
        OpenOptions::new().read(true).write(true).create(create).truncate(create).open(path);
    opened.with_context(|| path.display().to_string())
}

/// Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 11).unwrap_or(0) % bound.max(1)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[3]
    }

    /// A part of `len` bytes; the ends of pages are as likely as all other places together.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let mut start = self.below(len);
        if self.byte() & 1 == 0 {
            start &= !4095;
        }
        start..(start + self.below(STEP_MAX)).min(len)
    }

    /// Some bytes, few of them more often than many.
    fn bytes(&mut self) -> Vec<u8> {
        let most = [16, 4097, STEP_MAX][self.below(3)];
        let len = 1 + self.below(most - 1);
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.flatten().take(len).collect()
    }
}
