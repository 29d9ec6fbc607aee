package socket

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
)

// What a dead program left is replaced; who answers is left alone.
func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dir", "x.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", info, err)
	}
	if _, err := Listen(path); !errors.Is(err, ErrInUse) {
		t.Errorf("a second one: %v; want ErrInUse", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal("the stale socket is gone: ", err)
	}
	l, err = Listen(path)
	if err != nil {
		t.Fatalf("in place of a stale one: %v", err)
	}
	l.Close()
}
