//! Who may do what with the files of a share? Access control lists, attributes and users are the
//! same on both sides, or those that the share's user mapping says.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::XattrFlags;
use tests::guest::Guest;
use tests::testbed::Testbed;

use super::{ATTRIBUTE, Mounted, PERL};

/// Where Linux has the list of a file, and the one that what is made in a folder gets.
const LIST: &str = "system.posix_acl_access";
const DEFAULT_LIST: &str = "system.posix_acl_default";

/// An attribute that anybody may set.
const USER_ATTRIBUTE: &str = "user.nixvmm";

/// Users and groups that the list names, and one that it does not.
const READER: u32 = 2001;
const READERS: u32 = 3001;
const STRANGER: u32 = 2002;

/// Owner and group of the file that the host makes.
const OWNER: u32 = 4001;

/// Entries of a list (`linux/posix_acl_xattr.h`): what is meant, its rights, and who it is.
const ENTRIES: [(u16, u16, u32); 6] = [
    (0x01, 6, u32::MAX), // The owner reads and writes.
    (0x02, 4, READER),
    (0x04, 0, u32::MAX), // The file's group may nothing.
    (0x08, 6, READERS),  // More than the mask lets through.
    (0x10, 4, u32::MAX), // The mask.
    (0x20, 0, u32::MAX), // Nor may others.
];
const VERSION: u32 = 2;

/// The host's user and group whose rights the virtiofsd of the mapped share has, as root of the
/// guest.
const HOST_ID: u32 = 1000;

/// Gets or sets an attribute, in hexadecimal; or reads or appends to a file as somebody.
const ACT: &str = r#"
my ($verb, $path, @rest) = @ARGV;
if ($verb eq "get") {
    my $value = "\0" x 256;
    my $n = syscall(191, $path, $rest[0], $value, 256);
    die "$rest[0]: $!" if $n < 0;
    print unpack("H*", substr($value, 0, $n));
} elsif ($verb eq "set") {
    my $value = pack("H*", $rest[1]);
    syscall(188, $path, $rest[0], $value, length $value, 0) == 0 or die "$rest[0]: $!";
} else {
    my ($user, $group) = @rest;
    ($(, $)) = ($group, "$group $group");
    ($<, $>) = ($user, $user);
    die "still $< $> $( $)" if "$< $> $( $)" ne "$user $user $group $group $group $group";
    open(my $file, $verb eq "read" ? "<" : ">>", $path) or die "may not: $!";
    print {$verb eq "read" ? *STDOUT : $file} $verb eq "read" ? <$file> : ", and more";
    close($file) or die "may not: $!";
}
"#;

/// The folders of the shares that this is about, and what serves them.
pub(super) struct Rights {
    listed: PathBuf,
    mapped: PathBuf,
    translated: PathBuf,
    /// Where other users than root find virtiofsd too, and what runs it as one of them.
    virtiofsd: Mounted,
    as_user: PathBuf,
}

impl Rights {
    /// Lays the folders in `own`, whose file system has access control lists, and the rest in
    /// `folder`.
    pub(super) fn lay(testbed: &Testbed, folder: &Path, own: &Path) -> Result<Self> {
        let [listed, mapped, translated] =
            ["listed", "mapped", "translated"].map(|name| own.join(name));
        for folder in [&listed, &mapped, &translated] {
            fs::create_dir(folder)?;
        }
        let file = listed.join("by-host");
        fs::write(&file, "for readers")?;
        fs::set_permissions(&file, Permissions::from_mode(0o600))?;
        chown(&file, Some(OWNER), Some(OWNER))?;
        set(&file, LIST, &list())?;
        set(&file, USER_ATTRIBUTE, b"by the host")?;
        fs::write(mapped.join("of-root"), "root's")?;
        chown(&mapped, Some(HOST_ID), Some(HOST_ID))?;
        fs::write(own.join("bin/act.pl"), ACT)?;

        let virtiofsd = Mounted::bind(&testbed.virtiofsd, &folder.join("virtiofsd"))?;
        let as_user = folder.join("virtiofsd-of-a-user");
        let script = format!(
            "#!/bin/sh\nexec setpriv --pdeathsig KILL --reuid {HOST_ID} --regid {HOST_ID} \
             --clear-groups -- {}/virtiofsd \"$@\"\n",
            virtiofsd.0.display()
        );
        fs::write(&as_user, script)?;
        fs::set_permissions(&as_user, Permissions::from_mode(0o755))?;
        Ok(Self { listed, mapped, translated, virtiofsd, as_user })
    }

    /// The flags of `nixvmm` for these shares.
    pub(super) fn arguments(&self) -> Vec<String> {
        let program = self.virtiofsd.0.join("virtiofsd");
        let (program, as_user) = (program.display(), self.as_user.display());
        let listed = format!("posix-acl,sandbox=chroot,program={program}");
        let mapped = format!("uid-map=:0:{HOST_ID}:1:,gid-map=:0:{HOST_ID}:1:,program={as_user}");
        let translated = format!(
            "translate-uid=map:100:2100:10,translate-gid=map:200:2200:10,\
             sandbox=chroot,program={program}"
        );
        [(&self.listed, listed), (&self.mapped, mapped), (&self.translated, translated)]
            .into_iter()
            .flat_map(|(source, rest)| {
                let tag = source.file_name().unwrap_or_default().display();
                let source = source.display();
                ["--share".to_owned(), format!("tag={tag},source={source},{rest}")]
            })
            .collect()
    }

    /// Expects the guest, which has its programs on a mounted share, to have them all.
    pub(super) fn hold(&self, guest: &mut Guest) -> Result<()> {
        guest.run(
            "for tag in listed mapped translated; do \
             mkdir /$tag && mount -t virtiofs $tag /$tag || exit 1; done",
        )?;
        self.lists_of_the_host_are_obeyed(guest)?;
        self.lists_of_the_guest_are_the_hosts(guest)?;
        self.users_are_mapped(guest)?;
        guest.run("umount /listed /mapped /translated").map(drop)
    }

    fn lists_of_the_host_are_obeyed(&self, guest: &mut Guest) -> Result<()> {
        let file = "/listed/by-host";
        let seen = act(guest, &format!("get {file} {LIST}"))?;
        ensure!(seen == hexadecimal(&list()), "the guest sees the list {seen}");
        let seen = act(guest, &format!("get {file} {USER_ATTRIBUTE}"))?;
        ensure!(seen == hexadecimal(b"by the host"), "the guest sees the attribute {seen}");
        for (verb, user, group, expected) in [
            ("read", READER, READER, true),
            ("append", READER, READER, false),
            ("read", STRANGER, READERS, true),
            ("append", STRANGER, READERS, false),
            ("read", STRANGER, STRANGER, false),
            // The mode alone, 0640, would let the group read.
            ("read", STRANGER, OWNER, false),
            ("append", OWNER, OWNER, true),
        ] {
            may(guest, file, (verb, user, group), expected)?;
        }
        let content = fs::read_to_string(self.listed.join("by-host"))?;
        ensure!(content == "for readers, and more", "the host has {content}");
        Ok(())
    }

    fn lists_of_the_guest_are_the_hosts(&self, guest: &mut Guest) -> Result<()> {
        let list = list();
        let value = hexadecimal(&list);
        guest.run("cd /listed && echo mine > by-guest && chmod 600 by-guest && mkdir folder")?;
        act(guest, &format!("set /listed/by-guest {LIST} {value}"))?;
        act(guest, &format!("set /listed/folder {DEFAULT_LIST} {value}"))?;
        guest.run("umask 0; echo mine > /listed/folder/heir")?;
        for name in ["by-guest", "folder/heir"] {
            let path = self.listed.join(name);
            ensure!(get(&path, LIST)? == list, "{name} has another list on the host");
            let mode = path.metadata()?.mode() & 0o777;
            ensure!(mode == 0o640, "{name} has the mode {mode:o} on the host");
            let path = format!("/listed/{name}");
            may(guest, &path, ("read", READER, READER), true)?;
            may(guest, &path, ("read", STRANGER, STRANGER), false)?;
        }
        let default = get(&self.listed.join("folder"), DEFAULT_LIST)?;
        ensure!(default == list, "a folder has another list for what is made in it");
        for name in [USER_ATTRIBUTE, ATTRIBUTE] {
            act(guest, &format!("set /listed/by-guest {name} {}", hexadecimal(b"by the guest")))?;
            let value = get(&self.listed.join("by-guest"), name)?;
            ensure!(value == b"by the guest", "{name} has another value on the host: {value:?}");
        }
        Ok(())
    }

    fn users_are_mapped(&self, guest: &mut Guest) -> Result<()> {
        let owners = guest.run("echo mine > /mapped/mine && stat -c %u:%g /mapped /mapped/*")?;
        let expected = ["0:0", "0:0", "65534:65534"];
        ensure!(owners.lines().eq(expected), "the guest sees the owners {owners}");
        let (status, said) = guest.attempt("echo more >> /mapped/of-root")?;
        ensure!(status != 0, "a user's virtiofsd wrote to a file of root: {said}");
        guest.run("cd /translated && echo mine > mine && chown 103:204 mine")?;
        for (path, expected) in [
            (self.mapped.join("mine"), (HOST_ID, HOST_ID)),
            (self.translated.join("mine"), (2103, 2204)),
        ] {
            let file = path.metadata()?;
            let owner = (file.uid(), file.gid());
            ensure!(owner == expected, "{} is of {owner:?} on the host", path.display());
        }
        Ok(())
    }
}

fn may(
    guest: &mut Guest,
    path: &str,
    (verb, user, group): (&str, u32, u32),
    expected: bool,
) -> Result<()> {
    let (status, said) = guest.attempt(&command(&format!("{verb} {path} {user} {group}")))?;
    ensure!(
        (status == 0) == expected && (expected || said.contains("may not: Permission denied")),
        "{verb} {path} as {user} of {group}: {status}, {said}"
    );
    Ok(())
}

fn act(guest: &mut Guest, words: &str) -> Result<String> {
    guest.run(&command(words))
}

fn command(words: &str) -> String {
    format!("{PERL} /mnt/bin/act.pl {words}")
}

fn list() -> Vec<u8> {
    let entries = ENTRIES.iter().flat_map(|(tag, rights, who)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &who.to_le_bytes()].concat()
    });
    VERSION.to_le_bytes().into_iter().chain(entries).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn set(path: &Path, name: &str, value: &[u8]) -> Result<()> {
    let done = rustix::fs::setxattr(path, name, value, XattrFlags::empty());
    done.with_context(|| format!("{name} of {}", path.display()))
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::getxattr(path, name, &mut value[..])
        .with_context(|| format!("{name} of {}", path.display()))?;
    value.truncate(length);
    Ok(value)
}
