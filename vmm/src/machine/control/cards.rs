//! The verbs about network cards: their links.

use devices::virtio::net::NetHandle;
use serde_json::{Value, json};

use super::steering::Steering;
use crate::control::{Answer, Refusal, Request, Served};

/// `ListNetworkCards`.
pub(super) fn list(machine: &mut Steering, _: &Request) -> Served {
    let cards: Vec<Value> = machine.parts.cards.iter().map(describe).collect();
    Ok(Answer::Done(json!({ "cards": cards })))
}

/// `SetNetworkLink`.
pub(super) fn set_link(machine: &mut Steering, request: &Request) -> Served {
    let is_plugged = request.switch("plugged")?;
    let is_plugged = is_plugged.ok_or_else(|| Refusal::invalid_parameter("plugged"))?;
    let name = request.text("card")?;
    let found = machine.parts.cards.iter().find(|card| card.name() == name);
    let card = found.ok_or_else(|| Refusal::new("NoSuchCard", json!({ "card": name })))?;
    card.set_plugged(is_plugged);
    let state = if is_plugged { "in" } else { "out" };
    log::info!("the plug of {name} is {state}");
    let details = json!({ "card": name, "plugged": is_plugged });
    machine.parts.happenings.report("network-link-set", details);
    Ok(Answer::Done(describe(card)))
}

fn describe(card: &NetHandle) -> Value {
    json!({ "name": card.name(), "plugged": card.is_plugged(), "up": card.is_up() })
}
