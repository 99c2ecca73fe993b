//! The memory balloon.

use std::time::Duration;

use anyhow::{Context as _, Result};
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::device::VirtioDevice;

use super::Site;

/// Makes the balloon, if there is to be one.
pub(super) fn add(site: &Site<'_>, devices: &mut Vec<Box<dyn VirtioDevice>>) -> Result<()> {
    let config = site.config.balloon;
    if !config.enabled {
        return Ok(());
    }
    let options = BalloonOptions {
        deflate_on_oom: config.deflate_on_oom,
        free_page_reporting: config.free_page_reporting,
        statistics_interval: match config.statistics_interval {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        },
    };
    // Giving memory back takes microseconds for each report: no thread of its own.
    let balloon = Balloon::new(options, site.main_loop.handle()).context("--balloon")?;
    devices.push(Box::new(balloon));
    Ok(())
}
