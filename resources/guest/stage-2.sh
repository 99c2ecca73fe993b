#!@busybox@/bin/sh
# Stage 2 of the NixOS-shaped guest, the `init` of its system: makes on the tmpfs root what programs
# expect outside the store, then becomes systemd.
PATH=@busybox@/bin
mkdir -p /tmp /home /root /etc /var/lib /var/log /var/cache /var/tmp /run/etc/upper /run/etc/work
chmod 1777 /tmp /var/tmp
chmod 700 /root
ln -s @userland@/usr /usr
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "/$folder"; done
ln -s /run /var/run
ln -s @system@ /run/booted-system
ln -s @system@ /run/current-system
mount -t overlay -o lowerdir=@userland@/etc,upperdir=/run/etc/upper,workdir=/run/etc/work etc /etc
tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id

# A disk that says it is the data volume is mounted where a service keeps its state.
for disk in /sys/block/vd*; do
    [ "$(cat "$disk/serial")" = data ] || continue
    mkdir -p /var/lib/data
    echo "/dev/${disk##*/} /var/lib/data ext4 defaults 0 0" >> /etc/fstab
done
exec @system@/systemd/lib/systemd/systemd
