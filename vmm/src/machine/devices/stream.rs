//! What is behind consoles and serial ports.

use anyhow::{Context as _, Result};
use devices::host::stream::Stream;

use super::Site;
use crate::config::Console;
use crate::run_state::Ending;

/// What is behind a console or serial port; the escape keys of a terminal end the machine.
pub(super) fn open(flag: &str, console: &Console, site: &mut Site<'_>) -> Result<Option<Stream>> {
    let main_loop = &mut *site.main_loop;
    let stream = match console {
        Console::Off => return Ok(None),
        Console::Stdio => {
            let endings = site.endings.clone();
            Stream::stdio(main_loop, Box::new(move || endings.report(Ending::Killed)))
        }
        Console::Pty { link } => Stream::pty(main_loop, link.as_deref()).map(|(stream, path)| {
            log::info!("{flag}: {}", path.display());
            stream
        }),
        Console::File { path } => Stream::file(main_loop, path),
        Console::Socket { path } => Stream::socket(main_loop, path),
    };
    let place = console.path().map(|path| format!(" {}", path.display())).unwrap_or_default();
    Ok(Some(stream.with_context(|| format!("{flag}{place}: cannot be opened"))?))
}
