package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
)

const (
	poll      = 200 * time.Millisecond // how often the file is looked at where nobody says that it was written
	pollTold  = 2 * time.Second        // and where somebody does, but not for what another machine writes
	batchSize = 1 << 20                // bytes of values that are read at once, and a change more
)

// watch reads the file's log whenever the file was written.
type watch struct {
	store  *Store
	prefix string         // of the file's keys
	after  store.Revision // what was read
	events []store.Event  // read but not told
	notify *notify
	open   context.Context // until it or the store is closed
	close  context.CancelFunc
}

// Watch tells the changes after a revision.
func (s *Store) Watch(ctx context.Context, prefix string, after store.Revision) (store.Watch, error) {
	if err := errors.Join(store.CheckPrefix(prefix), store.CheckRevision(after)); err != nil {
		return nil, err
	}
	if s.open.Err() != nil {
		return nil, store.ErrClosed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w := &watch{store: s, prefix: s.space.Covers(prefix), after: after, notify: newNotify(s.path)}
	w.open, w.close = context.WithCancel(s.open)
	context.AfterFunc(w.open, w.notify.close)
	return w, nil
}

// Close ends the watch.
func (w *watch) Close() { w.close() }

// Next blocks until there is a change.
func (w *watch) Next(ctx context.Context) (store.Event, error) {
	for {
		if w.open.Err() != nil {
			return store.Event{}, store.ErrClosed
		}
		if err := ctx.Err(); err != nil {
			return store.Event{}, err
		}
		if len(w.events) > 0 {
			e := w.events[0]
			w.events = w.events[1:]
			return e, nil
		}
		if err := w.read(ctx); err != nil {
			return store.Event{}, err
		}
		if len(w.events) > 0 {
			continue
		}
		again := time.NewTimer(w.notify.interval())
		select {
		case <-w.notify.written:
		case <-again.C:
		case <-w.open.Done():
		case <-ctx.Done():
		}
		again.Stop()
	}
}

// read reads the changes after the last one read.
func (w *watch) read(ctx context.Context) error {
	var events []store.Event
	at := w.after
	err := w.store.view(ctx, func(tx *tx) error {
		now := tx.revision()
		switch {
		case w.after < tx.compacted():
			return fmt.Errorf("revision %d: %w", w.after, store.ErrCompacted)
		case w.after > now:
			return fmt.Errorf("revision %d is not of this store, which is at %d: %w", w.after, now, store.ErrCompacted)
		case w.after == now:
			return nil
		}
		c, size := tx.log.Cursor(), 0
		for k, v := c.Seek(binary.BigEndian.AppendUint64(nil, uint64(w.after)+1)); k != nil && size < batchSize; k, v = c.Next() {
			if len(k) != 8 {
				return invalid("a change without a revision")
			}
			at = store.Revision(binary.BigEndian.Uint64(k))
			if !bytes.HasPrefix(v[min(1, len(v)):], []byte(w.prefix)) {
				continue
			}
			var c change
			if err := c.unmarshal(v); err != nil {
				return err
			}
			size += len(v)
			events = append(events, store.Event{
				KV:      store.KV{Key: w.store.space.Key(c.key), Value: c.value, Revision: at},
				Deleted: c.deleted,
			})
		}
		return nil
	})
	if errors.Is(err, errNoFile) {
		if w.after > 0 {
			return fmt.Errorf("revision %d is not of this store, which is empty: %w", w.after, store.ErrCompacted)
		}
		return nil
	}
	if err != nil {
		return err
	}
	w.after, w.events = at, events
	return nil
}

// notify hears from the kernel when the store's file was written, put in its place or taken away. It may hear nothing: the
// directory may not be there yet, or the user's inotify instances are used up.
type notify struct {
	written chan struct{}
	file    *os.File // nil: nothing is heard
}

func newNotify(path string) *notify {
	n := &notify{written: make(chan struct{}, 1)}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return n
	}
	// The directory, because the file comes and goes. Who writes closes it afterwards, and before others may open it.
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
		unix.Close(fd)
		return n
	}
	n.file = os.NewFile(uintptr(fd), "inotify")
	go n.listen(filepath.Base(path))
	return n
}

func (n *notify) listen(name string) {
	b := make([]byte, 16<<10)
	for {
		size, err := n.file.Read(b)
		if err != nil {
			return // closed
		}
		if !mentions(b[:size], name) {
			continue
		}
		select {
		case n.written <- struct{}{}:
		default: // it is known already
		}
	}
}

// mentions tells whether one of the events of inotify(7) is of a name, or says that events were lost.
func mentions(events []byte, name string) bool {
	for len(events) >= unix.SizeofInotifyEvent {
		mask, size := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[12:])
		end := min(uint64(unix.SizeofInotifyEvent)+uint64(size), uint64(len(events)))
		if mask&unix.IN_Q_OVERFLOW != 0 || strings.TrimRight(string(events[unix.SizeofInotifyEvent:end]), "\x00") == name {
			return true
		}
		events = events[end:]
	}
	return false
}

func (n *notify) interval() time.Duration {
	if n.file == nil {
		return poll
	}
	return pollTold
}

func (n *notify) close() {
	if n.file != nil {
		n.file.Close()
	}
}
