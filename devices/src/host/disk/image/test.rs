use std::fs;

use arch::memory::{Backing, GuestAddress, GuestMemory};
use tempfile::{NamedTempFile, TempDir};

use super::*;
use crate::host::disk::transfer::Direction;

const WRITABLE: Access = Access { read_only: false, direct: false };
const READ_ONLY: Access = Access { read_only: true, direct: false };

fn file_of(content: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), content).unwrap();
    file
}

fn refusal(path: &Path, access: Access) -> String {
    Image::open(path, access).unwrap_err().to_string()
}

#[test]
fn an_image_of_whole_sectors_opens_with_its_size() {
    let file = file_of(&[7; 1536]);
    let image = Image::open(file.path(), WRITABLE).unwrap();
    assert_eq!(image.size_bytes().unwrap(), 1536);
    assert_eq!(image.blocks().logical_bytes, 512);
    assert_eq!(image.blocks().physical_bytes, 4096);
}

#[test]
fn a_partial_sector_is_refused_with_the_command_that_rounds_it_up() {
    let file = file_of(&[7; 1000]);
    let text = refusal(file.path(), READ_ONLY);
    assert!(text.contains("1000 bytes") && text.contains("truncate --size=%512"), "{text}");
}

#[test]
fn empty_files_folders_pipes_and_devices_are_refused() {
    let file = file_of(&[]);
    assert!(refusal(file.path(), WRITABLE).contains("is empty"));
    let folder = TempDir::new().unwrap();
    for access in [WRITABLE, READ_ONLY] {
        assert!(refusal(folder.path(), access).contains("neither a regular file"));
        assert!(refusal(Path::new("/dev/null"), access).contains("neither a regular file"));
    }
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert!(refusal(&pipe, READ_ONLY).contains("neither a regular file"));
}

#[test]
fn a_missing_image_is_named() {
    let folder = TempDir::new().unwrap();
    let text = refusal(&folder.path().join("absent.img"), READ_ONLY);
    assert!(text.contains("absent.img"), "{text}");
}

#[test]
fn one_writer_keeps_everybody_else_out_and_readers_keep_a_writer_out() {
    let file = file_of(&[0; 512]);
    let writer = Image::open(file.path(), WRITABLE).unwrap();
    for access in [WRITABLE, READ_ONLY] {
        assert!(refusal(file.path(), access).contains("is in use"));
    }
    drop(writer);
    let _readers = [
        Image::open(file.path(), READ_ONLY).unwrap(),
        Image::open(file.path(), READ_ONLY).unwrap(),
    ];
    assert!(matches!(Image::open(file.path(), WRITABLE), Err(ImageError::Locked(_))));
}

#[test]
fn file_systems_are_recognised_by_magic_alone() {
    let mut erofs = vec![0; 4096];
    erofs[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
    let mut squashfs = vec![0; 512];
    squashfs[..4].copy_from_slice(b"hsqs");
    let recognise = |content: &[u8]| {
        let file = file_of(content);
        FileSystem::recognise(file.as_file()).unwrap().map(FileSystem::name)
    };
    assert_eq!(recognise(&erofs), Some("erofs"));
    assert_eq!(recognise(&squashfs), Some("squashfs"));
    for other in [&[0; 4096][..], b"hs", &[]] {
        assert_eq!(recognise(other), None);
    }
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_their_neighbours_stay() {
    let file = file_of(&[7; 64 << 10]);
    let image = Image::open(file.path(), WRITABLE).unwrap();
    image.discard(4096, 8192).unwrap();
    image.write_zeroes(20480, 512, false).unwrap();
    image.write_zeroes(28672, 4096, true).unwrap();
    image.write_zero_bytes(40960, 1024).unwrap();
    let mut expected = vec![7; 64 << 10];
    for range in [4096..12288, 20480..20992, 28672..32768, 40960..41984] {
        expected[range].fill(0);
    }
    assert!(fs::read(file.path()).unwrap() == expected);
}

#[test]
fn bytes_pass_through_a_buffer_where_memory_is_not_aligned() {
    let content: Vec<u8> = (0..=255).cycle().take(600 << 10).collect();
    let file = file_of(&content);
    let image = Image::open(file.path(), WRITABLE).unwrap();
    let memory = GuestMemory::map(&[0..1 << 20], Backing::default()).unwrap();
    let slice = |address, len| memory.slice(GuestAddress(address), len).unwrap();
    let slices = [slice(0x1003, 300_001), slice(0x8_0001, 0), slice(0x8_0001, 299_999)];
    image.bounce(Direction::Read, 512, &slices).unwrap();
    let mut bytes = vec![0; 300_001];
    slices[0].copy_to(&mut bytes);
    assert!(bytes == content[512..512 + 300_001]);
    slices[0].fill(9);
    image.bounce(Direction::Write, 512, &slices).unwrap();
    let mut expected = content;
    expected[512..512 + 300_001].fill(9);
    assert!(fs::read(file.path()).unwrap() == expected);
}

#[test]
fn direct_access_reports_the_alignment_that_the_file_system_wants() {
    let folder = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![5; 16 << 10]).unwrap();
    match Image::open(&path, Access { read_only: false, direct: true }) {
        Ok(image) => {
            let blocks = image.blocks();
            assert!(blocks.logical_bytes.is_power_of_two() && blocks.logical_bytes >= 512);
            assert!(blocks.memory_alignment.is_power_of_two());
            assert!(image.is_direct());
        }
        // Some file systems know no direct access; the refusal must say what to do then.
        Err(error) => assert!(error.to_string().contains("leave `direct` out"), "{error}"),
    }
}

#[test]
fn another_file_takes_the_place_of_an_image_and_its_lock() {
    let (first, second) = (file_of(&[1; 1024]), file_of(&[2; 2048]));
    let image = Image::open(first.path(), WRITABLE).unwrap();
    let open = |path| File::options().read(true).write(true).open(path).unwrap();
    image.exchange(&open(second.path())).unwrap();
    assert_eq!(image.size_bytes().unwrap(), 2048);
    let mut start = [0; 1];
    assert_eq!(read_some(&image.file, 0, &mut start).unwrap(), 1);
    assert_eq!(start, [2]);
    assert!(refusal(second.path(), WRITABLE).contains("in use"));
    Image::open(first.path(), WRITABLE).unwrap();
}

#[test]
fn what_cannot_take_the_place_of_an_image_leaves_it_as_it_is() {
    let (file, partial, fine) = (file_of(&[1; 1024]), file_of(&[2; 1000]), file_of(&[3; 512]));
    let image = Image::open(file.path(), WRITABLE).unwrap();
    let _other_guest = Image::open(fine.path(), READ_ONLY).unwrap();
    let writable = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    for (successor, expected) in [
        (File::open(fine.path()).unwrap(), "not open for what this disk does"),
        (writable(Path::new("/dev/null")), "a file takes the place of a file"),
        (writable(fine.path()), "in use"),
        (writable(partial.path()), "ends within a block"),
    ] {
        let error = image.exchange(&successor).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(image.size_bytes().unwrap(), 1024);
    }
}
