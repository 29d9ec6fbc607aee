package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"github.com/caracal-net/caracal/cmd/caracald/ctl"
	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/internal/logs"
)

// logFlags say how the agent logs.
type logFlags struct {
	logs.Config
	level string
}

func (l *logFlags) add(f *pflag.FlagSet) {
	f.StringVar(&l.level, "log-level", ctl.FromEnv("CARACAL_LOG_LEVEL", "info"), "debug, info, warn or error (env CARACAL_LOG_LEVEL)")
	f.StringVar(&l.Format, "log-format", ctl.FromEnv(cni.FormatVariable, logs.Text), "text or json (env "+cni.FormatVariable+")")
	f.StringVar(&l.Path, "log-file", os.Getenv("CARACAL_LOG_FILE"), "`FILE` to log into beside stderr (env CARACAL_LOG_FILE); none: stderr alone")
	f.IntVar(&l.MaxSize, "log-file-max-size", logs.DefaultMaxSize, "`MB` of that file; then it is put aside and a new one begun")
	f.IntVar(&l.MaxAge, "log-file-max-age", logs.DefaultMaxAge, "`DAYS` that files put aside are kept")
	f.IntVar(&l.MaxCount, "log-file-max-count", logs.DefaultMaxCount, "`NUMBER` of files put aside that are kept")
}

func (l *logFlags) logger() (*slog.Logger, error) {
	var levelErr, formErr error
	if l.Level, levelErr = logs.ParseLevel(l.level); levelErr != nil {
		levelErr = fmt.Errorf("--log-level %q: %w", l.level, levelErr)
	}
	format := l.Format
	if l.Format, formErr = logs.ParseFormat(format); formErr != nil {
		formErr = fmt.Errorf("--log-format %q: %w", format, formErr)
	}
	err := errors.Join(levelErr, formErr, l.Check("--log-file-max-size", "--log-file-max-age", "--log-file-max-count"))
	l.Stderr = os.Stderr
	return logs.New(l.Config), err
}
