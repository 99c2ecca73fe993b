//! The verbs of `io.nixvmm.Machine`: one line of the table each, and a function that serves it.

use std::process;

use devices::host::stream::WindowSize;
use serde_json::{Value, json};

use super::super::devices::Disk;
use super::cards;
use super::memory;
use super::statistics;
use super::steering::Steering;
use crate::control::{
    Answer, Interface, MACHINE_INTERFACE, MACHINE_INTERFACE_NAME, Occasion, Refusal, Request,
    Served, Verb,
};

/// What control clients can call.
pub(super) const INTERFACE: Interface<Steering> = Interface {
    name: MACHINE_INTERFACE_NAME,
    description: MACHINE_INTERFACE,
    verbs: &[
        verb("GetState", &[], get_state),
        verb("GetConfiguration", &[], get_configuration),
        verb("Pause", &[], pause),
        verb("Resume", &[], resume),
        verb("PressPowerButton", &[], press_power_button),
        verb("PowerOff", &[], power_off),
        verb("Reset", &[], reset),
        verb("Stop", &[], stop),
        verb("ListDisks", &[], list_disks),
        verb("ResizeDisk", &["disk", "size"], resize_disk),
        verb("ExchangeImage", &["disk", "image"], exchange_image),
        verb("AddStorePaths", &["list"], add_store_paths),
        verb("ListNetworkCards", &[], cards::list),
        verb("SetNetworkLink", &["card", "plugged"], cards::set_link),
        verb("AttachConsole", &["console", "columns", "rows"], attach_console),
        verb("GetStatistics", &[], get_statistics),
        verb("GetMetrics", &[], get_metrics),
        verb("GetMemory", &[], memory::get),
        verb("SetMemorySize", &["size"], memory::set_size),
        verb("GetBalloon", &[], memory::get_balloon),
        verb("SetBalloonTarget", &["target"], memory::set_balloon_target),
        Verb { streams: true, ..verb("Subscribe", &[], subscribe) },
    ],
};

const fn verb(
    name: &'static str,
    parameters: &'static [&'static str],
    serve: fn(&mut Steering, &Request) -> Served,
) -> Verb<Steering> {
    Verb { name, parameters, streams: false, serve }
}

fn get_state(machine: &mut Steering, _: &Request) -> Served {
    let config = &machine.parts.config;
    let uptime = machine.started.elapsed().as_micros();
    Ok(Answer::Done(json!({
        "state": machine.state(),
        "version": env!("CARGO_PKG_VERSION"),
        "processId": process::id(),
        "uptimeUSec": u64::try_from(uptime).unwrap_or(u64::MAX),
        "processors": config.cpus,
        "memory": config.memory.size.0,
    })))
}

fn get_configuration(machine: &mut Steering, _: &Request) -> Served {
    match serde_json::to_value(&machine.parts.config) {
        Ok(configuration) => Ok(Answer::Done(json!({ "configuration": configuration }))),
        Err(error) => Err(Refusal::not_possible(error)),
    }
}

fn pause(machine: &mut Steering, _: &Request) -> Served {
    if machine.pause() {
        Ok(Answer::Later(Occasion::Paused))
    } else {
        Err(Refusal::not_possible("the guest has been asked to power off"))
    }
}

fn resume(machine: &mut Steering, _: &Request) -> Served {
    machine.resume();
    done()
}

fn press_power_button(machine: &mut Steering, _: &Request) -> Served {
    machine.press_button();
    done()
}

fn power_off(machine: &mut Steering, _: &Request) -> Served {
    machine.power_off();
    done()
}

fn reset(machine: &mut Steering, _: &Request) -> Served {
    machine.reset();
    done()
}

fn stop(machine: &mut Steering, _: &Request) -> Served {
    machine.stop();
    done()
}

fn list_disks(machine: &mut Steering, _: &Request) -> Served {
    let disks: Vec<Value> = machine.parts.disks.iter().map(describe).collect();
    Ok(Answer::Done(json!({ "disks": disks })))
}

fn resize_disk(machine: &mut Steering, request: &Request) -> Served {
    let size = request.number("size")?;
    let disk = find_disk(machine, request.text("disk")?)?;
    match machine.resize(disk, size) {
        Ok(size) => Ok(Answer::Done(json!({ "size": size }))),
        Err(error) => Err(Refusal::not_possible(error)),
    }
}

fn exchange_image(machine: &mut Steering, request: &Request) -> Served {
    let disk = find_disk(machine, request.text("disk")?)?;
    match machine.exchange(disk, &request.file("image")?.into()) {
        Ok(size) => Ok(Answer::Done(json!({ "size": size }))),
        Err(error) => Err(Refusal::not_possible(error)),
    }
}

fn add_store_paths(machine: &mut Steering, request: &Request) -> Served {
    let list = request.file("list")?;
    let additions = machine.parts.additions.as_ref();
    let additions = additions
        .ok_or_else(|| Refusal::not_possible("this guest has no --store-share closure=FILE"))?;
    let added = additions.add(list);
    let count = added.map_err(|error| Refusal::not_possible(format!("{error:#}")))?;
    log::info!("the guest sees {count} store paths more");
    machine.parts.happenings.report("store-paths-added", json!({ "count": count }));
    Ok(Answer::Done(json!({ "count": count })))
}

fn attach_console(machine: &mut Steering, request: &Request) -> Served {
    let name = request.optional_text("console")?;
    let size = WindowSize {
        columns: window_side(request, "columns")?,
        rows: window_side(request, "rows")?,
    };
    if !request.wants_upgrade() {
        return Err(Refusal::not_possible("the call has to ask for an upgrade of the connection"));
    }
    let mut consoles = machine.parts.consoles.iter().rev();
    let found = consoles.find(|(other, _)| name.is_none_or(|name| name == *other));
    let (_, outlet) = found.ok_or_else(|| {
        let name = name.unwrap_or("console");
        Refusal::not_possible(format_args!("this machine has no {name}"))
    })?;
    let tap = outlet.tap().map_err(Refusal::not_possible)?;
    if size != WindowSize::default() {
        tap.set_window_size(size);
    }
    Ok(Answer::Bytes(json!({}), tap))
}

fn window_side(request: &Request, name: &str) -> Result<u16, Refusal> {
    let side = u16::try_from(request.number(name)?.unwrap_or_default());
    side.map_err(|_| Refusal::invalid_parameter(name))
}

fn get_statistics(machine: &mut Steering, _: &Request) -> Served {
    Ok(Answer::Done(statistics::as_json(machine)))
}

fn get_metrics(machine: &mut Steering, _: &Request) -> Served {
    Ok(Answer::Done(json!({ "text": statistics::as_metrics(machine) })))
}

fn subscribe(machine: &mut Steering, _: &Request) -> Served {
    let state = machine.state();
    Ok(Answer::Events(json!({ "event": "subscribed", "state": state, "details": null })))
}

fn done() -> Served {
    Ok(Answer::Done(json!({})))
}

fn describe(disk: &Disk) -> Value {
    json!({
        "name": disk.name,
        "size": disk.resizer.size_bytes(),
        "readOnly": disk.resizer.is_read_only(),
    })
}

fn find_disk<'a>(machine: &'a Steering, name: &str) -> Result<&'a Disk, Refusal> {
    let found = machine.parts.disks.iter().find(|disk| disk.name == name);
    found.ok_or_else(|| Refusal::new("NoSuchDisk", json!({ "disk": name })))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_verb_is_described_with_its_parameters_and_every_description_is_served() {
        let methods: Vec<&str> = MACHINE_INTERFACE
            .split("\nmethod ")
            .skip(1)
            .map(|text| text.split_once(" -> ").unwrap().0)
            .collect();
        let described: Vec<(&str, Vec<&str>)> = methods
            .iter()
            .map(|method| {
                let (name, parameters) = method.split_once('(').unwrap();
                let parameters = parameters.trim_end_matches(')').split(',');
                let names = parameters.filter_map(|parameter| parameter.split_once(':'));
                (name, names.map(|(name, _)| name.trim()).collect())
            })
            .collect();
        let served: Vec<(&str, Vec<&str>)> =
            INTERFACE.verbs.iter().map(|verb| (verb.name, verb.parameters.to_vec())).collect();
        assert_eq!(served, described);
    }
}
