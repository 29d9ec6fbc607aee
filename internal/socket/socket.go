// Package socket listens on sockets of the file system.
package socket

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

// ErrInUse says that another program answers on a socket.
var ErrInUse = errors.New("another agent answers there; one runs on a node")

// Listen listens on a socket that only root may use, in place of one that a killed agent left. It makes the socket's directory.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", path, ErrInUse)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
