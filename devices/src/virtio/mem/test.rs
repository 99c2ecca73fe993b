use std::ops::Range;

use arch::memory::{Backing, GuestAddress};

use super::*;
use crate::test::LoopThread;
use crate::test::driver::{self, Driver, HIGH_RAM, LOW_RAM};
use crate::test::hostile::Subject;
use crate::test::wire::{MmioWire, Source};

const BLOCK: u64 = BLOCK_BYTES_MIN;
/// Eighty blocks: more than a word of bits has.
const ELASTIC: Range<u64> = 2 << 40..(2 << 40) + 80 * BLOCK;
const FIXED: u64 = LOW_RAM.end + (HIGH_RAM.end - HIGH_RAM.start);

const DONE: u16 = Answer::Done as u16;
const REFUSED: u16 = Answer::Refused as u16;
const ERROR: u16 = Answer::Error as u16;
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

fn memory(backing: Backing) -> GuestMemory {
    GuestMemory::map_elastic(&[LOW_RAM, HIGH_RAM], Some(&ELASTIC), backing).unwrap()
}

fn started(backing: Backing) -> (LoopThread, Driver, Sizer) {
    let (home, memory) = (LoopThread::new(), memory(backing));
    let mem = Mem::new(memory, memory.regions().last().unwrap(), home.handle());
    let sizer = mem.sizer(memory);
    let mut driver = Driver::new(Box::new(MmioWire::new(Box::new(mem), memory)), memory);
    driver.start();
    (home, driver, sizer)
}

/// Type and state of the answer to a request for `count` blocks from the block `first`.
fn ask(driver: &mut Driver, kind: u16, first: u64, count: u16) -> (u16, u16) {
    ask_at(driver, kind, ELASTIC.start + first * BLOCK, count)
}

fn ask_at(driver: &mut Driver, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let words = [u64::from(kind), address, u64::from(count)];
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    let answer = driver.request(0, &[&bytes], &[10]);
    let word = |at: usize| u16::from_le_bytes(answer[at..at + 2].try_into().unwrap());
    assert_eq!(answer.len(), 10);
    (word(0), word(8))
}

/// What the configuration says of plugged and requested bytes, in blocks.
fn configured(driver: &mut Driver) -> (u64, u64) {
    let mut config = [0; 56];
    driver.wire.read_config(0, &mut config);
    let word = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!([0, 16, 24, 32].map(word), [BLOCK, ELASTIC.start, 80 * BLOCK, 80 * BLOCK]);
    (word(40) / BLOCK, word(48) / BLOCK)
}

#[test]
fn blocks_are_plugged_up_to_what_was_asked_for() {
    let (_home, mut driver, sizer) = started(Backing::default());
    assert_eq!(ask(&mut driver, request::PLUG, 0, 1), (REFUSED, 0));
    sizer.set_size(FIXED + 70 * BLOCK).unwrap();
    driver.wire.wait_interrupt(Source::Config);
    assert_eq!(configured(&mut driver), (0, 70));
    assert_eq!(ask(&mut driver, request::PLUG, 2, 66), (DONE, 0));
    assert_eq!(configured(&mut driver), (66, 70));
    assert_eq!(ask(&mut driver, request::PLUG, 70, 5), (REFUSED, 0));
    assert_eq!(ask(&mut driver, request::PLUG, 76, 4), (DONE, 0));
    assert_eq!((sizer.size(), sizer.requested()), (FIXED + 70 * BLOCK, FIXED + 70 * BLOCK));
    assert_eq!(sizer.max(), FIXED + 80 * BLOCK);
}

#[test]
fn unplugged_memory_is_given_back() {
    for shared in [false, true] {
        let (_home, mut driver, sizer) = started(Backing { shared, ..Backing::default() });
        sizer.set_size(FIXED + 4 * BLOCK).unwrap();
        assert_eq!(ask(&mut driver, request::PLUG, 0, 4), (DONE, 0));
        let words = (0..4).map(|block| ELASTIC.start + block * BLOCK);
        words.clone().for_each(|word| driver.write_memory(word, &[7]));
        assert_eq!(ask(&mut driver, request::UNPLUG, 1, 2), (DONE, 0));
        let left: Vec<u8> = words.clone().flat_map(|word| driver.read_memory(word, 1)).collect();
        assert_eq!(left, [7, 0, 0, 7]);
        assert_eq!(sizer.size(), FIXED + 2 * BLOCK);
        assert_eq!(ask(&mut driver, request::UNPLUG_ALL, 0, 0), (DONE, 0));
        assert!(words.flat_map(|word| driver.read_memory(word, 1)).all(|byte| byte == 0));
        assert_eq!(sizer.size(), FIXED);
    }
}

#[test]
fn states_are_told() {
    let (_home, mut driver, sizer) = started(Backing::default());
    sizer.set_size(sizer.max()).unwrap();
    ask(&mut driver, request::PLUG, 60, 8);
    for (first, count, state) in
        [(60, 8, PLUGGED), (0, 60, UNPLUGGED), (68, 12, UNPLUGGED), (0, 80, MIXED), (59, 2, MIXED)]
    {
        assert_eq!(ask(&mut driver, request::STATE, first, count), (DONE, state));
    }
}

#[test]
fn what_is_against_the_rules_changes_nothing() {
    let (_home, mut driver, sizer) = started(Backing::default());
    sizer.set_size(sizer.max()).unwrap();
    ask(&mut driver, request::PLUG, 10, 10);
    let start = ELASTIC.start;
    for kind in [request::PLUG, request::UNPLUG, request::STATE, 4, u16::MAX] {
        for (address, count) in [
            (start, 0),
            (start, 81),
            (start, u16::MAX),
            (start + 79 * BLOCK, 2),
            (start + 1, 1),
            (start - BLOCK, 1),
            (ELASTIC.end, 1),
            (0, 1),
            (u64::MAX - BLOCK + 1, 2),
        ] {
            let found = ask_at(&mut driver, kind, address, count);
            assert_eq!(found, (ERROR, 0), "{kind} at {address:#x}, {count} blocks");
        }
    }
    for (kind, first, count) in
        [(request::PLUG, 10, 1), (request::PLUG, 5, 6), (request::UNPLUG, 19, 2)]
    {
        assert_eq!(ask(&mut driver, kind, first, count), (ERROR, 0));
    }
    assert_eq!(configured(&mut driver), (10, 80));
    let answer = driver.request(0, &[&[1; 23]], &[4, 6]);
    assert_eq!(answer, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0], "half a request");
}

#[test]
fn a_request_without_room_for_the_answer_makes_the_device_need_a_reset() {
    let (_home, mut driver, _) = started(Backing::default());
    driver.send(0, &[&[0; 24]], &[9]);
    driver.wait_needs_reset();
}

#[test]
fn sizes_that_the_guest_cannot_have_are_refused_with_those_that_it_can() {
    let (_home, _driver, sizer) = started(Backing::default());
    for bytes in [0, FIXED - BLOCK, sizer.max() + BLOCK, u64::MAX] {
        let error = sizer.set_size(bytes).unwrap_err().to_string();
        assert!(error.ends_with(&format!("from {FIXED} to {}", sizer.max())), "{error}");
    }
    let error = sizer.set_size(FIXED + BLOCK + 1).unwrap_err().to_string();
    let expected = format!("are {} and {}", FIXED + BLOCK, FIXED + 2 * BLOCK);
    assert!(error.ends_with(&expected), "{error}");
    assert_eq!(sizer.requested(), FIXED);
}

#[test]
fn plugged_memory_outlives_a_reset_and_not_a_restart() {
    let (_home, mut driver, sizer) = started(Backing::default());
    sizer.set_size(FIXED + 5 * BLOCK).unwrap();
    ask(&mut driver, request::PLUG, 0, 5);
    driver.start();
    assert_eq!(configured(&mut driver), (5, 5));
    driver.reset();
    sizer.switch_off();
    driver.start();
    assert_eq!(configured(&mut driver), (0, 5));
    assert_eq!(ask(&mut driver, request::STATE, 0, 80), (DONE, UNPLUGGED));
}

#[test]
fn buffers_may_be_in_plugged_memory() {
    let (_home, mut driver, sizer) = started(Backing::default());
    sizer.set_size(FIXED + BLOCK).unwrap();
    ask(&mut driver, request::PLUG, 0, 1);
    let read = GuestAddress(ELASTIC.start);
    let descriptor = driver::Descriptor { address: read.0, len: 24, flags: driver::NEXT, next: 1 };
    let answer =
        driver::Descriptor { address: read.0 + 4096, len: 10, flags: driver::WRITE, next: 0 };
    driver.write_memory(read.0, &[9, 0]);
    driver.write_descriptor(0, 0, descriptor);
    driver.write_descriptor(0, 1, answer);
    driver.make_available(0, 0);
    driver.wire.notify(0);
    while driver.used(0).is_none() {
        driver.wire.wait_interrupt(Source::Queue(0));
    }
    assert_eq!(driver.read_memory(answer.address, 2), ERROR.to_le_bytes());
}

#[test]
fn a_memory_device_survives_a_hostile_driver() {
    let memory = memory(Backing::default());
    let subject = Subject {
        make: &|home| Box::new(Mem::new(memory, memory.regions().last().unwrap(), home)),
        served: &[0],
        works: &|driver| {
            assert_eq!(ask(driver, request::STATE, 0, 80), (DONE, UNPLUGGED));
        },
    };
    subject.survives();
}
