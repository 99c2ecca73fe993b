//! Methods: what a call comes to.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use devices::host::stream::Tap;
use serde_json::{Map, Value, json};

use super::message::Call;

/// The interface that every varlink service has.
const SERVICE: &str = "org.varlink.service";
const SERVICE_DESCRIPTION: &str = include_str!("org.varlink.service.varlink");

/// What a service can do, and what it does it with.
pub struct Interface<S: 'static> {
    /// Its name.
    pub name: &'static str,
    /// What it has, in varlink's language.
    pub description: &'static str,
    /// Its methods.
    pub verbs: &'static [Verb<S>],
}

/// One method.
pub struct Verb<S> {
    /// Its name in the description.
    pub name: &'static str,
    /// The names of its parameters; others are refused.
    pub parameters: &'static [&'static str],
    /// Whether it has many replies, so that a call must say `more`.
    pub streams: bool,
    /// What it does.
    pub serve: fn(&mut S, &Request) -> Served,
}

/// How a call ends.
pub type Served = Result<Answer, Refusal>;

/// A call of a method that exists, with no parameters but those that it has.
pub struct Request {
    parameters: Map<String, Value>,
    file: Cell<Option<OwnedFd>>,
    upgrade: bool,
}

/// What a call comes to.
pub enum Answer {
    /// It is done; this is the reply.
    Done(Value),
    /// The reply comes when this does.
    Later(Occasion),
    /// This is the reply; after it the connection carries the bytes of a stream.
    Bytes(Value, Tap),
    /// This is the first reply; each event is a further one, as long as the client stays.
    Events(Value),
}

/// What a reply may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Every processor has left the guest.
    Paused,
}

/// Why a call is refused.
#[derive(Debug)]
pub struct Refusal {
    error: String,
    parameters: Value,
}

impl<S> Interface<S> {
    /// Serves one call; `file` is the descriptor that came with it.
    ///
    /// # Errors
    ///
    /// The error of the reply.
    pub fn serve(
        &self,
        subject: &mut S,
        call: Call,
        file: Option<OwnedFd>,
    ) -> Result<Answer, Refusal> {
        let (interface, method) = call.method.rsplit_once('.').unwrap_or_default();
        if interface == SERVICE {
            return self.serve_service(method, &call);
        }
        if interface != self.name {
            return Err(Refusal::of_service(
                "InterfaceNotFound",
                json!({ "interface": interface }),
            ));
        }
        let Some(verb) = self.verbs.iter().find(|verb| verb.name == method) else {
            return Err(Refusal::of_service("MethodNotFound", json!({ "method": call.method })));
        };
        if verb.streams && !call.more {
            return Err(Refusal::of_service("ExpectedMore", json!({})));
        }
        let parameters = call.parameters.unwrap_or_default();
        if let Some(unknown) =
            parameters.keys().find(|name| !verb.parameters.contains(&name.as_str()))
        {
            return Err(Refusal::invalid_parameter(unknown));
        }
        let request = Request { parameters, file: Cell::new(file), upgrade: call.upgrade };
        (verb.serve)(subject, &request)
    }

    fn serve_service(&self, method: &str, call: &Call) -> Result<Answer, Refusal> {
        match method {
            "GetInfo" => Ok(Answer::Done(json!({
                "vendor": "nixvmm",
                "product": "nixvmm",
                "version": env!("CARGO_PKG_VERSION"),
                "url": env!("CARGO_PKG_REPOSITORY"),
                "interfaces": [SERVICE, self.name],
            }))),
            "GetInterfaceDescription" => {
                let parameter =
                    call.parameters.as_ref().and_then(|parameters| parameters.get("interface"));
                let Some(Value::String(name)) = parameter else {
                    return Err(Refusal::invalid_parameter("interface"));
                };
                let description = match name.as_str() {
                    SERVICE => SERVICE_DESCRIPTION,
                    name if name == self.name => self.description,
                    _ => {
                        let parameters = json!({ "interface": name });
                        return Err(Refusal::of_service("InterfaceNotFound", parameters));
                    }
                };
                Ok(Answer::Done(json!({ "description": description })))
            }
            _ => Err(Refusal::of_service("MethodNotFound", json!({ "method": call.method }))),
        }
    }
}

impl Request {
    /// A text that must be given.
    ///
    /// # Errors
    ///
    /// It is missing or no text.
    pub fn text(&self, name: &str) -> Result<&str, Refusal> {
        let value = self.parameters.get(name).and_then(Value::as_str);
        value.ok_or_else(|| Refusal::invalid_parameter(name))
    }

    /// A text that may be left out.
    ///
    /// # Errors
    ///
    /// It is no text.
    pub fn optional_text(&self, name: &str) -> Result<Option<&str>, Refusal> {
        match self.parameters.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.text(name).map(Some),
        }
    }

    /// A number that may be left out.
    ///
    /// # Errors
    ///
    /// It is no whole number, or is negative.
    pub fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        self.optional(name, Value::as_u64)
    }

    /// A switch that may be left out.
    ///
    /// # Errors
    ///
    /// It is neither true nor false.
    pub fn switch(&self, name: &str) -> Result<Option<bool>, Refusal> {
        self.optional(name, Value::as_bool)
    }

    /// The descriptor that came with the call and that parameter `name` stands for: its index, 0.
    ///
    /// # Errors
    ///
    /// None came.
    pub fn file(&self, name: &str) -> Result<OwnedFd, Refusal> {
        let file = if self.number(name)? == Some(0) { self.file.take() } else { None };
        file.ok_or_else(|| Refusal::invalid_parameter(name))
    }

    /// Whether the connection shall carry something else after the reply.
    pub fn wants_upgrade(&self) -> bool {
        self.upgrade
    }

    fn optional<T>(
        &self,
        name: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        match self.parameters.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| Refusal::invalid_parameter(name)),
        }
    }
}

impl Refusal {
    /// An error of the machine's interface, with its parameters.
    #[must_use]
    pub fn new(error: &str, parameters: Value) -> Self {
        Self { error: format!("{}.{error}", super::MACHINE_INTERFACE_NAME), parameters }
    }

    /// What is asked for cannot be done, and why.
    #[must_use]
    pub fn not_possible(reason: impl std::fmt::Display) -> Self {
        Self::new("NotPossible", json!({ "reason": reason.to_string() }))
    }

    /// A parameter is missing, unknown or of the wrong type.
    #[must_use]
    pub fn invalid_parameter(name: &str) -> Self {
        Self::of_service("InvalidParameter", json!({ "parameter": name }))
    }

    /// The name of the error, with that of its interface, and its parameters.
    #[must_use]
    pub fn parts(&self) -> (&str, &Value) {
        (&self.error, &self.parameters)
    }

    fn of_service(error: &str, parameters: Value) -> Self {
        Self { error: format!("{SERVICE}.{error}"), parameters }
    }
}
