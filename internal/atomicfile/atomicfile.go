// Package atomicfile puts files and symbolic links in place of others: whoever looks, and whatever ends us in between, there
// is the old one or the new one, whole. A program that is being run can be replaced too.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// suffix ends the name of what is not in place yet. No container runtime takes it for a configuration.
const suffix = ".caracal-new"

// Dir is a directory in which files are replaced, by one process at a time.
type Dir struct {
	path   string
	lock   *os.File
	staged []*File
}

// File is one that was written beside its place.
type File struct {
	dir       *Dir
	temporary string
	path      string // its place
	done      bool
}

// Open waits until nobody else replaces files in a directory, and removes what one who was killed has left.
func Open(path string) (*Dir, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	d := &Dir{path: path, lock: f}
	if err := d.sweep(); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// sweep removes what a killed process left.
func (d *Dir) sweep() error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && strings.HasSuffix(e.Name(), suffix) {
			if err := os.Remove(filepath.Join(d.path, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Write writes a file beside its place, to the disk: it comes into place with Commit.
func (d *Dir) Write(name string, mode fs.FileMode, from io.Reader) (*File, error) {
	s := d.stage(name)
	f, err := os.OpenFile(s.temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", s.path, plain(err))
	}
	_, err = io.Copy(f, from)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("write %s: %w", s.path, plain(err))
	}
	return s, nil
}

// Link makes a symbolic link beside its place.
func (d *Dir) Link(name, target string) (*File, error) {
	s := d.stage(name)
	if err := os.Symlink(target, s.temporary); err != nil {
		return nil, fmt.Errorf("link %s: %w", s.path, plain(err))
	}
	return s, nil
}

func (d *Dir) stage(name string) *File {
	s := &File{dir: d, temporary: filepath.Join(d.path, "."+name+suffix), path: filepath.Join(d.path, name)}
	d.staged = append(d.staged, s)
	return s
}

// Commit puts the file in place, for good.
func (s *File) Commit() error {
	if err := os.Rename(s.temporary, s.path); err != nil {
		return fmt.Errorf("put %s in place: %w", s.path, plain(err))
	}
	s.done = true
	if err := s.dir.lock.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", s.dir.path, err)
	}
	return nil
}

// Close removes what was not committed, and lets others in.
func (d *Dir) Close() error {
	var errs []error
	for _, s := range d.staged {
		if s.done {
			continue
		}
		if err := os.Remove(s.temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, d.lock.Close())...)
}

// plain leaves out the temporary name, which says nothing to who reads it.
func plain(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	var l *os.LinkError
	if errors.As(err, &l) {
		return l.Err
	}
	return err
}
