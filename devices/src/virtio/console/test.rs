//! Consoles driven through registers and rings.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::event::EventLoop;
use crate::host::stream::{INPUT_BYTES_MAX, OUTPUT_BYTES_MAX};
use crate::test::LoopThread;
use crate::test::driver::{self, Driver};
use crate::test::hostile::Subject;
use crate::test::wire::Source;

const INPUT: u16 = 0;
const OUTPUT: u16 = 1;

/// A console with pipes behind it, and the other ends of the pipes.
struct Machine {
    driver: Driver,
    typing: Option<File>,
    screen: Option<File>,
    home: LoopThread,
}

fn pipe() -> (File, File) {
    let (reader, writer) = io::pipe().unwrap();
    (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
}

fn machine() -> Machine {
    let (input, typing) = pipe();
    let (screen, output) = pipe();
    let (home, stream) = LoopThread::with(move |event_loop| {
        let quit = Box::new(|| panic!("a pipe has no escape keys"));
        Stream::inherited(event_loop, input.as_fd(), output.as_fd(), quit).unwrap()
    });
    let driver = Driver::mmio(Box::new(Console::new(stream, home.handle())));
    Machine { driver, typing: Some(typing), screen: Some(screen), home }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from((index * 7 + index / 251) % 251).unwrap()).collect()
}

impl Machine {
    fn shown(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.screen.as_mut().unwrap().read_exact(&mut bytes).unwrap();
        bytes
    }

    fn type_in(&mut self, text: &[u8]) {
        self.typing.as_mut().unwrap().write_all(text).unwrap();
    }
}

#[test]
fn output_is_shown_and_input_fills_the_buffers_in_their_order() {
    let mut machine = machine();
    machine.driver.start();
    assert_eq!(machine.driver.request(OUTPUT, &[b"log", b"", b"in: "], &[]), b"");
    assert_eq!(machine.shown(7), b"login: ");
    let first = machine.driver.send(INPUT, &[], &[3, 2]);
    let second = machine.driver.send(INPUT, &[], &[8]);
    machine.type_in(b"root\r!!");
    assert_eq!(machine.driver.wait_used(INPUT), (u32::from(first.head), 5));
    assert_eq!(machine.driver.answer(&first), b"root\r");
    assert_eq!(machine.driver.wait_used(INPUT), (u32::from(second.head), 2));
    assert_eq!(&machine.driver.answer(&second)[..2], b"!!");
}

#[test]
fn a_slow_reader_stops_the_transmit_queue_and_loses_nothing() {
    let mut machine = machine();
    machine.driver.start();
    let all = pattern(2 << 20);
    let mut pieces = all.chunks(5000);
    let mut seen = Vec::new();
    let mut waiting = 0;
    loop {
        // As many as the queue takes, until the device stops taking them.
        while waiting < 32 {
            let Some(piece) = pieces.next() else { break };
            machine.driver.send(OUTPUT, &[piece], &[]);
            waiting += 1;
        }
        machine.home.settle();
        while machine.driver.used(OUTPUT).is_some() {
            waiting -= 1;
        }
        if waiting < 32 && pieces.len() > 0 {
            continue;
        }
        if waiting == 0 && pieces.len() == 0 {
            break;
        }
        seen.extend(machine.shown(4096));
    }
    drop(machine.driver);
    let (screen, home) = (machine.screen.take(), machine.home);
    let ending = std::thread::spawn(move || drop(home));
    screen.unwrap().read_to_end(&mut seen).unwrap();
    ending.join().unwrap();
    assert!(seen == all);
}

#[test]
fn what_a_reader_does_not_take_stays_with_the_guest() {
    const PIPE_BYTES: usize = 64 << 10;
    let mut machine = machine();
    machine.driver.start();
    let piece = pattern(4096);
    for _ in 0..OUTPUT_QUEUE_SIZE {
        machine.driver.send(OUTPUT, &[&piece], &[]);
    }
    machine.home.settle();
    let taken = std::iter::from_fn(|| machine.driver.used(OUTPUT)).count() * piece.len();
    assert!(taken >= PIPE_BYTES, "{taken}");
    assert!(taken <= PIPE_BYTES + OUTPUT_BYTES_MAX, "{taken}");
}

#[test]
fn input_waits_for_buffers_and_none_is_lost() {
    let mut machine = machine();
    machine.driver.start();
    let all = pattern(20 * INPUT_BYTES_MAX);
    let writer = std::thread::spawn({
        let (all, mut typing) = (all.clone(), machine.typing.take().unwrap());
        move || typing.write_all(&all).unwrap()
    });
    let mut seen = Vec::new();
    while seen.len() < all.len() {
        seen.extend(machine.driver.request(INPUT, &[], &[700, 1]));
    }
    writer.join().unwrap();
    assert!(seen == all);
}

#[test]
fn a_reset_keeps_what_is_on_its_way() {
    let mut machine = machine();
    machine.type_in(b"typed before the driver");
    machine.home.settle();
    for round in 0..3 {
        machine.driver.start();
        machine.driver.request(OUTPUT, &[b"boot"], &[]);
        assert_eq!(machine.driver.request(INPUT, &[], &[6]).len(), 6, "boot {round}");
        machine.driver.reset();
    }
    assert_eq!(machine.shown(12), b"bootbootboot");
    machine.driver.start();
    assert_eq!(machine.driver.request(INPUT, &[], &[64]), b"river");
}

#[test]
fn an_emergency_write_needs_no_driver_and_is_one_character_of_any_width() {
    let mut machine = machine();
    machine.driver.wire.write_config(8, &u32::from(b'o').to_le_bytes());
    machine.driver.wire.write_config(8, b"o");
    machine.driver.wire.write_config(8, b"p\xff");
    machine.driver.wire.write_config(9, b"x");
    machine.driver.wire.write_config(4, b"xxxx");
    machine.driver.start();
    machine.driver.wire.write_config(8, b"s");
    assert_eq!(machine.shown(4), b"oops");
}

#[test]
fn a_flood_of_emergency_writes_stops_nothing() {
    let mut machine = machine();
    for _ in 0..4 * OUTPUT_BYTES_MAX {
        machine.driver.wire.write_config(8, b"!");
    }
    machine.driver.start();
    let all = machine.shown(OUTPUT_BYTES_MAX);
    assert!(all.iter().all(|byte| *byte == b'!'));
}

#[test]
fn the_driver_learns_of_one_port_and_the_size_of_the_window_at_once_and_when_it_changes() {
    let home = LoopThread::new();
    let stream = Stream::null().unwrap();
    stream.resize(80, 25);
    let mut driver = Driver::mmio(Box::new(Console::new(stream.clone(), home.handle())));
    assert_eq!(config(&mut driver), [80, 25, 1, 0]);
    driver.start();
    driver.wire.wait_interrupt(Source::Config);
    stream.resize(132, 43);
    driver.wire.wait_interrupt(Source::Config);
    assert_eq!(config(&mut driver), [132, 43, 1, 0]);
}

fn config(driver: &mut Driver) -> [u16; 4] {
    [0, 2, 4, 6].map(|offset| {
        let mut word = [0; 2];
        driver.wire.read_config(offset, &mut word);
        u16::from_le_bytes(word)
    })
}

#[test]
fn a_chain_longer_than_all_memory_does_not_keep_the_loop() {
    let home = LoopThread::new();
    let console = Console::new(Stream::null().unwrap(), home.handle());
    let mut driver = Driver::mmio(Box::new(console));
    driver.start();
    let size = driver.rings[usize::from(OUTPUT)].size;
    for index in 0..size {
        let flags = if index + 1 < size { driver::NEXT } else { 0 };
        let all = driver::Descriptor { address: 0, len: 0x400_0000, flags, next: index + 1 };
        driver.write_descriptor(OUTPUT, index, all);
    }
    driver.make_available(OUTPUT, 0);
    driver.wire.notify(OUTPUT);
    // The chain is as long as 4 GiB: a reset in the middle of it need not wait for its end.
    home.settle();
    assert_eq!(driver.used(OUTPUT), None);
    driver.reset();
}

#[test]
fn a_faulty_console_rests_when_there_is_input() {
    let (mut event_loop, stream) = (EventLoop::new().unwrap(), Stream::null().unwrap());
    let home = event_loop.handle();
    let mut driver = Driver::mmio(Box::new(Console::new(stream.clone(), home.clone())));
    let driving = std::thread::spawn(move || {
        driver.start();
        driver.make_available(OUTPUT, u16::MAX);
        driver.wire.notify(OUTPUT);
        driver.wait_needs_reset();
        home.stop();
        driver
    });
    event_loop.run().unwrap();
    let _driver = driving.join().unwrap();
    stream.type_in(b"typed");
    event_loop.run_ready().unwrap();
    assert!(stream.attention().take(), "nobody takes the signal, and nobody spins on it");
}

#[test]
fn a_console_survives_a_hostile_driver() {
    let stream = Stream::null().unwrap();
    let typist = stream.clone();
    let subject = Subject {
        make: &|home| Box::new(Console::new(stream.clone(), home)),
        served: &[INPUT, OUTPUT],
        works: &|driver| {
            assert_eq!(driver.request(OUTPUT, &[b"hello", b"world"], &[]), b"");
            typist.type_in(b"typed");
            assert!(!driver.request(INPUT, &[], &[2, 2]).is_empty());
            // So that the next attack finds input and is looked at.
            typist.type_in(b"more");
        },
    };
    subject.survives();
}
