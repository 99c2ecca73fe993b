use std::sync::atomic::Ordering;

use super::*;
use crate::test::pci_wire::Routes;

const ENABLE: u8 = 0x80;
const FUNCTION_MASK: u8 = 0x40;

struct Guest {
    msix: Msix,
    routes: Arc<Routes>,
}

impl Guest {
    fn new(count: usize) -> Self {
        let routes = Arc::new(Routes::default());
        let msix = Msix::new(count, Arc::clone(&routes) as Arc<dyn MessageRoutes>).unwrap();
        Self { msix, routes }
    }

    /// Writes a vector as Linux does, word by word; its data are its number.
    fn set(&mut self, vector: u32, masked: bool) {
        for (word, value) in [(0, 0xfee0_0000), (1, 0), (2, vector), (3, u32::from(masked))] {
            let offset = usize::try_from(16 * vector + 4 * word).unwrap();
            self.msix.write_table(offset, &value.to_le_bytes());
        }
    }

    fn word(&self, offset: usize) -> u32 {
        let mut data = [0xaa; 4];
        self.msix.read_table(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn pending(&self) -> u64 {
        let mut data = [0xaa; 8];
        self.msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    fn updates(&self) -> usize {
        self.routes.updates.swap(0, Ordering::SeqCst)
    }
}

#[test]
fn vectors_are_masked_from_reset() {
    let guest = Guest::new(3);
    assert_eq!([0, 1, 2].map(|vector| guest.word(16 * vector + 12)), [1; 3]);
}

#[test]
fn setting_up_all_vectors_before_use_costs_one_update() {
    let mut guest = Guest::new(65);
    guest.msix.set_control(ENABLE | FUNCTION_MASK);
    (0..65).for_each(|vector| guest.set(vector, true));
    guest.msix.set_control(ENABLE);
    (0..65).for_each(|vector| guest.set(vector, false));
    assert_eq!(guest.updates(), 0);
    guest.msix.set_in_use(true);
    assert_eq!(guest.updates(), 1);
    assert_eq!(guest.routes.len(), 65);
}

#[test]
fn a_masked_vector_keeps_its_signal_as_its_pending_bit() {
    let mut guest = Guest::new(3);
    guest.msix.set_control(ENABLE);
    guest.msix.set_in_use(true);
    (0..3).for_each(|vector| guest.set(vector, vector == 1));
    assert_eq!(guest.routes.len(), 2);
    guest.msix.event(1).unwrap().signal();
    assert_eq!(guest.pending(), 0b010);
    guest.set(1, false);
    assert!(guest.routes.event(1).unwrap().take(), "the event comes with its signal");
    assert_eq!(guest.pending(), 0);
}

#[test]
fn the_function_mask_detaches_all_and_attaches_all_at_once() {
    let mut guest = Guest::new(4);
    guest.msix.set_control(ENABLE);
    (0..4).for_each(|vector| guest.set(vector, false));
    guest.msix.set_in_use(true);
    guest.updates();
    guest.msix.set_control(ENABLE | FUNCTION_MASK);
    assert_eq!((guest.updates(), guest.routes.len()), (1, 0));
    guest.msix.event(3).unwrap().signal();
    assert_eq!(guest.pending(), 0b1000);
    guest.msix.set_control(ENABLE);
    assert_eq!((guest.updates(), guest.routes.len()), (1, 4));
}

#[test]
fn a_message_that_changes_in_use_counts_at_once() {
    let mut guest = Guest::new(1);
    guest.msix.set_control(ENABLE);
    guest.set(0, false);
    guest.msix.set_in_use(true);
    guest.updates();
    guest.msix.write_table(8, &77u32.to_le_bytes());
    assert_eq!(guest.updates(), 1);
    assert!(guest.routes.event(77).is_some());
    guest.msix.write_table(8, &77u32.to_le_bytes());
    assert_eq!(guest.updates(), 0, "nothing has changed");
}

#[test]
fn a_reset_masks_detaches_and_forgets() {
    let mut guest = Guest::new(2);
    guest.msix.set_control(ENABLE);
    (0..2).for_each(|vector| guest.set(vector, vector == 1));
    guest.msix.set_in_use(true);
    guest.msix.event(1).unwrap().signal();
    guest.msix.reset();
    assert_eq!((guest.routes.len(), guest.pending()), (0, 0));
    assert_eq!([0, 4, 8, 12].map(|offset| guest.word(offset)), [0, 0, 0, 1]);
}

#[test]
fn any_access_to_the_table_is_harmless() {
    let mut guest = Guest::new(2);
    guest.msix.set_control(ENABLE);
    guest.msix.set_in_use(true);
    for offset in [0, 1, 7, 13, 15, 24, 31, 32, 1000, usize::MAX - 16] {
        for len in 1..=8 {
            guest.msix.write_table(offset, &[0xff; 8][..len]);
            guest.msix.read_table(offset, &mut [0; 8][..len]);
            guest.msix.read_pending(offset, &mut [0; 8][..len]);
        }
    }
    assert_eq!(guest.word(16 + 12), 1, "only the mask bit is there");
    assert_eq!(guest.word(32), 0, "there are two vectors");
}
