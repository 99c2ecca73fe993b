//! A vhost-user back-end that says what a script has, whatever it is asked.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;

/// Answers of a peer to the requests that it gets, in their order.
pub(crate) type Script = &'static [Answer];

#[derive(Clone, Copy)]
pub(crate) enum Answer {
    /// A number, as `GET_FEATURES` is answered.
    Number(u64),
    /// A number in a message about something else.
    Other,
    /// A header that promises more than a message may have.
    Endless,
    /// The beginning of a header.
    Torn,
    /// Requests that need no answer.
    Silence,
}

/// `VIRTIO_F_VERSION_1` and protocol features.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 30;

/// Follows a script, and then holds on to the connection until it is closed.
pub(crate) fn act(mut socket: UnixStream, script: Script) {
    let mut request = [0; 12];
    for answer in script {
        if socket.read_exact(&mut request).is_err() {
            return;
        }
        let size = u32::from_ne_bytes(request[8..].try_into().unwrap());
        let mut body = vec![0; usize::try_from(size).unwrap()];
        socket.read_exact(&mut body).unwrap();
        let header =
            |code: &[u8], size: u32| [code, &5u32.to_ne_bytes(), &size.to_ne_bytes()].concat();
        let bytes = match answer {
            Answer::Number(value) => {
                [header(&request[..4], 8), value.to_ne_bytes().into()].concat()
            }
            Answer::Other => [header(&99u32.to_ne_bytes(), 8), vec![1; 8]].concat(),
            Answer::Endless => [header(&request[..4], u32::MAX), vec![1; 4096]].concat(),
            Answer::Torn => vec![1; 7],
            Answer::Silence => Vec::new(),
        };
        let _ = socket.write_all(&bytes);
        if matches!(answer, Answer::Torn) {
            return;
        }
    }
    let _ = io::copy(&mut socket, &mut io::sink());
}
