//! Requests of ioctl(2), as the kernel's headers encode them.

use std::mem::size_of;

use kvm_bindings::*;

// Of the whole of KVM.
pub(super) const KVM_CREATE_VM: u32 = none(KVM, 0x01);
pub(super) const KVM_CHECK_EXTENSION: u32 = none(KVM, 0x03);
pub(super) const KVM_GET_VCPU_MMAP_SIZE: u32 = none(KVM, 0x04);
pub(super) const KVM_GET_SUPPORTED_CPUID: u32 = both::<kvm_cpuid2>(KVM, 0x05);

// Of a virtual machine.
pub(super) const KVM_CREATE_VCPU: u32 = none(KVM, 0x41);
pub(super) const KVM_SET_USER_MEMORY_REGION: u32 = write::<kvm_userspace_memory_region>(KVM, 0x46);
pub(super) const KVM_SET_TSS_ADDR: u32 = none(KVM, 0x47);
pub(super) const KVM_SET_IDENTITY_MAP_ADDR: u32 = write::<u64>(KVM, 0x48);
pub(super) const KVM_CREATE_IRQCHIP: u32 = none(KVM, 0x60);
pub(super) const KVM_SET_GSI_ROUTING: u32 = write::<kvm_irq_routing>(KVM, 0x6a);
pub(super) const KVM_IRQFD: u32 = write::<kvm_irqfd>(KVM, 0x76);
pub(super) const KVM_IOEVENTFD: u32 = write::<kvm_ioeventfd>(KVM, 0x79);

// Of a virtual processor.
pub(super) const KVM_RUN: u32 = none(KVM, 0x80);
pub(super) const KVM_GET_REGS: u32 = read::<kvm_regs>(KVM, 0x81);
pub(super) const KVM_SET_REGS: u32 = write::<kvm_regs>(KVM, 0x82);
pub(super) const KVM_GET_SREGS: u32 = read::<kvm_sregs>(KVM, 0x83);
pub(super) const KVM_SET_SREGS: u32 = write::<kvm_sregs>(KVM, 0x84);
pub(super) const KVM_SET_MSRS: u32 = write::<kvm_msrs>(KVM, 0x89);
pub(super) const KVM_GET_LAPIC: u32 = read::<kvm_lapic_state>(KVM, 0x8e);
pub(super) const KVM_SET_LAPIC: u32 = write::<kvm_lapic_state>(KVM, 0x8f);
pub(super) const KVM_KVMCLOCK_CTRL: u32 = none(KVM, 0xad);
pub(super) const KVM_SET_CPUID2: u32 = write::<kvm_cpuid2>(KVM, 0x90);
pub(super) const KVM_SET_XCRS: u32 = write::<kvm_xcrs>(KVM, 0xa7);
pub(super) const KVM_GET_TSC_KHZ: u32 = none(KVM, 0xa3);

// Of a block device (linux/fs.h).
pub(super) const BLKSSZGET: u32 = none(0x12, 104);
pub(super) const BLKDISCARD: u32 = none(0x12, 119);
pub(super) const BLKPBSZGET: u32 = none(0x12, 123);

// Of a vhost driver (linux/vhost.h); those for several devices, then the drivers' own.
pub(super) const VHOST_SET_FEATURES: u32 = write::<u64>(VHOST, 0x00);
pub(super) const VHOST_SET_MEM_TABLE: u32 = write::<u64>(VHOST, 0x03);
pub(super) const VHOST_SET_VRING_NUM: u32 = write::<u64>(VHOST, 0x10);
pub(super) const VHOST_SET_VRING_ADDR: u32 = write::<[u64; 5]>(VHOST, 0x11);
pub(super) const VHOST_SET_VRING_BASE: u32 = write::<u64>(VHOST, 0x12);
pub(super) const VHOST_SET_VRING_KICK: u32 = write::<u64>(VHOST, 0x20);
pub(super) const VHOST_SET_VRING_CALL: u32 = write::<u64>(VHOST, 0x21);
pub(super) const VHOST_SET_VRING_ERR: u32 = write::<u64>(VHOST, 0x22);
pub(super) const VHOST_NET_SET_BACKEND: u32 = write::<u64>(VHOST, 0x30);
pub(super) const VHOST_VSOCK_SET_RUNNING: u32 = write::<u32>(VHOST, 0x61);

// Of a terminal or socket (asm-generic/ioctls.h); those without numbers in libc for every target.
pub(super) const FIONBIO: u32 = 0x5421;
pub(super) const TCGETS: u32 = 0x5401;
pub(super) const TCSETS: u32 = 0x5402;
pub(super) const TCGETS2: u32 = read::<libc::termios2>(0x54, 0x2a);
pub(super) const TCSETS2: u32 = write::<libc::termios2>(0x54, 0x2b);
pub(super) const TIOCGPGRP: u32 = 0x540f;
pub(super) const TIOCGWINSZ: u32 = 0x5413;

// Of a tap interface (linux/if_tun.h).
pub(super) const TUNSETOFFLOAD: u32 = write::<u32>(b'T' as u32, 208);
pub(super) const TUNSETQUEUE: u32 = write::<libc::c_int>(b'T' as u32, 217);

/// The type of KVM's requests.
const KVM: u32 = 0xae;

/// The type of vhost's requests.
const VHOST: u32 = 0xaf;

const fn none(kind: u32, number: u32) -> u32 {
    kind << 8 | number
}

const fn write<T>(kind: u32, number: u32) -> u32 {
    1 << 30 | size::<T>() << 16 | none(kind, number)
}

const fn read<T>(kind: u32, number: u32) -> u32 {
    2 << 30 | size::<T>() << 16 | none(kind, number)
}

const fn both<T>(kind: u32, number: u32) -> u32 {
    read::<T>(kind, number) | write::<T>(kind, number)
}

/// A request has 14 bits for the size of its argument.
const fn size<T>() -> u32 {
    assert!(size_of::<T>() < 1 << 14);
    #[expect(clippy::cast_possible_truncation, reason = "it has 14 bits")]
    {
        size_of::<T>() as u32
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel() {
        for (request, expected) in [
            (KVM_RUN, 0xae80),
            (KVM_CREATE_VM, 0xae01),
            (KVM_SET_USER_MEMORY_REGION, 0x4020_ae46),
            (KVM_IRQFD, 0x4020_ae76),
            (KVM_IOEVENTFD, 0x4040_ae79),
            (KVM_SET_GSI_ROUTING, 0x4008_ae6a),
            (KVM_GET_SUPPORTED_CPUID, 0xc008_ae05),
            (KVM_SET_CPUID2, 0x4008_ae90),
            (KVM_GET_REGS, 0x8090_ae81),
            (KVM_GET_SREGS, 0x8138_ae83),
            (KVM_SET_LAPIC, 0x4400_ae8f),
            (BLKSSZGET, 0x1268),
            (BLKDISCARD, 0x1277),
            (BLKPBSZGET, 0x127b),
            (VHOST_SET_MEM_TABLE, 0x4008_af03),
            (VHOST_SET_VRING_ADDR, 0x4028_af11),
            (VHOST_VSOCK_SET_RUNNING, 0x4004_af61),
            (TCGETS2, 0x802c_542a),
            (TUNSETOFFLOAD, 0x4004_54d0),
            (TUNSETQUEUE, 0x4004_54d9),
            (TCSETS2, 0x402c_542b),
        ] {
            assert_eq!(request, expected, "{request:#x} {expected:#x}");
        }
    }
}
