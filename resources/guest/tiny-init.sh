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

# The power button, for a guest that has one and does not ignore it: an event of it is 24 bytes.
if ! grep -q power-button=ignored /proc/cmdline && [ -c /dev/input/event0 ]; then
    (dd if=/dev/input/event0 of=/dev/null bs=24 count=1 2> /dev/null && sync && poweroff -f) &
fi
while :; do
    setsid sh /bin/agent "$terminal"
    sleep 1
done
