#!/bin/busybox sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# /init of the guest that tests boot: loads the drivers, then runs what the host sends.
#
# The host talks over the virtio-serial port named "oxbow": one line a command,
#     ID BASE64-OF-A-SHELL-SCRIPT
# and for each, when it has ended, one line back (in any order: every command runs beside the
# others; a lock keeps the lines whole):
#     ID EXIT-STATUS BASE64-OF-ITS-OUTPUT
# Before that it says "hello SECONDS" once.  The console (ttyS0 or ttyAMA0) is for the kernel's
# messages and a person's eyes.

/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/ TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm /tmp /mnt /run
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
ln -sf /proc/self/fd /dev/fd

# In the order of their dependencies.  One that this machine has no use for may fail.
while read -r module; do
	insmod "/modules/$module" 2>/dev/null
done </modules/list

# New memory is put to use at once, and so that it can be taken away again.
echo online_movable >/sys/devices/system/memory/auto_online_blocks 2>/dev/null

echo "oxbow-guest: up $(cut -d' ' -f1 /proc/uptime)"
case " $(cat /proc/cmdline) " in
*" oxbow.probe "*) poweroff -f ;;
esac

port=
while [ -z "$port" ]; do
	for name in /sys/class/virtio-ports/*/name; do
		[ "$(cat "$name" 2>/dev/null)" = oxbow ] || continue
		port=/dev/$(basename "$(dirname "$name")")
	done
	[ -n "$port" ] || sleep 0.1
done
exec 3<>"$port"

answer()
{
	printf '%s %s %s\n' "$1" "$2" "$(base64 -w 0 <"$3")" >/tmp/answer."$1"
	until mkdir /tmp/port.lock 2>/dev/null; do
		sleep 0.01
	done
	cat /tmp/answer."$1" >&3
	rmdir /tmp/port.lock
	rm -f /tmp/answer."$1" "$3" /tmp/script."$1"
}

echo "hello $(cut -d' ' -f1 /proc/uptime)" >&3
while read -r id script <&3; do
	[ -n "$script" ] || continue
	printf '%s' "$script" | base64 -d >/tmp/script."$id"
	{
		sh /tmp/script."$id" </dev/null >/tmp/output."$id" 2>&1 3>&-
		answer "$id" $? /tmp/output."$id"
	} &
done
# The host closed the port for good.
poweroff -f
