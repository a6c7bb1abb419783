#!/bin/busybox sh
# SPDX-License-Identifier: MIT
#
# The guest's first process, from an initramfs that tools/guest.py packs: busybox,
# a few modules and this.  It shows the guest the host's file system as it is, but
# copy-on-write and cached, and starts the session on it.
#
# virtme-ng brings an init of its own.  It starts udev for hardware that no test
# needs, and its view of the host is uncached 9p, where starting Python takes
# seconds: of 12 s of boot on an idle machine, 8 were spent on that, and of 40 s
# with Linux 5.10 on a busy one 35.  Its options stay in charge of the machine.
#
# In the environment, from the kernel's command line: aioummu_scratch, the folder
# whose changes reach the host, and aioummu_session, the script to run.

bb=/bin/busybox
nine=trans=virtio,version=9p2000.L,access=any,msize=512000

die() {
	echo "aioummu-init: $*" >/dev/kmsg
	$bb poweroff -f
}

$bb mkdir -p /proc /sys /dev /lower /cow /new
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
while read -r module; do
	$bb insmod "/modules/$module" || die "cannot load $module"
done </modules/order

$bb mount -t 9p -o "ro,cache=loose,$nine" /dev/root /lower || die "no view of the host"
$bb mount -t tmpfs -o size=80% cow /cow
$bb mkdir /cow/upper /cow/work
$bb mount -t overlay -o xino=off,lowerdir=/lower,upperdir=/cow/upper,workdir=/cow/work \
	root /new || die "no copy-on-write view of the host"
$bb chmod 755 /new

$bb mount -t tmpfs -o mode=755 run /new/run
$bb mkdir -p "/new$aioummu_scratch"
$bb mount -t 9p -o "$nine" virtme.initmount0 "/new$aioummu_scratch" || die "no scratch folder"
$bb mkdir -p /new/lib/modules
$bb mount -t tmpfs -o mode=755 modules /new/lib/modules
$bb ln -s "$aioummu_modules" "/new/lib/modules/$($bb uname -r)"
$bb cp $bb /new/run/busybox

for folder in dev proc sys; do
	$bb mount --move /$folder /new/$folder
done
$bb mkdir -p /new/dev/pts /new/dev/shm /new/run/lock
$bb mount -t devpts -o mode=620,ptmxmode=666 pts /new/dev/pts
$bb mount -t tmpfs -o mode=1777 shm /new/dev/shm
$bb mount -t cgroup2 cgroup /new/sys/fs/cgroup
$bb mount -t debugfs debug /new/sys/kernel/debug
$bb mount -t tracefs trace /new/sys/kernel/tracing
$bb ln -s /proc/self/fd /new/dev/fd
$bb ln -s /proc/self/fd/0 /new/dev/stdin
$bb ln -s /proc/self/fd/1 /new/dev/stdout
$bb ln -s /proc/self/fd/2 /new/dev/stderr
$bb hostname guest
$bb ifconfig lo up

exec $bb switch_root /new /run/busybox env -i HOME=/root TERM=dumb \
	PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
	/run/busybox sh -c '/bin/bash "$0" "$1"; /run/busybox poweroff -f' \
	"$aioummu_session" "$aioummu_scratch"
