// Package cni is the network plugin: the commands of the CNI specification 1.1.0 for Caracal's own attachments, and its
// address management for other main plugins. Everything an attachment needs is made here, with no agent running.
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	"gopkg.in/natefinch/lumberjack.v2"

	"github.com/caracal-net/caracal/node"
)

// Plugin runs one command of a runtime.
type Plugin struct {
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer // receives the result and nothing else
	Stderr io.Writer
	// Step is called with the name of every step of ADD and DEL before it is taken; an error fails it. nil: nothing.
	Step func(name string) error
	// Spawn starts this program again beside the runtime, detached, with these arguments. nil: nobody does, and what a
	// later process would have done is done at once or left to the next.
	Spawn func(args ...string) error

	log *slog.Logger
}

// Main runs the command that the environment names and returns the process's exit status. The error, if there is
// one, went to Stdout as the specification wants it.
func (p *Plugin) Main(ctx context.Context) int { return p.main(ctx, p.run) }

// IPAMMain is Main for a program that another main plugin calls for addresses.
func (p *Plugin) IPAMMain(ctx context.Context) int { return p.main(ctx, p.runIPAM) }

func (p *Plugin) main(ctx context.Context, run func(context.Context, *Env, *Config) (any, error)) int {
	p.log = slog.New(slog.NewTextHandler(p.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	answer, spoken, err := p.dispatch(ctx, run)
	if err != nil {
		e := *asError(err)
		if e.CNIVersion = spoken; spoken == "" {
			e.CNIVersion = newest()
		}
		answer = &e
	}
	if answer != nil {
		b, _ := json.MarshalIndent(answer, "", "    ")
		if _, werr := p.Stdout.Write(append(b, '\n')); werr != nil {
			fmt.Fprintln(p.Stderr, "write answer:", werr)
			return 1
		}
	}
	if err != nil {
		return 1
	}
	return 0
}

func newest() string {
	all := Versions.SupportedVersions()
	return all[len(all)-1]
}

// dispatch reads configuration and parameters and runs the command. It returns the version to answer in.
func (p *Plugin) dispatch(ctx context.Context, run func(context.Context, *Env, *Config) (any, error)) (any, string, error) {
	data, err := io.ReadAll(io.LimitReader(p.Stdin, MaxConfig+1))
	if err != nil {
		return nil, "", fail(codeIO, "read configuration from stdin: %s", err)
	}
	if len(data) > MaxConfig {
		return nil, "", fail(codeDecode, "configuration on stdin is larger than %d bytes", MaxConfig)
	}
	env, err := ParseEnv(p.Getenv)
	if err != nil {
		return nil, spokenVersion(data), err
	}
	if env.Command == "VERSION" {
		return versions(data)
	}
	parse := ParseConfig
	if env.Command == "DEL" {
		parse = parseForDel
	}
	c, err := parse(data)
	if err != nil {
		return nil, spokenVersion(data), err
	}
	spoken := c.CNIVersion
	if minimum := map[string]string{"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}[env.Command]; minimum != "" && !c.atLeast(minimum) {
		return nil, spoken, fail(codeVersion, "%s needs a configuration with cniVersion %s or later; this one has %s", env.Command, minimum, c.CNIVersion)
	}
	p.openLog(c)
	begin := time.Now()
	answer, err := run(ctx, env, c)
	log := p.log.With("command", env.Command, "network", c.Name, "container", env.ContainerID, "interface", env.IfName,
		"duration", time.Since(begin).Round(time.Microsecond))
	if err != nil {
		log.Error("failed", "error", err)
	} else {
		log.Info("done")
	}
	return answer, spoken, err
}

func (p *Plugin) run(ctx context.Context, env *Env, c *Config) (any, error) {
	switch env.Command {
	case "ADD":
		return p.add(ctx, env, c)
	case "DEL":
		return nil, p.del(ctx, env, c)
	case "CHECK":
		return nil, p.check(ctx, env, c)
	case "GC":
		return nil, p.gc(ctx, env, c)
	default:
		return nil, p.status(ctx, env, c)
	}
}

// spokenVersion is the version of a configuration that may be wrong otherwise, "" when it has none that is spoken.
func spokenVersion(data []byte) string {
	var c struct {
		CNIVersion string `json:"cniVersion"`
	}
	if json.Unmarshal(data, &c) != nil || !supported(c.CNIVersion) {
		return ""
	}
	return c.CNIVersion
}

// versions answers VERSION: the version of the question, and all that are spoken (specification section 3, VERSION).
func versions(data []byte) (any, string, error) {
	var q struct {
		CNIVersion string `json:"cniVersion"`
	}
	if len(data) > 0 {
		if err := json.Unmarshal(data, &q); err != nil {
			return nil, "", decodeError(data, err)
		}
	}
	if q.CNIVersion == "" {
		q.CNIVersion = newest()
	}
	return struct {
		CNIVersion        string   `json:"cniVersion"`
		SupportedVersions []string `json:"supportedVersions"`
	}{q.CNIVersion, Versions.SupportedVersions()}, q.CNIVersion, nil
}

// logLevels are Calico's words for them.
var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "warn": slog.LevelWarn,
	"error": slog.LevelError, "fatal": slog.LevelError, "none": slog.LevelError,
}

// level is what is logged from; of an unknown word, which only DEL goes on with, slog.LevelInfo.
func (c *Config) level() (slog.Level, error) {
	if c.LogLevel == "" {
		return slog.LevelInfo, nil
	}
	level, ok := logLevels[strings.ToLower(c.LogLevel)]
	if !ok {
		return slog.LevelInfo, fail(codeConfig, "log_level %q: none of debug, info, warning, error", c.LogLevel)
	}
	return level, nil
}

func (p *Plugin) openLog(c *Config) {
	level, _ := c.level()
	to := p.Stderr
	if c.LogFilePath != "" {
		to = io.MultiWriter(to, &lumberjack.Logger{
			Filename: c.LogFilePath, MaxSize: c.LogFileMaxSize, MaxAge: c.LogFileMaxAge, MaxBackups: c.LogFileMaxCount,
		})
	}
	p.log = slog.New(slog.NewTextHandler(to, &slog.HandlerOptions{Level: level}))
}

func (p *Plugin) step(name string) error {
	if p.Step == nil {
		return nil
	}
	return p.Step(name)
}

func (c *Config) nodeOptions() node.Options { return node.Options{BootIDFile: c.BootIDFile} }

// delegate runs foreign plugins. Their stderr is ours.
func (p *Plugin) delegate() invoke.Exec {
	return &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: p.Stderr}, PluginDecoder: version.PluginDecoder{}}
}

// uninterrupted is how long a command may go on cleaning up when its own context has ended.
const uninterrupted = 30 * time.Second

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}
