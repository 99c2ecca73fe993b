//! A 16550 serial port, for kernels without virtio and for their earliest messages.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use crate::bus::Registers;
use crate::event::{Event, EventSet, Handler, Watch};
use crate::host::stream::Stream;
use crate::virtio::counters::{Counters, Totals};

/// Number of I/O ports.
pub const PORTS: u16 = 8;

/// Output is passed on at the end of a line, when the guest looks at the port, or at this length.
const BUFFER_BYTES_MAX: usize = 256;
/// Bytes of input moved at once; no UART of this kind has a longer FIFO.
const INPUT_BYTES_MAX: usize = 64;

const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const LINE_CONTROL_DIVISOR_LATCH: u8 = 1 << 7;
const MODEM_CONTROL: u8 = 4;
const MODEM_CONTROL_LOOP: u8 = 1 << 4;
const LINE_STATUS: u8 = 5;
const LINE_STATUS_TRANSMITTER_EMPTY: u8 = 0b0110_0000;

/// A serial port: its registers, its interrupt, and the stream behind it.
///
/// While the stream takes no output the transmitter is not empty, so that the guest waits; a guest
/// that does not wait loses what it writes then.
pub struct SerialPort {
    uart: Uart,
    interrupt: Event,
    stream: Stream,
    totals: Arc<Totals<2>>,
    /// The guest has seen that the transmitter is not empty.
    transmitter_awaited: bool,
    /// What the guest sends comes back to it, and nothing else does.
    in_loop: bool,
}

type Uart = Serial<Line, NoEvents, Vec<u8>>;

impl SerialPort {
    /// Makes a port that signals `interrupt`, edge triggered.
    pub fn new(interrupt: Event, stream: Stream) -> Self {
        let uart = power_on(&interrupt, Vec::with_capacity(BUFFER_BYTES_MAX));
        let totals = Arc::new(Totals::new(["input_bytes", "output_bytes"]));
        Self { uart, interrupt, stream, totals, transmitter_awaited: false, in_loop: false }
    }

    /// What the port has counted: the guest's input and its output.
    pub fn counters(&self) -> Counters {
        let totals = Arc::clone(&self.totals);
        Box::new(move || totals.read())
    }

    /// Puts all registers where they are at power on. Output is kept, input in the FIFO is dropped.
    pub fn reset(&mut self) {
        self.pass_on();
        let output = std::mem::take(self.uart.writer_mut());
        self.uart = power_on(&self.interrupt, output);
        self.transmitter_awaited = false;
        self.in_loop = false;
        self.take_input();
    }

    /// Passes on what the guest has written, as far as the stream takes it.
    fn pass_on(&mut self) {
        let buffer = self.uart.writer_mut();
        if !buffer.is_empty() {
            let taken = self.stream.send(buffer);
            buffer.drain(..taken.min(buffer.len()));
            self.totals.add(&mut [0, taken as u64]);
        }
    }

    /// Moves input to the FIFO, as far as there is any and it fits.
    fn take_input(&mut self) {
        let mut input = [0; INPUT_BYTES_MAX];
        while !self.in_loop && self.uart.fifo_capacity() > 0 && self.stream.has_input() {
            let room = self.uart.fifo_capacity().min(input.len());
            let Some(target) = input.get_mut(..room) else { return };
            let count = self.stream.receive(target);
            self.totals.add(&mut [count as u64, 0]);
            // There is room, and the interrupt cannot fail.
            let _ = self.uart.enqueue_raw_bytes(target.get(..count).unwrap_or_default());
        }
    }

    /// Serves both directions after the stream has changed.
    fn attend(&mut self) {
        self.pass_on();
        self.take_input();
        if self.transmitter_awaited && self.uart.writer().is_empty() {
            self.transmitter_awaited = false;
            self.renew_interrupts();
        }
    }

    /// Interrupts the guest once more if it asked to be told of an empty transmitter.
    fn renew_interrupts(&mut self) {
        // Behind the divisor latch there is no interrupt register; who sets a speed looks again.
        if self.uart.read(LINE_CONTROL) & LINE_CONTROL_DIVISOR_LATCH == 0 {
            let enabled = self.uart.read(INTERRUPT_ENABLE);
            // The interrupt cannot fail.
            let _ = self.uart.write(INTERRUPT_ENABLE, enabled);
        }
    }
}

impl Registers for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        let (Ok(register), [value]) = (u8::try_from(offset), data) else { return };
        self.pass_on();
        *value = self.uart.read(register);
        self.take_input();
        if register == LINE_STATUS && !self.uart.writer().is_empty() {
            *value &= !LINE_STATUS_TRANSMITTER_EMPTY;
            self.transmitter_awaited = true;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(register), &[value]) = (u8::try_from(offset), data) else { return };
        if self.uart.writer().len() >= BUFFER_BYTES_MAX {
            self.uart.writer_mut().pop();
        }
        // Neither the interrupt nor the buffer can fail.
        let _ = self.uart.write(register, value);
        if register == MODEM_CONTROL {
            self.in_loop = value & MODEM_CONTROL_LOOP != 0;
            self.take_input();
        }
        let buffer = self.uart.writer();
        if buffer.last() == Some(&b'\n') || buffer.len() >= BUFFER_BYTES_MAX {
            self.pass_on();
        }
    }
}

fn power_on(interrupt: &Event, output: Vec<u8>) -> Uart {
    Serial::new(Line(interrupt.clone()), output)
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

/// Brings input to the port when it arrives, and output away when there is room again.
pub struct SerialAttendant {
    port: Arc<Mutex<SerialPort>>,
    attention: Event,
}

impl SerialAttendant {
    /// Makes the handler of a port, for any loop.
    pub fn new(port: Arc<Mutex<SerialPort>>) -> Self {
        let attention =
            port.lock().unwrap_or_else(PoisonError::into_inner).stream.attention().clone();
        Self { port, attention }
    }

    fn attend(&self) {
        self.port.lock().unwrap_or_else(PoisonError::into_inner).attend();
    }
}

impl Handler for SerialAttendant {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        self.attend();
        watch.add(&self.attention, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        self.attention.take();
        self.attend();
    }
}

#[cfg(test)]
mod test {
    use std::fs;
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use std::sync::MutexGuard;

    use super::*;
    use crate::event::EventLoop;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = super::INTERRUPT_ENABLE as u64;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const MODEM_CONTROL: u64 = super::MODEM_CONTROL as u64;
    const LINE_STATUS: u64 = super::LINE_STATUS as u64;

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    fn lock(port: &Mutex<SerialPort>) -> MutexGuard<'_, SerialPort> {
        port.lock().unwrap()
    }

    /// What arrives in a file behind a port after `act`.
    fn output_of(act: impl FnOnce(&mut SerialPort)) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let stream = Stream::file(&mut event_loop, file.path()).unwrap();
        act(&mut SerialPort::new(Event::new().unwrap(), stream));
        event_loop.run_ready().unwrap();
        fs::read_to_string(file.path()).unwrap()
    }

    fn silent_port() -> SerialPort {
        SerialPort::new(Event::new().unwrap(), Stream::null().unwrap())
    }

    #[test]
    fn output_is_passed_on_by_line_and_when_the_guest_waits() {
        let write = |port: &mut SerialPort| {
            for byte in *b"ab\nc" {
                port.write(DATA, &[byte]);
            }
        };
        assert_eq!(output_of(write), "ab\n");
        let wait = |port: &mut SerialPort| {
            write(port);
            assert_ne!(read(port, LINE_STATUS) & LINE_STATUS_TRANSMITTER_EMPTY, 0);
        };
        assert_eq!(output_of(wait), "ab\nc");
    }

    #[test]
    fn output_without_a_line_end_is_passed_on_in_pieces_of_bounded_length() {
        let output = output_of(|port| {
            for _ in 0..BUFFER_BYTES_MAX + 1 {
                port.write(DATA, b"x");
            }
        });
        assert_eq!(output.len(), BUFFER_BYTES_MAX);
    }

    #[test]
    fn the_transmitter_interrupts_when_it_is_enabled() {
        let mut port = silent_port();
        port.write(INTERRUPT_ENABLE, &[2]);
        assert!(port.interrupt.take());
    }

    #[test]
    fn input_waits_for_room_in_the_fifo_and_interrupts() {
        let stream = Stream::null().unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let port = SerialPort::new(Event::new().unwrap(), stream.clone());
        let port = Arc::new(Mutex::new(port));
        let attendant = SerialAttendant::new(Arc::clone(&port));
        let _attendant = event_loop.add(Box::new(attendant)).unwrap();
        let typed: Vec<u8> = (0..=255).collect();
        lock(&port).write(INTERRUPT_ENABLE, &[1]);
        stream.type_in(&typed);
        assert!(!lock(&port).interrupt.take());
        event_loop.run_ready().unwrap();
        assert!(lock(&port).interrupt.take());
        let read_byte = |_| {
            assert_eq!(read(&mut lock(&port), LINE_STATUS) & 1, 1);
            read(&mut lock(&port), DATA)
        };
        assert_eq!((0..256).map(read_byte).collect::<Vec<_>>(), typed);
        let counters = lock(&port).counters();
        assert_eq!(counters().iter().map(|reading| reading.value).collect::<Vec<_>>(), [256, 0]);
        assert_eq!(read(&mut lock(&port), LINE_STATUS) & 1, 0);
    }

    #[test]
    fn input_typed_while_the_port_is_looped_back_comes_afterwards() {
        let stream = Stream::null().unwrap();
        let mut port = SerialPort::new(Event::new().unwrap(), stream.clone());
        port.write(MODEM_CONTROL, &[MODEM_CONTROL_LOOP]);
        port.write(DATA, b"l");
        stream.type_in(b"t");
        port.attend();
        assert_eq!(read(&mut port, DATA), b'l');
        port.write(MODEM_CONTROL, &[0]);
        assert_eq!(read(&mut port, DATA), b't');
    }

    #[test]
    fn a_slow_reader_makes_the_guest_wait_and_an_interrupt_ends_that() {
        let (input, _typing) = io::pipe().unwrap();
        let (mut screen, output) = io::pipe().unwrap();
        let mut event_loop = EventLoop::new().unwrap();
        let quit = Box::new(|| ());
        let stream = Stream::inherited(&mut event_loop, input.as_fd(), output.as_fd(), quit);
        let port = SerialPort::new(Event::new().unwrap(), stream.unwrap());
        let port = Arc::new(Mutex::new(port));
        let attendant = SerialAttendant::new(Arc::clone(&port));
        let _attendant = event_loop.add(Box::new(attendant)).unwrap();
        lock(&port).write(INTERRUPT_ENABLE, &[2]);
        let mut sent = Vec::new();
        while read(&mut lock(&port), LINE_STATUS) & LINE_STATUS_TRANSMITTER_EMPTY != 0 {
            let byte = u8::try_from(sent.len() % 251).unwrap();
            lock(&port).write(DATA, &[byte]);
            sent.push(byte);
            event_loop.run_ready().unwrap();
        }
        // The driver handles the interrupt of its last byte, and finds that it has to wait.
        read(&mut lock(&port), INTERRUPT_IDENTIFICATION);
        lock(&port).interrupt.take();
        let mut seen = vec![0; sent.len()];
        for part in seen.chunks_mut(4096) {
            screen.read_exact(part).unwrap();
            event_loop.run_ready().unwrap();
        }
        assert!(seen == sent, "nothing is lost");
        assert!(lock(&port).interrupt.take(), "the driver may go on");
        assert_ne!(read(&mut lock(&port), LINE_STATUS) & LINE_STATUS_TRANSMITTER_EMPTY, 0);
    }

    #[test]
    fn a_reset_forgets_registers() {
        let mut port = silent_port();
        port.write(INTERRUPT_ENABLE, &[1]);
        assert_eq!(read(&mut port, INTERRUPT_ENABLE), 1);
        port.reset();
        assert_eq!(read(&mut port, INTERRUPT_ENABLE), 0);
    }

    #[test]
    fn accesses_of_other_widths_and_places_do_nothing() {
        let output = output_of(|port| {
            port.write(DATA, b"a\n");
            port.write(300, b"\n");
            let mut data = [0; 4];
            port.read(DATA, &mut data);
            assert_eq!(data, [0xFF; 4]);
        });
        assert_eq!(output, "");
    }
}
