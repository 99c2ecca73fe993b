#!/bin/sh
# Stage 1 of the NixOS-shaped guest, as the initrd of a NixOS guest does it: loads modules, puts a tmpfs
# where the root will be, mounts the store read-only into it, and starts the `init=` of the
# kernel command line, which is a path in that store. What else the command line may say:
#   store=TAG              the store is not a disk but the share of that tag
#   store-overlay=tmpfs    what is written to the store goes to memory
#   store-overlay=SERIAL   what is written to the store goes to the disk of that serial number (ext4)
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

init= share= overlay=
for word in $(cat /proc/cmdline); do
    case $word in
        init=*) init=${word#init=} ;;
        store=*) share=${word#store=} ;;
        store-overlay=*) overlay=${word#store-overlay=} ;;
    esac
done
[ -n "$init" ] || fail 'the kernel command line has no init='

# The disk with the serial number $1; without one, the first.
disk() {
    found=/dev/vda
    for disk in /sys/block/vd*; do
        [ "$(cat "$disk/serial")" = "$1" ] && found=/dev/${disk##*/}
    done
    tries=0
    while [ ! -b "$found" ] && [ $tries -lt 50 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    echo "$found"
}

# Mounts the store at $1, read-only.
mount_store() {
    if [ -n "$share" ]; then
        mount -t virtiofs -o ro "$share" "$1" || fail "there is no store in the share $share"
        return
    fi
    store=$(disk root)
    format=erofs
    [ "$(head -c 4 "$store")" = hsqs ] && format=squashfs
    mount -t $format -o ro "$store" "$1" || fail "there is no store on $store"
}

mount -t tmpfs -o mode=755 root /mnt
nix=/mnt/nix
mkdir -p $nix/store /mnt/proc /mnt/sys /mnt/dev /mnt/run
if [ -z "$overlay" ]; then
    mount_store $nix/store
else
    mkdir $nix/.ro-store $nix/.rw-store
    mount_store $nix/.ro-store
    case $overlay in
        tmpfs) mount -t tmpfs -o mode=755 rw-store $nix/.rw-store ;;
        *) mount -t ext4 "$(disk "$overlay")" $nix/.rw-store ;;
    esac || fail "nothing can be written for the store to $overlay"
    mkdir -p $nix/.rw-store/store $nix/.rw-store/work
    mount -t overlay -o lowerdir=$nix/.ro-store,upperdir=$nix/.rw-store/store,workdir=$nix/.rw-store/work \
        overlay $nix/store || fail 'no overlay over the store'
fi
[ -x "/mnt$init" ] || fail "the store has no $init"
for mounted in proc sys dev run; do mount -o move "/$mounted" "/mnt/$mounted"; done
exec switch_root /mnt "$init"
