//! CPUID leaves shown to the guest.
//!
//! The host's supported leaves are the base. What describes the machine rather than the processor
//! is replaced: one socket with a core for each virtual processor and one thread in each core, the
//! hypervisor's own leaves, and the frequencies that spare a guest its calibration loops.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::platform::Processors;

const FEATURES: u32 = 1;
const CACHES_INTEL: u32 = 4;
const TOPOLOGY: u32 = 0xB;
const EXTENDED_STATES: u32 = 0xD;
const CRYSTAL_FREQUENCY: u32 = 0x15;
const PROCESSOR_FREQUENCY: u32 = 0x16;
const TOPOLOGY_V2: u32 = 0x1F;
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const FEATURES_AMD: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const CACHES_AMD: u32 = 0x8000_001D;
const TOPOLOGY_AMD: u32 = 0x8000_001E;
const TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

/// Asynchronous page faults (bits 4, 10 and 14): a guest page that the host swapped out is waited
/// for by the virtual processor, which every kernel gets right.
const KVM_ASYNC_PAGE_FAULTS: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Frequency of the in-kernel local APIC's bus (KVM_CAP_X86_APIC_BUS_CYCLES_NS, 1 ns by default).
const APIC_BUS_KHZ: u32 = 1_000_000;

/// Address bits of the oldest 64-bit processors, where CPUID does not say.
const ADDRESS_BITS_DEFAULT: u8 = 36;

/// What KVM says about the host's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostClock {
    /// Frequency of the guest's time stamp counter in kHz; zero when unknown.
    pub tsc_khz: u32,
    /// KVM emulates the local APIC's TSC-deadline mode.
    pub tsc_deadline: bool,
}

/// Makes the leaves of processor 0 from those that the host supports.
pub fn guest_leaves(
    supported: &[kvm_cpuid_entry2],
    processors: Processors,
    clock: HostClock,
) -> Vec<kvm_cpuid_entry2> {
    let topology = Topology::new(processors);
    let max_leaf = find(supported, 0).map_or(0, |entry| entry.eax);
    let intel = find(supported, 0).is_some_and(is_intel);
    let mut leaves: Vec<_> =
        supported.iter().filter(|entry| !is_replaced(entry.function)).copied().collect();
    for entry in &mut leaves {
        match entry.function {
            FEATURES => set_features(entry, topology, clock),
            CACHES_INTEL => set_caches_intel(entry, topology),
            KVM_SIGNATURE => entry.eax = HYPERVISOR_TIMING,
            KVM_FEATURES => entry.eax &= !KVM_ASYNC_PAGE_FAULTS,
            FEATURES_AMD if !intel => set_bit(&mut entry.ecx, 1, topology.count > 1),
            ADDRESS_SIZES => set_core_count(entry, topology),
            CACHES_AMD => set_caches_amd(entry, topology),
            TOPOLOGY_AMD => (entry.ebx, entry.ecx) = (0, 0),
            _ => {}
        }
    }
    for function in [TOPOLOGY, TOPOLOGY_V2] {
        if max_leaf >= function {
            leaves.extend(topology_leaves(function, topology));
        }
    }
    if clock.tsc_khz != 0 {
        leaves.push(leaf(HYPERVISOR_TIMING, [clock.tsc_khz, APIC_BUS_KHZ, 0, 0]));
        if intel && max_leaf >= PROCESSOR_FREQUENCY {
            leaves.extend(frequency_leaves(clock));
        }
    }
    leaves
}

/// Writes a processor's APIC id to every leaf that shows it.
pub fn set_apic_id(leaves: &mut [kvm_cpuid_entry2], apic_id: u32) {
    for entry in leaves {
        match entry.function {
            FEATURES => entry.ebx = entry.ebx & 0x00FF_FFFF | apic_id << 24,
            TOPOLOGY | TOPOLOGY_V2 => entry.edx = apic_id,
            TOPOLOGY_AMD => {
                entry.eax = apic_id;
                entry.ebx = entry.ebx & !0xFF | apic_id & 0xFF;
            }
            _ => {}
        }
    }
}

/// Number of guest-physical address bits that the leaves announce.
pub fn address_bits(leaves: &[kvm_cpuid_entry2]) -> u8 {
    find(leaves, ADDRESS_SIZES).map_or(ADDRESS_BITS_DEFAULT, |entry| entry.eax.to_le_bytes()[0])
}

/// The processor states that XCR0 enables at start: x87, SSE and AVX, those of them that there are.
///
/// A real processor starts with x87 only and leaves the rest to the kernel, which enables all it
/// knows before it looks at their sizes. An emulated host does not tell KVM when its guest does so,
/// and KVM would take it back at each exit.
pub fn first_states(leaves: &[kvm_cpuid_entry2]) -> Option<u64> {
    const X87_SSE_AVX: u32 = 0b111;
    find(leaves, EXTENDED_STATES).map(|entry| u64::from(entry.eax & X87_SSE_AVX))
}

/// How the APIC ids of one socket are made: `core_bits` bits of core number, no bits of thread
/// number.
#[derive(Clone, Copy)]
struct Topology {
    count: u32,
    core_bits: u32,
}

impl Topology {
    fn new(processors: Processors) -> Self {
        let count = processors.count.max(1);
        Self { count, core_bits: count.next_power_of_two().trailing_zeros() }
    }

    /// Number of APIC ids that the socket has room for.
    fn apic_ids(self) -> u32 {
        1 << self.core_bits
    }
}

/// Leaves that are made anew, or that contradict the topology and that no guest needs.
fn is_replaced(function: u32) -> bool {
    matches!(
        function,
        TOPOLOGY
            | TOPOLOGY_V2
            | CRYSTAL_FREQUENCY
            | PROCESSOR_FREQUENCY
            | HYPERVISOR_TIMING
            | TOPOLOGY_AMD_V2
    )
}

fn set_features(entry: &mut kvm_cpuid_entry2, topology: Topology, clock: HostClock) {
    // Bits 23 to 16: addressable ids of logical processors; 8 bits hold no more than 255.
    entry.ebx = entry.ebx & 0x0000_FFFF | topology.apic_ids().min(255) << 16;
    set_bit(&mut entry.ecx, 21, true); // x2APIC
    set_bit(&mut entry.ecx, 24, clock.tsc_deadline);
    set_bit(&mut entry.ecx, 31, true); // hypervisor
    set_bit(&mut entry.edx, 28, topology.count > 1); // HTT: more than one logical processor
}

fn set_caches_intel(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1F == 0 {
        return;
    }
    let cores_minus_1 = (topology.apic_ids() - 1).min(63);
    let level = entry.eax >> 5 & 7;
    let sharing_minus_1 = if level >= 3 { (topology.apic_ids() - 1).min(0xFFF) } else { 0 };
    entry.eax = entry.eax & 0x3FFF | cores_minus_1 << 26 | sharing_minus_1 << 14;
}

fn set_caches_amd(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    if entry.eax & 0x1F == 0 {
        return;
    }
    let level = entry.eax >> 5 & 7;
    let sharing_minus_1 = if level >= 3 { (topology.count - 1).min(0xFFF) } else { 0 };
    entry.eax = entry.eax & !(0xFFF << 14) | sharing_minus_1 << 14;
}

fn set_core_count(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    entry.ecx = entry.ecx & !0xF0FF | (topology.count - 1).min(255) | topology.core_bits << 12;
}

/// The extended topology enumeration: a thread level, a core level and the end of the list.
fn topology_leaves(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const THREAD_LEVEL: u32 = 1 << 8;
    const CORE_LEVEL: u32 = 2 << 8;
    let levels = [
        [0, 1, THREAD_LEVEL, 0],
        [topology.core_bits, topology.count, CORE_LEVEL | 1, 0],
        [0, 0, 2, 0],
    ];
    let mut index = 0;
    levels.map(|registers| {
        let mut entry = leaf(function, registers);
        entry.index = index;
        entry.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        index += 1;
        entry
    })
}

/// Time stamp counter as a ratio of the APIC bus clock, and the frequencies in MHz.
fn frequency_leaves(clock: HostClock) -> [kvm_cpuid_entry2; 2] {
    const BUS_MHZ: u32 = 100;
    let mhz = clock.tsc_khz / 1000;
    [
        leaf(CRYSTAL_FREQUENCY, [APIC_BUS_KHZ, clock.tsc_khz, APIC_BUS_KHZ * 1000, 0]),
        leaf(PROCESSOR_FREQUENCY, [mhz, mhz, BUS_MHZ, 0]),
    ]
}

fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
    leaves.iter().find(|entry| entry.function == function)
}

fn is_intel(vendor: &kvm_cpuid_entry2) -> bool {
    vendor.ebx.to_le_bytes() == *b"Genu"
}

fn set_bit(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

#[cfg(test)]
mod test {
    use super::*;

    const CLOCK: HostClock = HostClock { tsc_khz: 2_500_000, tsc_deadline: true };

    fn intel_host() -> Vec<kvm_cpuid_entry2> {
        let cache = |index, eax| {
            let mut entry = leaf(CACHES_INTEL, [eax, 0, 0, 0]);
            entry.index = index;
            entry
        };
        vec![
            leaf(0, [0x1F, u32::from_le_bytes(*b"Genu"), 0, 0]),
            leaf(FEATURES, [0, 0x3320_0800, 1 << 27, 0]),
            cache(0, 0x1C00_4121),
            cache(3, 0x1C03_C163),
            cache(4, 0),
            leaf(TOPOLOGY, [1, 2, 0x100, 51]),
            leaf(KVM_SIGNATURE, [KVM_FEATURES, 0, 0, 0]),
            leaf(KVM_FEATURES, [0x0100_7EFB, 0, 0, 0]),
            leaf(ADDRESS_SIZES, [0x302E, 0, 0x7013, 0]),
        ]
    }

    fn leaves_for(count: u32) -> Vec<kvm_cpuid_entry2> {
        guest_leaves(&intel_host(), Processors { count }, CLOCK)
    }

    #[test]
    fn three_processors_are_three_cores_of_one_socket_with_ids_of_two_bits() {
        let leaves = leaves_for(3);
        let topology: Vec<_> = leaves.iter().filter(|leaf| leaf.function == TOPOLOGY).collect();
        assert_eq!(topology.len(), 3);
        assert_eq!((topology[0].eax, topology[0].ebx), (0, 1));
        assert_eq!((topology[1].eax, topology[1].ebx, topology[1].index), (2, 3, 1));
        let sizes = find(&leaves, ADDRESS_SIZES).unwrap();
        assert_eq!(sizes.ecx, 2 << 12 | 2);
        assert_eq!(find(&leaves, FEATURES).unwrap().ebx >> 16 & 0xFF, 4);
    }

    #[test]
    fn inner_caches_are_private_and_the_last_level_is_shared_by_the_socket() {
        let leaves = leaves_for(4);
        let caches: Vec<_> = leaves.iter().filter(|leaf| leaf.function == CACHES_INTEL).collect();
        assert_eq!(caches[0].eax, 3 << 26 | 0x121);
        assert_eq!(caches[1].eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(caches[2].eax, 0);
    }

    #[test]
    fn one_processor_is_not_multithreaded() {
        assert_eq!(find(&leaves_for(1), FEATURES).unwrap().edx & 1 << 28, 0);
        assert_ne!(find(&leaves_for(2), FEATURES).unwrap().edx & 1 << 28, 0);
    }

    #[test]
    fn every_leaf_that_shows_an_apic_id_follows_it() {
        let mut leaves = leaves_for(64);
        set_apic_id(&mut leaves, 37);
        assert_eq!(find(&leaves, FEATURES).unwrap().ebx >> 24, 37);
        assert!(leaves.iter().filter(|leaf| leaf.function == TOPOLOGY).all(|leaf| leaf.edx == 37));
    }

    #[test]
    fn no_asynchronous_page_faults_are_offered_but_the_clock_is() {
        let features = find(&leaves_for(1), KVM_FEATURES).unwrap().eax;
        assert_eq!(features & KVM_ASYNC_PAGE_FAULTS, 0);
        assert_ne!(features & 1 << 3, 0);
    }

    #[test]
    fn frequencies_are_told_so_that_nothing_is_calibrated() {
        let leaves = leaves_for(1);
        let crystal = find(&leaves, CRYSTAL_FREQUENCY).unwrap();
        let hertz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax);
        assert_eq!(hertz, u64::from(CLOCK.tsc_khz) * 1000);
        assert_eq!(find(&leaves, HYPERVISOR_TIMING).unwrap().eax, CLOCK.tsc_khz);
        assert_eq!(find(&leaves, KVM_SIGNATURE).unwrap().eax, HYPERVISOR_TIMING);
    }

    #[test]
    fn an_unknown_frequency_is_not_announced() {
        let clock = HostClock::default();
        let leaves = guest_leaves(&intel_host(), Processors { count: 1 }, clock);
        assert!(find(&leaves, CRYSTAL_FREQUENCY).is_none());
        assert_eq!(find(&leaves, FEATURES).unwrap().ecx & 1 << 24, 0);
    }

    #[test]
    fn states_that_the_host_lacks_are_not_enabled() {
        assert_eq!(first_states(&[leaf(EXTENDED_STATES, [0x2E7, 0, 0, 0])]), Some(7));
        assert_eq!(first_states(&[leaf(EXTENDED_STATES, [3, 0, 0, 0])]), Some(3));
        assert_eq!(first_states(&[]), None);
    }

    #[test]
    fn address_bits_come_from_the_host_or_are_36() {
        assert_eq!(address_bits(&leaves_for(1)), 46);
        assert_eq!(address_bits(&[]), 36);
    }
}
