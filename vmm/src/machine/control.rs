//! The main thread's part while a guest runs: signals, the power button and the time that it is given.

use std::io;
use std::time::Duration;

use anyhow::Result;
use devices::event::{EventSet, Handler, LoopHandle, Watch};
use devices::host::signals::Signals;
use devices::power::PowerButton;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::Config;
use crate::run_state::{Ending, Endings};

const SIGNAL: u32 = 0;
const DEADLINE: u32 = 1;
const ENDING: u32 = 2;

/// Turns signals into power button presses and, when that does not help, into the hard end.
pub(crate) struct Control {
    signals: Signals,
    endings: Endings,
    button: PowerButton,
    deadline: TimerFd,
    shutdown_timeout: Duration,
    asked_to_end: bool,
    main_loop: LoopHandle,
}

impl Control {
    /// Makes the handler; `main_loop` is stopped whenever the guest's run ends.
    pub(crate) fn new(
        signals: Signals,
        endings: Endings,
        button: PowerButton,
        config: &Config,
        main_loop: LoopHandle,
    ) -> Result<Self> {
        let shutdown_timeout = Duration::from_secs(config.shutdown_timeout.into());
        let deadline = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            signals,
            endings,
            button,
            deadline,
            shutdown_timeout,
            asked_to_end: false,
            main_loop,
        })
    }

    fn ask_to_end(&mut self) {
        if self.asked_to_end || self.shutdown_timeout.is_zero() {
            return self.endings.report(Ending::Killed);
        }
        self.asked_to_end = true;
        log::info!("the power button is pressed; a second signal ends the guest at once");
        self.button.press();
        if self.deadline.reset(self.shutdown_timeout, None).is_err() {
            self.endings.report(Ending::Killed);
        }
    }
}

impl Handler for Control {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.signals, SIGNAL, EventSet::IN)?;
        watch.add(&self.deadline, DEADLINE, EventSet::IN)?;
        watch.add(self.endings.reported(), ENDING, EventSet::IN)
    }

    fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        match token {
            SIGNAL => {
                while self.signals.take().is_some() {
                    self.ask_to_end();
                }
            }
            DEADLINE => {
                let _ = self.deadline.wait();
                log::warn!("the guest did not power off in time");
                self.endings.report(Ending::Killed);
            }
            _ => self.main_loop.stop(),
        }
    }
}
