//! The memory balloon.

use serde::{Deserialize, Serialize};

/// A virtio memory balloon: the guest gives memory back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Balloon {
    /// Whether there is one. Default: yes.
    pub enabled: bool,
    /// Whether the guest may take memory out of it when it has no other. Default: yes.
    pub deflate_on_oom: bool,
    /// Whether memory that the guest frees goes back to the host by itself. Default: yes,
    /// and in no case with `prealloc`.
    pub free_page_reporting: bool,
    /// Seconds from one statistics report of the guest to the next; 0 has it report only when it
    /// is asked. Default: 0.
    pub statistics_interval: u32,
}

impl Default for Balloon {
    fn default() -> Self {
        Self {
            enabled: true,
            deflate_on_oom: true,
            free_page_reporting: true,
            statistics_interval: 0,
        }
    }
}
