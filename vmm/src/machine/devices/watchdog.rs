//! The guest's watchdog timer.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use devices::event::Registration;
use devices::watchdog::{Watchdog, WatchdogTimer};

use super::Site;
use crate::config;
use crate::run_state::Ending;
use crate::vcpu::Buses;

/// A watchdog as its registers, its timer and control clients have it.
pub(crate) type SharedWatchdog = Arc<Mutex<Watchdog>>;

/// Puts the watchdog on its ports, where one is asked for.
pub(super) fn add(
    buses: &mut Buses,
    site: &mut Site<'_>,
) -> Result<Option<(SharedWatchdog, Registration)>> {
    if site.config.watchdog == config::Watchdog::Off {
        return Ok(None);
    }
    let ports = site.plan.take_watchdog();
    let watchdog = Arc::new(Mutex::new(Watchdog::new().context("--watchdog")?));
    buses.ports.insert(ports.start.into()..ports.end.into(), watchdog.clone())?;
    let endings = site.endings.clone();
    let expire = move || {
        log::warn!("the guest's watchdog expired");
        endings.report(Ending::Watchdog);
    };
    let timer = WatchdogTimer::new(Arc::clone(&watchdog), expire).context("--watchdog")?;
    Ok(Some((watchdog, site.main_loop.add(Box::new(timer))?)))
}
