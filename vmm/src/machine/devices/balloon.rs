//! The memory balloon.

use std::time::Duration;

use anyhow::{Context as _, Result};
use devices::virtio::balloon::{Balloon, BalloonOptions, Inflator};
use devices::virtio::device::VirtioDevice;
use serde_json::json;

use super::Site;

/// Makes the balloon, if there is to be one; the result is the host's end of it.
pub(super) fn add(
    site: &Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
) -> Result<Option<Inflator>> {
    let config = site.config.balloon;
    if !config.enabled {
        return Ok(None);
    }
    let options = BalloonOptions {
        deflate_on_oom: config.deflate_on_oom,
        // Memory that was taken first is meant to stay: the host might not have it a second time.
        free_page_reporting: config.free_page_reporting && !site.config.memory.prealloc,
        statistics_interval: match config.statistics_interval {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        },
    };
    // Giving memory back takes microseconds for each report: no thread of its own.
    let balloon = Balloon::new(options, site.main_loop.handle()).context("--balloon")?;
    let inflator = balloon.inflator(site.memory);
    let happenings = site.happenings.clone();
    inflator.on_reached(move |size| {
        happenings.report("balloon-target-reached", json!({ "size": size }));
    });
    devices.push(Box::new(balloon));
    Ok(Some(inflator))
}
