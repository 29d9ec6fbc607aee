# The first process of a simulated machine (machine.go). It begins in the host's network namespace, and again in its own ones.
set -euo pipefail
if [ "${1:-}" != inside ]; then
	hierarchies=""
	for dir in /sys/fs/cgroup/*/; do
		c=$(basename "$dir")
		mkdir -p "$dir$CGROUP"
		if [ "$c" = cpuset ]; then
			for f in cpuset.cpus cpuset.mems; do cat "$dir$f" >"$dir$CGROUP/$f"; done
		fi
		echo $$ >"$dir$CGROUP/cgroup.procs"
		hierarchies+="$c "
	done
	export HIERARCHIES=$hierarchies
	exec unshare --mount --uts --ipc --pid --cgroup --fork --kill-child --mount-proc bash -c "$BASH_EXECUTION_STRING" machine inside
fi

mount --make-rprivate /
hostname "$NAME"
mkdir -p "$DISK"/{opt,var/{lib,log,tmp,cache,spool},bin,etc,work,root}
ln -sfn /run "$DISK/var/run"
ln -sfn /run/lock "$DISK/var/lock"
mount --bind "$DISK/root" /root
if [ -n "$BINARIES" ]; then
	mkdir -p /root/caracal
	mount --bind "$BINARIES" /root/caracal
	mount -o remount,bind,ro /root/caracal
fi
mount -t overlay -o "lowerdir=/etc,upperdir=$DISK/etc,workdir=$DISK/work" etc /etc
if [ ! -e "$DISK/installed" ]; then
	rm -rf /etc/cni /etc/caracal /etc/calico /etc/docker /etc/containerd
	: >/etc/resolv.conf.new
	mv /etc/resolv.conf.new /etc/resolv.conf
	echo "$NAME" >/etc/hostname
	printf '127.0.0.1 localhost %s\n::1 localhost\n' "$NAME" >/etc/hosts
	touch "$DISK/installed"
fi
mount --bind "$DISK/opt" /opt
mount --bind "$DISK/var" /var
mount --bind "$DISK/bin" /usr/local/bin
mount --bind "$BOOT_ID" /proc/sys/kernel/random/boot_id
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for c in $HIERARCHIES; do
	mkdir "/sys/fs/cgroup/$c"
	case $c in
	unified) mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified ;;
	systemd) mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd ;;
	*) mount -t cgroup -o "$c" cgroup "/sys/fs/cgroup/$c" ;;
	esac
done
mount -t bpf bpf /sys/fs/bpf
exec 3>"$UP" # on the real machine's /run, which is about to be hidden
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/netns
mount --make-rshared /
cd /root
echo up >&3
exec 3>&-
trap 'exit 0' TERM
while :; do
	sleep infinity &
	wait
done
