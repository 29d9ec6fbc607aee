package logs

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// file is one process's hand on a log file that others write and rotate too. A line is one write behind whatever is there
// (O_APPEND), so lines are whole; a file that was put aside meanwhile is still one that is kept, so none is lost. Nobody ever
// waits for another process: while one rotates the others write on, into the file that it puts aside.
type file struct {
	path    string
	max     int64 // bytes
	age     time.Duration
	count   int
	fd      int // -1: not open
	cleaned time.Time
}

const day = 24 * time.Hour

func newFile(c Config) *file {
	return &file{
		path: c.Path, max: int64(cmp.Or(c.MaxSize, DefaultMaxSize)) << 20, age: time.Duration(cmp.Or(c.MaxAge, DefaultMaxAge)) * day,
		count: cmp.Or(c.MaxCount, DefaultMaxCount), fd: -1,
	}
}

func (f *file) write(line []byte) error {
	size, err := f.open()
	if err != nil {
		return err
	}
	if size > 0 && size+int64(len(line)) > f.max {
		err = f.rotate()
		if _, oerr := f.open(); oerr != nil {
			return errors.Join(err, oerr)
		}
	}
	if time.Since(f.cleaned) > day {
		f.cleaned = time.Now()
		err = errors.Join(err, f.clean(f.cleaned))
	}
	return errors.Join(f.append(line), err)
}

// open makes sure that what is open is what the path names, and returns its size.
func (f *file) open() (int64, error) {
	var named, st unix.Stat_t
	if f.fd >= 0 {
		if unix.Lstat(f.path, &named) == nil && unix.Fstat(f.fd, &st) == nil && named.Ino == st.Ino && named.Dev == st.Dev {
			return st.Size, nil
		}
		f.close()
	}
	fd, err := openAppend(f.path)
	if errors.Is(err, unix.ENOENT) {
		if err := os.MkdirAll(filepath.Dir(f.path), 0o755); err != nil {
			return 0, fmt.Errorf("make the log's directory: %w", err)
		}
		fd, err = openAppend(f.path)
	}
	switch {
	case errors.Is(err, unix.ELOOP):
		return 0, errors.New("it is a symbolic link; name the file itself")
	case errors.Is(err, unix.EISDIR):
		return 0, errors.New("it is a directory; name a file in it")
	case errors.Is(err, unix.ENXIO):
		return 0, errNotRegular
	case err != nil:
		return 0, fmt.Errorf("open: %w", err)
	}
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return 0, cmp.Or(err, errNotRegular)
	}
	f.fd = fd
	return st.Size, nil
}

var errNotRegular = errors.New("it is not a regular file; name another")

// openAppend never waits, though it were a pipe, and follows no link: somebody else may own the directory.
func openAppend(path string) (fd int, err error) {
	err = again(func() (err error) {
		fd, err = unix.Open(path, unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		return err
	})
	return fd, err
}

func again(fn func() error) error {
	for {
		if err := fn(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (f *file) close() {
	unix.Close(f.fd)
	f.fd = -1
}

// append writes a line, or nothing of it: what a full disk took is taken back, unless somebody has written behind it.
func (f *file) append(line []byte) error {
	n := 0
	err := again(func() (err error) {
		n, err = unix.Write(f.fd, line)
		return err
	})
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if n == len(line) {
		return nil
	}
	var st unix.Stat_t
	if end, err := unix.Seek(f.fd, 0, unix.SEEK_CUR); err == nil && unix.Fstat(f.fd, &st) == nil && st.Size == end {
		_ = unix.Ftruncate(f.fd, end-int64(n)) // else a part of a line stays
	}
	return fmt.Errorf("write: %w", unix.ENOSPC)
}

// rotate puts the file aside. The lock is the file's own: who has it and finds the file under its name is the one who may.
func (f *file) rotate() error {
	if err := again(func() error { return unix.Flock(f.fd, unix.LOCK_EX|unix.LOCK_NB) }); err != nil {
		return nil // another process is at it
	}
	defer f.close() // and so ends the lock
	var named, st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return err
	}
	if unix.Lstat(f.path, &named) != nil || named.Ino != st.Ino || named.Dev != st.Dev {
		return nil // another process was
	}
	now := time.Now()
	aside := f.aside(now)
	for exists(aside) { // nobody else makes it: the next file begins when this one is aside
		now = now.Add(time.Millisecond)
		aside = f.aside(now)
	}
	if err := os.Rename(f.path, aside); err != nil {
		return fmt.Errorf("rotate: %w", err)
	}
	if fd, err := openAppend(f.path); err == nil { // whoever may read the old one may read the new one
		_ = unix.Fchmod(fd, st.Mode&0o777)
		_ = unix.Fchown(fd, int(st.Uid), int(st.Gid))
		unix.Close(fd)
	}
	f.cleaned = now
	return f.clean(now)
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// asideTime is when a file was put aside, in its name: cni-2026-11-21T19-50-44.123.log, UTC.
const asideTime = "2006-01-02T15-04-05.000"

func (f *file) aside(t time.Time) string {
	ext := filepath.Ext(f.path)
	return strings.TrimSuffix(f.path, ext) + "-" + t.UTC().Format(asideTime) + ext
}

// clean removes files put aside that are too old or too many. Others may be at it too.
func (f *file) clean(now time.Time) error {
	dir, base := filepath.Split(f.path)
	entries, err := os.ReadDir(filepath.Clean(dir))
	if err != nil {
		return fmt.Errorf("look for old logs: %w", err)
	}
	ext := filepath.Ext(base)
	var times []time.Time
	for _, e := range entries {
		stamp, ok := strings.CutPrefix(e.Name(), strings.TrimSuffix(base, ext)+"-")
		if stamp, ok2 := strings.CutSuffix(stamp, ext); ok && ok2 {
			if t, err := time.Parse(asideTime, stamp); err == nil {
				times = append(times, t)
			}
		}
	}
	slices.SortFunc(times, func(a, b time.Time) int { return b.Compare(a) }) // the newest first
	var errs []error
	for i, t := range times {
		if i < f.count && now.Sub(t) <= f.age {
			continue
		}
		if err := os.Remove(f.aside(t)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove old log: %w", err))
		}
	}
	return errors.Join(errs...)
}
