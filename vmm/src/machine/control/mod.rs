//! The main thread's part while a guest runs: signals, the power button and the time that it is
//! given.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use devices::event::{EventSet, Handler, LoopHandle, Watch};
use devices::host::signals::{IMAGES_CHANGED, Signals};
use devices::power::PowerButton;
use devices::virtio::block::Resizer;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::Config;
use crate::run_state::{Ending, Endings};

const SIGNAL: u32 = 0;
const PRESS: u32 = 1;
const ENDING: u32 = 2;

/// The power button is pressed again until the guest ends: one that is still booting does not hear
/// the first press, and one that shuts down already ignores the others.
const PRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Turns signals into power button presses and, when that does not help, into the hard end; or into
/// a look at the sizes of disks.
pub(crate) struct Control {
    signals: Signals,
    endings: Endings,
    button: PowerButton,
    resizers: Vec<Resizer>,
    press_timer: TimerFd,
    shutdown_timeout: Duration,
    /// When the guest is ended whatever it does; `None` while nobody has asked it to end.
    deadline: Option<Instant>,
    end_requested: Arc<AtomicBool>,
    main_loop: LoopHandle,
}

impl Control {
    /// Makes the handler; `main_loop` is stopped whenever the guest's run ends.
    pub(crate) fn new(
        signals: Signals,
        endings: Endings,
        button: PowerButton,
        resizers: Vec<Resizer>,
        config: &Config,
        main_loop: LoopHandle,
    ) -> Result<Self> {
        let shutdown_timeout = Duration::from_secs(config.shutdown_timeout.into());
        let press_timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            signals,
            endings,
            button,
            resizers,
            press_timer,
            shutdown_timeout,
            deadline: None,
            end_requested: Arc::default(),
            main_loop,
        })
    }

    /// Whether somebody has asked the guest to end.
    pub(crate) fn end_requested(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.end_requested)
    }

    fn ask_to_end(&mut self) {
        if self.deadline.is_some() || self.shutdown_timeout.is_zero() {
            return self.endings.report(Ending::Killed);
        }
        log::info!("the power button is pressed; a second signal ends the guest at once");
        self.deadline = Instant::now().checked_add(self.shutdown_timeout);
        self.end_requested.store(true, Ordering::Relaxed);
        self.button.press();
        if self.press_timer.reset(PRESS_INTERVAL, Some(PRESS_INTERVAL)).is_err() {
            self.endings.report(Ending::Killed);
        }
    }

    fn resize_disks(&self) {
        for resizer in &self.resizers {
            match resizer.resize() {
                Ok(size) => log::info!("{} has {size} bytes now", resizer.name()),
                Err(error) => log::warn!("{} keeps its size: {error}", resizer.name()),
            }
        }
    }

    fn press_again(&mut self) {
        // The timer is ready, so this does not wait.
        let _ = self.press_timer.wait();
        if self.deadline.is_none_or(|deadline| Instant::now() >= deadline) {
            log::warn!("the guest did not power off in time");
            return self.endings.report(Ending::Killed);
        }
        self.button.press();
    }
}

impl Handler for Control {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.signals, SIGNAL, EventSet::IN)?;
        watch.add(&self.press_timer, PRESS, EventSet::IN)?;
        watch.add(self.endings.reported(), ENDING, EventSet::IN)
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        match token {
            SIGNAL => {
                while let Some(signal) = self.signals.take() {
                    match signal {
                        IMAGES_CHANGED => self.resize_disks(),
                        _ => self.ask_to_end(),
                    }
                }
            }
            PRESS => self.press_again(),
            _ => self.main_loop.stop(),
        }
    }
}
