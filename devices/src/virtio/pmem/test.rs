use std::fs;

use tempfile::NamedTempFile;

use super::*;
use crate::test::LoopThread;
use crate::test::driver::Driver;
use crate::test::hostile::Subject;

const START: u64 = 3 << 40;

fn file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![7; 2 << 20]).unwrap();
    file
}

fn pmem(file: &NamedTempFile, read_only: bool, home: LoopHandle) -> Box<Pmem> {
    let window = FileWindow::open(file.path(), read_only).unwrap();
    Box::new(Pmem::new("pmem0".to_owned(), Arc::new(window), START, home))
}

#[test]
fn the_window_is_told_and_flushes_are_answered() {
    for read_only in [false, true] {
        let (home, file) = (LoopThread::new(), file());
        let mut driver = Driver::mmio(pmem(&file, read_only, home.handle()));
        driver.start();
        let mut config = [0; 16];
        driver.wire.read_config(0, &mut config);
        assert_eq!(u128::from_le_bytes(config), u128::from(START) | (2 << 20) << 64);
        assert_eq!(driver.request(0, &[&[0; 4]], &[4]), [0; 4]);
        assert_eq!(driver.request(0, &[&[0], &[0; 3]], &[1, 3]), [0; 4]);
    }
}

#[test]
fn what_is_no_flush_fails_and_changes_nothing() {
    let (home, file) = (LoopThread::new(), file());
    let mut driver = Driver::mmio(pmem(&file, false, home.handle()));
    driver.start();
    for request in [&[1u8, 0, 0, 0][..], &[255; 4], &[0; 3], &[]] {
        assert_eq!(driver.request(0, &[request], &[4]), [1, 0, 0, 0], "{request:?}");
    }
    assert_eq!(fs::read(file.path()).unwrap(), vec![7; 2 << 20]);
    driver.send(0, &[&[0; 4]], &[3]);
    driver.wait_needs_reset();
}

#[test]
fn persistent_memory_survives_a_hostile_driver() {
    let file = file();
    let subject = Subject {
        make: &|home| pmem(&file, true, home),
        served: &[0],
        works: &|driver| assert_eq!(driver.request(0, &[&[0; 4]], &[4]), [0; 4]),
    };
    subject.survives();
}
