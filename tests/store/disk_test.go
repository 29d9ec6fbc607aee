package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/store/storetest"
	"github.com/caracal-net/caracal/tools/lab"
)

// disk is a file system that can be made to hang: whoever writes or syncs then waits (FIFREEZE, ioctl_fsfreeze in fs/ioctl.c).
type disk struct {
	dir string
	fd  int
}

const (
	fifreeze = 0xc0045877 // _IOWR('X', 119, int), linux/fs.h
	fithaw   = 0xc0045878
)

// newDisk mounts one, until everything that the test does afterwards was cleaned up.
func newDisk(t *testing.T) *disk {
	t.Helper()
	if os.Geteuid() != 0 {
		lab.Skip(t, "needs root: a file system that hangs")
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		lab.Skip(t, "needs mkfs.ext4 (apt-get install e2fsprogs)")
	}
	base := t.TempDir()
	d := &disk{dir: filepath.Join(base, "mnt")}
	image := filepath.Join(base, "image")
	for _, err := range []error{os.Mkdir(d.dir, 0o700), os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<30)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, arg := range [][]string{{"mkfs.ext4", "-q", "-F", image}, {"mount", "-o", "loop", image, d.dir}} {
		if out, err := exec.Command(arg[0], arg[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", arg, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d.dir, 0); err != nil {
			t.Errorf("unmount %s: %v", d.dir, err)
		}
	})
	var err error
	if d.fd, err = unix.Open(d.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(d.fd) })
	return d
}

func (d *disk) hang(t *testing.T) {
	t.Helper()
	if err := unix.IoctlSetInt(d.fd, fifreeze, 0); err != nil {
		t.Fatalf("freeze: %v", err)
	}
}

// goOn ends hang; that it has ended already is no error.
func (d *disk) goOn() { unix.IoctlSetInt(d.fd, fithaw, 0) }

// move makes members keep their data on a disk, and sync it.
func (c *cluster) move(t *testing.T, d *disk, members ...*member) {
	t.Helper()
	for _, m := range members {
		m.kill(t)
		dir := filepath.Join(d.dir, m.name)
		if err := os.CopyFS(dir, os.DirFS(m.dir)); err != nil {
			t.Fatal(err)
		}
		m.args = replaced(replaced(m.args, m.dir, dir), "--unsafe-no-fsync", "--unsafe-no-fsync=false")
		m.dir = dir
		m.start(t)
		c.await(t)
	}
	t.Cleanup(d.goOn) // else nothing ends them
}

// The leader's disk hangs: the others go on without it, and it follows when it is back.
func TestDiskOfLeaderHangs(t *testing.T) {
	d := newDisk(t)
	c := startCluster(t, 3)
	m := c.members[0]
	c.move(t, d, m)
	writer := &counter{store: open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: 2 * time.Second}), key: "/n"}
	var watches []*sequence
	for range 3 { // the library chooses the member: some begin at that one
		w, err := open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: 2 * time.Second}).Watch(storetest.Context(t), "/n", 0)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		watches = append(watches, &sequence{watch: w})
	}
	follow := func() {
		t.Helper()
		for _, w := range watches {
			w.follow(t, writer.acked[len(writer.acked)-1])
		}
	}
	c.lead(t, m)
	add := func(n int) {
		t.Helper()
		want := len(writer.acked) + n
		until(t, "changes go on", func() error {
			for len(writer.acked) < want {
				if err := writer.add(storetest.Context(t)); err != nil {
					if !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrExists) {
						t.Fatalf("count: %v", err)
					}
					return err
				}
			}
			return nil
		})
	}
	add(5)
	follow()
	d.hang(t)
	begin := time.Now()
	add(5)
	t.Logf("five changes took %s after the leader's disk had hung", time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	follow()
	t.Logf("all had heard of it %s later", time.Since(begin).Round(time.Millisecond))
	d.goOn()
	c.await(t)
	add(5)
	follow()
}

// Most members' disks hang, for a moment again and again, then for long: what is asked is answered late, or it is said that
// nobody answers, in time; and what was acknowledged is there.
func TestMostDisksHang(t *testing.T) {
	d := newDisk(t)
	c := startCluster(t, 3)
	c.move(t, d, c.members[:2]...)
	const timeout = time.Second
	s := open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: timeout})
	at := storetest.Put(t, s, "/k", "0")
	w, err := s.Watch(storetest.Context(t), "/k", at)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx := storetest.Context(t)
	var acked int
	for i := 1; i <= 5; i++ { // each change finds the disks slow
		d.hang(t)
		slow := time.AfterFunc(300*time.Millisecond, d.goOn)
		begin := time.Now()
		_, err := s.Update(ctx, "/k", fmt.Append(nil, i), 0)
		slow.Stop()
		d.goOn()
		if err == nil {
			acked = i
		} else if !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("update %d: %v", i, err)
		}
		t.Logf("change %d took %s: %v", i, time.Since(begin).Round(time.Millisecond), err)
	}
	if acked == 0 {
		t.Error("no change went well though the disks were but slow")
	}
	d.hang(t)
	begin := time.Now()
	if _, err := s.Update(ctx, "/k", []byte("100"), 0); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("update: %v", err)
	}
	if took := time.Since(begin); took > timeout+slack {
		t.Errorf("update took %s", took)
	}
	d.goOn()
	until(t, "it works again", func() error {
		_, err := s.Update(context.Background(), "/k", []byte("200"), 0)
		return err
	})
	for last := 0; last != 200; {
		e, err := w.Next(ctx)
		if errors.Is(err, store.ErrUnavailable) {
			continue
		}
		if err != nil {
			t.Fatalf("next: %v", err)
		}
		n := 0
		fmt.Sscan(string(e.Value), &n)
		if n <= last || last < acked && n > acked {
			t.Errorf("told %d after %d; %d was acknowledged", n, last, acked)
		}
		last = n
	}
}

// lead makes a member the leader.
func (c *cluster) lead(t *testing.T, m *member) {
	t.Helper()
	until(t, m.name+" leads", func() error {
		leader := c.leader(t)
		if leader == m {
			return nil
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		st, err := c.raw(t).Status(ctx, m.client)
		if err != nil {
			return err
		}
		to := (&cluster{members: []*member{leader}}).raw(t) // only the leader gives it away
		if _, err := to.MoveLeader(ctx, st.Header.MemberId); err != nil {
			return err
		}
		return fmt.Errorf("%s led", leader.name)
	})
}
