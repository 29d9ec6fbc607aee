# Starts a real systemd on a simulated machine, with no unit but its own first targets: nothing of what is
# installed on the real machine. Sysctls that are not the network's are the real machine's, so they can't be written.
set -eu
if [ "${1:-}" != inside ]; then
	rm -rf /etc/systemd/system/*
	mkdir -p /root/units
	cd /usr/lib/systemd/system
	cp sysinit.target basic.target multi-user.target network.target network-online.target sockets.target timers.target paths.target \
		slices.target local-fs.target swap.target shutdown.target umount.target /root/units
	cat >/usr/local/bin/systemctl <<'end'
#!/bin/sh
exec nsenter -t "$(pgrep -o -x systemd)" -m -p -- /usr/bin/systemctl "$@"
end
	chmod +x /usr/local/bin/systemctl
	# Services find the real machine's boot id in their /proc.
	cat /proc/sys/kernel/random/boot_id >/var/lib/boot_id
	mkdir -p /etc/systemd/system.conf.d
	printf '[Manager]\nDefaultEnvironment=CARACAL_BOOT_ID_FILE=/var/lib/boot_id\n' >/etc/systemd/system.conf.d/boot_id.conf
	exec unshare --pid --fork --kill-child --mount-proc sh "$0" inside
fi
mount --bind /root/units /usr/lib/systemd/system
mount --bind /proc/sys /proc/sys
mount --bind /proc/sys/net /proc/sys/net
mount -o remount,bind,ro /proc/sys
export container=lab
exec /usr/lib/systemd/systemd --system --unit=multi-user.target --show-status=no
