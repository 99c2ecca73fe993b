//! `nixvmm ctl swap`: opens the new image as the disk needs it and hands it over. The machine
//! itself can open nothing.

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::connection::Connection;

/// Puts `image` into the disk called `disk`.
pub(super) fn exchange(connection: &mut Connection, disk: &str, image: &Path) -> Result<Value> {
    let listed = connection.call("ListDisks", &json!({}))?;
    let mut disks = listed["disks"].as_array().into_iter().flatten();
    let found = disks.find(|listed| listed["name"] == disk);
    let found = found.with_context(|| format!("there is no disk {disk}: `disks` lists them"))?;
    let is_read_only = found["readOnly"] == true;
    let file = OpenOptions::new().read(true).write(!is_read_only).open(image);
    let file = file.with_context(|| image.display().to_string())?;
    let parameters = json!({ "disk": disk, "image": 0 });
    connection.call_with("ExchangeImage", &parameters, &file)
}
