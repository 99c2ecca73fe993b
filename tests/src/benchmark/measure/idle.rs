//! What does an idle guest cost? Memory besides its own, with few devices and with all of ours.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Host, MARKS, MEMORY_MIB, Machine, PATIENCE, Reached, beat, wait_for};
use crate::benchmark::stage::INITRD_OF_DEVICES;
use crate::benchmark::vmm::{Link, Vmm};
use crate::benchmark::{Figures, memory, trace};

/// How long an idle guest is left alone before its VMM's memory is counted.
const SETTLING: Duration = Duration::from_secs(30);

/// How often each guest is looked at: the host's kernel maps a program's pages in windows of
/// sixteen, so that one and the same guest differs by several of them.
const RUNS: usize = 5;

impl Host<'_> {
    /// A disk and a console, and processors.
    pub(super) fn memory(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        let mut sizes = Vec::new();
        for processors in [1, 4] {
            let machine = Machine { processors, ..self.bzimage("idle") };
            let row = format!("memory outside RAM, {processors} vCPU");
            sizes.push(self.outside_ram(&row, vmm, &machine, figures)?);
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
        let machine = Machine {
            initrd: Path::new(INITRD_OF_DEVICES),
            link: Some(Link::Tap),
            has_every_device: true,
            ..self.bzimage("devices")
        };
        self.outside_ram("memory outside RAM, every device", vmm, &machine, figures).map(drop)
    }

    /// Adds the KiB outside the RAM of guests that have become idle, and those of the median one by
    /// mapping; returns its sum.
    fn outside_ram(
        &self,
        row: &str,
        vmm: Vmm,
        machine: &Machine<'_>,
        figures: &mut Figures,
    ) -> Result<f64> {
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            runs.push(self.outside_ram_once(vmm, machine)?);
        }
        let sizes = runs.iter().map(|(size, _)| *size as f64).collect();
        runs.sort_by_key(|(size, _)| *size);
        let (_, parts) = runs.swap_remove(RUNS / 2);
        let figure = figures.add(row, vmm, "KiB", sizes);
        figure.parts = parts.into_iter().map(|(name, size)| (name, size as f64)).collect();
        Ok(figure.value)
    }

    fn outside_ram_once(
        &self,
        vmm: Vmm,
        machine: &Machine<'_>,
    ) -> Result<(u64, BTreeMap<String, u64>)> {
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
        size
    }
}
