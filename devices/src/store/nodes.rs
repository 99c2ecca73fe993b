//! What the guest knows: a node for each file that it has looked up and not forgotten.
//!
//! A node is a name in another node, so that it costs less than 100 bytes and no descriptor. Links
//! to one file are one node, so that the guest reads and keeps it once.

use std::hash::{BuildHasher as _, RandomState};

use hashbrown::HashTable;
use rustix::io::Errno;

use super::wire::ROOT_ID;

/// A bound on what a guest can make us keep; several times what the largest store has.
const NODES_MAX: usize = 1 << 25;

/// What is kept free for further nodes: one for so many. Doubling would leave half of it unused.
const GROWTH: usize = 16;

/// Which file it is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) inode: u64,
    pub(super) device: u32,
    /// As the upper bits of a mode.
    pub(super) kind: u32,
}

/// Where a file is found on the host.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) identity: Identity,
    /// The directory that it is in, and its path below the root of the tree: empty for the root.
    pub(super) parent: Identity,
    pub(super) path: Vec<u8>,
}

/// All nodes; the first one is the root.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: Vec<Node>,
    vacant: Vec<u32>,
    /// Indices, found by the identity of what is there.
    by_identity: HashTable<u32>,
    hasher: RandomState,
}

#[derive(Debug)]
struct Node {
    name: Box<[u8]>,
    identity: Identity,
    /// References that the guest has.
    lookups: u64,
    parent: u32,
    /// Nodes whose parent this is: it is kept for them.
    children: u32,
}

const ROOT: u32 = 0;

impl Nodes {
    pub(super) fn new(root: Identity) -> Self {
        let (nodes, vacant, by_identity) = (Vec::new(), Vec::new(), HashTable::new());
        let mut nodes = Self { nodes, vacant, by_identity, hasher: RandomState::new() };
        nodes.begin(root);
        nodes
    }

    /// Forgets everything but the root: another session begins.
    pub(super) fn clear(&mut self) {
        if let Some(root) = self.nodes.first().map(|root| root.identity) {
            *self = Self::new(root);
        }
    }

    /// Where the node is, or an error where there is none.
    pub(super) fn place(&self, id: u64) -> Result<Place, Errno> {
        let node = self.node(index(id)?)?;
        let parent = self.node(node.parent)?.identity;
        let mut names = Vec::new();
        let mut at = node;
        while !at.name.is_empty() {
            names.push(&at.name);
            at = self.node(at.parent)?;
        }
        let mut path = Vec::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        for name in names.into_iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        Ok(Place { identity: node.identity, parent, path })
    }

    /// Notes that the guest was told of a file, found as `name` in the node `parent`.
    pub(super) fn refer(
        &mut self,
        parent: u64,
        name: &[u8],
        identity: Identity,
    ) -> Result<u64, Errno> {
        let parent = index(parent)?;
        self.node(parent)?;
        if let Some(known) = self.find(identity) {
            let node = self.nodes.get_mut(known as usize).ok_or(Errno::STALE)?;
            node.lookups = node.lookups.saturating_add(1);
            node.identity.kind = identity.kind;
            return Ok(id(known));
        }
        let node = Node { name: name.into(), identity, lookups: 1, parent, children: 0 };
        let place = self.put(node)?;
        self.index(identity, place);
        if let Some(parent) = self.nodes.get_mut(parent as usize) {
            parent.children = parent.children.saturating_add(1);
        }
        Ok(id(place))
    }

    /// Takes back references; a node that has none, and is on no other node's path, is gone.
    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        let Ok(mut at) = index(id) else { return };
        let Some(node) = self.nodes.get_mut(at as usize).filter(|_| at != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        // The parent may have been waiting for its last child.
        while at != ROOT {
            let Some(node) = self.nodes.get_mut(at as usize) else { return };
            if node.lookups > 0 || node.children > 0 || node.name.is_empty() {
                return;
            }
            let parent = node.parent;
            node.name = Box::default();
            let hash = hash(&self.hasher, node.identity);
            if let Ok(found) = self.by_identity.find_entry(hash, |index| *index == at) {
                found.remove();
            }
            self.vacant.push(at);
            let Some(above) = self.nodes.get_mut(parent as usize) else { return };
            above.children = above.children.saturating_sub(1);
            at = parent;
        }
    }

    /// How many nodes there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }

    fn begin(&mut self, root: Identity) {
        let name = Box::default();
        self.nodes.push(Node { name, identity: root, lookups: 1, parent: ROOT, children: 0 });
        self.index(root, ROOT);
    }

    /// The node of a file, if the guest knows it.
    fn find(&self, identity: Identity) -> Option<u32> {
        let is_it = |index: &u32| {
            let node = self.nodes.get(*index as usize);
            node.is_some_and(|node| key(node.identity) == key(identity))
        };
        self.by_identity.find(hash(&self.hasher, identity), is_it).copied()
    }

    fn index(&mut self, identity: Identity, place: u32) {
        let Self { nodes, by_identity, hasher, .. } = self;
        let hash_of = |index: &u32| {
            let node = nodes.get(*index as usize);
            node.map_or(0, |node| hash(hasher, node.identity))
        };
        by_identity.insert_unique(hash(hasher, identity), place, hash_of);
    }

    fn node(&self, index: u32) -> Result<&Node, Errno> {
        let node = self.nodes.get(index as usize).ok_or(Errno::STALE)?;
        // Only the root has no name, and what is vacant.
        if node.name.is_empty() && index != ROOT { Err(Errno::STALE) } else { Ok(node) }
    }

    fn put(&mut self, node: Node) -> Result<u32, Errno> {
        if let Some(vacant) = self.vacant.pop() {
            *self.nodes.get_mut(vacant as usize).ok_or(Errno::IO)? = node;
            return Ok(vacant);
        }
        let index = self.nodes.len();
        if index >= NODES_MAX {
            return Err(Errno::NOMEM);
        }
        if index == self.nodes.capacity() {
            self.nodes.reserve_exact(index / GROWTH + GROWTH);
        }
        self.nodes.push(node);
        u32::try_from(index).map_err(|_| Errno::NOMEM)
    }
}

/// What makes a file the same file, whatever it has become.
fn key(Identity { inode, device, .. }: Identity) -> (u64, u32) {
    (inode, device)
}

fn hash(hasher: &RandomState, identity: Identity) -> u64 {
    hasher.hash_one(key(identity))
}

fn id(index: u32) -> u64 {
    u64::from(index) + ROOT_ID
}

fn index(id: u64) -> Result<u32, Errno> {
    id.checked_sub(ROOT_ID).and_then(|index| u32::try_from(index).ok()).ok_or(Errno::STALE)
}

#[cfg(test)]
mod test {
    use super::*;

    fn file(inode: u64) -> Identity {
        Identity { inode, device: 1, kind: 0o100_000 }
    }

    #[test]
    fn a_node_is_its_path_until_it_is_forgotten() {
        let mut nodes = Nodes::new(file(1));
        let folder = nodes.refer(ROOT_ID, b"folder", file(2)).unwrap();
        let leaf = nodes.refer(folder, b"leaf", file(3)).unwrap();
        assert_eq!(nodes.place(leaf).unwrap().path, b"folder/leaf");
        assert_eq!(nodes.place(ROOT_ID).unwrap().path, b"");
        // The way to a child is kept.
        nodes.forget(folder, 1);
        assert_eq!(nodes.place(leaf).unwrap().path, b"folder/leaf");
        nodes.forget(leaf, 1);
        assert_eq!(nodes.place(leaf).unwrap_err(), Errno::STALE);
        assert_eq!(nodes.place(folder).unwrap_err(), Errno::STALE);
        assert_eq!(nodes.len(), 1);
    }

    #[test]
    fn links_are_one_node_with_the_sum_of_their_references() {
        let mut nodes = Nodes::new(file(1));
        let first = nodes.refer(ROOT_ID, b"a", file(2)).unwrap();
        assert_eq!(nodes.refer(ROOT_ID, b"b", file(2)).unwrap(), first);
        nodes.forget(first, 1);
        assert_eq!(nodes.place(first).unwrap().path, b"a");
        nodes.forget(first, u64::MAX);
        assert!(nodes.place(first).is_err());
    }

    #[test]
    fn what_nobody_was_told_of_is_stale() {
        let mut nodes = Nodes::new(file(1));
        for id in [0, 2, 3, u64::from(u32::MAX), u64::from(u32::MAX) + 2, u64::MAX] {
            assert_eq!(nodes.place(id).unwrap_err(), Errno::STALE);
            nodes.forget(id, 1);
            assert_eq!(nodes.refer(id, b"x", file(9)).unwrap_err(), Errno::STALE);
        }
        nodes.forget(ROOT_ID, u64::MAX);
        assert!(nodes.place(ROOT_ID).is_ok());
    }

    #[test]
    fn places_are_used_again() {
        let mut nodes = Nodes::new(file(1));
        for inode in 2..1000 {
            let id = nodes.refer(ROOT_ID, b"name", file(inode)).unwrap();
            nodes.forget(id, 1);
            nodes.forget(id, 1);
        }
        assert_eq!((nodes.nodes.len(), nodes.len()), (2, 1));
        // Whoever is found by its identity is who was put there last.
        let last = nodes.refer(ROOT_ID, b"other", file(5)).unwrap();
        assert_eq!(nodes.refer(ROOT_ID, b"other", file(5)).unwrap(), last);
        assert_eq!(nodes.place(last).unwrap().path, b"other");
        assert!(nodes.refer(ROOT_ID, b"third", file(999)).unwrap() != last);
    }

    /// What the C library keeps for an allocation: 8 bytes more, in steps of 16, at least 32.
    fn allocated(bytes: usize) -> usize {
        (bytes + 8).next_multiple_of(16).max(32)
    }

    fn bytes(nodes: &Nodes) -> usize {
        let names: usize = nodes.nodes.iter().map(|node| allocated(node.name.len())).sum();
        let table = nodes.by_identity.allocation_size();
        nodes.nodes.capacity() * size_of::<Node>() + table + names
    }

    #[test]
    fn a_known_file_costs_at_most_100_bytes_however_many_there_are() {
        // As long a name as most are, and at every size from where the table is at its emptiest.
        let mut nodes = Nodes::new(file(1));
        for known in 2..200_000_usize {
            let name = format!("lib-number-{known:09}.so");
            nodes.refer(ROOT_ID, name.as_bytes(), file(known as u64)).unwrap();
            if known > 1000 && known.is_power_of_two() || known % 28_672 == 1 {
                assert!(bytes(&nodes) <= known * 100, "{known}: {}", bytes(&nodes) / known);
            }
        }
        assert_eq!(nodes.len(), 199_999);
    }
}
