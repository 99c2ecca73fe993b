//! How does a machine end? Each end of a guest has its own exit status, and each is reached.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::diagnosis;
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("power::a_reboot_restarts_in_place_or_leaves_with_its_status", reboot),
    ("power::a_panic_has_its_status", panic),
    ("power::a_triple_fault_has_its_status", triple_fault),
    ("power::a_signal_presses_the_power_button_and_a_second_one_kills", signals),
    ("power::a_watchdog_that_is_not_fed_resets_the_guest_or_leaves_with_its_status", watchdog),
    ("power::a_guest_that_ignores_the_button_is_killed_in_time", timeout),
];

/// Exit statuses of `nixvmm`, as its manual has them.
const POWERED_OFF: i32 = 0;
const REBOOTED: i32 = 3;
const PANICKED: i32 = 4;
const TRIPLE_FAULTED: i32 = 5;
const KILLED: i32 = 6;
const WATCHDOG_EXPIRED: i32 = 7;

fn reboot(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed).boot()?;
    let first = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    guest.tell("reboot -f")?;
    guest.wait_for_agent()?;
    let second = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    ensure!(first != second, "the guest did not reboot");
    guest.signal(Signal::INT)?;
    guest.expect_status(POWERED_OFF)?;

    let mut guest = tiny(testbed).arguments(["--on-reboot", "exit"]).boot()?;
    guest.tell("reboot -f")?;
    guest.expect_status(REBOOTED)
}

fn panic(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed).boot()?;
    guest.tell("echo c > /proc/sysrq-trigger")?;
    guest.expect_status(PANICKED)
}

fn triple_fault(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed).command_line("reboot=triple").boot()?;
    guest.tell("reboot -f")?;
    guest.expect_status(TRIPLE_FAULTED)
}

fn signals(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed).boot()?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(POWERED_OFF)?;

    let mut guest = tiny(testbed).command_line("power-button=ignored").boot()?;
    guest.signal(Signal::TERM)?;
    press_seen(&mut guest)?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(KILLED)
}

/// The watchdog feeds itself from a process every second, until that is stopped.
fn watchdog(testbed: &Testbed) -> Result<()> {
    const DRIVER: &str = "sh /modules/more";
    const STATUS: &str = "cat /sys/class/watchdog/watchdog0/bootstatus";
    const FEED: &str = "watchdog -T 3 -t 1 /dev/watchdog0";
    let mut guest = tiny(testbed).arguments(["--watchdog", "reset"]).boot()?;
    guest.run(DRIVER)?;
    ensure!(guest.run(STATUS)?.trim() == "0", "the watchdog ended a run before the first");
    guest.run(&format!("{FEED} && sleep 5"))?;
    guest.run("killall -STOP watchdog")?;
    guest.wait_for_agent()?;
    guest.run(DRIVER)?;
    ensure!(guest.run(STATUS)?.trim() != "0", "the new run does not know why it began");
    guest.power_off()?;

    let mut guest = tiny(testbed).arguments(["--watchdog", "exit"]).boot()?;
    guest.run(DRIVER)?;
    guest.tell(&format!("{FEED} && sleep 1 && killall -STOP watchdog"))?;
    guest.expect_status(WATCHDOG_EXPIRED)
}

fn timeout(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed)
        .command_line("power-button=ignored")
        .arguments(["--shutdown-timeout", "3"])
        .boot()?;
    let doing = diagnosis::of(guest.process_id());
    ensure!(doing.contains("vcpu0: "), "no processor is seen:\n{doing}");
    guest.signal(Signal::TERM)?;
    guest.expect_status(KILLED)
}

/// The guest still answers after the first signal, so that only the second one can have ended it.
fn press_seen(guest: &mut Guest) -> Result<()> {
    let pressed = guest.run("dd if=/dev/input/event0 bs=24 count=1 | wc -c")?;
    ensure!(pressed.lines().any(|line| line == "24"), "the button was not pressed: {pressed}");
    Ok(())
}

fn tiny(testbed: &Testbed) -> Launch {
    Launch::tiny(testbed, &testbed.bzimage)
}
