//! The main thread's part while a guest runs: signals, control clients, and the time that a guest
//! is given to end.

mod cards;
mod memory;
mod statistics;
mod steering;
mod verbs;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, Result};
use devices::event::{EventSet, Handler, LoopHandle, Watch};
use devices::host::listener::Listener;
use devices::host::program;
use devices::host::signals::{IMAGES_CHANGED, Signals};
use rustix::fs::Mode;
use serde_json::json;
use vmm_sys_util::timerfd::TimerFd;

pub(super) use self::steering::{Parts, Steering};
use self::verbs::INTERFACE;
use crate::config::Config;
use crate::control::{Occasion, Server};

const SIGNAL: u32 = 0;
const PRESS: u32 = 1;
const ENDING: u32 = 2;
const HAPPENING: u32 = 3;
const RESTED: u32 = 4;
const UNUSED: u32 = 5;
/// The tokens of the control socket and its clients.
const SERVER: u32 = 16;

/// When the code that a guest's start needed is given back, and how often what was needed since.
const UNUSED_FIRST: Duration = Duration::from_secs(20);
const UNUSED_INTERVAL: Duration = Duration::from_secs(300);

/// Only the owner of the process may control it.
const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);

/// The name under which a service manager passes the control socket.
const INHERITED_NAME: &str = "control";

/// Turns signals and calls into what is done to the machine.
pub(super) struct Control {
    signals: Signals,
    server: Option<Server>,
    steering: Steering,
    /// Fires when code may have fallen out of use.
    unused: TimerFd,
    main_loop: LoopHandle,
}

/// The control socket that the configuration names, or that a service manager passes.
pub(super) fn listener(config: &Config) -> Result<Option<Listener>> {
    let inherited = Listener::inherited(INHERITED_NAME).context("the inherited control socket")?;
    if inherited.is_some() {
        return Ok(inherited);
    }
    let bind = |path: &std::path::PathBuf| {
        let listener = Listener::bind(path, Some(OWNER_ONLY));
        listener.with_context(|| format!("--control {}: cannot be listened on", path.display()))
    };
    config.control.as_ref().map(bind).transpose()
}

impl Control {
    /// Makes the handler; `main_loop` is stopped whenever the guest's run ends.
    pub(super) fn new(
        signals: Signals,
        listener: Option<Listener>,
        steering: Steering,
        main_loop: LoopHandle,
    ) -> Result<Self> {
        let server = listener.map(|listener| Server::new(listener, SERVER));
        let mut unused = TimerFd::new().map_err(io::Error::from)?;
        unused.reset(UNUSED_FIRST, Some(UNUSED_INTERVAL)).map_err(io::Error::from)?;
        Ok(Self { signals, server, steering, unused, main_loop })
    }

    /// Whether somebody has asked the guest to end.
    pub(super) fn end_requested(&self) -> Arc<AtomicBool> {
        self.steering.end_requested()
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.signals.take() {
            match signal {
                IMAGES_CHANGED => self.steering.look_at_images(),
                _ => self.steering.end_by_signal(),
            }
        }
    }

    /// Tells subscribers what has happened.
    fn announce(&mut self, watch: &mut Watch<'_, '_>) {
        self.steering.happenings().reported().take();
        while let Some(happening) = self.steering.happenings().take() {
            let Some(server) = &mut self.server else { continue };
            let event = json!({
                "event": happening.event,
                "state": self.steering.state(),
                "details": happening.details,
            });
            server.announce(&event, watch);
        }
    }

    /// Replies to those who waited for a pause that is complete by now, or over.
    fn settle_pause(&mut self, watch: &mut Watch<'_, '_>) {
        if self.steering.settle_pause()
            && let Some(server) = &mut self.server
        {
            server.complete(Occasion::Paused, watch);
        }
    }
}

impl Handler for Control {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.signals, SIGNAL, EventSet::IN)?;
        watch.add(self.steering.press_timer(), PRESS, EventSet::IN)?;
        watch.add(self.steering.endings().reported(), ENDING, EventSet::IN)?;
        watch.add(self.steering.happenings().reported(), HAPPENING, EventSet::IN)?;
        watch.add(self.steering.rested(), RESTED, EventSet::IN)?;
        watch.add(&self.unused, UNUSED, EventSet::IN)?;
        self.server.as_ref().map_or(Ok(()), |server| server.start(watch))
    }

    fn ready(&mut self, token: u32, readiness: EventSet, watch: &mut Watch<'_, '_>) {
        match token {
            SIGNAL => self.take_signals(),
            PRESS => self.steering.press_again(),
            ENDING => self.main_loop.stop(),
            HAPPENING => self.announce(watch),
            RESTED => drop(self.steering.rested().take()),
            UNUSED => {
                // The timer is ready, so this does not wait.
                let _ = self.unused.wait();
                program::release_start_up();
            }
            token => {
                if let Some(server) = &mut self.server {
                    server.ready(token, readiness, watch, &INTERFACE, &mut self.steering);
                }
            }
        }
        self.settle_pause(watch);
    }
}
