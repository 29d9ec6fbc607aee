// Package socket listens on sockets of the file system.
package socket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/holder"
)

// ErrInUse says that another program answers on a socket.
var ErrInUse = errors.New("another program answers there")

// Listen listens on a socket that only root may use, in place of one that a killed program left. It makes the socket's directory.
// What is there and is no socket stays. ErrInUse.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of socket: %w", err)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("%s is no socket, and stays", path)
	}
	c, err := net.Dial("unix", path)
	switch {
	case err == nil:
		defer c.Close()
		err = ErrInUse
		if who := holder.Peer(c.(*net.UnixConn)); who != "" {
			err = fmt.Errorf("%w: %s", ErrInUse, who)
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	case errors.Is(err, unix.EAGAIN): // more wait to be answered than it has room for
		return nil, fmt.Errorf("%s: %w", path, ErrInUse)
	case errors.Is(err, unix.ECONNREFUSED): // nobody has it open
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("remove old socket: %w", err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("look who answers on %s: %w", path, err)
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
