//! The first and only program of the guest that is measured. It tells how far it got by hypercalls,
//! which the host's tracing of KVM sees and no VMM has a part in; nothing of a measurement goes
//! through a device that is being measured.
#![expect(
    unsafe_code,
    reason = "hypercalls are instructions, io_uring takes raw buffers, requests of cards are ioctls"
)]

use std::arch::asm;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, init_module, reboot};
use rustix::time::{ClockId, clock_gettime};
use tests::benchmark::mark::{MARK, Stage};
use tests::benchmark::traffic;
use tests::vsock;

const DISK: &str = "/dev/vda";
const BLOCK: u32 = 4096;

/// What a random load keeps in flight.
const DEPTH: u32 = 32;

/// Requests before a load is measured, and while it is.
const WARM_UP: u32 = 1024;
const REQUESTS: u32 = 16_384;

/// Bytes that go over a network in each direction, and round trips.
const BULK: u64 = 2 << 20;
const ROUND_TRIPS: u64 = 200;

/// What is in front of the port for messages in the tables of the firmware.
const NOTIFY: &str = "io.systemd.credential:vmm.notify_socket=vsock-stream:2:";

/// The first network card.
const CARD: &str = "eth0";

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Buffer([u8; BLOCK as usize]);

fn main() {
    mark(Stage::UserSpace, boot_time(), 0);
    let ended = run();
    if let Err(error) = ended {
        // No device may be there to write to; the host sees the missing mark and this one.
        mark(Stage::Failed, u64::from(error.raw_os_error().unwrap_or(0).unsigned_abs()), 0);
    }
    let _ = reboot(RebootCommand::Restart);
}

fn run() -> io::Result<()> {
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    load_modules("/modules/order")?;
    let disk = OpenOptions::new().read(true).custom_flags(direct()).open(DISK)?;
    let mut first = Box::new(Buffer([0; BLOCK as usize]));
    disk.read_exact_at(&mut first.0, 0)?;
    mark(Stage::Devices, boot_time(), 0);

    // The kernel hands words of its command line that it does not know to its first program.
    match env::var("measure").as_deref() {
        Ok("idle") => idle(),
        Ok("devices") => {
            load_modules("/modules/network")?;
            card()?;
            load_modules("/modules/further")?;
            idle()
        }
        Ok("block") => block(),
        Ok("tap") => {
            load_modules("/modules/network")?;
            card()?;
            let stream = TcpStream::connect((traffic::HOST, traffic::PORT))?;
            stream.set_nodelay(true)?;
            traffic_over(&stream)
        }
        Ok("vsock") => {
            load_modules("/modules/network")?;
            traffic_over(&vsock::connect(vsock::HOST, traffic::PORT.into())?)?;
            messages()
        }
        Ok("log") => log(),
        _ => Ok(()),
    }
}

fn load_modules(list: &str) -> io::Result<()> {
    for line in fs::read_to_string(list)?.lines() {
        let module = fs::read(line.trim())?;
        init_module(&module, c"")?;
    }
    Ok(())
}

/// Opens the console, if it is a virtio console, and never ends.
fn idle() -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/hvc0").ok();
    if let Some(console) = console.as_mut() {
        console.write_all(b"idle\n")?;
    }
    mark(Stage::Idle, 0, 0);
    loop {
        thread::sleep(Duration::from_secs(1000));
    }
}

/// Writes the kernel's log to the console.
fn log() -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open("/dev/hvc0")?;
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let mut messages = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg")?;
    let mut message = [0; 8192];
    while let Ok(length @ 1..) = messages.read(&mut message) {
        console.write_all(message.get(..length).unwrap_or_default())?;
    }
    console.write_all(b"end of log\n")?;
    thread::sleep(Duration::from_secs(1));
    Ok(())
}

fn block() -> io::Result<()> {
    let disk = OpenOptions::new().read(true).write(true).custom_flags(direct()).open(DISK)?;
    let size = fs::read_to_string("/sys/block/vda/size").or_else(|_| {
        mount("sys", "/sys", "sysfs", MountFlags::empty(), None)?;
        fs::read_to_string("/sys/block/vda/size")
    })?;
    let sectors: u64 = size.trim().parse().map_err(io::Error::other)?;
    let blocks = sectors / 8;
    for (kind, write, depth) in [(1, false, DEPTH), (2, true, DEPTH), (3, false, 1)] {
        load(&disk, blocks, write, depth, WARM_UP)?;
        let start = Instant::now();
        let requests = if depth == 1 { REQUESTS / 4 } else { REQUESTS };
        load(&disk, blocks, write, depth, requests)?;
        let elapsed = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        mark(Stage::Load, kind << 32 | u64::from(requests), elapsed);
    }
    Ok(())
}

/// Random requests of 4 KiB, `depth` of them in flight.
fn load(disk: &File, blocks: u64, write: bool, depth: u32, requests: u32) -> io::Result<()> {
    let mut ring = IoUring::new(depth)?;
    let mut buffers = vec![Buffer([0x5a; BLOCK as usize]); depth as usize];
    let descriptor = types::Fd(disk.as_raw_fd());
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut entry = |buffer: &mut Buffer, slot: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % blocks * u64::from(BLOCK);
        let (address, length) = (buffer.0.as_mut_ptr(), BLOCK);
        let entry = match write {
            true => opcode::Write::new(descriptor, address, length).offset(offset).build(),
            false => opcode::Read::new(descriptor, address, length).offset(offset).build(),
        };
        entry.user_data(slot)
    };

    let (mut submitted, mut completed) = (0, 0);
    for (buffer, slot) in buffers.iter_mut().zip(0..) {
        submit(&mut ring, &entry(buffer, slot))?;
        submitted += 1;
    }
    while completed < requests {
        ring.submit_and_wait(1)?;
        let finished: Vec<(u64, i32)> =
            ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in finished {
            if u32::try_from(result) != Ok(BLOCK) {
                return Err(io::Error::from_raw_os_error(-result.min(0)));
            }
            completed += 1;
            let buffer = buffers
                .get_mut(usize::try_from(slot).unwrap_or(usize::MAX))
                .ok_or(io::ErrorKind::InvalidData)?;
            if submitted < requests {
                submit(&mut ring, &entry(buffer, slot))?;
                submitted += 1;
            }
        }
    }
    Ok(())
}

fn submit(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<()> {
    // SAFETY: the buffer of an entry lives until its completion was seen, and no slot is used twice
    // at once.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)
}

/// Bytes both ways, and round trips, each after some that are not measured.
fn traffic_over<S>(stream: &S) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let measured = |kind: u64, count: u64, times: u64, sent, received| {
        traffic::exchange(stream, sent / 8, received / 8 + 1)?;
        load_over_network(kind, count, times, |_| traffic::exchange(stream, sent, received))
    };
    measured(1, BULK / 1024, 1, BULK, 1)?;
    measured(2, BULK / 1024, 1, 0, BULK)?;
    measured(3, ROUND_TRIPS, ROUND_TRIPS, 1, 1)
}

/// Does something so many times, as a load of this kind with this count.
fn load_over_network(
    kind: u64,
    count: u64,
    times: u64,
    mut act: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    mark(Stage::Begun, kind, 0);
    let start = Instant::now();
    (1..=times).try_for_each(&mut act)?;
    let elapsed = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    mark(Stage::Load, kind << 32 | count, elapsed);
    Ok(())
}

/// Messages to the service manager, if there is a port for them, after one that is not measured.
fn messages() -> io::Result<()> {
    mount("sys", "/sys", "sysfs", MountFlags::empty(), None)?;
    let table = fs::read("/sys/firmware/dmi/tables/DMI")?;
    let table = String::from_utf8_lossy(&table);
    let Some((_, rest)) = table.split_once(NOTIFY) else { return Ok(()) };
    let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default();
    let port = digits.parse().map_err(io::Error::other)?;
    // Who waits for the other end to close knows that the message was taken, and pays for it.
    let say = |number| {
        let mut connection = vsock::connect(vsock::HOST, port)?;
        connection.write_all(traffic::message(number).as_bytes())?;
        connection.shutdown(Shutdown::Write)?;
        connection.read_to_end(&mut Vec::new()).map(drop)
    };
    say(0)?;
    load_over_network(4, traffic::MESSAGES, traffic::MESSAGES, say)
}

/// Gives the first card its address and waits for its link.
fn card() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let address = |address: Ipv4Addr| libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    };
    let flags = libc::IFF_UP | libc::IFF_RUNNING;
    let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let mask = Ipv4Addr::new(255, 255, 255, 0);
    request(&socket, libc::SIOCSIFADDR, &address(traffic::GUEST))?;
    request(&socket, libc::SIOCSIFNETMASK, &address(mask))?;
    request(&socket, libc::SIOCSIFFLAGS, &flags)
}

/// Changes the first card: `value` is what the request takes behind the interface's name.
fn request<T: Copy>(socket: &UdpSocket, request: libc::c_ulong, value: &T) -> io::Result<()> {
    #[repr(C)]
    struct InterfaceRequest<T> {
        name: [u8; libc::IFNAMSIZ],
        value: T,
        rest: [u8; 32],
    }
    let mut name = [0; libc::IFNAMSIZ];
    name[..CARD.len()].copy_from_slice(CARD.as_bytes());
    let change = InterfaceRequest { name, value: *value, rest: [0; 32] };
    // SAFETY: it is at least as long as the kernel's structure and begins like it.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request as _, &raw const change) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells the host's tracing that `stage` is reached. KVM refuses hypercalls of user space, but not
/// before it has traced them.
fn mark(stage: Stage, first: u64, second: u64) {
    // SAFETY: KVM changes nothing but RAX for a hypercall it refuses.
    unsafe {
        asm!(
            "vmmcall",
            inlateout("rax") MARK => _,
            in("rcx") stage as u64,
            in("rdx") first,
            in("rsi") second,
            options(nostack)
        );
    }
}

/// Nanoseconds since the kernel started.
fn boot_time() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

fn direct() -> i32 {
    i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0)
}
