//! How a machine's life ends.

/// Why the machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest powered off.
    PowerOff,
    /// The guest rebooted, and `on-reboot` is `exit`.
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// A processor met a triple fault.
    TripleFault,
    /// The guest did not power off in time after it was asked to.
    Killed,
    /// The guest's watchdog expired, and `watchdog` is `exit`.
    Watchdog,
}

impl Exit {
    /// The exit status of the process.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 3,
            Self::Panic => 4,
            Self::TripleFault => 5,
            Self::Killed => 6,
            Self::Watchdog => 7,
        }
    }
}
