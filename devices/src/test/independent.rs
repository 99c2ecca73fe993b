//! Our devices under drivers that others wrote: those of the `virtio-drivers` crate.
#![expect(unsafe_code, reason = "the crate's memory interface is an unsafe trait")]

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, OnceLock};

use arch::memory::{Backing, GuestAddress, GuestMemory};
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::device::net::VirtIONetRaw;
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::device::socket::{
    VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType,
};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::driver::halves;
use super::pci_wire::PciWire;
use super::wire::{MmioWire, Source, Wire};
use crate::virtio::device::VirtioDevice;
use crate::virtio::transport::{Area, Half, Register};

/// Registers as the crate's drivers use them. Clones are the same device.
#[derive(Clone)]
pub(crate) struct Wired(Arc<Mutex<Box<dyn Wire>>>);

impl Wired {
    fn new(mut wire: Box<dyn Wire>) -> Self {
        wire.probe();
        Self(Arc::new(Mutex::new(wire)))
    }

    /// The device on each transport.
    fn on_both(make: impl Fn() -> Box<dyn VirtioDevice>) -> [Self; 2] {
        let mmio = MmioWire::new(make(), GuestPages::memory());
        let pci = PciWire::new(make(), GuestPages::memory());
        [Self::new(Box::new(mmio)), Self::new(Box::new(pci))]
    }

    fn wait_interrupt(&self, source: Source) {
        self.0.lock().unwrap().wait_interrupt(source);
    }

    fn read(&self, register: Register) -> u32 {
        self.0.lock().unwrap().read(register)
    }

    fn write(&self, register: Register, value: u32) {
        self.0.lock().unwrap().write(register, value);
    }
}

impl Transport for Wired {
    fn device_type(&self) -> DeviceType {
        self.0.lock().unwrap().device_kind().try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        let half = |index| {
            self.write(Register::DeviceFeaturesSelect, index);
            u64::from(self.read(Register::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    fn write_driver_features(&mut self, driver_features: u64) {
        for (index, bits) in (0..).zip(halves(driver_features)) {
            self.write(Register::DriverFeaturesSelect, index);
            self.write(Register::DriverFeatures, bits);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(Register::QueueSelect, u32::from(queue));
        self.read(Register::QueueSizeMax)
    }

    fn notify(&mut self, queue: u16) {
        self.0.lock().unwrap().notify(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(self.read(Register::Status))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(Register::Status, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(Register::QueueSelect, u32::from(queue));
        self.write(Register::QueueSize, size);
        let areas = [
            (Area::Descriptors, descriptors),
            (Area::Driver, driver_area),
            (Area::Device, device_area),
        ];
        for (area, address) in areas {
            let [low, high] = halves(address);
            self.write(Register::QueueArea(area, Half::Low), low);
            self.write(Register::QueueArea(area, Half::High), high);
        }
        self.write(Register::QueueReady, 1);
    }

    /// A queue of a live device goes with the device.
    fn queue_unset(&mut self, _: u16) {
        self.write(Register::Status, 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(Register::QueueSelect, u32::from(queue));
        self.read(Register::QueueReady) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let mut wire = self.0.lock().unwrap();
        let mut status = InterruptStatus::empty();
        let queues = (0..2).filter(|queue| wire.take_interrupt(Source::Queue(*queue))).count();
        status.set(InterruptStatus::QUEUE_INTERRUPT, queues > 0);
        let config = wire.take_interrupt(Source::Config);
        status.set(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT, config);
        status
    }

    fn read_config_generation(&self) -> u32 {
        self.read(Register::ConfigGeneration)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        let offset = u64::try_from(offset).unwrap();
        self.0.lock().unwrap().read_config(offset, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        let offset = u64::try_from(offset).unwrap();
        self.0.lock().unwrap().write_config(offset, value.as_bytes());
        Ok(())
    }
}

/// The crate's view of guest memory: pages, and a page to bounce each buffer through.
struct GuestPages;

const MEMORY_SIZE: u64 = 64 << 20;

/// Pages that are free again, by how many are together, and where untouched ones begin.
struct FreePages {
    runs: BTreeMap<usize, Vec<u64>>,
    untouched: u64,
}

static FREE: Mutex<FreePages> = Mutex::new(FreePages { runs: BTreeMap::new(), untouched: 0x1000 });

impl GuestPages {
    fn memory() -> GuestMemory {
        static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
        let map = || GuestMemory::map(&[0..MEMORY_SIZE], Backing::default()).unwrap();
        *MEMORY.get_or_init(map)
    }

    fn take(pages: usize) -> u64 {
        let mut free = FREE.lock().unwrap();
        let address = free.runs.get_mut(&pages).and_then(Vec::pop).unwrap_or_else(|| {
            let address = free.untouched;
            free.untouched += u64::try_from(pages * PAGE_SIZE).unwrap();
            address
        });
        let len = pages * PAGE_SIZE;
        Self::memory().slice(GuestAddress(address), len).expect("memory is large enough").fill(0);
        address
    }

    fn give_back(address: u64, pages: usize) {
        FREE.lock().unwrap().runs.entry(pages).or_default().push(address);
    }
}

// SAFETY: pages are page aligned, zeroed, and given to one owner at a time.
unsafe impl Hal for GuestPages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let address = Self::take(pages);
        let slice = Self::memory().slice(GuestAddress(address), pages * PAGE_SIZE).unwrap();
        (address, NonNull::new(slice.as_ptr()).unwrap())
    }

    unsafe fn dma_dealloc(address: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        Self::give_back(address, pages);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        panic!("registers are not memory here");
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let address = Self::take(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller promises that the buffer is valid and not accessed meanwhile.
            let bytes = unsafe { buffer.as_ref() };
            Self::memory().write_bytes(GuestAddress(address), bytes).unwrap();
        }
        address
    }

    unsafe fn unshare(address: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        let slice = Self::memory().slice(GuestAddress(address), buffer.len()).unwrap();
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller promises that the buffer is valid and not accessed meanwhile.
            slice.copy_to(unsafe { buffer.as_mut() });
        }
        Self::give_back(address, buffer.len().div_ceil(PAGE_SIZE));
    }
}

mod test {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::host::disk::Engine;
    use crate::host::disk::image::{Access, Image};
    use crate::host::stream::Stream;
    use crate::host::tap::Tap;
    use crate::host::vsock::Gate;
    use crate::test::LoopThread;
    use crate::virtio::block::{Block, BlockOptions};
    use crate::virtio::console::Console;
    use crate::virtio::net::tap::TapBackend;
    use crate::virtio::net::{Net, NetOptions};
    use crate::virtio::rng::Entropy;
    use crate::virtio::vsock::Vsock;

    const SECTORS: usize = 512;
    const CID: u32 = 7;

    fn disk(home: &LoopThread, engine: Engine, read_only: bool) -> Block {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; SECTORS * 512]).unwrap();
        let access = Access { read_only, ..Access::default() };
        let image = Image::open(file.path(), access).unwrap();
        let options = BlockOptions { image, serial: "independent".to_owned(), engine, queues: 2 };
        Block::new(options, home.handle()).unwrap()
    }

    #[test]
    fn a_disk_serves_an_independent_driver() {
        let home = LoopThread::new();
        for engine in [Engine::Sync, Engine::Uring, Engine::Auto] {
            for wired in Wired::on_both(|| Box::new(disk(&home, engine, false))) {
                let mut driver = VirtIOBlk::<GuestPages, _>::new(wired).unwrap();
                assert_eq!(driver.capacity(), SECTORS as u64);
                let mut id = [0; 20];
                let len = driver.device_id(&mut id).unwrap();
                assert_eq!(&id[..len], b"independent");
                let data: Vec<u8> = (0..=255).cycle().take(16 * 512).collect();
                driver.write_blocks(3, &data).unwrap();
                driver.flush().unwrap();
                let mut back = vec![0; 18 * 512];
                driver.read_blocks(2, &mut back).unwrap();
                assert_eq!(back, [&[7; 512][..], &data, &[7; 512]].concat());
                assert!(driver.read_blocks(SECTORS, &mut [0; 512]).is_err());
            }
        }
    }

    #[test]
    fn a_read_only_disk_is_known_as_one_and_refuses_writes() {
        let home = LoopThread::new();
        for wired in Wired::on_both(|| Box::new(disk(&home, Engine::Auto, true))) {
            let mut driver = VirtIOBlk::<GuestPages, _>::new(wired).unwrap();
            assert!(driver.readonly());
            assert!(driver.write_blocks(0, &[1; 512]).is_err());
            let mut back = [0; 512];
            driver.read_blocks(0, &mut back).unwrap();
            assert_eq!(back, [7; 512]);
        }
    }

    #[test]
    fn a_disk_interrupts_an_independent_driver_that_waits() {
        let home = LoopThread::new();
        for wired in Wired::on_both(|| Box::new(disk(&home, Engine::Auto, false))) {
            let mut driver = VirtIOBlk::<GuestPages, _>::new(wired.clone()).unwrap();
            driver.enable_interrupts();
            for sector in 0..100 {
                let (mut request, mut response) = (BlkReq::default(), BlkResp::default());
                let mut data = [0; 512];
                // SAFETY: the buffers live until the request is complete.
                let token = unsafe {
                    driver.read_blocks_nb(sector, &mut request, &mut data, &mut response)
                }
                .unwrap();
                while driver.peek_used() != Some(token) {
                    wired.wait_interrupt(Source::Queue(0));
                }
                // SAFETY: these are the buffers of the request.
                unsafe {
                    driver.complete_read_blocks(token, &request, &mut data, &mut response).unwrap();
                }
                assert_eq!((response.status(), data), (RespStatus::OK, [7; 512]));
            }
        }
    }

    #[test]
    fn entropy_fills_the_buffer_of_an_independent_driver() {
        let home = LoopThread::new();
        for wired in Wired::on_both(|| Box::new(Entropy::new(home.handle()))) {
            let mut driver = VirtIORng::<GuestPages, _>::new(wired).unwrap();
            let mut bytes = [0; 64];
            assert_eq!(driver.request_entropy(&mut bytes), Ok(64));
            assert_ne!(bytes, [0; 64]);
        }
    }

    #[test]
    fn a_console_talks_to_an_independent_driver() {
        for over_pci in [0, 1] {
            let (input, mut typing) = std::io::pipe().unwrap();
            let (mut screen, output) = std::io::pipe().unwrap();
            let (home, stream) = LoopThread::with(move |event_loop| {
                let quit = Box::new(|| panic!("a pipe has no escape keys"));
                Stream::inherited(event_loop, input.as_fd(), output.as_fd(), quit).unwrap()
            });
            let stream = Mutex::new(Some(stream));
            let make = || -> Box<dyn VirtioDevice> {
                Box::new(Console::new(stream.lock().unwrap().take().unwrap(), home.handle()))
            };
            let wire: Box<dyn Wire> = match over_pci {
                0 => Box::new(MmioWire::new(make(), GuestPages::memory())),
                _ => Box::new(PciWire::new(make(), GuestPages::memory())),
            };
            let wired = Wired::new(wire);
            let mut driver = VirtIOConsole::<GuestPages, _>::new(wired.clone()).unwrap();
            driver.send_bytes(b"login: ").unwrap();
            let mut shown = [0; 7];
            screen.read_exact(&mut shown).unwrap();
            assert_eq!(&shown, b"login: ");
            typing.write_all(b"root\n").unwrap();
            let mut typed = Vec::new();
            while typed.len() < 5 {
                match driver.recv(true).unwrap() {
                    Some(byte) => typed.push(byte),
                    None => wired.wait_interrupt(Source::Queue(0)),
                }
            }
            assert_eq!(typed, b"root\n");
        }
    }

    #[test]
    fn a_socket_device_carries_connections_of_an_independent_driver() {
        let home = LoopThread::new();
        for over_pci in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let gate = Gate::at(&folder.path().join("gate")).unwrap();
            let listener = UnixListener::bind(folder.path().join("gate_9")).unwrap();
            let device = Box::new(Vsock::new(CID, gate, home.handle()));
            let wire: Box<dyn Wire> = match over_pci {
                false => Box::new(MmioWire::new(device, GuestPages::memory())),
                true => Box::new(PciWire::new(device, GuestPages::memory())),
            };
            let wired = Wired::new(wire);
            let driver = VirtIOSocket::<GuestPages, _, 4096>::new(wired.clone()).unwrap();
            let mut driver = VsockConnectionManager::new(driver);
            assert_eq!(driver.guest_cid(), u64::from(CID));
            let event = |driver: &mut VsockConnectionManager<GuestPages, Wired, 4096>| loop {
                if let Some(event) = driver.poll().unwrap() {
                    return event;
                }
                wired.wait_interrupt(Source::Queue(0));
            };

            let host = VsockAddr { cid: 2, port: 9 };
            driver.connect(host, 1000).unwrap();
            assert_eq!(event(&mut driver).event_type, VsockEventType::Connected);
            let (mut program, _) = listener.accept().unwrap();
            driver.send(host, 1000, b"ping").unwrap();
            let mut said = [0; 4];
            program.read_exact(&mut said).unwrap();
            assert_eq!(&said, b"ping");
            program.write_all(b"pong").unwrap();
            assert_eq!(event(&mut driver).event_type, VsockEventType::Received { length: 4 });
            assert_eq!(driver.recv(host, 1000, &mut said), Ok(4));
            assert_eq!(&said, b"pong");

            driver.listen(22);
            let mut program = UnixStream::connect(folder.path().join("gate")).unwrap();
            program.write_all(b"CONNECT 22\nearly").unwrap();
            let asked = event(&mut driver);
            assert_eq!(asked.event_type, VsockEventType::ConnectionRequest);
            let early = event(&mut driver);
            assert_eq!(early.event_type, VsockEventType::Received { length: 5 });
            driver.shutdown(asked.source, 22).unwrap();
            let mut line = String::new();
            program.read_to_string(&mut line).unwrap();
            assert_eq!(line, format!("OK {}\n", asked.source.port));
        }
    }

    #[test]
    fn a_card_exchanges_frames_with_an_independent_driver() {
        const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
        let home = LoopThread::new();
        let wire = Mutex::new(None);
        let make = || -> Box<dyn VirtioDevice> {
            let (outside, inside) = UnixDatagram::pair().unwrap();
            inside.set_nonblocking(true).unwrap();
            *wire.lock().unwrap() = Some(outside);
            let tap = Arc::new(Tap::stand_in("wire", vec![inside.into()]));
            let backend = TapBackend::new("net0", tap, vec![home.handle()]).unwrap();
            let name = "net0".to_owned();
            let options = NetOptions { name, mac: MAC, mtu: None, backend: Box::new(backend) };
            Box::new(Net::new(options, home.handle()))
        };
        for over_pci in [false, true] {
            let registers: Box<dyn Wire> = match over_pci {
                false => Box::new(MmioWire::new(make(), GuestPages::memory())),
                true => Box::new(PciWire::new(make(), GuestPages::memory())),
            };
            let wired = Wired::new(registers);
            let wire = wire.lock().unwrap().take().unwrap();
            let mut driver = VirtIONetRaw::<GuestPages, _, 16>::new(wired.clone()).unwrap();
            driver.enable_interrupts();
            assert_eq!(driver.mac_address(), MAC);
            for round in 0..100_u8 {
                let sent = vec![round; 60 + usize::from(round)];
                driver.send(&sent).unwrap();
                let mut frame = [0; 2000];
                let len = wire.recv(&mut frame).unwrap();
                assert_eq!(&frame[12..len], sent);
                let mut buffer = [0; 2000];
                // SAFETY: the buffer lives until the frame is received.
                let token = unsafe { driver.receive_begin(&mut buffer) }.unwrap();
                wire.send(&frame[..len]).unwrap();
                while driver.poll_receive() != Some(token) {
                    wired.wait_interrupt(Source::Queue(0));
                }
                // SAFETY: it is the buffer of the token.
                let (header, received) =
                    unsafe { driver.receive_complete(token, &mut buffer) }.unwrap();
                assert_eq!(buffer[header..header + received], sent);
            }
        }
    }
}
