//! What can be done to a running machine, whoever asks for it.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use devices::event::Event;
use devices::host::stream::Outlet;
use devices::power::PowerButton;
use devices::virtio::balloon::Inflator;
use devices::virtio::mem::Sizer;
use devices::virtio::net::NetHandle;
use devices::watchdog::Watchdog;
use serde_json::{Value, json};
use vmm_sys_util::timerfd::TimerFd;

use super::super::devices::{Counted, Disk, SharedWatchdog};
use super::super::store_server::Additions;
use crate::config::Config;
use crate::happenings::Happenings;
use crate::notify::Notifier;
use crate::run_state::{Ending, Endings};
use crate::vcpu::Pause;

/// The power button is pressed again until the guest ends: one that is still booting does not hear
/// the first press, and one that shuts down already ignores the others.
const PRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The parts of the machine that can be got hold of from outside.
pub(crate) struct Parts {
    /// The machine as it was asked for.
    pub(crate) config: Config,
    /// Where its end is reported.
    pub(crate) endings: Endings,
    /// Where everything else is reported.
    pub(crate) happenings: Happenings,
    /// Its processors.
    pub(crate) pause: Pause,
    /// The guest's power button.
    pub(crate) button: PowerButton,
    /// The guest's watchdog, whose time stops with the processors.
    pub(crate) watchdog: Option<SharedWatchdog>,
    /// The disks.
    pub(crate) disks: Vec<Disk>,
    /// The network cards.
    pub(crate) cards: Vec<NetHandle>,
    /// The places where clients can look on at a console, by name.
    pub(crate) consoles: Vec<(&'static str, Outlet)>,
    /// The devices that count.
    pub(crate) counted: Vec<Counted>,
    /// Who is told that the guest ends.
    pub(crate) notifier: Notifier,
    /// The size of its memory, where that can change.
    pub(crate) sizer: Option<Sizer>,
    /// Where further paths of a closure go, if the guest has one.
    pub(crate) additions: Option<Additions>,
    /// The balloon, where there is one.
    pub(crate) inflator: Option<Inflator>,
}

/// The hands on the machine.
pub(crate) struct Steering {
    pub(super) parts: Parts,
    pub(super) started: Instant,
    press_timer: TimerFd,
    /// When the guest is ended whatever it does; `None` while nobody has asked it to end.
    deadline: Option<Instant>,
    end_requested: Arc<AtomicBool>,
    /// Somebody waits for a pause to be complete.
    pause_awaited: bool,
    /// A pause has not been told of yet.
    pause_unreported: bool,
}

impl Steering {
    /// Takes hold of a machine.
    pub(crate) fn new(parts: Parts) -> io::Result<Self> {
        Ok(Self {
            parts,
            started: Instant::now(),
            press_timer: TimerFd::new().map_err(io::Error::from)?,
            deadline: None,
            end_requested: Arc::default(),
            pause_awaited: false,
            pause_unreported: false,
        })
    }

    /// Whether somebody has asked the guest to end.
    pub(super) fn end_requested(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.end_requested)
    }

    pub(super) fn endings(&self) -> &Endings {
        &self.parts.endings
    }

    pub(super) fn happenings(&self) -> &Happenings {
        &self.parts.happenings
    }

    pub(super) fn rested(&self) -> &Event {
        self.parts.pause.rested()
    }

    /// Runs while the guest is given time to end.
    pub(super) fn press_timer(&self) -> &TimerFd {
        &self.press_timer
    }

    /// What the machine does, by the name that it has in the interface.
    pub(super) fn state(&self) -> &'static str {
        if self.parts.pause.is_complete() {
            "paused"
        } else if self.parts.pause.is_begun() {
            "pausing"
        } else if self.deadline.is_some() {
            "ending"
        } else {
            "running"
        }
    }

    /// A signal asks for the end; a second one does not wait for it.
    pub(super) fn end_by_signal(&mut self) {
        if self.deadline.is_some() {
            return self.stop();
        }
        log::info!("the power button is pressed; a second signal ends the guest at once");
        self.power_off();
    }

    /// Asks the guest to power off, and ends it when it does not in time. A paused guest has to run
    /// for that.
    pub(super) fn power_off(&mut self) {
        if self.deadline.is_some() {
            return;
        }
        let timeout = Duration::from_secs(self.parts.config.shutdown_timeout.into());
        if timeout.is_zero() {
            return self.stop();
        }
        self.deadline = Instant::now().checked_add(timeout);
        self.end_requested.store(true, Ordering::Relaxed);
        self.parts.notifier.stopping();
        self.resume();
        self.press_button();
        if self.press_timer.reset(PRESS_INTERVAL, Some(PRESS_INTERVAL)).is_err() {
            self.stop();
        }
    }

    /// Presses the power button once more, or ends the guest if its time is over.
    pub(super) fn press_again(&mut self) {
        // The timer is ready, so this does not wait.
        let _ = self.press_timer.wait();
        if self.deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            log::warn!("the guest did not power off in time");
            return self.stop();
        }
        self.press_button();
    }

    pub(super) fn press_button(&self) {
        self.parts.button.press();
    }

    /// Ends the machine at once.
    pub(super) fn stop(&self) {
        self.parts.endings.report(Ending::Killed);
    }

    /// Resets the machine as its guest can.
    pub(super) fn reset(&self) {
        self.parts.endings.report(Ending::Reset);
    }

    /// Has the processors leave the guest; says whether that is asked of one that shall end.
    pub(super) fn pause(&mut self) -> bool {
        if self.deadline.is_some() {
            return false;
        }
        self.pause_awaited = true;
        self.pause_unreported |= !self.parts.pause.is_begun();
        self.parts.pause.begin();
        self.with_watchdog(Watchdog::hold);
        true
    }

    /// Lets the processors run again.
    pub(super) fn resume(&mut self) {
        if self.parts.pause.is_begun() {
            self.with_watchdog(Watchdog::release);
            self.parts.pause.end();
            self.parts.happenings.report("resumed", Value::Null);
        }
    }

    fn with_watchdog(&self, act: impl FnOnce(&mut Watchdog)) {
        if let Some(watchdog) = &self.parts.watchdog {
            act(&mut watchdog.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Whether those who wait for a pause need to wait no longer.
    pub(super) fn settle_pause(&mut self) -> bool {
        let is_over = !self.parts.pause.is_begun();
        let is_settled = self.pause_awaited && (is_over || self.parts.pause.is_complete());
        if is_settled {
            self.pause_awaited = false;
            if std::mem::take(&mut self.pause_unreported) && !is_over {
                self.parts.happenings.report("paused", Value::Null);
            }
        }
        is_settled
    }

    /// Tells the guest of the sizes that images have by now.
    pub(super) fn look_at_images(&self) {
        for disk in &self.parts.disks {
            // It has been logged.
            let _ = self.resize(disk, None);
        }
    }

    /// Puts another image into a disk, tells the guest its size and returns that in bytes.
    pub(super) fn exchange(&self, disk: &Disk, image: &File) -> io::Result<u64> {
        let size = disk.resizer.exchange(image)?;
        log::info!("{} has another image, of {size} bytes", disk.resizer.name());
        let details = json!({ "disk": disk.name, "size": size });
        self.parts.happenings.report("disk-exchanged", details);
        Ok(size)
    }

    /// Tells the guest the size that an image has by now, or is given first; returns it in bytes.
    pub(super) fn resize(&self, disk: &Disk, size: Option<u64>) -> Result<u64> {
        let grown = size.map_or(Ok(()), |size| disk.resizer.grow(size));
        match grown.and_then(|()| disk.resizer.resize()) {
            Ok(size) => {
                log::info!("{} has {size} bytes now", disk.resizer.name());
                let details = json!({ "disk": disk.name, "size": size });
                self.parts.happenings.report("disk-resized", details);
                Ok(size)
            }
            Err(error) => {
                log::warn!("{} keeps its size: {error}", disk.resizer.name());
                Err(error.into())
            }
        }
    }
}
