//! Escape keys: Ctrl-A and a letter, as users of other machine monitors know them.

/// What starts an escape: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What `Ctrl-A h` shows.
pub(super) const HELP: &[u8] = b"\r\n\
    Ctrl-A h    this help\r\n\
    Ctrl-A x    end the machine at once\r\n\
    Ctrl-A a    send Ctrl-A to the guest (so does Ctrl-A Ctrl-A)\r\n";

/// What a user asks for with the escape keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EscapeAction {
    /// The machine shall end.
    Quit,
    /// The keys shall be explained.
    Help,
}

/// Finds the escape keys in what is typed.
#[derive(Debug, Default)]
pub struct EscapeKeys {
    begun: bool,
}

impl EscapeKeys {
    /// Keeps in `typed` what is for the guest, calls `act` for the rest; returns the kept length.
    pub fn filter(&mut self, typed: &mut [u8], mut act: impl FnMut(EscapeAction)) -> usize {
        let mut kept = 0;
        for index in 0..typed.len() {
            let Some(&byte) = typed.get(index) else { break };
            let for_guest = if self.begun {
                self.begun = false;
                match byte {
                    ESCAPE | b'a' => Some(ESCAPE),
                    b'x' => {
                        act(EscapeAction::Quit);
                        None
                    }
                    b'h' | b'?' => {
                        act(EscapeAction::Help);
                        None
                    }
                    _ => None,
                }
            } else {
                self.begun = byte == ESCAPE;
                (!self.begun).then_some(byte)
            };
            if let (Some(byte), Some(place)) = (for_guest, typed.get_mut(kept)) {
                *place = byte;
                kept += 1;
            }
        }
        kept
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn type_in(keys: &mut EscapeKeys, text: &[u8]) -> (Vec<u8>, Vec<EscapeAction>) {
        let mut typed = text.to_vec();
        let mut actions = Vec::new();
        let kept = keys.filter(&mut typed, |action| actions.push(action));
        typed.truncate(kept);
        (typed, actions)
    }

    #[test]
    fn what_is_no_escape_passes_unchanged() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != ESCAPE).collect();
        assert_eq!(type_in(&mut EscapeKeys::default(), &all), (all, vec![]));
    }

    #[test]
    fn escapes_act_and_leave_nothing_for_the_guest() {
        let mut keys = EscapeKeys::default();
        let actions = vec![EscapeAction::Help, EscapeAction::Quit];
        assert_eq!(type_in(&mut keys, b"l\x01hs\x01z\n\x01x"), (b"ls\n".to_vec(), actions));
    }

    #[test]
    fn a_doubled_escape_is_sent_once() {
        let mut keys = EscapeKeys::default();
        assert_eq!(type_in(&mut keys, b"\x01\x01x\x01ax"), (b"\x01x\x01x".to_vec(), vec![]));
    }

    #[test]
    fn an_escape_may_be_typed_in_two_reads() {
        let mut keys = EscapeKeys::default();
        assert_eq!(type_in(&mut keys, b"a\x01"), (b"a".to_vec(), vec![]));
        assert_eq!(type_in(&mut keys, b"xb"), (b"b".to_vec(), vec![EscapeAction::Quit]));
    }
}
