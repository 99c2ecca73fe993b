//! How fast are taps and sockets? The guest's end asks a server in the host for bytes both ways and
//! for round trips, over each kind of link, and tells how long it took by its own clock. Over vsock
//! it also sends messages to the service manager, where the VMM relays them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};

use super::{Host, MARKS, Machine, PATIENCE_WITH_LINK, Reached, Stage};
use crate::benchmark::Figures;
use crate::benchmark::trace::{self, Event, Mark};
use crate::benchmark::traffic::{self, HOST, PORT};
use crate::benchmark::vmm::{GATE, Link, SERVICE_MANAGER, TAP, Vmm};
use crate::service_manager::ServiceManager;
use crate::tool;
use crate::vsock;

/// Events that are seen from the first load's beginning on, whose mark has this stage.
const SEEN_OF_LOADS: [&str; 3] = [
    "enable_event:kvm:kvm_exit if a1 == 6",
    "enable_event:kvm:kvm_userspace_exit if a1 == 6",
    "enable_event:sched:sched_switch if a1 == 6",
];

/// A kind of event that is rarer is not shown, though it is among the raw figures.
const SHOWN_MIN: f64 = 0.02;

/// The host's end of every link; dropping it takes the tap away.
pub(super) struct Network;

impl Network {
    /// Makes the tap, and a server at the host's end of each link.
    pub(super) fn set_up(stage: &Stage) -> Result<Self> {
        let _ = ip(&["link", "delete", TAP]);
        ip(&["tuntap", "add", TAP, "mode", "tap"])?;
        let network = Self;
        ip(&["address", "add", &format!("{HOST}/24"), "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        // Nothing but what is measured shall go over it.
        fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1")?;

        let tcp = TcpListener::bind((HOST, PORT)).context("the tap has no address")?;
        serve_all(move || {
            let (stream, _) = tcp.accept()?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        let vsock = vsock::Listener::bind(PORT.into()).context("the host has no vsock")?;
        serve_all(move || vsock.accept());
        let path = stage.path(Path::new(&format!("{GATE}_{PORT}")))?;
        let _ = fs::remove_file(&path);
        let unix = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        serve_all(move || Ok(unix.accept()?.0));
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", TAP]);
    }
}

/// Serves one connection after the other for as long as this process lives.
fn serve_all<S: Read + Write>(mut accept: impl FnMut() -> std::io::Result<S> + Send + 'static) {
    thread::spawn(move || {
        while let Ok(stream) = accept() {
            // A guest that is ended leaves its connection.
            let _ = traffic::serve(stream);
        }
    });
}

fn ip(arguments: &[&str]) -> Result<()> {
    tool::run("ip", arguments.iter().map(Path::new)).map(drop)
}

impl Host<'_> {
    /// What goes over `link`, if `vmm` has it.
    pub(super) fn network(&self, vmm: Vmm, link: Link, figures: &mut Figures) -> Result<()> {
        if !vmm.has(link) {
            return Ok(());
        }
        let machine = Machine { link: Some(link), ..self.bzimage(link.measure()) };
        let manager = self.service_manager()?;
        let run = self.run(vmm, &machine, &[MARKS])?;
        let marks: Vec<Mark> = run.events.iter().filter_map(trace::mark).collect();
        let loads = marks.iter().filter(|mark| mark.stage == Reached::Load as u64);
        let mut rows = 0;
        for mark in loads {
            let count = (mark.first & 0xffff_ffff) as f64;
            let seconds = mark.second as f64 / 1e9;
            let (what, unit, value) = match mark.first >> 32 {
                1 => ("guest sends", "MiB/s", count / 1024.0 / seconds),
                2 => ("guest receives", "MiB/s", count / 1024.0 / seconds),
                4 => ("relayed message", "ms", seconds * 1000.0 / count),
                _ => ("round trips", "1/s", count / seconds),
            };
            figures.add(&format!("{}, {what}", link.name()), vmm, unit, vec![value]);
            rows += 1;
        }
        let failed = marks.iter().find(|mark| mark.stage == Reached::Failed as u64);
        let loads = loads_over(vmm, link);
        ensure!(
            rows == loads,
            "{rows} of {loads} loads came to an end; the guest's own error: {failed:?}"
        );
        if vmm.relays(link) {
            for number in 0..=traffic::MESSAGES {
                manager.wait_for(&traffic::message(number), PATIENCE_WITH_LINK)?;
            }
        }
        Ok(())
    }

    /// Who listens where those that relay messages send them.
    fn service_manager(&self) -> Result<ServiceManager> {
        let path = self.stage.path(Path::new(SERVICE_MANAGER))?;
        let _ = fs::remove_file(&path);
        ServiceManager::new(path.parent().context("a socket is in a folder")?)
    }

    /// What the host's kernel sees of each load over `link`, if `vmm` has it.
    pub(super) fn network_exits(&self, vmm: Vmm, link: Link, figures: &mut Figures) -> Result<()> {
        if !vmm.has(link) {
            return Ok(());
        }
        let machine = Machine { link: Some(link), ..self.bzimage(link.measure()) };
        let requests = SEEN_OF_LOADS.map(|trigger| (MARKS.0, Some(trigger)));
        let _manager = self.service_manager()?;
        let run = self.run(vmm, &machine, &requests)?;
        let mut seen: Option<BTreeMap<String, f64>> = None;
        let mut rows = 0;
        for event in &run.events {
            match trace::mark(event) {
                Some(mark) if mark.stage == Reached::Begun as u64 => seen = Some(BTreeMap::new()),
                Some(mark) if mark.stage == Reached::Load as u64 => {
                    let seen = seen.take().context("a load ended that had not begun")?;
                    add_seen(link, vmm, mark, seen, figures);
                    rows += 1;
                }
                Some(_) => {}
                None => {
                    if let Some(seen) = &mut seen {
                        *seen.entry(kind(event)).or_default() += 1.0;
                    }
                }
            }
        }
        let loads = loads_over(vmm, link);
        ensure!(rows == loads, "{rows} of {loads} loads came to an end");
        Ok(())
    }
}

/// How many loads there are: bytes both ways, round trips, and messages where somebody takes them.
fn loads_over(vmm: Vmm, link: Link) -> usize {
    if vmm.relays(link) { 4 } else { 3 }
}

/// Adds what was seen of the load that `mark` ends: of each MiB or of each round trip.
fn add_seen(link: Link, vmm: Vmm, mark: Mark, seen: BTreeMap<String, f64>, figures: &mut Figures) {
    let count = (mark.first & 0xffff_ffff) as f64;
    let (what, count) = match mark.first >> 32 {
        1 => ("per MiB sent", count / 1024.0),
        2 => ("per MiB received", count / 1024.0),
        4 => ("per relayed message", count),
        _ => ("per round trip", count),
    };
    let parts: BTreeMap<_, _> = seen.into_iter().map(|(kind, seen)| (kind, seen / count)).collect();
    let exits = parts.iter().filter(|(kind, _)| kind.starts_with("kvm_exit"));
    let exits = exits.map(|(_, count)| count).sum();
    tool::progress(&format!("  {}, {what}:", link.name()));
    for (kind, count) in parts.iter().filter(|(_, count)| **count > SHOWN_MIN) {
        tool::progress(&format!("    {kind}: {count:.2}"));
    }
    figures.add(&format!("{}, exits {what}", link.name()), vmm, "", vec![exits]).parts = parts;
}

/// What an event is about: the reason of an exit, or who runs next.
fn kind(event: &Event) -> String {
    let word = |before: &str| {
        let rest = event.text.split_once(before).map_or("", |(_, rest)| rest);
        rest.split(' ').next().unwrap_or_default().to_owned()
    };
    match event.name.as_str() {
        "sched_switch" => format!("{} {}", event.name, word("next_comm=")),
        name => format!("{name} {}", word("reason ")),
    }
}
