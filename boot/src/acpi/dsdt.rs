//! The DSDT: the devices, in AML (ACPI 6.5, chapters 6, 19 and 20).

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO,
    If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Or, Package, Path, ResourceTemplate,
    Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use arch::platform::{MmioDevice, PciHost, Platform, Power, SerialPort};

use super::tables::last_bus;
use super::{Error, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const DSDT_HEADER_LEN: u32 = 36;
/// Integers have 64 bits from revision 2 on.
const DSDT_REVISION: u8 = 2;

/// What goes to SLP_TYP for soft-off; any value that the sleep control register has room for.
const SLEEP_TYPE_OFF: u8 = 5;
/// Notification of a power button: it was pressed (ACPI 6.5, table 5.168).
const BUTTON_PRESSED: u8 = 0x80;
/// Device is present, enabled, shown and works.
const STATUS_OK: u8 = 0x0F;
/// How an operating system takes over PCI Express features (PCI Firmware 3.3, 4.5).
const PCI_OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// First capability dword of _OSC, bit 2: the UUID is not known.
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const POWER_PORTS: u8 = 1;

pub(super) fn dsdt(platform: &Platform) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    power_button(&platform.power).to_aml_bytes(&mut devices);
    motherboard(platform)?.to_aml_bytes(&mut devices);
    if let Some(pci) = &platform.pci {
        pci_host(pci)?.to_aml_bytes(&mut devices);
    }
    for (index, device) in platform.virtio_mmio.iter().enumerate() {
        let shared =
            platform.virtio_mmio.iter().filter(|other| other.interrupt == device.interrupt);
        virtio_mmio(index, device, shared.count() > 1)?.to_aml_bytes(&mut devices);
    }
    for (index, port) in platform.serial.iter().enumerate() {
        serial_port(index, *port).to_aml_bytes(&mut devices);
    }
    if let Some(port) = platform.panic_port {
        panic_device(port).to_aml_bytes(&mut devices);
    }
    processors(platform.processors.count).to_aml_bytes(&mut devices);

    let mut body = Scope::raw("\\_SB_".into(), devices);
    soft_off().to_aml_bytes(&mut body);
    let mut dsdt =
        Sdt::new(*b"DSDT", DSDT_HEADER_LEN, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    Ok(dsdt)
}

/// AML that is finished: children of a device may have other lifetimes than the device.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

impl Code {
    fn add(&mut self, object: &dyn Aml) -> &mut Self {
        object.to_aml_bytes(&mut self.0);
        self
    }

    fn device(name: &str, children: &[&dyn Aml]) -> Self {
        let mut code = Self(Vec::new());
        code.add(&Device::new(name.into(), children.to_vec()));
        code
    }
}

/// A control-method power button, pressed by the generic event device (ACPI 6.5, 5.6.9).
fn power_button(power: &Power) -> Code {
    let pressed = Notify::new(&path("PWRB"), &BUTTON_PRESSED).into_code();
    let matches = Equal::new(&Arg(0), &power.button_interrupt).into_code();
    let event =
        Method::new("_EVT".into(), 1, true, vec![&If::new(&matches, vec![&pressed])]).into_code();
    let mut code = Code::device("PWRB", &[&hardware_id("PNP0C0C"), &unique_id(0)]);
    code.add(&Code::device(
        "GED_",
        &[
            &hardware_id("ACPI0013"),
            &unique_id(0),
            &resources(&[&line(power.button_interrupt, false)]),
            &event,
        ],
    ));
    code
}

/// Addresses that no driver may take: the configuration space and the power registers.
fn motherboard(platform: &Platform) -> Result<Code, Error> {
    let power = &platform.power;
    let ports: Vec<_> = [power.sleep_control_port, power.sleep_status_port, power.reset_port]
        .map(|port| IO::new(port, port, 1, POWER_PORTS))
        .into();
    let mut taken: Vec<&dyn Aml> = ports.iter().map(|port| -> &dyn Aml { port }).collect();
    let configuration =
        platform.pci.as_ref().map(|pci| memory("PCI configuration space", &pci.ecam));
    let configuration = configuration.transpose()?;
    if let Some(configuration) = &configuration {
        taken.push(configuration);
    }
    Ok(Code::device("MBRD", &[&hardware_id("PNP0C02"), &unique_id(0), &resources(&taken)]))
}

/// The PCI Express host bridge of segment 0.
fn pci_host(pci: &PciHost) -> Result<Code, Error> {
    let buses = AddressSpace::new_bus_number(0u16, last_bus(pci)?.into());
    let windows = [window_32(&pci.window_32)?, window_64(&pci.window_64)];
    let mut resource_list: Vec<&dyn Aml> = vec![&buses];
    resource_list.extend(windows.iter().flatten().map(|window| -> &dyn Aml { window }));
    Ok(Code::device(
        "PCI0",
        &[
            &hardware_id("PNP0A08"),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &unique_id(0),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &resources(&resource_list),
            &osc(),
        ],
    ))
}

/// Grants whatever control the operating system asks for: there is no firmware that wants any.
fn osc() -> Code {
    let (uuid, capabilities) = (Arg(0), Arg(3));
    let status = path("CDW1");
    let offset = ZERO;
    let field = CreateDWordField::new(&status, &capabilities, &offset);
    let known = Uuid::new(PCI_OSC_UUID);
    let is_known = Equal::new(&uuid, &known);
    let granted = Return::new(&capabilities);
    let refuse = Or::new(&status, &status, &OSC_UNKNOWN_UUID);
    let refused = Return::new(&capabilities);
    Method::new(
        "_OSC".into(),
        4,
        true,
        vec![&field, &If::new(&is_known, vec![&granted]), &Else::new(vec![&refuse, &refused])],
    )
    .into_code()
}

fn window_32(range: &Range<u64>) -> Result<Option<Code>, Error> {
    let Some(last) = last_of(range) else { return Ok(None) };
    match (u32::try_from(range.start), u32::try_from(last)) {
        (Ok(first), Ok(last)) => {
            let cacheable = AddressSpaceCacheable::NotCacheable;
            Ok(Some(AddressSpace::new_memory(cacheable, true, first, last, None).into_code()))
        }
        _ => Err(beyond_32_bits("PCI window below 4 GiB", range)),
    }
}

fn window_64(range: &Range<u64>) -> Option<Code> {
    let cacheable = AddressSpaceCacheable::NotCacheable;
    last_of(range)
        .map(|last| AddressSpace::new_memory(cacheable, true, range.start, last, None).into_code())
}

/// A virtio device as Linux and QEMU know it: LNRO0005.
fn virtio_mmio(index: usize, device: &MmioDevice, shared: bool) -> Result<Code, Error> {
    let registers = memory("registers of a virtio-mmio device", &device.registers)?;
    let unique = u32::try_from(index).unwrap_or(u32::MAX);
    Ok(Code::device(
        &format!("V{index:03X}"),
        &[
            &hardware_id("LNRO0005"),
            &unique_id(unique),
            &Name::new("_CCA".into(), &ONE),
            &resources(&[&registers, &line(device.interrupt, shared)]),
        ],
    ))
}

fn serial_port(index: usize, serial: SerialPort) -> Code {
    const PORTS: u8 = 8;
    let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
    Code::device(
        &format!("COM{number:X}"),
        &[
            &hardware_id("PNP0501"),
            &unique_id(number),
            &resources(&[
                &IO::new(serial.port, serial.port, 1, PORTS),
                &line(serial.interrupt, false),
            ]),
        ],
    )
}

/// pvpanic, as QEMU specifies it.
fn panic_device(port: u16) -> Code {
    Code::device(
        "PEVT",
        &[
            &hardware_id("QEMU0001"),
            &unique_id(0),
            &Name::new("_STA".into(), &STATUS_OK),
            &resources(&[&IO::new(port, port, 1, 1)]),
        ],
    )
}

/// Processors by the ids that the MADT gives them.
fn processors(count: u32) -> Code {
    let mut children = Code(Vec::new());
    children.add(&hardware_id("ACPI0010"));
    children.add(&Name::new("_CID".into(), &EISAName::new("PNP0A05")));
    for id in 0..count {
        let name = format!("C{id:03X}");
        children.add(&Code::device(&name, &[&hardware_id("ACPI0007"), &unique_id(id)]));
    }
    Code::device("CPUS", &[&children])
}

/// How the system is switched off: the value for the sleep control register.
fn soft_off() -> Name {
    let sleep_type = SLEEP_TYPE_OFF;
    Name::new("_S5_".into(), &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]))
}

/// _HID: a string for ACPI's own and other vendors' ids, packed for the PNP ids.
fn hardware_id(id: &str) -> Name {
    if id.starts_with("PNP") {
        Name::new("_HID".into(), &EISAName::new(id))
    } else {
        Name::new("_HID".into(), &String::from(id))
    }
}

fn unique_id(id: u32) -> Name {
    Name::new("_UID".into(), &id)
}

fn resources(descriptors: &[&dyn Aml]) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(descriptors.to_vec()))
}

/// An edge-triggered interrupt line, active high.
fn line(interrupt: u32, shared: bool) -> Interrupt {
    Interrupt::new(true, true, false, shared, interrupt)
}

fn memory(what: &'static str, range: &Range<u64>) -> Result<Memory32Fixed, Error> {
    let len = range.end.saturating_sub(range.start);
    match (u32::try_from(range.start), u32::try_from(len)) {
        (Ok(start), Ok(len)) if len > 0 && start.checked_add(len).is_some() => {
            Ok(Memory32Fixed::new(true, start, len))
        }
        _ => Err(beyond_32_bits(what, range)),
    }
}

fn last_of(range: &Range<u64>) -> Option<u64> {
    if range.is_empty() { None } else { range.end.checked_sub(1) }
}

const fn beyond_32_bits(what: &'static str, range: &Range<u64>) -> Error {
    Error::Range { what, start: range.start, end: range.end }
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// Objects borrow their operands; their code does not.
trait IntoCode: Aml {
    fn into_code(self) -> Code
    where
        Self: Sized,
    {
        let mut code = Code(Vec::new());
        code.add(&self);
        code
    }
}

impl<T: Aml> IntoCode for T {}
