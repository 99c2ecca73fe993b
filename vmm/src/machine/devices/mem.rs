//! Memory that comes and goes at run time.

use anyhow::{Context as _, Result};
use devices::virtio::device::VirtioDevice;
use devices::virtio::mem::{Mem, Sizer};
use serde_json::json;

use super::Site;

/// Makes the memory device where memory may grow; the result is the host's end of it.
pub(super) fn add(
    site: &Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
) -> Result<Option<Sizer>> {
    let Some(range) = site.plan.elastic() else { return Ok(None) };
    let region = site.memory.regions().find(|region| region.start.0 == range.start);
    let region = region.context("memory that may grow is not mapped")?;
    let mem = Mem::new(site.memory, region, site.main_loop.handle());
    let sizer = mem.sizer(site.memory);
    let happenings = site.happenings.clone();
    sizer.on_reached(move |size| happenings.report("memory-resized", json!({ "size": size })));
    devices.push(Box::new(mem));
    Ok(Some(sizer))
}
