//! What goes over a network that is measured? One connection, on which the guest asks for so many
//! bytes to be taken and so many to be sent, and the host's end does it. And messages to the
//! service manager, each in a connection of its own.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Ipv4Addr;

/// Where the host's end listens: a TCP port, a vsock port, and the end of a unix socket's name.
pub const PORT: u16 = 5001;

/// The host's address on the tap, and the guest's.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 1);
/// The guest's address on the tap.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 98, 0, 2);

/// How many messages the guest sends to the service manager after the first one.
pub const MESSAGES: u64 = 50;

/// One of them.
pub fn message(number: u64) -> String {
    format!("STATUS=Message {number}.\n")
}

/// Bytes of one read or write.
const CHUNK: usize = 128 << 10;

/// How many bytes the server takes first, and how many it sends then, as two little-endian numbers.
const HEADER: usize = 16;

/// Serves the host's end of a connection until the guest ends it.
///
/// # Errors
/// When the connection is lost.
pub fn serve(mut stream: impl Read + Write) -> io::Result<()> {
    let mut buffer = vec![0x5a; CHUNK];
    let mut header = [0; HEADER];
    loop {
        match stream.read_exact(&mut header) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            outcome => outcome?,
        }
        let [taken, sent] = numbers(header);
        receive(&mut stream, &mut buffer, taken)?;
        send(&mut stream, &mut buffer, sent)?;
    }
}

/// The guest's end: sends `sent` bytes and waits for `received`.
///
/// # Errors
/// When the connection is lost.
pub fn exchange(mut stream: impl Read + Write, sent: u64, received: u64) -> io::Result<()> {
    let mut buffer = vec![0x5a; HEADER + CHUNK];
    // A request goes out at once, with what it is followed by.
    let first = usize::try_from(sent).unwrap_or(usize::MAX).min(CHUNK);
    let header = [sent.to_le_bytes(), received.to_le_bytes()].concat();
    let (head, rest) = buffer.split_at_mut(HEADER);
    head.copy_from_slice(&header);
    let left = sent - rest.get(..first).unwrap_or_default().len() as u64;
    stream.write_all(buffer.get(..HEADER + first).unwrap_or_default())?;
    send(&mut stream, &mut buffer, left)?;
    receive(&mut stream, &mut buffer, received)
}

fn send(stream: &mut impl Write, buffer: &mut [u8], mut left: u64) -> io::Result<()> {
    while left > 0 {
        let part = part(buffer, left);
        stream.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

fn receive(stream: &mut impl Read, buffer: &mut [u8], mut left: u64) -> io::Result<()> {
    while left > 0 {
        match stream.read(part(buffer, left))? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => left -= count as u64,
        }
    }
    Ok(())
}

/// As much of `buffer` as is `left`, and no more than a chunk.
fn part(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let length = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK);
    buffer.get_mut(..length).unwrap_or_default()
}

fn numbers(header: [u8; HEADER]) -> [u64; 2] {
    let (first, second) = header.split_at(size_of::<u64>());
    [first, second].map(|bytes| bytes.try_into().map_or(0, u64::from_le_bytes))
}

#[cfg(test)]
mod test {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn as_many_bytes_go_each_way_as_the_guest_says() {
        let (guest, host) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || serve(&host));
        for (sent, received) in [(1, 1), (0, 1 << 20), (1 << 20, 1), (CHUNK as u64, 0), (0, 0)] {
            exchange(&guest, sent, received).unwrap();
        }
        drop(guest);
        server.join().unwrap().unwrap();
    }
}
