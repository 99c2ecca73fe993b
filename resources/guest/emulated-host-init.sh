#!/bin/sh
# The emulated host's first program: loads modules, makes the file system of the machine around it its
# own root, and runs there the script that `testbed.script=` of the kernel command line names.
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module parameters; do
    insmod "$module" $parameters || echo "cannot load $module"
done < /modules/order

mount -t virtiofs hostroot /mnt || echo 'cannot mount the file system of the machine around'
mount -t proc proc /mnt/proc
mount -t sysfs sys /mnt/sys
mount -t debugfs debug /mnt/sys/kernel/debug
mount -t tracefs tracing /mnt/sys/kernel/tracing
mount -t devtmpfs dev /mnt/dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 pts /mnt/dev/pts
mount -t tmpfs shm /mnt/dev/shm
mount -t tmpfs run /mnt/run
mount -t cgroup2 cgroup /mnt/sys/fs/cgroup
ip link set lo up

script=$(sed -n 's/.*testbed\.script=\([^ ]*\).*/\1/p' /proc/cmdline)
exec switch_root /mnt /bin/sh "$script"
