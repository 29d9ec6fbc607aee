package cni

import (
	"errors"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"

	"github.com/caracal-net/caracal/node"
)

// A container that is taken off one of its networks is not on it by its other ones either, wherever that is interrupted: asked
// again nobody knows any more whose it was.
func TestDetachInterrupted(t *testing.T) {
	leaves := node.Key{Network: "docker-1", ContainerID: "one", IfName: "cali0"}
	stays := node.Key{Network: "docker-2", ContainerID: "two", IfName: "cali0"}
	for _, step := range []string{"unmap", "unlink", "forget", ""} {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			interrupted := errors.New("interrupted")
			a := NewAttacher(Config{StateDir: dir, BPFFSDir: filepath.Join(dir, "bpf")}, slog.New(slog.DiscardHandler), func(at string) error {
				if at == step {
					return interrupted
				}
				return nil
			})
			record := func(k node.Key, host string, profiles ...string) node.Endpoint {
				return node.Endpoint{Key: k, HostIfName: host, Netns: "/run/docker/netns/1", Profiles: profiles, Docker: &node.Docker{}}
			}
			err := a.Update(t.Context(), func(tx *node.Tx) error {
				return errors.Join(tx.PutEndpoint(record(leaves, "calitest1", "one", "two")), tx.PutEndpoint(record(stays, "calitest2", "two", "one")))
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := a.Detach(t.Context(), leaves); step == "" && err != nil || step != "" && !errors.Is(err, interrupted) {
				t.Fatal(err)
			}
			err = a.View(t.Context(), func(tx *node.Tx) error {
				e, err := tx.Endpoint(stays)
				if want := []string{"two"}; !slices.Equal(e.Profiles, want) {
					t.Errorf("profiles %q, want %q", e.Profiles, want)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}
