//! The root disk, and what the kernel command line says about it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Result, bail};
pub(super) use boot::cmdline::has_parameter;

/// The root disk's serial, by which an initrd finds it.
pub(crate) const SERIAL: &str = "root";

/// File systems that a root image may have: name, offset of the magic number, magic number
/// (the kernel's magic.h, little endian).
const FILE_SYSTEMS: [(&str, u64, [u8; 4]); 2] =
    [("erofs", 1024, 0xe0f5_e1e2_u32.to_le_bytes()), ("squashfs", 0, *b"hsqs")];

/// The name of the file system in `image`, as the kernel has it.
pub(super) fn file_system(image: &Path) -> Result<&'static str> {
    let image = File::open(image)?;
    for (name, offset, magic) in FILE_SYSTEMS {
        let mut bytes = [0; 4];
        if image.read_exact_at(&mut bytes, offset).is_ok() && bytes == magic {
            return Ok(name);
        }
    }
    bail!("neither erofs nor squashfs: give another file system as --disk path=FILE,readonly")
}

/// Lets the kernel mount the first disk, unless the command line names a root already.
pub(super) fn mount(command_line: &mut String, file_system: &str) {
    if !has_parameter(command_line, "root") {
        append(command_line, &format!("root=/dev/vda ro rootfstype={file_system}"));
    }
}

/// Adds parameters after those that there are, before the arguments of init, which follow `--`.
pub(super) fn append(command_line: &mut String, parameters: &str) {
    let end = end_of_parameters(command_line);
    let (kernel, init) = command_line.split_at_checked(end).unwrap_or((command_line, ""));
    let words = [kernel.trim_end(), parameters, init.trim_start()];
    *command_line =
        words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join(" ");
}

/// Where the word `--` outside quotes is, or the end.
fn end_of_parameters(command_line: &str) -> usize {
    let mut quoted = false;
    let mut start = 0;
    for (index, byte) in command_line.bytes().chain([b' ']).enumerate() {
        quoted ^= byte == b'"';
        if byte.is_ascii_whitespace() && !quoted {
            if command_line.get(start..index) == Some("--") {
                return start;
            }
            start = index + 1;
        }
    }
    command_line.len()
}
