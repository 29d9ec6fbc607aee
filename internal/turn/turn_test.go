package turn

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"testing"
	"time"
)

func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if _, err := Wait(t.Context(), path, false, 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a reader makes the file: %v", err)
	}
	writer, err := Wait(t.Context(), path, true, 0)
	if err != nil {
		t.Fatal(err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, write := range []bool{false, true} {
		for _, wait := range []time.Duration{0, time.Millisecond} {
			if _, err := Wait(t.Context(), path, write, wait); !errors.Is(err, ErrTimeout) {
				t.Errorf("beside a writer: %v", err)
			}
		}
		if _, err := Wait(canceled, path, write, time.Minute); !errors.Is(err, context.Canceled) {
			t.Errorf("given up: %v", err)
		}
	}
	next := make(chan error)
	go func() {
		f, err := Wait(t.Context(), path, false, time.Minute)
		if err == nil {
			err = f.Close()
		}
		next <- err
	}()
	select {
	case err := <-next:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	writer.Close()
	if err := <-next; err != nil {
		t.Fatal(err)
	}
	one, err := Wait(t.Context(), path, false, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	two, err := Wait(t.Context(), path, false, 0)
	if err != nil {
		t.Fatalf("beside another reader: %v", err)
	}
	two.Close()
}
