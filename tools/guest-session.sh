#!/bin/bash
# SPDX-License-Identifier: MIT
#
# What runs inside the guest, as root, started by tools/guest-init.sh on its view of
# the host: load the module, run the command, unload the module.
#
# $1 is the scratch folder, the only place whose changes reach the host:
#   session.env  in:  the variables below, quoted for the shell
#   command.sh   in:  the command, quoted for the shell
#   phases       out: one "name value" line for each phase that came to its end
#
# Everything that matters is a line in `phases`, so a guest that panics half-way
# is told apart from a command that failed.

scratch=$1
# shellcheck source=/dev/null
. "$scratch/session.env" # cwd user module rule private

# Every fork costs some 20 ms in an emulated guest, and every program of the host's
# that is started 200: hence the shell's own means below wherever they will do.

# Ports of their own for stdout and stderr: the console is the kernel's.  The host
# announces them when the driver asks, which may take a moment.
stdout='' stderr=''
for ((tries = 0; tries < 500; tries++)); do
	for port in /sys/class/virtio-ports/*; do
		name=
		[ -e "$port/name" ] && read -r name <"$port/name"
		case $name in
		virtme.stdout) stdout=/dev/${port##*/} ;;
		aioummu.stderr) stderr=/dev/${port##*/} ;;
		esac
	done
	[ -n "$stdout" ] && [ -n "$stderr" ] && break
	sleep 0.02
done
exec >"$stdout" 2>"$stderr" </dev/null

phase() {
	echo "$*" >>"$scratch/phases"
	echo "<6>aioummu-guest: $*" >/dev/kmsg
}

# An unprivileged user has to reach the interpreter, even below a private home.
if [ ${#private[@]} -gt 0 ]; then
	chmod o+x "${private[@]}"
fi

read -r uptime _ </proc/uptime
phase up "$uptime"

if [ -n "$module" ]; then
	udev=
	udevd=/lib/systemd/systemd-udevd
	if [ -n "$rule" ] && [ -x "$udevd" ]; then
		# The real thing where the host has udevd ...
		mkdir -p /run/udev/rules.d
		cp "$rule" /run/udev/rules.d/ && "$udevd" --daemon 2>/dev/null && udev=yes
	fi
	insmod "$module" 2>"$scratch/insmod.err"
	rc=$?
	cat "$scratch/insmod.err" >&2
	phase insmod $rc
	[ $rc -eq 0 ] || exit 1
	if [ -n "$udev" ]; then
		udevadm settle --timeout=60
	elif [ -n "$rule" ]; then
		# ... and otherwise at least the mode that it gives.
		name=$(sed -n 's/^KERNEL=="\([^"]*\)".*/\1/p' "$rule")
		mode=$(sed -n 's/.*MODE="\([0-7]*\)".*/\1/p' "$rule")
		[ -e "/dev/$name" ] && [ -n "$mode" ] && chmod "$mode" "/dev/$name"
	fi
fi

cd "$cwd" || exit 1
if [ -n "$user" ]; then
	setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups \
		env HOME=/tmp bash "$scratch/command.sh" </dev/null
else
	bash "$scratch/command.sh" </dev/null
fi
phase exit $?
cd /

if [ -n "$module" ]; then
	name=${module##*/}
	name=${name%.ko}
	# A test that leaves a process behind with the device open is a failure too.
	timeout 60 rmmod "$name" 2>"$scratch/rmmod.err"
	rc=$?
	cat "$scratch/rmmod.err" >&2
	if [ $rc -eq 0 ] && { [ -e "/sys/module/$name" ] || grep -q "^$name" /proc/slabinfo; }; then
		echo "rmmod: $name or one of its slab caches is still there" >&2
		rc=1
	fi
	phase rmmod $rc
fi
phase "done" 0
