use std::sync::atomic::Ordering;

use super::*;
use crate::test::LoopThread;
use crate::test::driver::{self, Driver};
use crate::test::echo::Echo;
use crate::test::pci_wire::{BAR, PciWire};
use crate::test::wire::{Source, Wire};

fn wire(home: &LoopThread) -> PciWire {
    PciWire::new(Box::new(Echo::new(2, home.handle())), driver::memory())
}

#[test]
fn a_request_is_answered_by_the_queues_own_vector() {
    let home = LoopThread::new();
    let mut driver = Driver::pci(Box::new(Echo::new(2, home.handle())));
    driver.start();
    assert_eq!(driver.request(1, &[b"to", b"gether"], &[3, 9]), b"together");
    assert!(!driver.wire.take_interrupt(Source::Queue(0)));
}

#[test]
fn a_driver_that_starts_costs_one_update_of_routes() {
    let home = LoopThread::new();
    let memory = driver::memory();
    let wire = PciWire::new(Box::new(Echo::new(2, home.handle())), memory);
    let routes = Arc::clone(&wire.routes);
    let mut driver = Driver::new(Box::new(wire), memory);
    driver.start();
    assert_eq!((routes.updates.load(Ordering::SeqCst), routes.len()), (1, 3));
    driver.reset();
    assert_eq!((routes.updates.load(Ordering::SeqCst), routes.len()), (2, 0));
}

#[test]
fn says_what_and_where_it_is() {
    let home = LoopThread::new();
    let mut wire = wire(&home);
    assert_eq!([wire.config(0, 2), wire.config(2, 2)], [0x1af4, 0x1044]);
    assert_eq!(wire.config(0x10, 4), u32::try_from(BAR).unwrap());
    assert_eq!(wire.config(0x3d, 1), 0, "there is no interrupt pin");
    assert_eq!(wire.layout.vectors, 3);
    assert_eq!(wire.device_kind(), 4);
    let doorbells = wire.transport.lock().unwrap().doorbells();
    let places: Vec<_> =
        doorbells.iter().map(|doorbell| (doorbell.offset, doorbell.data)).collect();
    assert_eq!(places, vec![(0x1000, None), (0x1004, None)]);
}

#[test]
fn parts_of_fields_can_be_read_and_only_whole_ones_written() {
    let home = LoopThread::new();
    let mut wire = wire(&home);
    let features = wire.bar(4, 4);
    assert_eq!(
        [4, 5, 6, 7].map(|offset| wire.bar(offset, 1)),
        features.to_le_bytes().map(u32::from)
    );
    wire.set_bar(0, 1, 2);
    assert_eq!(wire.bar(0, 4), 0, "half of the selector is not written");
    let mut transport = wire.transport.lock().unwrap();
    // The queue selector, and in the same access a part of what is behind it.
    transport.write(0x16, &[1, 0, 0]);
    let mut data = [0; 8];
    transport.read(0x12, &mut data);
    assert_eq!(data, [2, 0, 0, 0, 1, 0, 64, 0]);
}

#[test]
fn vectors_that_do_not_exist_are_none() {
    let home = LoopThread::new();
    let mut wire = wire(&home);
    for (vector, taken) in [(0, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff)] {
        wire.set_bar(0x10, vector, 2);
        assert_eq!(wire.bar(0x10, 2), taken);
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar_and_nothing_else() {
    let home = LoopThread::new();
    let mut wire = wire(&home);
    let window = wire.layout.window;
    let aim = |wire: &mut PciWire, bar: u32, offset: u32, len: u32| {
        wire.set_config(window + 4, bar, 1);
        wire.set_config(window + 8, offset, 4);
        wire.set_config(window + 12, len, 4);
    };
    aim(&mut wire, 0, 0x12, 2);
    assert_eq!(wire.config(window + 16, 2), 2, "the number of queues");
    aim(&mut wire, 0, 0x16, 2);
    wire.set_config(window + 16, 1, 2);
    assert_eq!(wire.bar(0x16, 2), 1);
    for (bar, offset, len) in
        [(1, 0x12, 2), (0, 0x12, 3), (0, 0x13, 2), (0, 0x8000, 1), (0, u32::MAX, 1)]
    {
        aim(&mut wire, bar, offset, len);
        wire.set_config(window + 16, 0x55, 4);
        assert_eq!(wire.config(window + 16, 4), 0, "{bar} {offset:#x} {len}");
    }
}

#[test]
fn a_bar_that_is_disabled_reads_as_ones() {
    let home = LoopThread::new();
    let mut wire = wire(&home);
    wire.set_config(4, 0, 2);
    assert_eq!(wire.bar(0x12, 2), 0xffff);
    wire.set_bar(0x16, 1, 2);
    wire.set_config(4, 2, 2);
    assert_eq!([wire.bar(0x12, 2), wire.bar(0x16, 2)], [2, 0]);
}

#[test]
fn an_announced_change_of_the_configuration_triggers_the_vector_for_it() {
    let home = LoopThread::new();
    let memory = driver::memory();
    let wire = PciWire::new(Box::new(Echo::new(1, home.handle())), memory);
    let change = wire.transport.lock().unwrap().config_change();
    let mut driver = Driver::new(Box::new(wire), memory);
    driver.start();
    let generation = driver.wire.read(Register::ConfigGeneration);
    change.announce();
    driver.wire.wait_interrupt(Source::Config);
    assert_ne!(driver.wire.read(Register::ConfigGeneration), generation);
}

#[test]
fn a_restart_of_the_guest_leaves_nothing_behind() {
    let home = LoopThread::new();
    let memory = driver::memory();
    let wire = PciWire::new(Box::new(Echo::new(1, home.handle())), memory);
    let (transport, routes) = (Arc::clone(&wire.transport), Arc::clone(&wire.routes));
    let mut driver = Driver::new(Box::new(wire), memory);
    driver.start();
    transport.lock().unwrap().reset();
    assert_eq!((driver.status(), routes.len()), (0, 0));
    driver.start();
    assert_eq!(driver.request(0, &[b"again"], &[5]), b"again");
}
