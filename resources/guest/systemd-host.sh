#!/bin/sh
# A host that systemd runs, in namespaces of its own: what it starts, mounts and connects is gone with it.
#   systemd-host.sh STORE GROUP FOLDER NAME=FILE…
# STORE is the erofs image of the NixOS-shaped guest, whose userland is this host's too; GROUP is an empty
# control group; FOLDER becomes /opt, and each FILE, or folder, is /srv/NAME.
set -eu
case ${1-} in
start)
    shift
    exec unshare --mount --pid --fork --kill-child --net --ipc --uts sh "$0" enter "$@"
    ;;
enter)
    # Where unshare(1) stays behind, systemd could not make groups below.
    echo 0 > "$3/cgroup.procs"
    shift
    exec unshare --cgroup sh "$0" become "$@"
    ;;
esac
shift
store=$1 folder=$3
shift 3

mount -t tmpfs -o mode=755 root /mnt
cd /mnt
mkdir -p dev etc nix/store opt proc root run srv sys tmp usr var/lib var/log var/tmp
chmod 1777 tmp var/tmp
chmod 700 root
for link in bin sbin lib lib64; do ln -s "usr/$link" "$link"; done
mount -t erofs -o loop,ro "$store" nix/store
userland=$(echo nix/store/*-debian-userland)
mount --bind "$userland/usr" usr
cp -a "$userland/etc" .
mount --bind "$folder" opt
for file; do
    if [ -d "${file#*=}" ]; then mkdir "srv/${file%%=*}"; else : > "srv/${file%%=*}"; fi
    mount --bind "${file#*=}" "srv/${file%%=*}"
done

# What the host is called and does is the test's to say.
tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id
echo host > etc/hostname
ln -sf /usr/lib/systemd/system/basic.target etc/systemd/system/default.target
rm -rf etc/systemd/system/*.wants etc/systemd/system-generators
# The kernel is not this host's alone.
for unit in systemd-sysctl.service systemd-modules-load.service systemd-update-utmp.service; do
    ln -s /dev/null "etc/systemd/system/$unit"
done

mount -t proc proc proc
mount -t sysfs -o ro sys sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 dev dev
mkdir dev/net dev/pts dev/shm
mount -t tmpfs shm dev/shm
mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 pts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 console:1:3 net/tun:10:200; do
    numbers=${device#*:}
    mknod -m 666 "dev/${device%%:*}" c "${numbers%:*}" "${numbers#*:}"
done
# As udev makes them, which has nothing to do here.
for device in kvm:10:232 vhost-net:10:238 vhost-vsock:10:241; do
    numbers=${device#*:}
    mknod -m 660 "dev/${device%%:*}" c "${numbers%:*}" "${numbers#*:}"
    chgrp "$(sed -n 's/^kvm:x:\([0-9]*\):.*/\1/p' etc/group)" "dev/${device%%:*}"
done

mkdir run/old
pivot_root . run/old
exec env -i PATH=/usr/sbin:/usr/bin container=nixvmm-test sh -c '
    umount -l /run/old
    ip link set lo up
    exec /usr/lib/systemd/systemd --show-status=no > /dev/null 2>&1 < /dev/null'
