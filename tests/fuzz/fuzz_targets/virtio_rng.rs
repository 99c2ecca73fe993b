//! Whatever a driver does with an entropy source, it works after a reset.
#![no_main]

use devices::virtio::rng::Entropy;
use fuzz::virtio::{Step, drive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| drive(|home| Box::new(Entropy::new(home)), &steps));
