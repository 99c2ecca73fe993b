//! The virtual machine: every call that is made on KVM's machine, apart from running processors.
//!
//! KVM's machine lives as long as one run of the guest; [`Vm`] lives as long as the process. It
//! remembers the wires that devices connect, and each run of the guest gets a fresh machine with
//! them. The first machine is made by a thread of its own: the devices and the kernel need not wait
//! while KVM awaits grace periods of the host.
#![expect(unsafe_code, reason = "hands guest memory to KVM and lends it our eventfds")]

use std::collections::BTreeMap;
use std::io;
use std::mem::{self, ManuallyDrop};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, ensure};
use arch::entry::Entry;
use arch::memory::GuestMemory;
use arch::platform::Processors;
use arch::target::{cpuid, irqchip, layout, msr, start};
use devices::event::Event;
use devices::host::file_window::FileWindow;
use devices::interrupt::{Message, MessageRoutes};
use devices::virtio::transport::Doorbell;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KvmIrqRouting, Msrs, kvm_cpuid_entry2, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_userspace_memory_region,
    kvm_xcrs,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_allocator::IdAllocator;
use vmm_sys_util::eventfd::EventFd;

use crate::thread;

/// Where KVM is.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// Routes that KVM keeps for one machine (KVM_MAX_IRQ_ROUTES on x86_64).
const ROUTES_MAX: u32 = 4096;

/// KVM itself: what is asked once, whatever number of times the guest restarts.
pub(crate) struct Hypervisor {
    kvm: Kvm,
    supported_leaves: Vec<kvm_cpuid_entry2>,
}

impl Hypervisor {
    /// Opens KVM and asks what it can do.
    pub(crate) fn open() -> Result<Self> {
        let kvm = Kvm::new().map_err(io::Error::from).with_context(|| {
            format!(
                "cannot open {DEVICE}; is the kvm module loaded, and may this user open it? \
                 (group kvm on most systems)"
            )
        })?;
        let version = kvm.get_api_version();
        ensure!(
            version == i32::try_from(KVM_API_VERSION)?,
            "{DEVICE} has interface version {version}, which nixvmm does not know"
        );
        let supported_leaves =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        Ok(Self { kvm, supported_leaves: supported_leaves.as_slice().to_vec() })
    }

    /// The largest number of processors that a machine can have here.
    pub(crate) fn processors_max(&self) -> u32 {
        // APIC ids above 254 cannot be addressed by messages without interrupt remapping.
        u32::try_from(self.kvm.get_max_vcpus()).unwrap_or(u32::MAX).min(254)
    }

    /// Number of guest-physical address bits.
    pub(crate) fn address_bits(&self) -> u8 {
        cpuid::address_bits(&self.supported_leaves)
    }

    /// The leaves of processor 0; `vcpu` tells the frequency of its clock.
    fn guest_leaves(&self, vcpu: &VcpuFd, processors: Processors) -> Vec<kvm_cpuid_entry2> {
        let clock = cpuid::HostClock {
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
            tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer),
        };
        cpuid::guest_leaves(&self.supported_leaves, processors, clock)
    }
}

/// One virtual machine with its wires.
pub(crate) struct Vm {
    hypervisor: Arc<Hypervisor>,
    memory: GuestMemory,
    inner: Mutex<Inner>,
}

struct Inner {
    run: Run,
    /// What the guest has in memory beside its RAM; their slots follow those of RAM.
    windows: Vec<kvm_userspace_memory_region>,
    doorbells: Vec<(u64, Doorbell)>,
    lines: Vec<(u32, Event)>,
    messages: BTreeMap<RawFd, MessageWire>,
    message_interrupts: IdAllocator,
}

/// What KVM has of a run of the guest.
enum Run {
    /// A thread makes the machine.
    Coming(JoinHandle<Result<VmFd>>),
    Here(VmFd),
    Over,
}

/// An event that sends a message. It keeps its interrupt number and its route while it is masked,
/// so that unmasking it costs no new routing table.
struct MessageWire {
    event: Event,
    interrupt: u32,
    message: Message,
    attached: bool,
}

impl Vm {
    /// Begins to make a machine with all of `memory` and the in-kernel interrupt controllers.
    pub(crate) fn new(hypervisor: Hypervisor, memory: GuestMemory) -> Result<Arc<Self>> {
        let hypervisor = Arc::new(hypervisor);
        let maker = Arc::clone(&hypervisor);
        let machine = thread::spawn("machine", move || create_machine(&maker.kvm, memory))?;
        let inner = Inner {
            run: Run::Coming(machine),
            windows: Vec::new(),
            doorbells: Vec::new(),
            lines: Vec::new(),
            messages: BTreeMap::new(),
            message_interrupts: message_interrupts()?,
        };
        Ok(Arc::new(Self { hypervisor, memory, inner: Mutex::new(inner) }))
    }

    /// Takes KVM's machine and its message routes away; the devices have been reset.
    ///
    /// Its processors are dropped by the caller before, so that it goes at once.
    pub(crate) fn end_run(&self) -> Result<()> {
        let mut inner = self.inner();
        inner.messages.clear();
        inner.message_interrupts = message_interrupts()?;
        inner.run = Run::Over;
        Ok(())
    }

    /// Shows a file to the guest at `start`.
    ///
    /// Where it is read-only, what the guest writes to it is lost, or ends the guest if KVM does
    /// not know the instruction.
    pub(crate) fn connect_window(&self, start: u64, window: &FileWindow) -> Result<()> {
        let mut inner = self.inner();
        let slot = self.memory.regions().count() + inner.windows.len();
        inner.windows.push(kvm_userspace_memory_region {
            slot: slot.try_into()?,
            flags: if window.is_read_only() { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: start,
            memory_size: window.len(),
            userspace_addr: window.host_address(),
        });
        Ok(())
    }

    /// Connects the doorbell of a transport whose registers are at `registers`: the guest's write
    /// signals the event without an exit to user space.
    pub(crate) fn connect_doorbell(&self, registers: u64, doorbell: Doorbell) -> Result<()> {
        let address = registers.checked_add(doorbell.offset).context("a doorbell beyond memory")?;
        self.inner().doorbells.push((address, doorbell));
        Ok(())
    }

    /// Connects an event to an interrupt line, edge triggered.
    pub(crate) fn connect_line(&self, interrupt: u32, event: Event) {
        self.inner().lines.push((interrupt, event));
    }

    /// Begins a run of the guest on a wired machine with all its processors: the first one at
    /// `entry`, the others waiting to be started by it.
    pub(crate) fn create_processors(
        &self,
        processors: Processors,
        entry: Entry,
    ) -> Result<Vec<VcpuFd>> {
        start::write_tables(self.memory, entry.mode)?;
        let mut inner = self.inner();
        let machine = inner.begin_run(&self.hypervisor.kvm, self.memory)?;
        let mut leaves = None;
        (0..processors.count)
            .map(|id| {
                let vcpu = machine
                    .create_vcpu(id.into())
                    .with_context(|| format!("cannot make virtual processor {id}"))?;
                let leaves =
                    leaves.get_or_insert_with(|| self.hypervisor.guest_leaves(&vcpu, processors));
                cpuid::set_apic_id(leaves, id);
                set_up_processor(&vcpu, leaves)?;
                if id == 0 {
                    set_first_instruction(&vcpu, entry)?;
                }
                Ok(vcpu)
            })
            .collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MessageRoutes for Vm {
    fn set(&self, changes: &[(Event, Option<Message>)]) -> io::Result<()> {
        let mut inner = self.inner();
        let mut routes_changed = false;
        for (event, message) in changes {
            match message {
                Some(message) => routes_changed |= inner.route_message(event, *message)?,
                None => inner.detach_message(event)?,
            }
        }
        if routes_changed {
            inner.commit_routes()?;
        }
        changes
            .iter()
            .filter(|(_, message)| message.is_some())
            .try_for_each(|(event, _)| inner.attach_message(event))
    }
}

impl Inner {
    fn begin_run(&mut self, kvm: &Kvm, memory: GuestMemory) -> Result<&VmFd> {
        let machine = match mem::replace(&mut self.run, Run::Over) {
            Run::Coming(maker) => maker.join().map_err(|_| anyhow!("no machine was made"))??,
            Run::Here(_) | Run::Over => create_machine(kvm, memory)?,
        };
        for window in &self.windows {
            // SAFETY: a file's window stays mapped until the process ends.
            unsafe { machine.set_user_memory_region(*window) }
                .with_context(|| format!("cannot show a file at {:#x}", window.guest_phys_addr))?;
        }
        for (address, doorbell) in &self.doorbells {
            register_doorbell(&machine, *address, doorbell)
                .with_context(|| format!("cannot connect the doorbell at {address:#x}"))?;
        }
        for (interrupt, event) in &self.lines {
            lend(event, |event| machine.register_irqfd(event, *interrupt))
                .with_context(|| format!("cannot connect interrupt {interrupt}"))?;
        }
        self.run = Run::Here(machine);
        Ok(self.run.machine()?)
    }

    /// Notes where an event's message goes, and says whether that is new.
    fn route_message(&mut self, event: &Event, message: Message) -> io::Result<bool> {
        if let Some(wire) = self.messages.get_mut(&event.as_raw_fd()) {
            let changed = wire.message != message;
            wire.message = message;
            return Ok(changed);
        }
        let interrupt = self.message_interrupts.allocate_id().map_err(io::Error::other)?;
        let wire = MessageWire { event: event.clone(), interrupt, message, attached: false };
        self.messages.insert(event.as_raw_fd(), wire);
        Ok(true)
    }

    /// Gives KVM the whole routing table: the lines and every message, masked or not.
    fn commit_routes(&self) -> io::Result<()> {
        let messages = self.messages.values().map(message_route);
        let routes: Vec<_> = irqchip::line_routes().chain(messages).collect();
        let routes = KvmIrqRouting::from_entries(&routes).map_err(io::Error::other)?;
        Ok(self.run.machine()?.set_gsi_routing(&routes)?)
    }

    fn attach_message(&mut self, event: &Event) -> io::Result<()> {
        if let Some(wire) = self.messages.get_mut(&event.as_raw_fd())
            && !wire.attached
        {
            let machine = self.run.machine()?;
            lend(&wire.event, |event| machine.register_irqfd(event, wire.interrupt))?;
            wire.attached = true;
        }
        Ok(())
    }

    fn detach_message(&mut self, event: &Event) -> io::Result<()> {
        if let Some(wire) = self.messages.get_mut(&event.as_raw_fd())
            && wire.attached
        {
            let machine = self.run.machine()?;
            lend(&wire.event, |event| machine.unregister_irqfd(event, wire.interrupt))?;
            wire.attached = false;
        }
        Ok(())
    }
}

impl Run {
    fn machine(&self) -> io::Result<&VmFd> {
        match self {
            Self::Here(machine) => Ok(machine),
            Self::Coming(_) | Self::Over => Err(io::Error::other("the guest does not run")),
        }
    }
}

fn register_doorbell(
    machine: &VmFd,
    address: u64,
    doorbell: &Doorbell,
) -> Result<(), kvm_ioctls::Error> {
    let write = IoEventAddress::Mmio(address);
    lend(&doorbell.event, |event| match doorbell.data {
        Some(data) => machine.register_ioevent(event, &write, data),
        None => machine.register_ioevent(event, &write, NoDatamatch),
    })
}

fn message_interrupts() -> Result<IdAllocator> {
    Ok(IdAllocator::new(layout::IOAPIC_PINS, ROUTES_MAX - 1)?)
}

fn message_route(wire: &MessageWire) -> kvm_irq_routing_entry {
    let [low, high] = [wire.message.address & 0xFFFF_FFFF, wire.message.address >> 32]
        .map(|half| u32::try_from(half).unwrap_or(u32::MAX));
    kvm_irq_routing_entry {
        gsi: wire.interrupt,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data: wire.message.data,
                ..Default::default()
            },
        },
        ..Default::default()
    }
}

fn create_machine(kvm: &Kvm, memory: GuestMemory) -> Result<VmFd> {
    let vm = kvm.create_vm().context("cannot make a virtual machine")?;
    for (slot, region) in (0..).zip(memory.regions()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start.0,
            memory_size: region.slice.len().try_into()?,
            userspace_addr: region.slice.as_ptr() as u64,
        };
        // SAFETY: the region is guest memory, which stays mapped until the process ends.
        unsafe { vm.set_user_memory_region(slot) }.context("cannot give RAM to the guest")?;
    }
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)?;
    vm.set_tss_address(usize::try_from(layout::KVM_TSS)?)?;
    vm.create_irq_chip().context("cannot make the interrupt controllers")?;
    Ok(vm)
}

fn set_up_processor(vcpu: &VcpuFd, leaves: &[kvm_cpuid_entry2]) -> Result<()> {
    vcpu.set_cpuid2(&CpuId::from_entries(leaves)?).context("KVM_SET_CPUID2")?;
    if let Some(states) = cpuid::first_states(leaves) {
        set_states(vcpu, states).context("KVM_SET_XCRS")?;
    }
    let registers = msr::boot_registers();
    let written = vcpu.set_msrs(&Msrs::from_entries(&registers)?).context("KVM_SET_MSRS")?;
    if let Some(refused) = registers.get(written) {
        log::debug!("the host has no model-specific register {:#x}", refused.index);
    }
    let mut apic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    irqchip::set_local_pins(&mut apic);
    vcpu.set_lapic(&apic).context("KVM_SET_LAPIC")
}

fn set_states(vcpu: &VcpuFd, states: u64) -> Result<(), kvm_ioctls::Error> {
    let mut registers = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    // The first entry is XCR0, whose number is 0.
    registers.xcrs[0].value = states;
    vcpu.set_xcrs(&registers)
}

fn set_first_instruction(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let mut system = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    start::set_system_registers(&mut system, entry.mode);
    vcpu.set_sregs(&system).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&start::registers(entry)).context("KVM_SET_REGS")
}

/// Lends an event to a call that wants an eventfd of another type.
fn lend<T>(event: &Event, call: impl FnOnce(&EventFd) -> T) -> T {
    // SAFETY: the descriptor is an open eventfd, and without a drop it is not closed here.
    call(&ManuallyDrop::new(unsafe { EventFd::from_raw_fd(event.as_raw_fd()) }))
}
