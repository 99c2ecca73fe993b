//! Cards driven through registers and rings, with datagram sockets in place of a tap.

mod control;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use super::layout::*;
use super::tap::TapBackend;
use super::*;
use crate::host::tap::Tap;
use crate::test::LoopThread;
use crate::test::driver::{self, Driver, Sent};
use crate::test::hostile::Subject;
use crate::test::pci_wire::PciWire;
use crate::test::wire::Source;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const EVENT_IDX: u64 = 1 << 29;

/// A card, its driver, and the other ends of the tap's queues.
struct Machine {
    driver: Driver,
    wires: Vec<UnixDatagram>,
    tap: Arc<Tap>,
    handle: NetHandle,
    home: LoopThread,
}

fn card(home: &LoopHandle, pairs: usize) -> (Net, Vec<UnixDatagram>, Arc<Tap>) {
    let (wires, ends): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixDatagram::pair().unwrap()).unzip();
    for end in &ends {
        end.set_nonblocking(true).unwrap();
    }
    let tap = Arc::new(Tap::stand_in("wire", ends.into_iter().map(Into::into).collect()));
    let backend = TapBackend::new("net0", Arc::clone(&tap), vec![home.clone()]).unwrap();
    let options = NetOptions {
        name: "net0".to_owned(),
        mac: MAC,
        mtu: Some(1500),
        backend: Box::new(backend),
    };
    (Net::new(options, home.clone()), wires, tap)
}

fn machine(pairs: usize) -> Machine {
    let home = LoopThread::new();
    let (card, wires, tap) = card(&home.handle(), pairs);
    let handle = card.handle();
    Machine { driver: Driver::mmio(Box::new(card)), wires, tap, handle, home }
}

/// A started card with one queue pair and all features but `without`.
fn started(without: u64) -> Machine {
    let mut machine = machine(1);
    let offered = machine.driver.offered_features();
    machine.driver.start_with(offered & !without);
    machine
}

/// A frame with an empty header.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    let body = (0..len).map(|index| u8::try_from((index * 7 + index / 251 + seed) % 251).unwrap());
    [0; HEADER_BYTES].into_iter().chain(body).collect()
}

impl Machine {
    /// Sends a control command and returns the answer.
    fn command(&mut self, parts: &[&[u8]]) -> u8 {
        let queue = u16::try_from(2 * self.tap.queues().len()).unwrap();
        self.command_on(queue, parts)
    }

    fn command_on(&mut self, queue: u16, parts: &[&[u8]]) -> u8 {
        let sent = self.driver.send(queue, parts, &[1]);
        assert_eq!(self.driver.wait_used(queue), (u32::from(sent.head), 1));
        self.driver.answer(&sent)[0]
    }

    /// What the card has counted when it is done with everything.
    fn counts(&self) -> (Count, Count) {
        self.home.settle();
        self.handle.counts()
    }

    fn config(&mut self) -> [u8; 12] {
        let mut config = [0; 12];
        self.driver.wire.read_config(0, &mut config);
        config
    }

    fn status(&mut self) -> u8 {
        self.config()[6]
    }

    /// Takes the frame that was sent from the wire.
    fn on_wire(&self, pair: usize) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let len = self.wires[pair].recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// Waits for a frame in `buffers`, in their order, and checks that it is `expected`.
    #[track_caller]
    fn receives(&mut self, buffers: &[Sent], expected: &[u8]) {
        let mut bytes = Vec::new();
        for buffer in buffers {
            let (head, len) = self.driver.wait_used(RECEIVE);
            assert_eq!(head, u32::from(buffer.head));
            let mut part = self.driver.answer(buffer);
            part.truncate(usize::try_from(len).unwrap());
            bytes.extend(part);
        }
        let count = u16::try_from(buffers.len()).unwrap();
        assert_eq!(bytes[NUM_BUFFERS_OFFSET..HEADER_BYTES], count.to_le_bytes());
        assert_eq!(bytes[HEADER_BYTES..], expected[HEADER_BYTES..]);
    }
}

#[test]
fn a_card_tells_its_address_link_pairs_and_mtu() {
    let mut machine = machine(3);
    let mut expected = [0; 12];
    expected[..6].copy_from_slice(&MAC);
    expected[6] = 1;
    expected[8] = 3;
    expected[10..].copy_from_slice(&1500_u16.to_le_bytes());
    assert_eq!(machine.config(), expected);
    let offered = machine.driver.offered_features();
    let all = FRONT_FEATURES | GUEST_OFFLOADS | FEATURE_MQ | FEATURE_MTU | FEATURE_MRG_RXBUF;
    assert_eq!(offered & all, all);
}

#[test]
fn frames_go_both_ways_however_their_buffers_are_split() {
    for without in [0, FEATURE_MRG_RXBUF, EVENT_IDX] {
        let mut machine = started(without);
        let (sent, received) = (frame(100, 1), frame(60, 2));
        assert_eq!(machine.driver.request(TRANSMIT, &[&sent], &[]), b"");
        assert_eq!(machine.on_wire(0), sent);
        let (header, body) = sent.split_at(HEADER_BYTES);
        machine.driver.request(TRANSMIT, &[&header[..5], &header[5..], body], &[]);
        assert_eq!(machine.on_wire(0), sent);
        let whole = machine.driver.send(RECEIVE, &[], &[2000]);
        let split = machine.driver.send(RECEIVE, &[], &[3, 8, 0, 30, 100]);
        for buffer in [whole, split] {
            machine.wires[0].send(&received).unwrap();
            machine.receives(&[buffer], &received);
        }
        let (sent, received) = machine.counts();
        assert_eq!(sent, Count { frames: 2, bytes: 200, dropped: 0 });
        assert_eq!(received, Count { frames: 2, bytes: 120, dropped: 0 });
    }
}

#[test]
fn the_queues_of_one_pair_share_a_vector_and_those_of_several_have_one_each() {
    let home = LoopThread::new();
    for (pairs, vectors) in [(1, 2), (2, 6)] {
        let (card, ..) = card(&home.handle(), pairs);
        assert_eq!(PciWire::new(Box::new(card), driver::memory()).layout.vectors, vectors);
    }
    let (card, wires, _tap) = card(&home.handle(), 1);
    let mut driver = Driver::pci(Box::new(card));
    driver.start();
    let (sent, received) = (frame(100, 1), frame(60, 2));
    let buffer = driver.send(RECEIVE, &[], &[200]);
    assert_eq!(driver.request(TRANSMIT, &[&sent], &[]), b"");
    wires[0].send(&received).unwrap();
    assert_eq!(driver.wait_used(RECEIVE), (buffer.head.into(), 72));
    assert_eq!(driver.answer(&buffer)[HEADER_BYTES..72], received[HEADER_BYTES..]);
}

#[test]
fn a_large_frame_fills_several_chains_and_says_how_many() {
    let mut machine = started(0);
    let buffers: Vec<_> = (0..60).map(|_| machine.driver.send(RECEIVE, &[], &[700, 800])).collect();
    for (range, len) in [(0..1, 1488), (1..3, 1489), (3..47, 65_550), (47..48, 20)] {
        let large = frame(len, len);
        machine.wires[0].send(&large).unwrap();
        machine.receives(&buffers[range], &large);
    }
}

#[test]
fn a_large_frame_after_small_ones_arrives_whole() {
    for large in [5188, 5189, 5190, 9000, 65_550] {
        let mut machine = started(0);
        let sizes = [vec![60; 20], vec![large], vec![1488; 20], vec![large; 2]].concat();
        for len in sizes {
            let count = (len + HEADER_BYTES).div_ceil(1500);
            let buffers: Vec<_> =
                (0..count).map(|_| machine.driver.send(RECEIVE, &[], &[700, 800])).collect();
            let sent = frame(len, len);
            machine.wires[0].send(&sent).unwrap();
            machine.receives(&buffers, &sent);
        }
    }
}

#[test]
fn a_frame_that_finds_too_few_buffers_waits_for_more_and_loses_nothing() {
    let mut machine = started(0);
    let first = machine.driver.send(RECEIVE, &[], &[1000]);
    let large = frame(9000, 3);
    let small = frame(50, 4);
    machine.wires[0].send(&large).unwrap();
    machine.wires[0].send(&small).unwrap();
    machine.home.settle();
    assert!(machine.driver.used(RECEIVE).is_none());
    let mut buffers = vec![first];
    for len in [3000, 5, 5006, 1] {
        buffers.push(machine.driver.send(RECEIVE, &[], &[len.max(12)]));
        machine.home.settle();
    }
    machine.receives(&buffers[..4], &large);
    let more = machine.driver.send(RECEIVE, &[], &[100]);
    let _ = machine.driver.wait_used(RECEIVE);
    let _ = machine.driver.wait_used(RECEIVE);
    let mut bytes = machine.driver.answer(&buffers[4]);
    bytes.extend(machine.driver.answer(&more));
    assert_eq!(bytes[HEADER_BYTES..HEADER_BYTES + 50], small[HEADER_BYTES..]);
}

#[test]
fn a_frame_that_no_ring_of_this_driver_can_hold_is_dropped_and_counted() {
    let mut machine = started(0);
    let size = machine.driver.rings[0].size;
    let buffers: Vec<_> = (0..size).map(|_| machine.driver.send(RECEIVE, &[], &[64])).collect();
    let small = frame(40, 5);
    machine.wires[0].send(&frame(20_000, 6)).unwrap();
    machine.wires[0].send(&small).unwrap();
    machine.receives(&buffers[..1], &small);
    let (_, received) = machine.counts();
    assert_eq!(received, Count { frames: 1, bytes: 40, dropped: 1 });
}

#[test]
fn without_mergeable_buffers_a_frame_that_is_too_large_is_dropped_alone() {
    let mut machine = started(FEATURE_MRG_RXBUF);
    let buffers: Vec<_> = (0..3).map(|_| machine.driver.send(RECEIVE, &[], &[100])).collect();
    let (exact, small) = (frame(88, 1), frame(50, 2));
    machine.wires[0].send(&exact).unwrap();
    machine.wires[0].send(&frame(89, 7)).unwrap();
    machine.wires[0].send(&small).unwrap();
    machine.receives(&buffers[..1], &exact);
    assert_eq!(machine.driver.wait_used(RECEIVE), (u32::from(buffers[1].head), 0));
    machine.receives(&buffers[2..], &small);
    assert_eq!(machine.counts().1, Count { frames: 2, bytes: 138, dropped: 1 });
}

#[test]
fn buffers_without_room_for_a_header_come_back_unused() {
    for without in [0, FEATURE_MRG_RXBUF] {
        let mut machine = started(without);
        let small = machine.driver.send(RECEIVE, &[], &[HEADER_BYTES - 1]);
        assert_eq!(machine.driver.wait_used(RECEIVE), (u32::from(small.head), 0));
        let empty = machine.driver.send(RECEIVE, &[b"nothing to write"], &[]);
        assert_eq!(machine.driver.wait_used(RECEIVE), (u32::from(empty.head), 0));
    }
}

#[test]
fn frames_wait_for_buffers_in_their_order() {
    let mut machine = started(0);
    let frames: Vec<_> = (0..8).map(|seed| frame(64 + seed, seed)).collect();
    for frame in &frames {
        machine.wires[0].send(frame).unwrap();
    }
    machine.home.settle();
    for frame in &frames {
        let buffer = machine.driver.send(RECEIVE, &[], &[200]);
        machine.receives(&[buffer], frame);
    }
}

#[test]
fn a_full_tap_stops_the_transmit_queue_and_loses_nothing() {
    let mut machine = started(0);
    let frames: Vec<_> = (0..200).map(|seed| frame(8000 + seed, seed)).collect();
    for frame in &frames {
        machine.driver.send(TRANSMIT, &[frame], &[]);
    }
    machine.home.settle();
    let mut used = 0;
    while machine.driver.used(TRANSMIT).is_some() {
        used += 1;
    }
    assert!((1..200).contains(&used), "the wire takes {used} frames and no more");
    for frame in &frames {
        assert_eq!(machine.on_wire(0), *frame);
    }
    for _ in used..200 {
        machine.driver.wait_used(TRANSMIT);
    }
    let bytes = frames.iter().map(|frame| frame.len() - HEADER_BYTES).sum::<usize>() as u64;
    assert_eq!(machine.counts().0, Count { frames: 200, bytes, dropped: 0 });
}

#[test]
fn what_is_no_frame_is_dropped_and_counted_and_others_pass() {
    let mut machine = started(0);
    let huge = vec![0; 40_000];
    for parts in [&[&[][..]][..], &[&[0; 5]], &[&[0; HEADER_BYTES + 13]], &[&huge, &huge]] {
        machine.driver.request(TRANSMIT, parts, &[]);
    }
    machine.driver.request(TRANSMIT, &[], &[100]);
    machine.driver.request(TRANSMIT, &[&frame(14, 1)], &[]);
    assert_eq!(machine.on_wire(0), frame(14, 1));
    assert_eq!(machine.counts().0, Count { frames: 1, bytes: 14, dropped: 5 });
}

#[test]
fn a_pulled_plug_is_seen_and_stops_frames_both_ways() {
    let mut machine = started(0);
    let buffer = machine.driver.send(RECEIVE, &[], &[200]);
    machine.handle.set_plugged(false);
    machine.driver.wire.wait_interrupt(Source::Config);
    assert_eq!(machine.status(), 0);
    assert!(!machine.handle.is_up());
    machine.driver.request(TRANSMIT, &[&frame(60, 1)], &[]);
    machine.wires[0].send(&frame(60, 2)).unwrap();
    machine.home.settle();
    machine.handle.set_plugged(true);
    machine.driver.wire.wait_interrupt(Source::Config);
    assert_eq!(machine.status(), 1);
    machine.wires[0].send(&frame(60, 3)).unwrap();
    machine.receives(&[buffer], &frame(60, 3));
    machine.driver.request(TRANSMIT, &[&frame(60, 4)], &[]);
    assert_eq!(machine.on_wire(0), frame(60, 4));
    let (sent, received) = machine.counts();
    assert_eq!((sent.dropped, received.dropped), (1, 1));
}

#[test]
fn frames_for_an_earlier_driver_are_forgotten() {
    let mut machine = started(0);
    machine.wires[0].send(&frame(60, 1)).unwrap();
    machine.driver.start();
    let buffer = machine.driver.send(RECEIVE, &[], &[100]);
    machine.wires[0].send(&frame(60, 2)).unwrap();
    machine.receives(&[buffer], &frame(60, 2));
}

/// Buffers and frames of all sizes in any order, the same in every run (xorshift).
#[test]
fn whatever_the_buffers_frames_arrive_whole_and_in_order_or_are_counted() {
    for without in [0, FEATURE_MRG_RXBUF] {
        let mut machine = started(without);
        machine.wires[0].set_nonblocking(true).unwrap();
        let mut seed = 0x6e69_7876_6d6d_0003_u64;
        let mut below = |end: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % u64::try_from(end).unwrap()).unwrap()
        };
        let (mut buffers, mut descriptors) = (VecDeque::new(), 0);
        let (mut expected, mut dropped, mut arrived) = (VecDeque::new(), 0, 0);
        for round in 0..3000 {
            let mut one_of = |ends: &[usize]| {
                let end = ends[below(ends.len())];
                below(end)
            };
            let mut parts: Vec<_> = (0..=one_of(&[4])).map(|_| one_of(&[9, 200, 3000])).collect();
            // Room for a header, without which a chain would overtake others on its way back.
            parts.push(HEADER_BYTES);
            let len = 14 + one_of(&[100, 1500, 9000, 65_000]);
            if descriptors + parts.len() < 250 && below(3) > 0 {
                descriptors += parts.len();
                buffers.push_back((machine.driver.send(RECEIVE, &[], &parts), parts.len()));
            }
            if expected.len() < 64 && machine.wires[0].send(&frame(len, round)).is_ok() {
                expected.push_back(frame(len, round));
            }
            machine.home.settle();
            let (mut bytes, mut chains) = (Vec::new(), 0);
            while let Some((head, len)) = machine.driver.used(RECEIVE) {
                let (buffer, parts) = buffers.pop_front().unwrap();
                assert_eq!(head, u32::from(buffer.head));
                descriptors -= parts;
                if len == 0 {
                    assert_ne!(without, 0, "a buffer came back unused");
                    continue;
                }
                let answer = machine.driver.answer(&buffer);
                bytes.extend_from_slice(&answer[..usize::try_from(len).unwrap()]);
                chains += 1;
                let count = bytes[NUM_BUFFERS_OFFSET..HEADER_BYTES].try_into().unwrap();
                if u16::from_le_bytes(count) == chains {
                    let position = expected
                        .iter()
                        .position(|frame: &Vec<u8>| frame[HEADER_BYTES..] == bytes[HEADER_BYTES..]);
                    dropped += position.expect("a frame that was sent");
                    expected.drain(..=position.unwrap());
                    arrived += 1;
                    (bytes, chains) = (Vec::new(), 0);
                }
            }
            assert_eq!(chains, 0, "a frame is published with all its buffers");
        }
        assert!(arrived > 100, "{arrived} frames arrived");
        let (_, received) = machine.counts();
        assert_eq!(received.frames, arrived);
        let left = u64::try_from(dropped + expected.len()).unwrap();
        assert!((u64::try_from(dropped).unwrap()..=left).contains(&received.dropped));
        assert_eq!(dropped > 0, without == FEATURE_MRG_RXBUF, "{dropped} frames dropped");
    }
}

#[test]
fn a_card_survives_a_hostile_driver() {
    let wire: RefCell<Option<UnixDatagram>> = RefCell::new(None);
    let subject = Subject {
        make: &|home| {
            let (card, mut wires, _) = card(&home, 1);
            *wire.borrow_mut() = wires.pop();
            Box::new(card)
        },
        served: &[RECEIVE, TRANSMIT, 2],
        works: &|driver| {
            let wire = wire.borrow();
            let wire = wire.as_ref().unwrap();
            // What attacks have sent is in the way.
            wire.set_nonblocking(true).unwrap();
            while wire.recv(&mut [0; 100]).is_ok() {}
            wire.set_nonblocking(false).unwrap();
            driver.request(TRANSMIT, &[&frame(77, 1)], &[]);
            let mut bytes = [0; 200];
            assert_eq!(wire.recv(&mut bytes).unwrap(), 89);
            assert_eq!(bytes[..89], frame(77, 1));
            let buffer = driver.send(RECEIVE, &[], &[100]);
            wire.send(&frame(50, 2)).unwrap();
            assert_eq!(driver.wait_used(RECEIVE), (u32::from(buffer.head), 62));
            let sent = driver.send(2, &[&[0, 0], &[1]], &[1]);
            assert_eq!(driver.wait_used(2), (u32::from(sent.head), 1));
        },
    };
    subject.survives();
}
