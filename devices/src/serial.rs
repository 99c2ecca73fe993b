//! A 16550 serial port, for kernels without virtio and for their earliest messages.

use std::convert::Infallible;
use std::io::Write;

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::bus::Registers;
use crate::event::Event;

/// Number of I/O ports.
pub const PORTS: u16 = 8;

/// Output is passed on at the end of a line, when the guest looks at the port, or at this length.
const BUFFER_BYTES_MAX: usize = 256;

/// A serial port: its registers, its interrupt, and where its output goes.
pub struct SerialPort {
    uart: Uart,
    interrupt: Event,
    input_taken: Event,
    output: Box<dyn Write + Send>,
}

type Uart = Serial<Line, NoEvents, Vec<u8>>;

impl SerialPort {
    /// Makes a port that signals `interrupt`, and `input_taken` when it has room for more input.
    pub fn new(interrupt: Event, input_taken: Event, output: Box<dyn Write + Send>) -> Self {
        let uart = power_on(&interrupt);
        Self { uart, interrupt, input_taken, output }
    }

    /// Number of bytes of input that fit now.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Hands input to the guest, and returns how many bytes of it fitted.
    pub fn receive(&mut self, input: &[u8]) -> usize {
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Puts all registers where they are at power on. Output is kept, input is dropped.
    pub fn reset(&mut self) {
        self.pass_on();
        self.uart = power_on(&self.interrupt);
        self.input_taken.signal();
    }

    /// Passes on what the guest has written. Output that nobody can take is lost.
    fn pass_on(&mut self) {
        let buffer = self.uart.writer_mut();
        if !buffer.is_empty() {
            let _ = self.output.write_all(buffer).and_then(|()| self.output.flush());
            buffer.clear();
        }
    }
}

impl Registers for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let (Ok(offset), [value]) = (u8::try_from(offset), data) else { return };
        self.pass_on();
        let room = self.input_room();
        *value = self.uart.read(offset);
        if self.input_room() > room {
            self.input_taken.signal();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(offset), &[value]) = (u8::try_from(offset), data) else { return };
        // Neither the interrupt nor the buffer can fail.
        let _ = self.uart.write(offset, value);
        let buffer = self.uart.writer();
        if buffer.last() == Some(&b'\n') || buffer.len() >= BUFFER_BYTES_MAX {
            self.pass_on();
        }
    }
}

fn power_on(interrupt: &Event) -> Uart {
    Serial::new(Line(interrupt.clone()), Vec::with_capacity(BUFFER_BYTES_MAX))
}

/// The port's interrupt line, edge triggered.
struct Line(Event);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.signal();
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use std::io;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    struct Pieces(Sender<Vec<u8>>);

    impl Write for Pieces {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.send(data.to_vec()).map_err(io::Error::other)?;
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialPort, Receiver<Vec<u8>>) {
        let (sender, pieces) = channel();
        let events = (Event::new().unwrap(), Event::new().unwrap());
        (SerialPort::new(events.0, events.1, Box::new(Pieces(sender))), pieces)
    }

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_is_passed_on_by_line_and_when_the_guest_waits() {
        let (mut port, pieces) = port();
        for byte in *b"ab\nc" {
            port.write(DATA, &[byte]);
        }
        assert_eq!(pieces.try_recv().unwrap(), b"ab\n");
        assert!(pieces.try_recv().is_err());
        assert_ne!(read(&mut port, LINE_STATUS) & 0x20, 0, "the transmitter is always empty");
        assert_eq!(pieces.try_recv().unwrap(), b"c");
    }

    #[test]
    fn output_without_a_line_end_is_passed_on_in_pieces_of_bounded_length() {
        let (mut port, pieces) = port();
        for _ in 0..BUFFER_BYTES_MAX {
            port.write(DATA, b"x");
        }
        assert_eq!(pieces.try_recv().unwrap().len(), BUFFER_BYTES_MAX);
    }

    #[test]
    fn input_waits_for_room_and_interrupts() {
        let (mut port, _pieces) = port();
        port.write(INTERRUPT_ENABLE, &[1]);
        let long = [b'y'; 1000];
        let taken = port.receive(&long);
        assert!(taken > 0 && taken < long.len());
        assert_eq!((port.receive(&long), port.input_room()), (0, 0));
        assert!(port.interrupt.take());
        assert_eq!(read(&mut port, DATA), b'y');
        assert!(port.input_taken.take());
        assert_eq!(port.input_room(), 1);
    }

    #[test]
    fn a_reset_forgets_input_and_registers() {
        let (mut port, _pieces) = port();
        port.write(INTERRUPT_ENABLE, &[1]);
        port.receive(b"z");
        port.reset();
        assert_eq!(read(&mut port, LINE_STATUS) & 1, 0);
        assert_eq!(read(&mut port, INTERRUPT_ENABLE), 0);
    }

    #[test]
    fn accesses_of_other_widths_and_places_do_nothing() {
        let (mut port, pieces) = port();
        port.write(DATA, b"ab");
        port.write(300, b"a");
        let mut data = [0; 4];
        port.read(DATA, &mut data);
        assert_eq!(data, [0xFF; 4]);
        assert!(pieces.try_recv().is_err());
    }
}
