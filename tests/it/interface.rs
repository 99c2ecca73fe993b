//! What is at the host's end of a card? An interface with addresses of IPv4 and IPv6, which are
//! 10.N.0.1 and fdN::1 in network N; the guest's are 10.N.0.2 and fdN::2.

use std::path::Path;

use anyhow::Result;
use tests::guest::Guest;
use tests::tool;

/// An interface of the host, which goes when it is dropped.
pub(crate) struct Interface(&'static str);

impl Interface {
    /// Makes an interface with `arguments` of ip(8) and gives it addresses in network `number`.
    pub(crate) fn add(arguments: &[&str], name: &'static str, number: u8) -> Result<Self> {
        // A test that was ended may have left it.
        let _ = ip(&["link", "delete", name]);
        ip(arguments)?;
        let interface = Self(name);
        interface.set(&["up"])?;
        interface.address(number)?;
        Ok(interface)
    }

    /// Gives it its addresses again, if it has lost them.
    pub(crate) fn address(&self, number: u8) -> Result<()> {
        for address in [format!("10.{number}.0.1/24"), format!("fd{number}::1/64")] {
            ip(&["addr", "replace", &address, "dev", self.0, "nodad"])
                .or_else(|_| ip(&["addr", "replace", &address, "dev", self.0]))?;
        }
        Ok(())
    }

    /// Changes it as `ip link set` does.
    pub(crate) fn set(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["link", "set", self.0][..], arguments].concat())
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", self.0]);
    }
}

/// Runs ip(8).
pub(crate) fn ip(arguments: &[&str]) -> Result<()> {
    tool::run("ip", arguments.iter().map(Path::new)).map(drop)
}

/// Gives a card of the guest its addresses in network `number`.
pub(crate) fn set_up(guest: &mut Guest, card: &str, number: u8) -> Result<()> {
    guest
        .run(&format!(
            "echo 0 > /proc/sys/net/ipv6/conf/{card}/accept_dad; ip addr add 10.{number}.0.2/24 \
             dev {card}; ip addr add fd{number}::2/64 dev {card}; ip link set {card} up; \
             until grep -q 1 /sys/class/net/{card}/carrier; do sleep 0.1; done"
        ))
        .map(drop)
}
