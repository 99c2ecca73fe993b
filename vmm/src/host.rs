//! What commands that work on a machine's files need of the host as the machine itself does.

pub use devices::host::disk::image::lock::try_lock;
pub use devices::host::signals::{END_REQUESTS, Signals};
