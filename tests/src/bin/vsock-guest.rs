//! Programs at either end of a vsock connection, for guests and hosts that have no other:
//!
//! - `serve PORT COMMAND` runs a shell command for each connection, with it as standard streams;
//! - `connect CID PORT` sends standard input and prints what comes back.
#![expect(unsafe_code, reason = "no safe interface knows vsock addresses")]

use std::env;
use std::io;
use std::mem::size_of;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::thread;

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
    let listener = socket()?;
    let address = address(libc::VMADDR_CID_ANY, number(port)?);
    // SAFETY: the address is one, and as long as it is said to be.
    check(unsafe { libc::bind(listener.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // SAFETY: the socket is open.
    check(unsafe { libc::listen(listener.as_raw_fd(), 128) })?;
    loop {
        // SAFETY: nothing is to be written about the other end.
        let accepted = unsafe {
            libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut())
        };
        // SAFETY: a new descriptor is nobody else's.
        let connection = unsafe { OwnedFd::from_raw_fd(check(accepted)?) };
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::from(connection.try_clone()?))
            .stdout(Stdio::from(connection))
            .spawn()?;
        thread::spawn(move || child.wait());
    }
}

fn connect(cid: &str, port: &str) -> io::Result<()> {
    let socket = socket()?;
    let address = address(number(cid)?, number(port)?);
    // SAFETY: the address is one, and as long as it is said to be.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    // Reading, writing and half closes are the same for every kind of socket.
    let mut connection = UnixStream::from(socket);
    let mut sender = connection.try_clone()?;
    let sending = thread::spawn(move || {
        io::copy(&mut io::stdin(), &mut sender)?;
        sender.shutdown(Shutdown::Write)
    });
    io::copy(&mut connection, &mut io::stdout())?;
    sending.join().map_err(|_| io::Error::other("sending panicked"))?
}

/// Bytes of an address, as a constant that the compiler compares with the type.
const ADDRESS_LEN: libc::socklen_t = 16;
const _: () = assert!(size_of::<libc::sockaddr_vm>() == 16);

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: a new descriptor is nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?)) }
}

fn number(text: &str) -> io::Result<u32> {
    text.parse().map_err(|error| io::Error::other(format!("{text}: {error}")))
}

fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
