//! Does a datagram arrive, and its answer? Either end of such an exchange, for hosts and guests.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// The longest datagram that is looked at.
const BYTES_MAX: usize = 2048;

/// After how long a question is asked again, since datagrams may be lost, and how often.
const AGAIN: Duration = Duration::from_secs(1);
const TIMES_MAX: u32 = 60;

/// Answers datagrams until it is dropped.
pub struct Answerer {
    _is_wanted: Arc<()>,
    /// Where it listens.
    pub place: SocketAddr,
}

impl Answerer {
    /// Answers what comes to `place` as `answer` says, if it does.
    ///
    /// # Errors
    /// When somebody else has the place.
    pub fn start(
        place: SocketAddr,
        answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let socket = UdpSocket::bind(place)?;
        socket.set_read_timeout(Some(AGAIN))?;
        let place = socket.local_addr()?;
        let is_wanted = Arc::new(());
        let wanted = Arc::downgrade(&is_wanted);
        thread::spawn(move || serve(&socket, &wanted, answer));
        Ok(Self { _is_wanted: is_wanted, place })
    }
}

fn serve(socket: &UdpSocket, wanted: &Weak<()>, answer: impl Fn(&[u8]) -> Option<Vec<u8>>) {
    let mut bytes = [0; BYTES_MAX];
    while wanted.strong_count() > 0 {
        // Nothing may have come, or somebody who was answered may have gone.
        let Ok((length, asker)) = socket.recv_from(&mut bytes) else { continue };
        if let Some(answer) = bytes.get(..length).and_then(&answer) {
            let _ = socket.send_to(&answer, asker);
        }
    }
}

/// An answer that nobody takes for a copy of the question.
pub fn reversed(question: &[u8]) -> Option<Vec<u8>> {
    Some(question.iter().rev().copied().collect())
}

/// Sends `question` to `place` until something comes back, and returns that.
///
/// # Errors
/// When nothing comes back.
pub fn ask(place: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let own: IpAddr = match place {
        SocketAddr::V4(_) => [0; 4].into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((own, 0))?;
    socket.connect(place)?;
    socket.set_read_timeout(Some(AGAIN))?;
    let mut bytes = [0; BYTES_MAX];
    for _ in 0..TIMES_MAX {
        let outcome = socket.send(question).and_then(|_| socket.recv(&mut bytes));
        match outcome {
            Ok(length) => return Ok(bytes.get(..length).unwrap_or_default().to_vec()),
            // Who is to answer may not listen yet.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => thread::sleep(AGAIN),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(ErrorKind::TimedOut, format!("{place} does not answer")))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn who_asks_is_answered_by_either_protocol_even_before_somebody_listens() {
        for address in [IpAddr::from([127, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()] {
            let first = Answerer::start((address, 0).into(), |_| None).unwrap();
            let place = first.place;
            let asker = thread::spawn(move || ask(place, b"who?"));
            drop(first);
            let second = loop {
                if let Ok(answerer) = Answerer::start(place, reversed) {
                    break answerer;
                }
                thread::sleep(Duration::from_millis(10));
            };
            assert_eq!(asker.join().unwrap().unwrap(), b"?ohw");
            drop(second);
        }
    }
}
