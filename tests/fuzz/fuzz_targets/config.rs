//! Configuration files: a machine that is understood survives being written and laid over itself.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmm::config::Config;

fuzz_target!(|input: (&str, &str)| {
    let (below, above) = input;
    let file = Path::new("guest.json");
    let _ = Config::from_texts(&[(file, below), (file, above)]);
    if let Ok(config) = Config::from_texts(&[(file, above)]) {
        let text = serde_json::to_string(&config).expect("what was text is text again");
        let layered = Config::from_texts(&[(file, &text), (file, &text)]);
        assert_eq!(layered.expect("what was written is understood"), config);
    }
});
