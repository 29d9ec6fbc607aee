// Package logs is how plugin and agent write their logs: to stderr, and to a file beside it that any number of processes
// append to and rotate at once.
package logs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// The forms of a line.
const (
	Text = "text" // key=value, as log/slog writes it
	JSON = "json" // an object
)

// What a Config's zero values mean; they are Calico's.
const (
	DefaultMaxSize  = 100 // MB
	DefaultMaxAge   = 30  // days
	DefaultMaxCount = 10  // files
)

// Config says what is logged, how, and where.
type Config struct {
	Level  slog.Level
	Format string // Text or JSON; "": Text
	Stderr io.Writer
	Quiet  bool // beside a file that can be written, stderr has warnings and errors only

	Path     string // of the file beside stderr; "": none
	MaxSize  int    // of that file, MB (2^20 bytes): then it is put aside and a new one begun
	MaxAge   int    // days that files put aside are kept
	MaxCount int    // files put aside that are kept
}

// New returns a logger. What keeps it from writing its file is said on stderr, once when that begins and once when it is
// over; whoever logs never notices.
func New(c Config) *slog.Logger {
	if c.Path == "" {
		return slog.New(c.handler(c.Stderr))
	}
	f := &fileOf{file: newFile(c), trouble: slog.New(c.handler(c.Stderr))}
	both := c.handler(&tee{f, c.Stderr, true})
	if !c.Quiet {
		return slog.New(both)
	}
	return slog.New(byLevel{c.handler(&tee{f, c.Stderr, false}), both})
}

// byLevel has one handler for warnings and errors, and another one for the rest.
type byLevel struct{ rest, warnings slog.Handler }

func (b byLevel) Enabled(ctx context.Context, l slog.Level) bool { return b.rest.Enabled(ctx, l) }

func (b byLevel) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		return b.warnings.Handle(ctx, r)
	}
	return b.rest.Handle(ctx, r)
}

func (b byLevel) WithAttrs(attrs []slog.Attr) slog.Handler {
	return byLevel{b.rest.WithAttrs(attrs), b.warnings.WithAttrs(attrs)}
}

func (b byLevel) WithGroup(name string) slog.Handler {
	return byLevel{b.rest.WithGroup(name), b.warnings.WithGroup(name)}
}

func (c Config) handler(to io.Writer) slog.Handler {
	options := &slog.HandlerOptions{Level: c.Level}
	if c.Format == JSON {
		return slog.NewJSONHandler(to, options)
	}
	return slog.NewTextHandler(to, options)
}

// Check says which value can't be meant, by its name: one of those given, of MaxSize, MaxAge and MaxCount.
func (c Config) Check(size, age, count string) error {
	for _, v := range []struct {
		name  string
		value int
	}{{size, c.MaxSize}, {age, c.MaxAge}, {count, c.MaxCount}} {
		if v.value < 0 || v.value > 1<<20 {
			return fmt.Errorf("%s %d: not between 1 and %d, or 0 for the default", v.name, v.value, 1<<20)
		}
	}
	return nil
}

// levels are the plugin's and the agent's words for them, Calico's among them.
var levels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "warn": slog.LevelWarn,
	"error": slog.LevelError, "fatal": slog.LevelError, "none": slog.LevelError,
}

// ParseLevel reads a level's name; "" is slog.LevelInfo.
func ParseLevel(s string) (slog.Level, error) {
	if s == "" {
		return slog.LevelInfo, nil
	}
	level, ok := levels[strings.ToLower(s)]
	if !ok {
		return slog.LevelInfo, errors.New("none of debug, info, warning, error")
	}
	return level, nil
}

// ParseFormat reads a form's name; "" is Text.
func ParseFormat(s string) (string, error) {
	switch f := strings.ToLower(s); f {
	case "":
		return Text, nil
	case Text, JSON:
		return f, nil
	}
	return Text, errors.New("neither text nor json")
}

// fileOf is a file, and whether its trouble has been told.
type fileOf struct {
	*file
	trouble *slog.Logger // to stderr alone
	mu      sync.Mutex
	failed  bool
}

// add writes a line, and returns whether it could.
func (f *fileOf) add(line []byte) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.write(line)
	switch {
	case err != nil && !f.failed:
		f.trouble.Warn("the log file can't be written; what follows is on stderr alone", "file", f.path, "error", err)
	case err == nil && f.failed:
		f.trouble.Info("the log file can be written again", "file", f.path)
	}
	f.failed = err != nil
	return err == nil
}

// tee writes each line to the file, and to stderr always or when the file does not take it.
type tee struct {
	file   *fileOf
	stderr io.Writer
	always bool
}

// Write never fails: what can't be written to one may be read in the other.
func (t *tee) Write(line []byte) (int, error) {
	if t.always {
		_, _ = t.stderr.Write(line)
	}
	if !t.file.add(line) && !t.always {
		_, _ = t.stderr.Write(line)
	}
	return len(line), nil
}
