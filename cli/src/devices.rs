//! What device flags say.

use std::path::PathBuf;

use vmm::config::{
    Balloon, ByteSize, Console, Disk, HugePages, LinkKeys, Machined, Memory, Net, NetLink, Pmem,
    Share, StoreShare, Vsock,
};

use crate::key_values::KeyValues;

/// The keys of `--disk`.
pub(crate) fn disk(text: &str) -> Result<Disk, String> {
    let items = KeyValues::parse(text, &["path", "readonly", "serial", "direct", "engine"])?;
    Ok(Disk {
        path: items.required("path")?,
        readonly: items.switch("readonly")?.unwrap_or_default(),
        serial: items.value("serial")?,
        direct: items.switch("direct")?.unwrap_or_default(),
        engine: items.value("engine")?.unwrap_or_default(),
    })
}

/// The keys of `--net`.
pub(crate) fn net(text: &str) -> Result<Net, String> {
    let keys = &["tap", "fd", "type", "vhost-user", "mac", "queues", "vhost", "mtu"];
    let items = KeyValues::parse(text, keys)?;
    let fd: Option<String> = items.value("fd")?;
    let link = NetLink::from_keys(LinkKeys {
        kind: items.value("type")?,
        tap: items.value("tap")?,
        fd: fd.as_deref().map(descriptors).transpose()?,
        vhost_user: items.value("vhost-user")?,
    })?;
    Ok(Net {
        mac: items.value("mac")?,
        queues: items.value("queues")?,
        vhost: items.value("vhost")?.unwrap_or_default(),
        mtu: items.value("mtu")?,
        ..Net::new(link)
    })
}

/// The keys of `--vsock`.
pub(crate) fn vsock(text: &str) -> Result<Vsock, String> {
    let items = KeyValues::parse(text, &["cid", "socket"])?;
    let cid: Option<String> = items.value("cid")?;
    let cid = match cid.as_deref() {
        None | Some("auto") => None,
        Some(_) => items.value("cid")?,
    };
    Ok(Vsock { cid, socket: items.value("socket")? })
}

/// The keys of `--machined`.
pub(crate) fn machined(text: &str) -> Result<Machined, String> {
    let items = KeyValues::parse(text, &["name", "socket"])?;
    let default = Machined::new(items.required::<String>("name")?);
    Ok(Machined { socket: items.value("socket")?.unwrap_or(default.socket), ..default })
}

/// `3:4:5`, one descriptor for each queue pair.
fn descriptors(text: &str) -> Result<Vec<i32>, String> {
    let number = |part: &str| part.parse().map_err(|error| format!("fd={text}: {error}"));
    text.split(':').map(number).collect()
}

/// The keys of `--pmem`.
pub(crate) fn pmem(text: &str) -> Result<Pmem, String> {
    let items = KeyValues::parse(text, &["file", "readonly"])?;
    Ok(Pmem {
        file: items.required("file")?,
        readonly: items.switch("readonly")?.unwrap_or_default(),
    })
}

/// The keys of `--store-share`.
pub(crate) fn store_share(text: &str) -> Result<StoreShare, String> {
    let default = StoreShare::default();
    let items = KeyValues::parse(text, &["closure", "store", "tag"])?;
    Ok(StoreShare {
        closure: items.value("closure")?,
        store: items.value("store")?.unwrap_or(default.store),
        tag: items.value("tag")?.unwrap_or(default.tag),
    })
}

/// The keys of `--share`.
pub(crate) fn share(text: &str) -> Result<Share, String> {
    const KEYS: &[&str] = &[
        "tag",
        "source",
        "socket",
        "readonly",
        "cache",
        "xattr",
        "posix-acl",
        "sandbox",
        "uid-map",
        "gid-map",
        "translate-uid",
        "translate-gid",
        "program",
    ];
    let items = KeyValues::parse(text, KEYS)?;
    Ok(Share {
        tag: items.required("tag")?,
        source: items.value("source")?,
        socket: items.value("socket")?,
        readonly: items.switch("readonly")?.unwrap_or_default(),
        cache: items.value("cache")?,
        xattr: items.switch("xattr")?.unwrap_or_default(),
        posix_acl: items.switch("posix-acl")?.unwrap_or_default(),
        sandbox: items.value("sandbox")?,
        uid_map: items.value("uid-map")?,
        gid_map: items.value("gid-map")?,
        translate_uid: items.value("translate-uid")?,
        translate_gid: items.value("translate-gid")?,
        program: items.value("program")?,
        arguments: Vec::new(),
    })
}

/// What `--memory` changes.
#[derive(Clone, Debug)]
pub(crate) struct MemoryChange {
    size: Option<ByteSize>,
    max: Option<ByteSize>,
    shared: Option<bool>,
    hugepages: Option<HugePages>,
    prealloc: Option<bool>,
    mergeable: Option<bool>,
}

/// The keys of `--memory`.
pub(crate) fn memory(text: &str) -> Result<MemoryChange, String> {
    const KEYS: &[&str] = &["size", "max", "shared", "hugepages", "prealloc", "mergeable"];
    let items = KeyValues::parse(text, KEYS)?;
    Ok(MemoryChange {
        size: items.value("size")?,
        max: items.value("max")?,
        shared: items.switch("shared")?,
        hugepages: items.value("hugepages")?,
        prealloc: items.switch("prealloc")?,
        mergeable: items.switch("mergeable")?,
    })
}

impl MemoryChange {
    /// Changes what was given and leaves the rest.
    pub(crate) fn apply(self, memory: &mut Memory) {
        memory.size = self.size.unwrap_or(memory.size);
        memory.max = self.max.or(memory.max);
        memory.shared = self.shared.unwrap_or(memory.shared);
        memory.hugepages = self.hugepages.or(memory.hugepages);
        memory.prealloc = self.prealloc.unwrap_or(memory.prealloc);
        memory.mergeable = self.mergeable.unwrap_or(memory.mergeable);
    }
}

/// What `--balloon` changes.
#[derive(Clone, Debug)]
pub(crate) struct BalloonChange {
    enabled: Option<bool>,
    deflate_on_oom: Option<bool>,
    free_page_reporting: Option<bool>,
    statistics_interval: Option<u32>,
}

/// The keys of `--balloon`.
pub(crate) fn balloon(text: &str) -> Result<BalloonChange, String> {
    const KEYS: &[&str] =
        &["enabled", "deflate-on-oom", "free-page-reporting", "statistics-interval"];
    let items = KeyValues::parse(text, KEYS)?;
    Ok(BalloonChange {
        enabled: items.switch("enabled")?,
        deflate_on_oom: items.switch("deflate-on-oom")?,
        free_page_reporting: items.switch("free-page-reporting")?,
        statistics_interval: items.value("statistics-interval")?,
    })
}

impl BalloonChange {
    /// Changes what was given and leaves the rest.
    pub(crate) fn apply(self, balloon: &mut Balloon) {
        balloon.enabled = self.enabled.unwrap_or(balloon.enabled);
        balloon.deflate_on_oom = self.deflate_on_oom.unwrap_or(balloon.deflate_on_oom);
        balloon.free_page_reporting =
            self.free_page_reporting.unwrap_or(balloon.free_page_reporting);
        balloon.statistics_interval =
            self.statistics_interval.unwrap_or(balloon.statistics_interval);
    }
}

/// The keys of `--console` and `--serial`.
pub(crate) fn console(text: &str) -> Result<Console, String> {
    let items = KeyValues::parse(text, &["kind", "path", "link"])?;
    let kind: String = items.required("kind")?;
    let path: Option<PathBuf> = items.value("path")?;
    let link: Option<PathBuf> = items.value("link")?;
    match (kind.as_str(), path, link) {
        ("off", None, None) => Ok(Console::Off),
        ("stdio", None, None) => Ok(Console::Stdio),
        ("pty", None, link) => Ok(Console::Pty { link }),
        ("file", Some(path), None) => Ok(Console::File { path }),
        ("socket", Some(path), None) => Ok(Console::Socket { path }),
        ("file" | "socket", None, _) => Err(format!("a path is missing: {kind},path=FILE")),
        ("off" | "stdio" | "pty", Some(_), _) => Err(format!("{kind} takes no path")),
        ("off" | "stdio" | "file" | "socket", _, Some(_)) => Err(format!("{kind} takes no link")),
        _ => Err(format!(
            "unknown kind {kind}: there are off, stdio, pty, file,path=FILE and socket,path=FILE"
        )),
    }
}

#[cfg(test)]
mod test {
    use vmm::config::Engine;

    use super::*;

    #[test]
    fn a_disk_flag_has_the_keys_of_a_disk() {
        assert_eq!(disk("a.img").unwrap(), Disk::new("a.img"));
        assert_eq!(
            disk("path=a.img,readonly,serial=data,direct=on,engine=sync").unwrap(),
            Disk {
                path: "a.img".into(),
                readonly: true,
                serial: Some("data".into()),
                direct: true,
                engine: Engine::Sync,
            }
        );
        assert_eq!(disk("readonly").unwrap_err(), "path is missing: path=VALUE");
        assert_eq!(
            disk("a,engine=fast").unwrap_err(),
            "engine=fast: unknown variant `fast`, expected one of `auto`, `uring`, `sync`"
        );
    }

    #[test]
    fn a_net_flag_says_what_is_behind_the_card_first() {
        use vmm::config::VhostNet;

        assert_eq!(net("vmtap0").unwrap(), Net::new(NetLink::Tap("vmtap0".into())));
        assert_eq!(net("fd=3").unwrap(), Net::new(NetLink::Descriptors(vec![3])));
        assert_eq!(net("type=user").unwrap(), Net::new(NetLink::User));
        assert_eq!(net("vhost-user=/s").unwrap(), Net::new(NetLink::VhostUser("/s".into())));
        assert_eq!(
            net("type=macvtap,fd=3:4,mac=52:54:00:00:00:01,queues=2,vhost=off,mtu=9000").unwrap(),
            Net {
                mac: Some("52:54:00:00:00:01".parse().unwrap()),
                queues: Some(2),
                vhost: VhostNet::Off,
                mtu: Some(9000),
                ..Net::new(NetLink::Macvtap(vec![3, 4]))
            }
        );
        for (text, expected) in [
            ("mtu=1500", "give one of tap=NAME, fd=N, type=user and vhost-user=SOCKET"),
            ("tap=a,fd=3", "tap, fd, vhost-user and type=user exclude one another"),
            ("fd=3:x", "fd=3:x: invalid digit found in string"),
            (
                "tap=a,mac=01:00:00:00:00:00",
                "mac=01:00:00:00:00:00: no address of one card: the first byte must be even, \
                 and not all may be zero",
            ),
            (
                "tap=a,vhost=yes",
                "vhost=yes: unknown variant `yes`, expected one of `auto`, `on`, `off`",
            ),
        ] {
            assert_eq!(net(text).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn a_vsock_flag_has_an_id_a_socket_or_both() {
        assert_eq!(vsock("auto").unwrap(), Vsock::default());
        assert_eq!(vsock("7").unwrap(), Vsock { cid: Some(7), socket: None });
        assert_eq!(
            vsock("cid=7,socket=/s").unwrap(),
            Vsock { cid: Some(7), socket: Some("/s".into()) }
        );
        assert_eq!(vsock("socket=/s").unwrap(), Vsock { cid: None, socket: Some("/s".into()) });
        assert_eq!(vsock("cid=x").unwrap_err(), "cid=x: invalid digit found in string");
    }

    #[test]
    fn a_pmem_flag_has_a_file() {
        let expected = Pmem { file: "store.erofs".into(), readonly: true };
        assert_eq!(pmem("store.erofs,readonly").unwrap(), expected);
        assert_eq!(pmem("file=store.erofs,readonly=on").unwrap(), expected);
        assert_eq!(pmem("readonly").unwrap_err(), "file is missing: file=VALUE");
    }

    #[test]
    fn a_store_share_flag_has_a_closure_or_shows_the_whole_store() {
        let default = StoreShare::default();
        let closure = Some("/run/store-paths".into());
        assert_eq!((&*default.tag, &default.closure), ("store", &None));
        assert_eq!(default.store, std::path::Path::new("/nix/store"));
        for text in ["/run/store-paths", "closure=/run/store-paths"] {
            let expected = StoreShare { closure: closure.clone(), ..default.clone() };
            assert_eq!(store_share(text).unwrap(), expected, "{text}");
        }
        let expected = StoreShare { closure, store: "/s".into(), tag: "t".into() };
        assert_eq!(store_share("tag=t,closure=/run/store-paths,store=/s").unwrap(), expected);
        let expected = StoreShare { store: "/s".into(), ..default };
        assert_eq!(store_share("store=/s").unwrap(), expected);
        assert!(store_share("store=/s,store=/t").is_err());
        let error = store_share("store=/s,readonly").unwrap_err();
        assert!(error.contains("readonly") && error.contains("closure"), "{error}");
    }

    #[test]
    fn a_share_flag_says_who_serves_the_folder_and_how() {
        use vmm::config::{ShareCache, ShareSandbox};

        let expected = Share { tag: "home".into(), ..Share::default() };
        assert_eq!(
            share("home,socket=/s").unwrap(),
            Share { socket: Some("/s".into()), ..expected.clone() }
        );
        assert_eq!(
            share(
                "tag=home,source=/h,readonly,cache=always,posix-acl,sandbox=none,uid-map=:0:1:1:"
            )
            .unwrap(),
            Share {
                source: Some("/h".into()),
                readonly: true,
                cache: Some(ShareCache::Always),
                posix_acl: true,
                sandbox: Some(ShareSandbox::None),
                uid_map: Some(":0:1:1:".into()),
                ..expected
            }
        );
        assert_eq!(share("source=/h").unwrap_err(), "tag is missing: tag=VALUE");
        assert_eq!(
            share("home,source=/h,cache=none").unwrap_err(),
            "cache=none: unknown variant `none`, expected one of `auto`, `always`, `metadata`, \
             `never`"
        );
    }

    #[test]
    fn a_memory_flag_changes_only_what_it_says() {
        let mut value = Memory { prealloc: true, ..Memory::default() };
        memory("shared").unwrap().apply(&mut value);
        assert_eq!(value, Memory { shared: true, prealloc: true, ..Memory::default() });
        memory("1G,max=2G,hugepages=2M,prealloc=off,shared=off,mergeable")
            .unwrap()
            .apply(&mut value);
        assert_eq!(
            value,
            Memory {
                size: ByteSize(1 << 30),
                max: Some(ByteSize(2 << 30)),
                shared: false,
                hugepages: Some(HugePages::Size2M),
                prealloc: false,
                mergeable: true,
            }
        );
        assert_eq!(
            memory("1GB").unwrap_err(),
            "size=1GB: not a size: write bytes or a binary unit, as in 4096, 512M or 4GiB"
        );
        assert_eq!(
            memory("1G,hugepages=4M").unwrap_err(),
            "hugepages=4M: unknown variant `4M`, expected `2M` or `1G`"
        );
    }

    #[test]
    fn a_balloon_flag_changes_only_what_it_says() {
        let mut value = Balloon { deflate_on_oom: false, ..Balloon::default() };
        balloon("off,statistics-interval=5").unwrap().apply(&mut value);
        assert_eq!(
            value,
            Balloon {
                enabled: false,
                deflate_on_oom: false,
                free_page_reporting: true,
                statistics_interval: 5,
            }
        );
        balloon("free-page-reporting=off").unwrap().apply(&mut value);
        assert!(!value.enabled && !value.free_page_reporting);
        assert_eq!(balloon("maybe").unwrap_err(), "enabled=maybe: neither on nor off");
    }

    #[test]
    fn a_console_flag_names_its_kind_first() {
        for (text, expected) in [
            ("off", Console::Off),
            ("stdio", Console::Stdio),
            ("pty", Console::Pty { link: None }),
            ("pty,link=/p", Console::Pty { link: Some("/p".into()) }),
            ("file,path=/f", Console::File { path: "/f".into() }),
            ("kind=socket,path=/s", Console::Socket { path: "/s".into() }),
        ] {
            assert_eq!(console(text).unwrap(), expected, "{text}");
        }
        for (text, expected) in [
            ("file", "a path is missing: file,path=FILE"),
            ("stdio,path=/x", "stdio takes no path"),
            ("socket,path=/x,link=/y", "socket takes no link"),
            ("path=/x", "kind is missing: kind=VALUE"),
            (
                "tty",
                "unknown kind tty: there are off, stdio, pty, file,path=FILE and socket,path=FILE",
            ),
        ] {
            assert_eq!(console(text).unwrap_err(), expected, "{text}");
        }
    }
}
