package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// labFile is <lab>/lab.json. It is written before anything it names is made and removed after all of it is gone.
type labFile struct {
	Name    string     `json:"name"`
	Up      bool       `json:"up"` // false while it is made or taken down
	Created time.Time  `json:"created"`
	Outside bool       `json:"outside,omitempty"`
	MTU     int        `json:"mtu"`
	Network string     `json:"network"`
	Foreign bool       `json:"foreign,omitempty"` // Config.Conflist was set: release pods by DEL on the way down
	CNIPath []string   `json:"cniPath"`
	Hosts   []hostFile `json:"hosts"`
}

type hostFile struct {
	Name      string         `json:"name"`
	Netns     string         `json:"netns"` // name under /run/netns
	Addr4     netip.Prefix   `json:"addr4"`
	Addr6     netip.Prefix   `json:"addr6"`
	IPv4Pools []netip.Prefix `json:"ipv4Pools"`
	IPv6Pools []netip.Prefix `json:"ipv6Pools"`
}

// podFile is <lab>/<host>/pods/<pod>.json, written before the pod's namespace is made.
type podFile struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"` // the Kubernetes word, not a network namespace
	UID         string            `json:"uid"`
	ContainerID string            `json:"containerID"`
	Netns       string            `json:"netns"` // name under /run/netns
	IfName      string            `json:"ifName"`
	State       PodState          `json:"state"`
	IPs         []netip.Addr      `json:"ips,omitempty"` // asked for
	Labels      map[string]string `json:"labels,omitempty"`
	Args        [][2]string       `json:"args,omitempty"`
	Env         []string          `json:"env,omitempty"`
	Caps        map[string]any    `json:"capabilities,omitempty"`
	Result      json.RawMessage   `json:"result,omitempty"`
}

const labJSON = "lab.json"

func (l *Lab) load() error {
	data, err := os.ReadFile(filepath.Join(l.Dir, labJSON))
	if errors.Is(err, os.ErrNotExist) {
		if _, statErr := os.Stat(l.Dir); statErr == nil {
			return fmt.Errorf("lab %s: %w (lab down --name %s)", l.Name, ErrClosing, l.Name)
		}
		return fmt.Errorf("lab %s: %w", l.Name, ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("read lab: %w", err)
	}
	if err := json.Unmarshal(data, &l.file); err != nil {
		return fmt.Errorf("read %s: %w", filepath.Join(l.Dir, labJSON), err)
	}
	return nil
}

func (l *Lab) save() error { return writeJSON(filepath.Join(l.Dir, labJSON), l.file, os.Rename) }

// writeJSON writes v next to path and puts it in place with place: os.Rename replaces, os.Link fails if path exists.
func writeJSON(path string, v any, place func(from, to string) error) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(data, '\n'))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = place(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// lockDir takes a lock on the lab's directory: shared while pods are added or removed, exclusive while the lab is made
// or taken down. The kernel gives it up when its process ends. The error is ErrNotFound if the directory is gone.
func lockDir(ctx context.Context, dir string, how int) (unlock func(), err error) {
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("lab %s: %w", filepath.Base(dir), ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("lock lab: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s, in use by another process: %w", dir, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	here, err1 := f.Stat()
	there, err2 := os.Stat(dir)
	if err1 != nil || err2 != nil || !os.SameFile(here, there) { // removed while we waited
		f.Close()
		return nil, fmt.Errorf("lab %s: %w", filepath.Base(dir), ErrNotFound)
	}
	return func() { f.Close() }, nil
}

// use takes the shared lock for work on a lab that is up.
func (l *Lab) use(ctx context.Context) (unlock func(), err error) {
	unlock, err = lockDir(ctx, l.Dir, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	fresh := &Lab{Name: l.Name, Dir: l.Dir}
	if err := fresh.load(); err != nil {
		unlock()
		return nil, err
	}
	if !fresh.file.Up || !fresh.file.Created.Equal(l.file.Created) {
		unlock()
		return nil, fmt.Errorf("lab %s: %w", l.Name, ErrClosing)
	}
	return unlock, nil
}
