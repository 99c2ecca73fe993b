//! Measures nixvmm beside QEMU and alioth: `cargo benchmark`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tests::benchmark::vmm::{Link, Vmm};
use tests::benchmark::{Figures, Plan, Topic, measure, report, store};
use tests::cache::Cache;
use tests::emulated_host::{Clock, EmulatedHost, Job};
use tests::tool::progress;

/// Names the file with the plan, for the process in the emulated host.
const PLAN: &str = "NIXVMM_BENCHMARK_PLAN";

/// What all measurements with one clock may take.
const LIMIT: Duration = Duration::from_secs(60 * 60);

const MIB: f64 = 1024.0 * 1024.0;

/// Measures nixvmm beside QEMU and alioth, and prints a table of ratios.
///
/// Everything runs in an emulated host whose clock counts instructions, so that results repeat
/// whatever else this machine does. What it needs it fetches and builds first.
#[derive(Parser)]
#[command(name = "cargo benchmark")]
struct Arguments {
    /// What to measure; everything if nothing is named.
    topics: Vec<Topic>,
    /// Whom to measure; everyone if nobody is named.
    #[arg(long, value_delimiter = ',')]
    vmm: Vec<Vmm>,
    /// Over what, where a network is measured; over everything if nothing is named.
    #[arg(long, value_delimiter = ',')]
    link: Vec<Link>,
    /// Who serves the store that is measured, each in a host of its own; everyone by default.
    #[arg(long, value_delimiter = ',')]
    server: Vec<store::Server>,
    /// The file for the raw figures.
    #[arg(long, default_value = "target/benchmark.json")]
    json: PathBuf,
}

fn main() -> Result<ExitCode> {
    if let Some(path) = env::var_os(PLAN) {
        let plan: Plan = serde_json::from_str(&fs::read_to_string(path)?)?;
        measure::run(&plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    let arguments = Arguments::parse();
    let all = [
        Topic::Start,
        Topic::Boot,
        Topic::Exits,
        Topic::Memory,
        Topic::Devices,
        Topic::Block,
        Topic::Net,
        Topic::NetExits,
        Topic::Pairs,
        Topic::Store,
        Topic::StoreStart,
        Topic::Profile,
    ];
    let topics = if arguments.topics.is_empty() { all.to_vec() } else { arguments.topics };
    let vmms = if arguments.vmm.is_empty() { Vmm::ALL.to_vec() } else { arguments.vmm };
    let links = if arguments.link.is_empty() { Link::ALL.to_vec() } else { arguments.link };
    let servers = arguments.server;
    let servers = if servers.is_empty() { store::Server::ALL.to_vec() } else { servers };

    let cache = Cache::open()?;
    let plan = Plan::prepare(&cache, topics, vmms, links, servers)?;
    let mut figures = Figures::default();
    for vmm in &plan.vmms {
        let size = fs::metadata(vmm.program(&plan.programs))?.len() as f64 / MIB;
        figures.add("program size", *vmm, "MiB", vec![size]);
    }
    if plan.topics.contains(&Topic::StoreStart) {
        store::start(&plan.programs.nixvmm, &mut figures)?;
    }
    measure_all(&cache, &plan, &mut figures);
    figures.notes.extend(store::table(&figures));

    if let Some(folder) = arguments.json.parent() {
        fs::create_dir_all(folder)?;
    }
    figures.save(&arguments.json)?;
    for note in &figures.notes {
        println!("{note}\n");
    }
    print!("{}", report::table(&figures));
    println!("\nraw figures: {}", arguments.json.display());
    Ok(ExitCode::SUCCESS)
}

/// A peer that makes an emulated host hang takes nobody else's figures with it.
fn measure_all(cache: &Cache, plan: &Plan, figures: &mut Figures) {
    let in_hosts = plan.topics.iter().filter(|topic| **topic != Topic::StoreStart);
    let (by_time, by_instructions): (Vec<Topic>, Vec<Topic>) =
        in_hosts.partition(|topic| **topic == Topic::Pairs);
    let (of_stores, by_instructions): (Vec<Topic>, Vec<Topic>) =
        by_instructions.into_iter().partition(|topic| *topic == Topic::Store);
    for server in &plan.servers {
        let plan = Plan { servers: vec![*server], ..plan.clone() };
        let measured =
            measure_in_host(cache, &plan, of_stores.clone(), Clock::Instructions, figures);
        figures.note_failure(&format!("store, {}", server.name()), measured);
    }
    for vmm in &plan.vmms {
        let plan = Plan { vmms: vec![*vmm], ..plan.clone() };
        let topics = by_instructions.clone();
        let measured = measure_in_host(cache, &plan, topics, Clock::Instructions, figures);
        figures.note_failure(vmm.name(), measured);
    }
    let measured = measure_in_host(cache, plan, by_time, Clock::Wall, figures);
    figures.note_failure("by the wall clock", measured);
}

fn measure_in_host(
    cache: &Cache,
    plan: &Plan,
    topics: Vec<Topic>,
    clock: Clock,
    figures: &mut Figures,
) -> Result<()> {
    if topics.is_empty() {
        return Ok(());
    }
    let folder = tempfile::tempdir_in(cache.root())?;
    let (file, results) = (folder.path().join("plan.json"), folder.path().join("results.json"));
    let plan = Plan { topics, results: results.clone(), ..plan.clone() };
    fs::write(&file, serde_json::to_string(&plan)?)?;
    progress("booting an emulated host for the measurements");
    let own = env::current_exe()?;
    let job = Job {
        command: vec![own.to_str().context("a path that is no UTF-8")?.to_owned()],
        environment: vec![(PLAN, path_text(&file)?)],
        interactive: false,
        limit: LIMIT,
    };
    let ended = EmulatedHost::prepare(cache)?.with_clock(clock).run(&job);
    // What was measured before a host hung counts.
    if results.exists() {
        figures.load(&results)?;
    }
    ensure!(ended? == ExitCode::SUCCESS, "the measurements failed");
    Ok(())
}

fn path_text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path that is no UTF-8")?.to_owned())
}
