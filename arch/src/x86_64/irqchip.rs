//! The in-kernel interrupt controllers: routes of the IOAPIC's lines, and the local APICs' own
//! pins.
//!
//! There is no PIC and no PIT to be seen: the ACPI tables say "hardware reduced", time comes from
//! kvmclock and the TSC deadline.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_lapic_state,
};

use super::layout::IOAPIC_PINS;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const DELIVERY_EXTERNAL: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

/// One route for each pin of the IOAPIC: global system interrupt N is pin N.
pub fn line_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    (0..IOAPIC_PINS).map(|pin| kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
        },
        ..Default::default()
    })
}

/// Leaves the local APIC's pins as firmware does: LINT0 for an external controller, masked because
/// there is none, and LINT1 for non-maskable interrupts.
pub fn set_local_pins(apic: &mut kvm_lapic_state) {
    write_register(apic, LVT_LINT0, LVT_MASKED | DELIVERY_EXTERNAL);
    write_register(apic, LVT_LINT1, DELIVERY_NMI);
}

fn write_register(apic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in apic.regs.iter_mut().skip(offset).zip(value.to_ne_bytes()) {
        *register = i8::from_ne_bytes([byte]);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn every_pin_has_its_own_interrupt() {
        let routes: Vec<_> = line_routes().collect();
        assert_eq!(routes.len(), 24);
        assert!(routes.iter().enumerate().all(|(pin, route)| route.gsi as usize == pin));
    }

    #[test]
    fn local_pins_are_written_in_the_processors_byte_order() {
        let mut apic = kvm_lapic_state::default();
        set_local_pins(&mut apic);
        assert_eq!(apic.regs[LVT_LINT0..LVT_LINT0 + 4], [0, 7, 1, 0]);
        assert_eq!(apic.regs[LVT_LINT1..LVT_LINT1 + 4], [0, 4, 0, 0]);
    }
}
