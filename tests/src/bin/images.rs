//! Prepares the guests of the testbed and prints where they are: `cargo run -p tests --bin images`.

use anyhow::Result;
use tests::cache::Cache;
use tests::kernel::Kernel;
use tests::nixos_guest::NixosGuest;
use tests::tiny_guest;

fn main() -> Result<()> {
    let cache = Cache::open()?;
    let kernel = Kernel::fetch(&cache)?;
    let nixos = NixosGuest::prepare(&cache, &kernel)?;
    println!("kernel {}", kernel.image.display());
    println!("tiny-initramfs {}", tiny_guest::initramfs(&cache, &kernel)?.display());
    println!("initrd {}", nixos.initrd.display());
    println!("erofs {}", nixos.erofs.display());
    println!("squashfs {}", nixos.squashfs.display());
    println!("store {}", nixos.store.display());
    println!("cmdline {}", nixos.command_line);
    Ok(())
}
