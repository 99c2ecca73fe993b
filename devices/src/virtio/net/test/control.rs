//! What becomes of commands on the control queue.

use super::*;

#[test]
fn the_control_queue_answers_every_command() {
    let mut machine = machine(4);
    machine.driver.start();
    let one = 1_u32.to_le_bytes();
    let none = 0_u32.to_le_bytes();
    let all = GUEST_OFFLOADS.to_le_bytes();
    for (expected, parts) in [
        // Receive modes.
        (0, &[&[0, 0], &[1][..]][..]),
        (0, &[&[0, 5], &[0]]),
        (1, &[&[0, 6], &[1]]),
        (1, &[&[0, 0], &[2]]),
        (1, &[&[0, 0]]),
        // Tables of addresses.
        (0, &[&[1, 0], &none, &none]),
        (0, &[&[1, 0], &one, &MAC, &one, &MAC]),
        (1, &[&[1, 0], &one, &MAC, &one, &MAC[1..]]),
        (1, &[&[1, 0], &[0xff; 4], &MAC]),
        // Its own address.
        (1, &[&[1, 1], &[1; 6]]),
        (1, &[&[1, 1], &[0; 6]]),
        (1, &[&[1, 1], &[2; 5]]),
        (0, &[&[1, 1], &[2; 6]]),
        // VLANs are not offered.
        (1, &[&[2, 0], &[1, 0]]),
        (0, &[&[3, 0]]),
        // Queue pairs.
        (0, &[&[4, 0], &[4, 0]]),
        (1, &[&[4, 0], &[5, 0]]),
        (1, &[&[4, 0], &[0, 0]]),
        (1, &[&[4, 1], &[1, 0]]),
        // Offloads.
        (0, &[&[5, 0], &all]),
        (0, &[&[5, 0], &[0; 8]]),
        (1, &[&[5, 0], &[0xff; 8]]),
        (1, &[&[5, 0], &[0; 7]]),
        (1, &[&[6, 0], &[0; 7]]),
        (1, &[&[0xff, 0xff]]),
        (1, &[&[0]]),
        (1, &[]),
    ] {
        assert_eq!(machine.command(parts), expected, "{parts:?}");
    }
    assert_eq!(machine.config()[..6], [2; 6]);
    assert_eq!(machine.tap.used_queues(), 4);
    machine.driver.start();
    assert_eq!(machine.config()[..6], MAC, "a reset brings the address back");
    assert_eq!(machine.tap.used_queues(), 1, "and one queue pair");
}

#[test]
fn commands_that_were_not_agreed_on_are_refused() {
    let mut machine = started(
        FEATURE_CTRL_RX
            | FEATURE_CTRL_RX_EXTRA
            | FEATURE_CTRL_MAC_ADDR
            | FEATURE_GUEST_ANNOUNCE
            | FEATURE_CTRL_GUEST_OFFLOADS,
    );
    let all: [&[&[u8]]; 6] = [
        &[&[0, 0], &[1]],
        &[&[0, 2], &[1]],
        &[&[1, 1], &[2; 6]],
        &[&[3, 0]],
        &[&[4, 0], &[1, 0]],
        &[&[5, 0], &[0; 8]],
    ];
    for parts in all {
        assert_eq!(machine.command(parts), 1, "{parts:?}");
    }
}

#[test]
fn a_command_without_room_for_its_answer_asks_for_a_reset() {
    let mut machine = started(0);
    machine.driver.send(2, &[&[0, 0, 1]], &[]);
    machine.driver.wait_needs_reset();
    machine.driver.start();
    assert_eq!(machine.command(&[&[0, 0], &[1]]), 0);
}

#[test]
fn a_driver_announces_itself_when_asked() {
    let mut machine = started(0);
    machine.handle.announce();
    machine.driver.wire.wait_interrupt(Source::Config);
    assert_eq!(machine.status(), 3);
    assert_eq!(machine.command(&[&[3, 0]]), 0);
    assert_eq!(machine.status(), 1);
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut machine = machine(2);
    let offered = machine.driver.offered_features();
    machine.driver.start_with(offered & !FEATURE_MQ);
    assert_eq!(machine.command_on(2, &[&[0, 0], &[1]]), 0);
    let buffer = machine.driver.send(RECEIVE, &[], &[200]);
    machine.wires[0].send(&frame(60, 1)).unwrap();
    machine.receives(&[buffer], &frame(60, 1));
}

#[test]
fn further_queue_pairs_carry_frames_once_they_are_in_use() {
    let mut machine = machine(3);
    machine.driver.start();
    assert_eq!(machine.command(&[&[4, 0], &[3, 0]]), 0);
    for pair in [2, 0, 1] {
        let queue = u16::try_from(2 * pair).unwrap();
        machine.driver.request(queue + 1, &[&frame(60, pair)], &[]);
        assert_eq!(machine.on_wire(pair), frame(60, pair));
        let buffer = machine.driver.send(queue, &[], &[100]);
        machine.wires[pair].send(&frame(30, pair)).unwrap();
        assert_eq!(machine.driver.wait_used(queue), (u32::from(buffer.head), 42));
    }
}
