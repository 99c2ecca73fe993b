//! Does a guest agree? The guest tests.

fn main() {}
