package ipam

import (
	"context"
	"fmt"
	"testing"

	"github.com/caracal-net/caracal/node"
)

// BenchmarkAttachment is what one pod costs: ADD's open, one transaction and close, and DEL's.
func BenchmarkAttachment(b *testing.B) {
	for _, disk := range []struct {
		name string
		dir  func(testing.TB) string
	}{{"disk", func(t testing.TB) string { return t.TempDir() }}, {"memory", memory}} {
		for _, n := range []int{0, 10, 500} {
			b.Run(fmt.Sprintf("%s/pods=%d", disk.name, n), func(b *testing.B) {
				dir := disk.dir(b)
				populate(b, dir, n)
				for b.Loop() {
					if _, err := attach(dir, node.Options{}, testConfig, Request{Key: key(n), V4: true}); err != nil {
						b.Fatal(err)
					}
					if err := detach(dir, node.Options{}, key(n)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkStatus is what STATUS costs, which writes nothing.
func BenchmarkStatus(b *testing.B) {
	dir := memory(b)
	populate(b, dir, 500)
	for b.Loop() {
		db, err := node.Open(context.Background(), dir, node.Options{})
		if err != nil {
			b.Fatal(err)
		}
		if err := db.View(func(tx *node.Tx) error { return Status(tx, testConfig, true, false) }); err != nil {
			b.Fatal(err)
		}
		db.Close()
	}
}
