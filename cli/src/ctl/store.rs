//! `nixvmm ctl store-add`: hands a list of store paths over, in memory that nobody can change any
//! more. The machine itself can open nothing.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use vmm::sealed_list::{BYTES_MAX, SealedList};

use super::connection::Connection;

/// Adds the paths that `list` has, one a line: all of them at once, or none where one does not
/// exist.
pub(super) fn add(connection: &mut Connection, method: &str, list: &Path) -> Result<Value> {
    let context = || list.display().to_string();
    let bytes = fs::metadata(list).with_context(context)?.len();
    ensure!(bytes <= BYTES_MAX, "{}: more than {BYTES_MAX} bytes: add it in parts", context());
    let lines = SealedList::new(&fs::read(list).with_context(context)?)?;
    connection.call_with(method, &json!({ "list": 0 }), &lines)
}
