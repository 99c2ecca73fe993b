use super::*;
use crate::test::LoopThread;
use crate::test::driver::{Driver, HIGH_RAM, LOW_RAM};
use crate::test::hostile::Subject;
use crate::test::wire::Source;

const OPTIONS: BalloonOptions =
    BalloonOptions { deflate_on_oom: true, free_page_reporting: true, statistics_interval: None };
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
const REPORT: u16 = 3;
/// Memory of the driver that nothing else uses.
const FREE: u64 = 0x280_0000;

fn balloon(options: BalloonOptions) -> (LoopThread, Driver, Inflator) {
    let home = LoopThread::new();
    let balloon = Balloon::new(options, home.handle()).unwrap();
    let shared = Arc::clone(&balloon.shared);
    let driver = Driver::mmio(Box::new(balloon));
    let inflator = Inflator { memory: driver.memory, shared };
    (home, driver, inflator)
}

fn started() -> (LoopThread, Driver, Inflator) {
    let (home, mut driver, inflator) = balloon(OPTIONS);
    driver.start();
    (home, driver, inflator)
}

fn numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|page| u32::try_from(page / 4096).unwrap().to_le_bytes()).collect()
}

fn is_zero(driver: &Driver, page: u64) -> bool {
    driver.read_memory(page, 4096).iter().all(|byte| *byte == 0)
}

#[test]
fn pages_in_the_balloon_are_given_back_in_any_order_and_split() {
    let (_home, mut driver, inflator) = started();
    let pages: Vec<_> = (0..8).map(|page| FREE + page * 4096).collect();
    for page in &pages {
        driver.write_memory(*page, &[7; 4096]);
    }
    let order = [pages[3], pages[2], pages[6], pages[5], HIGH_RAM.start];
    let request = numbers(&order);
    assert_eq!(driver.request(INFLATE, &[&request[..5], &request[5..]], &[]), b"");
    let given: Vec<_> = pages.iter().filter(|page| is_zero(&driver, **page)).copied().collect();
    assert_eq!(given, [pages[2], pages[3], pages[5], pages[6]]);
    assert_eq!(inflator.given_back(), (5 * 4096, 0));
    driver.write_memory(pages[2], &[9; 4096]);
    assert_eq!(driver.request(DEFLATE, &[&numbers(&pages[2..3])], &[]), b"");
    assert!(!is_zero(&driver, pages[2]), "memory that is used again keeps what is written");
}

#[test]
fn pages_that_are_no_ram_are_left_out_and_the_others_given_back() {
    let (_home, mut driver, inflator) = started();
    driver.write_memory(FREE, &[7; 4096]);
    let pages = [LOW_RAM.end, FREE, HIGH_RAM.end, u64::from(u32::MAX) * 4096];
    driver.request(INFLATE, &[&numbers(&pages)], &[]);
    assert!(is_zero(&driver, FREE));
    assert_eq!(inflator.given_back(), (4096, 0));
}

#[test]
fn a_request_is_served_up_to_the_limit_and_answered() {
    let (_home, mut driver, inflator) = started();
    let pages: Vec<_> = (0..REQUEST_PAGES_MAX as u64 + 9).map(|page| FREE + page * 4096).collect();
    driver.request(INFLATE, &[&numbers(&pages)], &[]);
    assert_eq!(inflator.given_back().0, (REQUEST_PAGES_MAX * PAGE_BYTES) as u64);
    driver.request(INFLATE, &[&numbers(&pages[..1])[..3]], &[]);
    driver.request(INFLATE, &[], &[4]);
    assert_eq!(inflator.given_back().0, (REQUEST_PAGES_MAX * PAGE_BYTES) as u64);
}

#[test]
fn reported_memory_is_given_back_by_the_page() {
    let (_home, mut driver, inflator) = started();
    driver.write_memory(FREE, &[7; 4 * 4096]);
    driver.next_room(FREE + 16);
    driver.request(REPORT, &[], &[4096 - 16, 4096, 4096 + 16]);
    assert_eq!(inflator.given_back(), (0, 3 * 4096 - 4096), "what the buffers have of whole pages");
    assert!(is_zero(&driver, FREE + 4096));
    assert_eq!(driver.read_memory(FREE + 3 * 4096, 16), [7; 16]);
}

#[test]
fn reports_stay_as_they_are_while_the_guest_poisons_free_pages() {
    let (_home, mut driver, inflator) = started();
    driver.wire.write_config(12, &0xaaaa_aaaa_u32.to_le_bytes());
    driver.write_memory(FREE, &[0xaa; 4096]);
    driver.next_room(FREE);
    driver.request(REPORT, &[], &[4096]);
    assert_eq!(driver.read_memory(FREE, 4096), [0xaa; 4096]);
    assert_eq!(inflator.given_back(), (0, 0));
}

#[test]
fn the_target_is_told_and_outlives_a_reset_and_the_size_does_not() {
    let (_home, mut driver, inflator) = started();
    inflator.set_target(5 * 4096 + 1).unwrap();
    driver.wire.wait_interrupt(Source::Config);
    let mut config = [0; 16];
    driver.wire.read_config(0, &mut config);
    assert_eq!(config[..8], [5, 0, 0, 0, 0, 0, 0, 0]);
    driver.wire.write_config(4, &3u32.to_le_bytes());
    assert_eq!((inflator.target(), inflator.actual()), (5 * 4096, 3 * 4096));
    driver.start();
    driver.wire.read_config(0, &mut config);
    assert_eq!(config[..8], [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(inflator.actual(), 0);
}

#[test]
fn a_target_beyond_memory_is_refused_with_the_size_of_memory() {
    let (_home, _driver, inflator) = started();
    let ram = LOW_RAM.end + (HIGH_RAM.end - HIGH_RAM.start);
    inflator.set_target(ram).unwrap();
    for bytes in [ram + 4096, u64::MAX] {
        let error = inflator.set_target(bytes).unwrap_err().to_string();
        assert!(error.contains(&ram.to_string()), "{error}");
    }
    assert_eq!(inflator.target(), ram);
}

#[test]
fn only_the_drivers_words_of_the_configuration_can_be_written() {
    let (_home, mut driver, _inflator) = started();
    for offset in 0..16 {
        driver.wire.write_config(offset, &[0xff]);
        driver.wire.write_config(offset, &[0xff; 2]);
    }
    for offset in [0, 2, 8, 13, 16] {
        driver.wire.write_config(offset, &[0xff; 4]);
    }
    let mut config = [1; 16];
    driver.wire.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (home, mut driver, inflator) = started();
    assert_eq!(inflator.statistics(), None);
    let record = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let first = [record(4, 1000), record(99, 5), record(u16::MAX, 5), record(5, 2000)].concat();
    let first = driver.send(STATISTICS, &[&first[..15], &first[15..]], &[]);
    home.settle();
    let statistics = inflator.statistics().unwrap();
    let values: Vec<_> = statistics.iter().collect();
    assert_eq!(values, [("free-bytes", 1000), ("total-bytes", 2000)]);
    assert_eq!(driver.used(STATISTICS), None, "the device keeps the buffer");
    inflator.refresh_statistics();
    assert_eq!(driver.wait_used(STATISTICS), (u32::from(first.head), 0));
    let second = [record(4, 3000), vec![5, 0, 1]].concat();
    driver.send(STATISTICS, &[&second], &[]);
    home.settle();
    let statistics = inflator.statistics().unwrap();
    assert_eq!((statistics.get("free-bytes"), statistics.get("total-bytes")), (Some(3000), None));
}

#[test]
fn statistics_are_asked_for_at_the_interval() {
    let statistics_interval = Some(Duration::from_millis(5));
    let (_home, mut driver, _) = balloon(BalloonOptions { statistics_interval, ..OPTIONS });
    driver.start();
    for _ in 0..3 {
        let sent = driver.send(STATISTICS, &[&[0; 10]], &[]);
        assert_eq!(driver.wait_used(STATISTICS), (u32::from(sent.head), 0));
    }
}

#[test]
fn queues_of_features_that_the_driver_refused_are_not_counted() {
    let (_home, mut driver, inflator) = balloon(OPTIONS);
    let offered = driver.offered_features();
    driver.negotiate(offered & !FEATURE_STATS_VQ);
    (0..3).for_each(|queue| driver.enable_queue(queue));
    driver.set_status(15);
    driver.write_memory(FREE, &[7; 4096]);
    driver.next_room(FREE);
    driver.request(2, &[], &[4096]);
    assert!(is_zero(&driver, FREE));
    assert_eq!(inflator.given_back(), (0, 4096));
}

#[test]
fn what_is_switched_off_is_not_offered() {
    let options = BalloonOptions { deflate_on_oom: false, free_page_reporting: false, ..OPTIONS };
    let (_home, mut driver, _) = balloon(options);
    assert_eq!(driver.offered_features() & (FEATURE_DEFLATE_ON_OOM | FEATURE_PAGE_REPORTING), 0);
    driver.start();
    assert_eq!(driver.queue_size_max(REPORT), 0);
}

#[test]
fn a_balloon_survives_a_hostile_driver() {
    let subject = Subject {
        make: &|home| Box::new(Balloon::new(OPTIONS, home).unwrap()),
        served: &[INFLATE, DEFLATE, STATISTICS, REPORT],
        works: &|driver| {
            driver.write_memory(FREE, &[7; 4096]);
            driver.request(INFLATE, &[&numbers(&[FREE])], &[]);
            assert!(is_zero(driver, FREE));
        },
    };
    subject.survives();
}
