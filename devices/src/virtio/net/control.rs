//! The control queue (virtio 1.3, section 5.1.6.5): one command a chain, each answered.

use super::backend::{Link, Settings};
use super::layout::{
    FEATURE_CTRL_GUEST_OFFLOADS, FEATURE_CTRL_MAC_ADDR, FEATURE_CTRL_RX, FEATURE_CTRL_RX_EXTRA,
    FEATURE_GUEST_ANNOUNCE, FEATURE_MQ, GUEST_OFFLOADS, command,
};
use crate::virtio::chain::Chain;
use crate::virtio::queue::Queue;
use crate::virtio::worker::{Fault, Worker};
use crate::warn_limited;

/// Addresses in one table; more than any driver of ours has seen in use. They are checked for
/// their form and forgotten, since frames are not filtered.
const TABLE_ADDRESSES_MAX: u32 = 1 << 16;

const ADDRESS_BYTES: usize = 6;

/// What a command is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Answer {
    Ok = 0,
    Error = 1,
}

/// The back of the control queue.
pub(super) struct ControlWorker {
    name: String,
    queue: Queue,
    chain: Chain,
    features: u64,
    /// Queue pairs that the driver knows of.
    pairs: u16,
    settings: Box<dyn Settings>,
    link: Link,
}

impl ControlWorker {
    pub(super) fn new(
        name: &str,
        queue: Queue,
        features: u64,
        pairs: u16,
        settings: Box<dyn Settings>,
        link: Link,
    ) -> Self {
        let chain = Chain::with_capacity(queue.size());
        Self { name: name.to_owned(), queue, chain, features, pairs, settings, link }
    }

    fn serve(&mut self) -> Result<(), Fault> {
        while self.queue.pop(&mut self.chain)? {
            let place = self.chain.split_off_status();
            let place =
                place.ok_or(Fault::Request("a control command has no room for an answer"))?;
            let answer = self.carry_out().unwrap_or(Answer::Error);
            place.write(0, &(answer as u8));
            self.queue.complete(self.chain.head(), 1);
        }
        Ok(())
    }

    /// Carries out the command of the chain; `None` when it is not one that was agreed on, or is
    /// malformed.
    fn carry_out(&mut self) -> Option<Answer> {
        let [class, number]: [u8; 2] = self.chain.take()?;
        match (class, number) {
            (command::RX, number) => self.set_receive_mode(number),
            (command::MAC, command::MAC_TABLE_SET) if self.has(FEATURE_CTRL_RX) => {
                self.check_table()?;
                self.check_table()
            }
            (command::MAC, command::MAC_ADDR_SET) if self.has(FEATURE_CTRL_MAC_ADDR) => {
                let mac: [u8; ADDRESS_BYTES] = self.chain.take()?;
                let is_of_one_card = mac.first()? & 1 == 0 && mac != [0; ADDRESS_BYTES];
                is_of_one_card.then(|| self.link.set_mac(mac)).map(|()| Answer::Ok)
            }
            (command::ANNOUNCE, command::ANNOUNCE_ACK) if self.has(FEATURE_GUEST_ANNOUNCE) => {
                self.link.end_announcement();
                Some(Answer::Ok)
            }
            (command::MQ, command::MQ_VQ_PAIRS_SET) if self.has(FEATURE_MQ) => {
                let pairs = u16::from_le_bytes(self.chain.take()?);
                let is_known = (1..=self.pairs).contains(&pairs);
                let outcome = is_known.then(|| self.settings.set_pairs(pairs))?;
                Some(self.told(outcome, "use other queue pairs"))
            }
            (command::GUEST_OFFLOADS, command::GUEST_OFFLOADS_SET)
                if self.has(FEATURE_CTRL_GUEST_OFFLOADS) =>
            {
                let offloads = u64::from_le_bytes(self.chain.take()?);
                let is_known = offloads & !(self.features & GUEST_OFFLOADS) == 0;
                let outcome = is_known.then(|| self.settings.set_guest_offloads(offloads))?;
                Some(self.told(outcome, "change its offloads"))
            }
            _ => None,
        }
    }

    /// Receive modes only narrow or widen a filter, and there is none.
    fn set_receive_mode(&mut self, number: u8) -> Option<Answer> {
        let is_known = match number {
            0..=command::RX_ALLMULTI => self.has(FEATURE_CTRL_RX),
            _ if number <= command::RX_NOBCAST => self.has(FEATURE_CTRL_RX_EXTRA),
            _ => false,
        };
        let [on]: [u8; 1] = self.chain.take()?;
        (is_known && on <= 1).then_some(Answer::Ok)
    }

    /// One of the two tables of a command: a number and as many addresses.
    fn check_table(&mut self) -> Option<Answer> {
        let count = u32::from_le_bytes(self.chain.take()?);
        if count > TABLE_ADDRESSES_MAX {
            return None;
        }
        for _ in 0..count {
            let _: [u8; ADDRESS_BYTES] = self.chain.take()?;
        }
        Some(Answer::Ok)
    }

    fn told(&self, outcome: std::io::Result<()>, what: &str) -> Answer {
        match outcome {
            Ok(()) => Answer::Ok,
            Err(error) => {
                warn_limited!("{}: the host cannot {what}: {error}", self.name);
                Answer::Error
            }
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

impl Worker for ControlWorker {
    fn queues(&mut self) -> &mut [Queue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn doorbell(&mut self, _index: usize) -> Result<(), Fault> {
        let outcome = self.serve();
        self.queue.notify_driver();
        outcome
    }
}
