#!/bin/sh
# Stage 1 of the NixOS-shaped guest, as the initrd of a NixOS guest does it: loads modules, puts a tmpfs
# where the root will be, mounts the store image read-only into it, and starts the `init=` of the
# kernel command line, which is a path in that store.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=755 run /run

say() { echo "stage 1: $*" > /dev/kmsg; }
fail() {
    say "$*"
    echo "stage 1: $*" > /dev/console
    poweroff -f
}

while read -r module parameters; do
    insmod "$module" $parameters || say "cannot load $module"
done < /modules/order

init=
for word in $(cat /proc/cmdline); do
    case $word in init=*) init=${word#init=} ;; esac
done
[ -n "$init" ] || fail 'the kernel command line has no init='

# The store is the disk that says it is the root; without one that says so, the first.
store=/dev/vda
for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial")" = root ] && store=/dev/${disk##*/}
done
tries=0
while [ ! -b "$store" ] && [ $tries -lt 50 ]; do
    sleep 0.1
    tries=$((tries + 1))
done

mount -t tmpfs -o mode=755 root /mnt
mkdir -p /mnt/nix/store /mnt/proc /mnt/sys /mnt/dev /mnt/run
format=erofs
[ "$(head -c 4 "$store")" = hsqs ] && format=squashfs
mount -t $format -o ro "$store" /mnt/nix/store ||
    fail "there is no store on $store"
[ -x "/mnt$init" ] || fail "the store has no $init"
for mounted in proc sys dev run; do mount -o move "/$mounted" "/mnt/$mounted"; done
exec switch_root /mnt "$init"
