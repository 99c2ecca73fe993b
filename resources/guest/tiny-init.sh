#!/bin/sh
# The first and only program of the tiny guest: loads modules, then serves the agent on the terminal
# that `agent=` of the kernel command line names (hvc0).
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
while read -r module parameters; do
    insmod "$module" $parameters || echo "tiny guest: cannot load $module" > /dev/kmsg
done < /modules/order

terminal=hvc0
for word in $(cat /proc/cmdline); do
    case $word in agent=*) terminal=${word#agent=} ;; esac
done
tries=0
while [ ! -c "/dev/$terminal" ] && [ $tries -lt 50 ]; do
    sleep 0.1
    tries=$((tries + 1))
done

# A disk that says it is the state has a script for the beginning, and one for an end by power button.
state=
for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial" 2> /dev/null)" = state ] && state=/dev/${disk##*/}
done
[ -z "$state" ] || mount -t ext4 "$state" /mnt

power_off() {
    [ -z "$state" ] || (cd /mnt && sh ./stop)
    sync
    [ -z "$state" ] || umount /mnt
    poweroff -f
}

# The power button, for a guest that has one and does not ignore it: an event of it is 24 bytes, and is
# not missed from here on.
if ! grep -q power-button=ignored /proc/cmdline && [ -c /dev/input/event0 ]; then
    exec 3< /dev/input/event0
    (dd bs=24 count=1 <&3 > /dev/null 2>&1 && power_off) &
    exec 3<&-
fi
[ -z "$state" ] || (cd /mnt && exec sh ./start > "/dev/$terminal" 2>&1) &
while :; do
    setsid sh /bin/agent "$terminal"
    sleep 1
done
