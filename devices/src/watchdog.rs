//! A watchdog timer, which a guest's system manager keeps from expiring as long as it works.
//!
//! Four 32-bit ports, which ACPI's watchdog action table (WDAT) describes to the driver. It is
//! stopped until the driver starts it. A driver's sign of life only moves the end of the countdown:
//! the timer looks at it when it fires, so that a sign costs no system call.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::bus::Registers;
use crate::event::{Event, EventSet, Handler, Watch};

/// Number of I/O ports.
pub const PORTS: u16 = 16;

/// Control: 1 is running, 0 is stopped.
pub const CONTROL: u16 = 0;
/// The countdown from the last sign of life to the end, in counts.
pub const COUNTDOWN: u16 = 4;
/// Reads the counts that are left; a write of any value is a sign of life.
pub const COUNT: u16 = 8;
/// Status: 1 when the watchdog ended the guest's last run, until the driver writes 0.
pub const STATUS: u16 = 12;

/// Length of a count in milliseconds.
pub const COUNT_MILLISECONDS: u32 = 100;
/// The longest countdown, in counts: nearly two hours.
pub const COUNTDOWN_MAX: u32 = 0xFFFF;

/// What a driver that sets no countdown gets, in counts: half a minute.
const COUNTDOWN_DEFAULT: u32 = 300;

const CHANGED: u32 = 0;
const FIRED: u32 = 1;

/// The registers, and how far the countdown is.
pub struct Watchdog {
    state: State,
    /// In counts.
    countdown: u32,
    has_expired: bool,
    /// The machine is paused, and with it the countdown.
    is_held: bool,
    /// The timer has to look at the countdown before it fires.
    changed: Event,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Stopped,
    Running { end: Instant },
    Held { left: Duration },
}

/// What the timer is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    Later(Duration),
    Expiry,
}

impl Watchdog {
    /// Makes a watchdog that is stopped.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            state: State::Stopped,
            countdown: COUNTDOWN_DEFAULT,
            has_expired: false,
            is_held: false,
            changed: Event::new()?,
        })
    }

    /// Stops it, as at power on; that it expired is told to the next run of the guest, which is
    /// not paused.
    pub fn reset(&mut self) {
        self.is_held = false;
        (self.state, self.countdown) = (State::Stopped, COUNTDOWN_DEFAULT);
    }

    /// Stops time while the machine is paused.
    pub fn hold(&mut self) {
        self.is_held = true;
        if let State::Running { end } = self.state {
            self.state = State::Held { left: end.saturating_duration_since(Instant::now()) };
        }
    }

    /// Lets time go on.
    pub fn release(&mut self) {
        self.is_held = false;
        if let State::Held { left } = self.state {
            self.state = State::Running { end: Instant::now() + left };
            self.changed.signal();
        }
    }

    /// Starts the countdown anew.
    fn count_down(&mut self) {
        let left = Duration::from_millis((self.countdown * COUNT_MILLISECONDS).into());
        self.state = match self.is_held {
            true => State::Held { left },
            false => State::Running { end: Instant::now() + left },
        };
    }

    fn control(&mut self, value: u32) {
        match (value & 1 != 0, self.state) {
            (true, State::Stopped) => {
                self.count_down();
                self.changed.signal();
            }
            (true, _) => {}
            (false, _) => self.state = State::Stopped,
        }
    }

    fn set_countdown(&mut self, counts: u32) {
        self.countdown = counts.clamp(1, COUNTDOWN_MAX);
        if self.state != State::Stopped {
            self.count_down();
            // The end may be earlier than the timer knows.
            self.changed.signal();
        }
    }

    fn counts_left(&self) -> u32 {
        let left = match self.state {
            State::Stopped => return 0,
            State::Running { end } => end.saturating_duration_since(Instant::now()),
            State::Held { left } => left,
        };
        let counts = left.as_millis().div_ceil(COUNT_MILLISECONDS.into());
        u32::try_from(counts).unwrap_or(COUNTDOWN_MAX)
    }

    /// What is to be done at `now`; who is told of an expiry is told once.
    fn look(&mut self, now: Instant) -> Due {
        match self.state {
            State::Stopped | State::Held { .. } => Due::Nothing,
            State::Running { end } if end > now => Due::Later(end - now),
            State::Running { .. } => {
                (self.state, self.has_expired) = (State::Stopped, true);
                Due::Expiry
            }
        }
    }
}

impl Registers for Watchdog {
    /// What is no register of 32 bits reads as zeros.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match u16::try_from(offset) {
            Ok(CONTROL) => u32::from(self.state != State::Stopped),
            Ok(COUNTDOWN) => self.countdown,
            Ok(COUNT) => self.counts_left(),
            Ok(STATUS) => u32::from(self.has_expired),
            _ => 0,
        };
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match u16::try_from(offset) {
            Ok(CONTROL) => self.control(value),
            Ok(COUNTDOWN) => self.set_countdown(value),
            Ok(COUNT) if self.state != State::Stopped => self.count_down(),
            Ok(STATUS) => self.has_expired = value & 1 != 0 && self.has_expired,
            _ => {}
        }
    }
}

/// Watches the countdown in a loop, and says when it has come to its end.
pub struct WatchdogTimer<F> {
    watchdog: Arc<Mutex<Watchdog>>,
    changed: Event,
    timer: TimerFd,
    expired_fn: F,
}

impl<F: FnMut() + Send> WatchdogTimer<F> {
    /// Makes the handler of a watchdog, for any loop.
    pub fn new(watchdog: Arc<Mutex<Watchdog>>, expired_fn: F) -> io::Result<Self> {
        let changed = lock(&watchdog).changed.clone();
        Ok(Self { watchdog, changed, timer: TimerFd::new()?, expired_fn })
    }
}

impl<F: FnMut() + Send> Handler for WatchdogTimer<F> {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.changed, CHANGED, EventSet::IN)?;
        watch.add(&self.timer, FIRED, EventSet::IN)
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        if token == FIRED {
            // It has fired, so this does not wait.
            let _ = self.timer.wait();
        } else {
            self.changed.take();
        }
        let due = lock(&self.watchdog).look(Instant::now());
        match due {
            Due::Nothing => {}
            // A count more than none: a timer of zero would be off.
            Due::Later(left) => {
                if let Err(error) = self.timer.reset(left.max(Duration::from_millis(1)), None) {
                    crate::warn_limited!("watchdog: the timer cannot be set: {error}");
                }
            }
            Due::Expiry => (self.expired_fn)(),
        }
    }
}

fn lock(watchdog: &Mutex<Watchdog>) -> MutexGuard<'_, Watchdog> {
    watchdog.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod test {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::event::EventLoop;

    const COUNTDOWN_LEN: Duration = Duration::from_secs(30);

    fn write(watchdog: &mut Watchdog, register: u16, value: u32) {
        watchdog.write(register.into(), &value.to_le_bytes());
    }

    fn read(watchdog: &mut Watchdog, register: u16) -> u32 {
        let mut data = [0xFF; 4];
        watchdog.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn started() -> Watchdog {
        let mut watchdog = Watchdog::new().unwrap();
        write(&mut watchdog, CONTROL, 1);
        watchdog
    }

    #[test]
    fn a_watchdog_that_nobody_started_never_expires() {
        let mut watchdog = Watchdog::new().unwrap();
        write(&mut watchdog, COUNTDOWN, 1);
        write(&mut watchdog, COUNT, 1);
        assert_eq!(watchdog.look(Instant::now() + 2 * COUNTDOWN_LEN), Due::Nothing);
        assert_eq!((read(&mut watchdog, CONTROL), read(&mut watchdog, COUNT)), (0, 0));
    }

    #[test]
    fn it_expires_once_at_the_end_of_its_countdown_and_tells_the_next_run() {
        let mut watchdog = started();
        assert_eq!((read(&mut watchdog, CONTROL), read(&mut watchdog, STATUS)), (1, 0));
        assert!(matches!(watchdog.look(Instant::now()), Due::Later(left) if left <= COUNTDOWN_LEN));
        let end = Instant::now() + COUNTDOWN_LEN;
        assert_eq!([end, end].map(|now| watchdog.look(now)), [Due::Expiry, Due::Nothing]);
        watchdog.reset();
        assert_eq!((read(&mut watchdog, CONTROL), read(&mut watchdog, STATUS)), (0, 1));
        write(&mut watchdog, STATUS, 0);
        assert_eq!(read(&mut watchdog, STATUS), 0);
    }

    #[test]
    fn a_sign_of_life_moves_the_end_without_waking_the_timer() {
        let mut watchdog = started();
        assert!(watchdog.changed.take());
        watchdog.state = State::Running { end: Instant::now() };
        write(&mut watchdog, COUNT, 1);
        assert!(!watchdog.changed.take());
        assert!(matches!(watchdog.look(Instant::now()), Due::Later(_)));
        assert!((1..=COUNTDOWN_DEFAULT).contains(&read(&mut watchdog, COUNT)));
    }

    #[test]
    fn a_new_countdown_counts_at_once_and_a_stop_ends_it() {
        let mut watchdog = started();
        watchdog.changed.take();
        write(&mut watchdog, COUNTDOWN, 10);
        assert!(watchdog.changed.take());
        assert_eq!(watchdog.look(Instant::now() + Duration::from_secs(1)), Due::Expiry);
        write(&mut watchdog, CONTROL, 1);
        write(&mut watchdog, CONTROL, 0);
        assert_eq!(watchdog.look(Instant::now() + COUNTDOWN_LEN), Due::Nothing);
    }

    #[test]
    fn a_paused_machine_does_not_expire_and_has_the_same_time_left_afterwards() {
        let mut watchdog = started();
        watchdog.hold();
        assert_eq!(watchdog.look(Instant::now() + 2 * COUNTDOWN_LEN), Due::Nothing);
        write(&mut watchdog, COUNT, 1);
        assert_eq!(read(&mut watchdog, COUNT), COUNTDOWN_DEFAULT);
        watchdog.changed.take();
        watchdog.release();
        assert!(watchdog.changed.take());
        assert!(matches!(watchdog.look(Instant::now()), Due::Later(_)));
        assert_eq!(watchdog.look(Instant::now() + COUNTDOWN_LEN), Due::Expiry);
    }

    #[test]
    fn any_value_of_any_width_at_any_place_is_taken() {
        let mut watchdog = Watchdog::new().unwrap();
        for offset in (0..=u64::from(PORTS)).chain([u64::MAX]) {
            for width in 0..=8 {
                for value in [0, 1, 0x80, 0xFF] {
                    watchdog.write(offset, &vec![value; width]);
                    let mut data = vec![0xFF; width];
                    watchdog.read(offset, &mut data);
                    assert!(width == 4 || data.iter().all(|byte| *byte == 0));
                    watchdog.look(Instant::now());
                }
            }
        }
        write(&mut watchdog, COUNTDOWN, u32::MAX);
        assert_eq!(read(&mut watchdog, COUNTDOWN), COUNTDOWN_MAX);
        write(&mut watchdog, COUNTDOWN, 0);
        assert_eq!(read(&mut watchdog, COUNTDOWN), 1);
    }

    #[test]
    fn the_timer_reports_an_expiry_from_its_loop() {
        let mut event_loop = EventLoop::new().unwrap();
        let watchdog = Arc::new(Mutex::new(started()));
        let (sender, expired) = channel();
        let handle = event_loop.handle();
        let expire = move || {
            sender.send(()).unwrap();
            handle.stop();
        };
        let timer = WatchdogTimer::new(Arc::clone(&watchdog), expire).unwrap();
        let _timer = event_loop.add(Box::new(timer)).unwrap();
        event_loop.run_ready().unwrap();
        assert!(expired.try_recv().is_err());
        write(&mut lock(&watchdog), COUNTDOWN, 1);
        event_loop.run().unwrap();
        assert_eq!(expired.try_recv(), Ok(()));
    }
}
