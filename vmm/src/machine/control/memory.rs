//! The verbs about memory: its size and the balloon.

use devices::virtio::balloon::Inflator;
use devices::virtio::mem::Sizer;
use serde_json::{Value, json};

use super::steering::Steering;
use crate::control::{Answer, Refusal, Request, Served};

/// `GetMemory`.
pub(super) fn get(machine: &mut Steering, _: &Request) -> Served {
    let reply = match &machine.parts.sizer {
        Some(sizer) => sizes(sizer),
        None => {
            let size = machine.parts.config.memory.size.0;
            json!({ "size": size, "requested": size, "max": size })
        }
    };
    Ok(Answer::Done(reply))
}

/// `SetMemorySize`.
pub(super) fn set_size(machine: &mut Steering, request: &Request) -> Served {
    let size = needed(request, "size")?;
    let Some(sizer) = &machine.parts.sizer else {
        return Err(Refusal::not_possible("this machine was started without --memory max=SIZE"));
    };
    sizer.set_size(size).map_err(Refusal::not_possible)?;
    log::info!("the guest is asked to have {size} bytes of memory");
    machine.parts.happenings.report("memory-size-requested", json!({ "size": size }));
    Ok(Answer::Done(sizes(sizer)))
}

/// `GetBalloon`.
pub(super) fn get_balloon(machine: &mut Steering, _: &Request) -> Served {
    let inflator = balloon(machine)?;
    inflator.refresh_statistics();
    let statistics = inflator.statistics();
    let age = statistics
        .map(|statistics| u64::try_from(statistics.time.elapsed().as_micros()).unwrap_or(u64::MAX));
    let values = statistics.map(|statistics| {
        let pairs = statistics.iter().map(|(name, value)| (name.to_owned(), json!(value)));
        Value::Object(pairs.collect())
    });
    let (inflated, reported) = inflator.given_back();
    Ok(Answer::Done(json!({
        "target": inflator.target(),
        "size": inflator.actual(),
        "inflated": inflated,
        "reported": reported,
        "statistics": values,
        "ageUSec": age,
    })))
}

/// `SetBalloonTarget`.
pub(super) fn set_balloon_target(machine: &mut Steering, request: &Request) -> Served {
    let target = needed(request, "target")?;
    balloon(machine)?.set_target(target).map_err(Refusal::not_possible)?;
    log::info!("the guest is asked to put {target} bytes of memory into the balloon");
    machine.parts.happenings.report("balloon-target-set", json!({ "target": target }));
    Ok(Answer::Done(json!({})))
}

fn balloon(machine: &Steering) -> Result<&Inflator, Refusal> {
    let inflator = machine.parts.inflator.as_ref();
    inflator.ok_or_else(|| Refusal::not_possible("this machine was started with --balloon off"))
}

fn sizes(sizer: &Sizer) -> Value {
    json!({ "size": sizer.size(), "requested": sizer.requested(), "max": sizer.max() })
}

fn needed(request: &Request, name: &str) -> Result<u64, Refusal> {
    request.number(name)?.ok_or_else(|| Refusal::invalid_parameter(name))
}
