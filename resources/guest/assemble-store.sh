#!/bin/sh
# Lays out the store of the NixOS-shaped guest and makes its images, as root or in a user namespace:
#   assemble-store.sh USERLAND_TAR USERLAND_NAME INPUT OUT
# INPUT is a folder with the store paths that come from elsewhere; USERLAND_NAME is the one made here.
# The store stays as a folder beside the images, for shares; it has programs that become root, and so
# nobody else may look into the folder around it.
set -eu
tar=$1 name=$2 input=$3 out=$4
rm -rf "$out/private"
mkdir -m 700 "$out/private"
store=$out/private/store
mkdir -m 755 "$store"
cp -r "$input/." "$store"
userland=$store/$name
mkdir "$userland"
tar --extract --file "$tar" --directory "$userland" --numeric-owner \
    --exclude './dev/*' --exclude './var/*' --exclude './usr/share/doc' --exclude './usr/share/man' \
    --exclude './usr/share/locale' --exclude './usr/share/info' --exclude './usr/share/zoneinfo' \
    --exclude './usr/share/i18n' --exclude './usr/share/bash-completion' --exclude './usr/share/zsh' \
    --exclude './usr/lib/udev/hwdb.*' --exclude './usr/lib/x86_64-linux-gnu/gconv' \
    --exclude './usr/lib/x86_64-linux-gnu/perl-base' ./usr ./etc

etc=$userland/etc
units=$etc/systemd/system
rm -f "$etc/machine-id" "$etc/fstab" "$etc/resolv.conf"
: > "$etc/fstab"
echo nixvmm-guest > "$etc/hostname"
printf '\nA NixOS-shaped guest on nixvmm. Log in as "root" with the password "root".\n\n' > "$etc/issue"
printf 'Leave with "poweroff".\n' > "$etc/motd"
mkdir -p "$units/multi-user.target.wants" "$units/serial-getty@hvc0.service.d" "$etc/systemd/network"
for timer in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service; do
    find "$units" -name "$timer" -exec rm -f {} +
done
# There is no partition table to look at, and no second terminal.
mkdir -p "$etc/systemd/system-generators"
ln -s /dev/null "$etc/systemd/system-generators/systemd-gpt-auto-generator"
for unit in getty@tty1.service sys-kernel-debug.mount sys-kernel-tracing.mount \
    systemd-journal-flush.service; do
    ln -sf /dev/null "$units/$unit"
done
ln -sf /usr/lib/systemd/system/systemd-networkd.service "$units/multi-user.target.wants/"

# Systemd itself runs from the store, so the store, and what is below and above it where it is an
# overlay, stays when everything else is unmounted.
for mount in 'nix-store.mount' 'nix-.ro\x2dstore.mount' 'nix-.rw\x2dstore.mount'; do
    mkdir -p "$units/$mount.d"
    printf '[Unit]\nDefaultDependencies=no\n' > "$units/$mount.d/stays.conf"
done

cat > "$etc/systemd/network/10-ethernet.network" <<'UNIT'
[Match]
Type=ether
[Network]
DHCP=yes
UNIT
cat > "$units/test-agent.service" <<UNIT
[Unit]
Description=Runs what the tests send over the console
ConditionKernelCommandLine=agent=hvc0
[Service]
ExecStart=$(cat "$input"/*-test-agent/command) hvc0
Restart=always
UNIT
cat > "$units/serial-getty@hvc0.service.d/agent.conf" <<'UNIT'
[Unit]
ConditionKernelCommandLine=!agent=hvc0
UNIT
cat > "$units/witness.service" <<'UNIT'
[Unit]
Description=Writes to the data volume when it is stopped
ConditionPathIsMountPoint=/var/lib/data
RequiresMountsFor=/var/lib/data
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo started >> /var/lib/data/witness'
ExecStop=/bin/sh -c 'sleep 0.2; echo stopped >> /var/lib/data/witness'
UNIT
ln -s ../test-agent.service ../witness.service "$units/multi-user.target.wants/"

rm -f "$out/store.erofs" "$out/store.squashfs"
mkfs.erofs --quiet -T0 "$out/store.erofs" "$store"
mksquashfs "$store" "$out/store.squashfs" -quiet -no-progress -comp lz4 -all-time 0 -mkfs-time 0
