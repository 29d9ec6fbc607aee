package ctl

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// interfaces asks the kernel about the interfaces of the namespace it was made in, one at a time: no dump that a
// concurrent change could interrupt.
type interfaces struct{ fd int }

func openInterfaces() (*interfaces, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	return &interfaces{fd}, nil
}

func (i *interfaces) close() { unix.Close(i.fd) }

// index is an interface's number, 0 when there is none of that name.
func (i *interfaces) index(name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	r, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("interface %q: %w", name, err)
	}
	if err := unix.IoctlIfreq(i.fd, unix.SIOCGIFINDEX, r); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return 0, nil
		}
		return 0, fmt.Errorf("interface %s: %w", name, err)
	}
	return int(r.Uint32()), nil
}

// name is an interface's name, "" when there is none of that number.
func (i *interfaces) name(index uint32) (string, error) {
	if index == 0 {
		return "", nil
	}
	r, err := unix.NewIfreq("")
	if err != nil {
		return "", err
	}
	r.SetUint32(index)
	if err := unix.IoctlIfreq(i.fd, unix.SIOCGIFNAME, r); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return "", nil
		}
		return "", fmt.Errorf("interface %d: %w", index, err)
	}
	return r.Name(), nil
}
