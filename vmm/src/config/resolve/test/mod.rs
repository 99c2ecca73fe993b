mod boot;
mod consoles;
mod disks;
mod memory;
mod network;
mod round_trip;
mod shares;

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::super::{
    Balloon, BootProtocol, Credential, Engine, Forward, HugePages, Machined, Memory, Net, NetLink,
    OnReboot, Pmem, Ready, Share, ShareCache, ShareSandbox, Smbios, StoreShare, Transport,
    VhostNet, Vsock, Watchdog,
};
use super::*;

/// A folder with a kernel and disks, and the smallest machine made of them.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("kernel"), "kernel").unwrap();
        fs::write(folder.path().join("initrd"), "initrd").unwrap();
        for disk in ["a.img", "b.img"] {
            fs::write(folder.path().join(disk), [0; 1024]).unwrap();
        }
        let mut erofs = vec![0; 4096];
        erofs[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        fs::write(folder.path().join("store.erofs"), erofs).unwrap();
        fs::write(folder.path().join("store.squashfs"), [b"hsqs".as_slice(), &[0; 508]].concat())
            .unwrap();
        fs::write(folder.path().join("odd.img"), [0; 513]).unwrap();
        fs::write(folder.path().join("empty.img"), []).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> Config {
        Config { kernel: self.path("kernel"), ..Config::default() }
    }

    /// Changes the smallest machine into one that must be refused with `expected`, in which `@`
    /// stands for the folder.
    #[track_caller]
    fn refused(&self, change: impl FnOnce(&mut Config), expected: &str) {
        let mut config = self.config();
        change(&mut config);
        let error = format!("{:#}", config.resolve().unwrap_err());
        let folder = self.folder.path().to_str().unwrap();
        assert_eq!(error, expected.replace('@', folder));
    }

    fn resolved(&self, change: impl FnOnce(&mut Config)) -> Config {
        let mut config = self.config();
        change(&mut config);
        config.resolve().unwrap()
    }
}
