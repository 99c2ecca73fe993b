use std::fs;
use std::path::Path;

use tempfile::NamedTempFile;

use super::*;
use crate::host::disk::image::Access;
use crate::test::LoopThread;
use crate::test::driver::{Descriptor, Driver, INDIRECT, NEXT, WRITE};
use crate::test::hostile::Subject;
use crate::test::wire::Source;

const SECTORS: u64 = 256;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// An image, the thread of its device and the driver in front of it.
struct Setup {
    file: NamedTempFile,
    _home: LoopThread,
    driver: Driver,
}

impl Setup {
    fn new(engine: Engine) -> Self {
        Self::with(engine, Access::default())
    }

    fn with(engine: Engine, access: Access) -> Self {
        let file = image_file();
        let home = LoopThread::new();
        let driver = Driver::mmio(Box::new(block(file.path(), engine, access, home.handle())));
        let mut setup = Self { file, _home: home, driver };
        setup.driver.start();
        setup
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.file.path()).unwrap()
    }

    /// Reads sectors and returns the data with the status behind them.
    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        self.driver.request(0, &[&header(IN, sector)], &[len, 1])
    }

    /// Sends a request without data to read and returns its status.
    fn command(&mut self, kind: u32, sector: u64, data: &[u8]) -> u8 {
        let sent = self.driver.send(0, &[&header(kind, sector), data], &[1]);
        self.driver.wait_used(0);
        self.driver.answer(&sent)[0]
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.command(OUT, sector, data)
    }
}

/// Every engine that this machine has.
fn engines() -> Vec<Engine> {
    let file = image_file();
    let image = Arc::new(Image::open(file.path(), Access::default()).unwrap());
    let has = |engine: &Engine| engine.open(Arc::clone(&image)).is_ok();
    [Engine::Sync, Engine::Uring, Engine::Auto].into_iter().filter(has).collect()
}

fn block(path: &Path, engine: Engine, access: Access, home: LoopHandle) -> Block {
    let image = Image::open(path, access).unwrap();
    let options = BlockOptions { image, serial: "a serial".to_owned(), engine, queues: 2 };
    Block::new(options, home).unwrap()
}

fn image_file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), pattern(usize::try_from(SECTORS).unwrap() * 512)).unwrap();
    file
}

/// Bytes that differ from sector to sector.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from((index / 512 + index) % 251).unwrap()).collect()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_image() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        let data: Vec<u8> = (0..=255).cycle().take(4096).collect();
        assert_eq!(setup.write(8, &data), OK);
        assert_eq!(setup.read(8, 4096), [&data[..], &[OK]].concat());
        assert!(setup.content()[4096..8192] == data);
        assert_eq!(setup.read(0, 512), [&pattern(512)[..], &[OK]].concat());
    }
}

#[test]
fn header_data_and_status_may_be_split_anywhere() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        let header = header(IN, 2);
        let (first, second) = header.split_at(5);
        let answer = setup.driver.request(0, &[first, second], &[1, 1022, 0, 500, 14]);
        assert_eq!(answer, [&pattern(4096)[1024..2560], &[OK]].concat());
        let data = [[3; 256], [4; 256]];
        let parts = [first_of(OUT), vec![], rest_of(OUT), data[0].to_vec(), data[1].to_vec()];
        let parts: Vec<_> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(setup.driver.request(0, &parts, &[1]), [OK]);
        assert!(setup.content()[..512] == data.concat());
    }
}

fn first_of(kind: u32) -> Vec<u8> {
    header(kind, 0)[..7].to_vec()
}

fn rest_of(kind: u32) -> Vec<u8> {
    header(kind, 0)[7..].to_vec()
}

#[test]
fn requests_past_the_end_fail_and_touch_nothing() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        let before = setup.content();
        for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
            assert_eq!(setup.write(sector, &[1; 1024]), IO_ERROR);
            let sent = setup.driver.send(0, &[&header(IN, sector)], &[1024, 1]);
            assert_eq!(setup.driver.wait_used(0).1, 0, "no byte of the buffers is promised");
            assert_eq!(setup.driver.answer(&sent)[1024], IO_ERROR);
        }
        assert_eq!(setup.read(SECTORS, 0), [OK], "nothing at the very end is nothing wrong");
        assert!(setup.content() == before);
    }
}

#[test]
fn broken_requests_are_refused_by_their_status() {
    let mut setup = Setup::new(Engine::Sync);
    let before = setup.content();
    assert_eq!(setup.driver.request(0, &[&header(IN, 0)[..15]], &[1]), [IO_ERROR]);
    assert_eq!(setup.driver.request(0, &[], &[1]), [IO_ERROR]);
    assert_eq!(setup.write(0, &[1; 511]), IO_ERROR);
    for kind in [2, 3, 5, 7, 10, 14, 24, u32::MAX] {
        assert_eq!(setup.command(kind, 0, &[]), UNSUPPORTED);
    }
    let sent = setup.driver.send(0, &[&header(OUT, 0), &[1; 512]], &[512, 1]);
    setup.driver.wait_used(0);
    assert_eq!(setup.driver.answer(&sent)[512], IO_ERROR);
    assert!(setup.content() == before);
}

#[test]
fn a_request_for_more_memory_than_any_honest_one_is_refused() {
    let mut setup = Setup::new(Engine::Sync);
    let header = setup.driver.place(&header(OUT, 0));
    let status = setup.driver.place(&[0xff]);
    let first = Descriptor { address: header, len: 16, flags: NEXT, next: 1 };
    setup.driver.write_descriptor(0, 0, first);
    // 32 MiB, over and over again.
    for index in 1..10 {
        let data = Descriptor { address: 0, len: 32 << 20, flags: NEXT, next: index + 1 };
        setup.driver.write_descriptor(0, index, data);
    }
    let last = Descriptor { address: status, len: 1, flags: WRITE, next: 0 };
    setup.driver.write_descriptor(0, 10, last);
    setup.driver.make_available(0, 0);
    setup.driver.wire.notify(0);
    setup.driver.wait_used(0);
    assert_eq!(setup.driver.read_memory(status, 1), [IO_ERROR]);
}

#[test]
fn a_chain_without_room_for_a_status_needs_a_reset_and_all_is_well_after_it() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        setup.driver.send(0, &[&header(FLUSH, 0)], &[]);
        setup.driver.wait_needs_reset();
        setup.driver.start();
        assert_eq!(setup.read(0, 512), [&pattern(512)[..], &[OK]].concat());
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    for engine in engines() {
        let mut setup = Setup::with(engine, Access { read_only: true, direct: false });
        let offered = setup.driver.offered_features();
        assert_eq!(offered >> 5 & 1, 1, "VIRTIO_BLK_F_RO");
        assert_eq!(setup.write(0, &[1; 512]), IO_ERROR);
        assert_eq!(setup.command(DISCARD, 0, &range(0, 8, 0)), UNSUPPORTED);
        assert_eq!(setup.command(WRITE_ZEROES, 0, &range(0, 8, 0)), UNSUPPORTED);
        assert_eq!(setup.command(FLUSH, 0, &[]), OK);
        assert!(setup.content() == pattern(setup.content().len()));
        // A driver that turns the feature down may write no more than one that takes it.
        setup.driver.start_with(offered & !(1 << 5));
        assert_eq!(setup.write(0, &[1; 512]), IO_ERROR);
    }
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeros() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        assert_eq!(setup.command(DISCARD, 0, &range(8, 8, 0)), OK);
        assert_eq!(setup.command(WRITE_ZEROES, 0, &range(17, 1, 0)), OK);
        assert_eq!(setup.command(WRITE_ZEROES, 0, &range(24, 8, 1)), OK);
        let mut expected = pattern(setup.content().len());
        for zeroed in [4096..8192, 8704..9216, 12288..16384] {
            expected[zeroed].fill(0);
        }
        assert!(setup.content() == expected);
        let refused = [
            (DISCARD, range(0, 0, 0), IO_ERROR),
            (DISCARD, range(SECTORS - 1, 2, 0), IO_ERROR),
            (DISCARD, range(u64::MAX, 1, 0), IO_ERROR),
            (DISCARD, range(0, u32::MAX, 0), IO_ERROR),
            (DISCARD, range(0, 1, 1), UNSUPPORTED),
            (WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED),
            (WRITE_ZEROES, [range(0, 1, 0), range(1, 1, 0)].concat(), IO_ERROR),
            (WRITE_ZEROES, range(0, 1, 0)[..15].to_vec(), IO_ERROR),
        ];
        for (kind, data, status) in refused {
            assert_eq!(setup.command(kind, 0, &data), status);
        }
        assert!(setup.content() == expected);
    }
}

#[test]
fn the_serial_is_twenty_bytes_padded_with_zeros() {
    let mut setup = Setup::new(Engine::Sync);
    let answer = setup.driver.request(0, &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!(answer, *b"a serial\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let answer = setup.driver.request(0, &[&header(GET_ID, 0)], &[19, 1]);
    assert_eq!(answer, [], "no room, so nothing is promised");
    assert_eq!(identification("a serial of more than twenty bytes"), *b"a serial of more tha");
}

#[test]
fn configuration_space_tells_sizes_limits_and_queues() {
    let mut setup = Setup::new(Engine::Sync);
    let mut config = [0; 64];
    setup.driver.wire.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from(word(0)), SECTORS);
    assert_eq!((word(8), word(12), word(20)), (1 << 20, 254, 512));
    assert_eq!(config[24..28], [3, 0, 8, 0], "a page is eight blocks");
    assert_eq!((config[32], config[34]), (1, 2), "write-back; two queues");
    assert_eq!([36, 40, 44, 48, 52].map(word), [1 << 22, 1, 8, 1 << 16, 1]);
    assert_eq!(config[56], 1);
}

#[test]
fn every_queue_is_served() {
    for engine in engines() {
        let mut setup = Setup::new(engine);
        let expected = [&pattern(1024)[512..], &[OK]].concat();
        for queue in [1, 0, 1] {
            assert_eq!(setup.driver.request(queue, &[&header(IN, 1)], &[512, 1]), expected);
        }
    }
}

#[test]
fn more_requests_than_the_disk_takes_at_a_time_are_all_answered() {
    const COUNT: u16 = 256;
    for engine in engines() {
        let mut setup = Setup::new(engine);
        let driver = &mut setup.driver;
        let header = driver.place(&header(IN, 1));
        let data = driver.room(512);
        let status = driver.place(&[0xff]);
        let table = [
            Descriptor { address: header, len: 16, flags: NEXT, next: 1 },
            Descriptor { address: data, len: 512, flags: NEXT | WRITE, next: 2 },
            Descriptor { address: status, len: 1, flags: WRITE, next: 0 },
        ];
        let table = driver.place(&table.map(Descriptor::bytes).concat());
        let whole = Descriptor { address: table, len: 48, flags: INDIRECT, next: 0 };
        for _ in 0..3 {
            for queue in 0..2 {
                for head in 0..COUNT {
                    driver.write_descriptor(queue, head, whole);
                    driver.make_available(queue, head);
                }
            }
            (0..2).for_each(|queue| driver.wire.notify(queue));
            for queue in 0..2 {
                let mut heads: Vec<_> = (0..COUNT).map(|_| driver.wait_used(queue).0).collect();
                heads.sort_unstable();
                assert!(heads.into_iter().eq(0..u32::from(COUNT)));
            }
        }
        assert_eq!(driver.read_memory(status, 1), [OK]);
        assert!(driver.read_memory(data, 512) == pattern(1024)[512..]);
    }
}

#[test]
fn the_cache_is_written_through_when_the_driver_cannot_flush_or_switched_it_off() {
    const FLUSH_BIT: u64 = 1 << 9;
    const SWITCH_BIT: u64 = 1 << 11;
    let mut setup = Setup::new(Engine::Sync);
    let offered = setup.driver.offered_features();
    let mut mode = |features, switch: &[u8]| {
        setup.driver.start_with(features);
        setup.driver.wire.write_config(32, switch);
        let mut mode = [9];
        setup.driver.wire.read_config(32, &mut mode);
        assert_eq!(setup.write(0, &[1; 512]), OK);
        mode[0]
    };
    assert_eq!(mode(offered, &[]), 1);
    assert_eq!(mode(offered, &[0]), 0);
    assert_eq!(mode(offered, &[7]), 1, "no such mode");
    assert_eq!(mode(offered & !SWITCH_BIT, &[0]), 1, "there is no switch");
    assert_eq!(mode(offered & !FLUSH_BIT, &[]), 0);
    assert_eq!(mode(offered & !FLUSH_BIT & !SWITCH_BIT, &[1]), 0);
}

#[test]
fn a_grown_image_is_announced_and_its_new_sectors_can_be_used() {
    let file = image_file();
    let home = LoopThread::new();
    let device = block(file.path(), Engine::Auto, Access::default(), home.handle());
    let resizer = device.resizer();
    let mut driver = Driver::mmio(Box::new(device));
    driver.start();
    let grown = SECTORS * 512 + 4096 + 100;
    file.as_file().set_len(grown).unwrap();
    assert_eq!(resizer.resize().unwrap(), grown - 100);
    driver.wire.wait_interrupt(Source::Config);
    let mut capacity = [0; 8];
    driver.wire.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS + 8);
    assert_eq!(driver.request(0, &[&header(IN, SECTORS + 7)], &[512, 1]), [0; 513]);
}

#[test]
fn a_hostile_driver_breaks_nothing() {
    for engine in engines() {
        let file = image_file();
        let make = |home| -> Box<dyn VirtioDevice> {
            Box::new(block(file.path(), engine, Access { read_only: true, direct: false }, home))
        };
        let works = |driver: &mut Driver| {
            let answer = driver.request(0, &[&header(IN, 1)], &[512, 1]);
            assert_eq!(answer, [&pattern(1024)[512..], &[OK]].concat());
        };
        Subject { make: &make, served: &[0, 1], works: &works }.survives();
    }
}
