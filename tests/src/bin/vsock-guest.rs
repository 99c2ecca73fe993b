//! Programs at either end of a vsock connection, for guests and hosts that have no other:
//!
//! - `serve PORT COMMAND` runs a shell command for each connection, with it as standard streams;
//! - `connect CID PORT` sends standard input and prints what comes back.

use std::env;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::thread;

use tests::vsock::{self, Listener};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["serve", port, command] => serve(port, command),
        ["connect", cid, port] => connect(cid, port),
        _ => Err(io::Error::other("give `serve PORT COMMAND` or `connect CID PORT`")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str, command: &str) -> io::Result<()> {
    let listener = Listener::bind(number(port)?)?;
    loop {
        let connection = OwnedFd::from(listener.accept()?);
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(connection.try_clone()?)
            .stdout(connection)
            .spawn()?;
        thread::spawn(move || child.wait());
    }
}

fn connect(cid: &str, port: &str) -> io::Result<()> {
    let mut connection = vsock::connect(number(cid)?, number(port)?)?;
    let mut sender = connection.try_clone()?;
    let sending = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut sender)?;
        sender.shutdown(Shutdown::Write)
    });
    io::copy(&mut connection, &mut io::stdout())?;
    sending.join().map_err(|_| io::Error::other("sending panicked"))?
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|error| io::Error::other(format!("{text}: {error}")))
}
