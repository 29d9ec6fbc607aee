// Package kernels runs tests of other packages on Debian's kernels (.ci/kernels), in a virtual machine: the oldest that Caracal supports,
// whose verifier takes less and which has no TCX, and newer ones.
package kernels

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caracal-net/caracal/tests/testenv"
	"github.com/caracal-net/caracal/tools/lab"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

// Run in the guest: every program through the verifier, on packets, on interfaces by what the kernel has, and behind real
// calls of the plugin. The machine is emulated, so these are few.
var inside = []struct{ pkg, run string }{
	{"loader", "^(TestProbe|TestAttach|TestAttachNet|TestAttachNetWithoutTCX|TestWithoutTCX|TestPrivateDir)$"},
	{"tests/dataplane", "^(TestPackets|TestNetPackets|TestServicePackets)$"},
	{"tests/dataplane", "^(TestPolicyRows|TestEvents)$/^v6$"},
	{"tests/dataplane", "^TestServices$/^nft$/^v6=false$/^(judged|to_host|in_turn)$"},
	{"tests/dataplane", "^TestWhatIf$/^v4$/^no_HTTP"},
	{"tests/cni", "^TestTTL$"},
	{"tests/ctl", "^TestScripts$/^pods$"},
}

func TestKernels(t *testing.T) {
	testenv.NeedRoot(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("boots kernels for amd64")
	}
	qemu := testenv.NeedProgram(t, "qemu-system-x86_64", "qemu-system-x86")
	root, err := testenv.Root()
	if err != nil {
		t.Fatal(err)
	}
	kernels, err := filepath.Glob(filepath.Join(root, "out/kernels/*/boot"))
	if err != nil {
		t.Fatal(err)
	}
	if len(kernels) == 0 {
		lab.Skip(t, "needs kernels in out/kernels (.ci/kernels fetches them)")
	}
	dir := t.TempDir()
	script := fmt.Sprintf("export CARACAL_NO_SKIPS=1 %s=%s\n", testenv.BinDirVariable, filepath.Dir(testenv.Bin(t, "caracal")))
	for _, i := range inside {
		program := filepath.Join(dir, filepath.Base(i.pkg)+".test")
		build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", program, "./"+i.pkg)
		build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the tests of %s: %v\n%s", i.pkg, err, out)
		}
		script += fmt.Sprintf("cd %s && /run/guest/%s -test.v -test.run '%s' || code=1\n", filepath.Join(root, i.pkg), filepath.Base(program), i.run)
	}
	for _, k := range kernels {
		k = filepath.Dir(k)
		t.Run(filepath.Base(k), func(t *testing.T) { boot(t, qemu, k, dir, script) })
	}
}

// early are the directories of the modules with which the guest reaches this machine's files.
var early = []string{"drivers/virtio", "fs/9p", "fs/fscache", "fs/netfs", "fs/overlayfs", "net/9p"}

// initScript gives the guest this machine's root directory, with what it writes in memory, and shares as /run/guest.
const initScript = `#!/bin/sh
export PATH=/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin
busybox mkdir -p /proc /lower /upper /root
busybox mount -t proc proc /proc
busybox modprobe -a virtio_pci 9pnet_virtio 9p overlay
options=trans=virtio,version=9p2000.L,msize=512000
busybox mount -t 9p -o ro,cache=loose,$options root /lower
busybox mount -t tmpfs tmpfs /upper
busybox mkdir /upper/files /upper/work
busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
busybox umount /proc
cd /root
busybox mount -t proc proc proc
busybox mount -t sysfs sysfs sys
busybox mount -t bpf bpf sys/fs/bpf
busybox mount -t devtmpfs devtmpfs dev
busybox mount -t tmpfs tmpfs run
busybox mount -t tmpfs tmpfs var/lib
busybox mkdir -p lib/modules run/netns run/guest
busybox mount -t 9p -o $options guest run/guest
busybox mount --bind ".$kernel/lib/modules" lib/modules
busybox ln -sf "$busybox" sbin/modprobe
exec busybox switch_root /root /bin/sh /run/guest/run
`

// boot starts a kernel, runs the script, which is to set code when something failed, and fails the test if it did.
func boot(t *testing.T, qemu, kernel, shared, script string) {
	busybox := testenv.NeedProgram(t, "busybox", "busybox-static")
	log, status := filepath.Join(shared, "log"), filepath.Join(shared, "status")
	for _, old := range []string{log, status} {
		if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	script = "ip link set lo up\n(\ncode=0\n" + script + "exit $code\n) >/run/guest/log 2>&1\n" +
		"echo $? >/run/guest/status\nbusybox poweroff -f\n"
	if err := os.WriteFile(filepath.Join(shared, "run"), []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	image, err := filepath.Glob(filepath.Join(kernel, "boot/vmlinuz-*"))
	if err != nil || len(image) != 1 {
		t.Fatalf("kernel image in %s: %v %v", kernel, image, err)
	}
	disk := initramfs(t, busybox, kernel)
	for attempt := 1; ; attempt++ {
		// Emulated, though slow: /dev/kvm is not on every machine, and not every one that is there runs a guest.
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
		cmd := exec.CommandContext(ctx, qemu, "-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", "2G", "-nographic",
			"-no-reboot", "-nic", "none", "-kernel", image[0], "-initrd", disk,
			"-append", "console=ttyS0 quiet panic=-1",
			"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
			"-virtfs", "local,path="+shared+",mount_tag=guest,security_model=none")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		console, err := cmd.CombinedOutput()
		err = errors.Join(err, ctx.Err())
		cancel()
		said, unread := os.ReadFile(log)
		code, _ := os.ReadFile(status)
		if err == nil && strings.TrimSpace(string(code)) == "0" {
			t.Logf("%s", said)
			return
		}
		// A kernel that patches its own code at boot now and then trips over it when emulated: it never began the script.
		if errors.Is(unread, fs.ErrNotExist) && attempt < 3 {
			t.Logf("the guest did not start:\n%s", console)
			continue
		}
		t.Fatalf("in the guest: %v, status %q\n%s\nconsole:\n%s", err, code, said, console)
	}
}

// initramfs makes the file system that the kernel starts from.
func initramfs(t *testing.T, busybox, kernel string) string {
	dir := t.TempDir()
	file := dir + ".cpio"
	t.Cleanup(func() { os.Remove(file) })
	script := "set -e\nmkdir bin; cp $busybox bin/busybox; ln -s busybox bin/sh\n" +
		"release=$(ls $kernel/lib/modules)\nm=lib/modules/$release/kernel\n" +
		"for d in $early; do [ ! -d $kernel/$m/$d ] || { mkdir -p $m/$d; cp $kernel/$m/$d/*.ko $m/$d; }; done\n" +
		"cp $kernel/lib/modules/$release/modules.* lib/modules/$release\n" +
		"busybox depmod -b $PWD $release\nfind . | busybox cpio -o -H newc >$file\n"
	init := strings.Replace(initScript, "\n", fmt.Sprintf("\nkernel=%s busybox=%s\n", kernel, busybox), 1)
	if err := os.WriteFile(filepath.Join(dir, "init"), []byte(init), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "busybox="+busybox, "kernel="+kernel, "early="+strings.Join(early, " "), "file="+file)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make the initramfs: %v\n%s", err, out)
	}
	return file
}
