//! Either end of a connection, for guests and hosts that have no other program for it.
//!
//! Of vsock:
//! - `serve PORT COMMAND` runs a shell command for each connection, with it as standard streams;
//! - `connect CID PORT` sends standard input and prints what comes back.
//!
//! Of TCP:
//! - `send ADDRESS PORT BYTES` sends so much of a pattern;
//! - `receive ADDRESS PORT BYTES` expects it.
//!
//! Of UDP:
//! - `answer PORT` sends back what comes, from its end to its beginning;
//! - `ask ADDRESS PORT TEXT` sends that until something comes back, and prints it.

use std::env;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::thread;

use tests::datagram::{self, Answerer};
use tests::pattern;
use tests::vsock::{self, Listener};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome =
        match words.as_slice() {
            ["serve", port, command] => serve(port, command),
            ["connect", cid, port] => connect(cid, port),
            ["send", address, port, bytes] => tcp(address, port)
                .and_then(|mut stream| pattern::write(&mut stream, parsed(bytes)?)),
            ["receive", address, port, bytes] => tcp(address, port)
                .and_then(|mut stream| pattern::check(&mut stream, parsed(bytes)?)),
            ["answer", port] => answer(port),
            ["ask", address, port, text] => ask(address, port, text),
            _ => Err(io::Error::other("give serve, connect, send, receive, answer or ask")),
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
    let listener = Listener::bind(parsed(port)?)?;
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
    let mut connection = vsock::connect(parsed(cid)?, parsed(port)?)?;
    let mut sender = connection.try_clone()?;
    let sending = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut sender)?;
        sender.shutdown(Shutdown::Write)
    });
    io::copy(&mut connection, &mut io::stdout())?;
    sending.join().map_err(|_| io::Error::other("sending panicked"))?
}

fn tcp(address: &str, port: &str) -> io::Result<TcpStream> {
    TcpStream::connect((parsed::<IpAddr>(address)?, parsed(port)?))
}

fn answer(port: &str) -> io::Result<()> {
    let place = (Ipv6Addr::UNSPECIFIED, parsed(port)?).into();
    let _answerer = Answerer::start(place, datagram::reversed)?;
    loop {
        thread::park();
    }
}

fn ask(address: &str, port: &str, text: &str) -> io::Result<()> {
    let place = (parsed::<IpAddr>(address)?, parsed(port)?).into();
    io::stdout().write_all(&datagram::ask(place, text.as_bytes())?)
}

fn parsed<T: FromStr<Err: Display>>(text: &str) -> io::Result<T> {
    text.parse().map_err(|error| io::Error::other(format!("{text}: {error}")))
}
