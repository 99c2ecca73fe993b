//! A parameter that is said to be there is there, and one that was added is found.
#![no_main]

use boot::cmdline::has_parameter;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str)| {
    let (line, parameter) = input;
    if has_parameter(line, parameter) {
        let underscored = |text: &str| text.replace('-', "_");
        assert!(underscored(line).contains(&underscored(parameter)));
    }
    assert!(has_parameter(&format!("root=/dev/vda {line}"), "root"));
});
