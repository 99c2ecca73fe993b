//! `nixvmm ctl store-add`: sends a list of store paths in as many calls as it takes.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::connection::Connection;

/// Paths of a call: with names as long as they may be, and every byte escaped, still a quarter of
/// the longest message.
const PATHS_MAX: usize = 64;

/// Adds the paths that `list` has, one a line: all of them, or none where one does not exist.
pub(super) fn add(connection: &mut Connection, method: &str, list: &Path) -> Result<Value> {
    let text = fs::read_to_string(list).with_context(|| list.display().to_string())?;
    let paths: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let mut reply = json!({});
    if paths.len() > PATHS_MAX {
        for paths in paths.chunks(PATHS_MAX) {
            connection.call(method, &json!({ "paths": paths, "onlyCheck": true }))?;
        }
    }
    for paths in paths.chunks(PATHS_MAX) {
        reply = connection.call(method, &json!({ "paths": paths }))?;
    }
    Ok(reply)
}
