package ipam

import (
	"context"
	"net/netip"
	"os"
	"testing"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// testConfig has 1,024 IPv4 blocks of 64 addresses.
var testConfig = Config{Pools: []api.IPPool{pool("10.244.0.0/16", 26)}}

// memory is a directory of the test's own on a file system that syncs in no time.
func memory(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "caracal-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// attach is ADD's transaction: addresses and record, or neither.
func attach(dir string, o node.Options, cfg Config, r Request) (addrs []netip.Addr, err error) {
	db, err := node.Open(context.Background(), dir, o)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	return addrs, db.Update(func(tx *node.Tx) (err error) {
		addrs, err = record(tx, cfg, r)
		return err
	})
}

func record(tx *node.Tx, cfg Config, r Request) ([]netip.Addr, error) {
	addrs, err := Assign(tx, cfg, r)
	if err != nil {
		return nil, err
	}
	return addrs, tx.PutEndpoint(node.Endpoint{Key: r.Key, HostIfName: "cali" + r.Key.ContainerID, Addrs: addrs, IPAM: Name, Netns: "/run/netns/x",
		MAC: "02:00:00:00:00:01", PodName: "pod-" + r.Key.ContainerID, PodNamespace: "default"})
}

// detach is DEL's transaction.
func detach(dir string, o node.Options, k node.Key) error {
	db, err := node.Open(context.Background(), dir, o)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Update(func(tx *node.Tx) error { return forget(tx, k) })
}

func forget(tx *node.Tx, k node.Key) error {
	if _, err := Release(tx, k); err != nil {
		return err
	}
	return tx.DeleteEndpoint(k)
}

// populate attaches pods 0 to n-1.
func populate(t testing.TB, dir string, n int) {
	t.Helper()
	db, err := node.Open(context.Background(), dir, node.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for i := range n {
		err := db.Update(func(tx *node.Tx) error {
			_, err := record(tx, testConfig, Request{Key: key(i), V4: true})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// checkClean fails the test for everything that Check finds in a database that every process has left.
func checkClean(t testing.TB, dir string, o node.Options) Report {
	t.Helper()
	var report Report
	look(t, dir, o, func(tx *node.Tx) (err error) {
		report, err = Check(tx, nil)
		return err
	})
	for _, p := range report.Problems {
		t.Errorf("check: %+v", p)
	}
	return report
}

func look(t testing.TB, dir string, o node.Options, fn func(*node.Tx) error) {
	t.Helper()
	db, err := node.OpenReadOnly(context.Background(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.View(fn); err != nil {
		t.Fatal(err)
	}
}

// bootFile makes a boot id file of the test's own.
func bootFile(t testing.TB, id string) node.Options {
	t.Helper()
	file := t.TempDir() + "/boot_id"
	if err := os.WriteFile(file, []byte(id), 0o600); err != nil {
		t.Fatal(err)
	}
	return node.Options{BootIDFile: file}
}
