//! What does an idle guest cost? Memory besides its own, with few devices and with all of ours.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Host, MARKS, MEMORY_MIB, Machine, PATIENCE, Reached, beat, wait_for};
use crate::benchmark::vmm::{Link, Vmm};
use crate::benchmark::{Figures, memory, trace};

/// How long an idle guest is left alone before its VMM's memory is counted.
const SETTLING: Duration = Duration::from_secs(30);

impl Host<'_> {
    /// A disk and a console, and processors.
    pub(super) fn memory(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        let mut sizes = Vec::new();
        for processors in [1, 4] {
            let machine = Machine { processors, ..self.bzimage("idle") };
            let (size, parts) = self.outside_ram(vmm, &machine)?;
            sizes.push(size);
            let row = format!("memory outside RAM, {processors} vCPU");
            figures.add(&row, vmm, "KiB", vec![size]).parts = parts;
        }
        let further = (sizes[1] - sizes[0]) / 3.0;
        figures.add("memory per further vCPU", vmm, "KiB", vec![further]);
        Ok(())
    }

    /// Every kind of device that nixvmm has, each with its driver.
    pub(super) fn every_device(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        if vmm != Vmm::Nixvmm {
            return Ok(());
        }
        let machine =
            Machine { link: Some(Link::Tap), has_every_device: true, ..self.bzimage("devices") };
        let (size, parts) = self.outside_ram(vmm, &machine)?;
        let row = "memory outside RAM, every device";
        figures.add(row, vmm, "KiB", vec![size]).parts = parts;
        Ok(())
    }

    /// KiB outside the RAM of a guest that has become idle, and the same by mapping.
    fn outside_ram(&self, vmm: Vmm, machine: &Machine<'_>) -> Result<(f64, BTreeMap<String, f64>)> {
        beat();
        trace::start(&[MARKS])?;
        let mut child = self.spawn(vmm, machine)?;
        let idle = wait_for(PATIENCE, || {
            ensure!(child.try_wait()?.is_none(), "the VMM ended before its guest was idle");
            let text = fs::read_to_string(trace::FILE)?;
            Ok(text.contains(&format!(" a1 {:#x} ", Reached::Idle as u64)))
        });
        thread::sleep(SETTLING);
        let size = memory::outside_ram(child.id(), u64::from(MEMORY_MIB) * 1024);
        let _ = child.kill();
        child.wait()?;
        trace::stop(&[MARKS])?;
        idle?;
        let (size, parts) = size?;
        Ok((size as f64, parts.into_iter().map(|(name, size)| (name, size as f64)).collect()))
    }
}
