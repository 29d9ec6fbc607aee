// Package cni is the network plugin: the commands of the CNI specification 1.1.0 for Caracal's own attachments, and its
// address management for other main plugins. Everything an attachment needs is made here, with no agent running.
package cni

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/caracal-net/caracal/internal/capability"
	"github.com/caracal-net/caracal/internal/logs"
	"github.com/caracal-net/caracal/internal/trace"
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

	log   *slog.Logger
	trace trace.Context // our span of the runtime's trace
	about node.Endpoint // what the command turned out to be about, for its line in the log
	swept int           // how many attachments GC removed
	spare bool          // an attachment whose interface is there stays: errAlive
}

// Main runs the command that the environment names and returns the process's exit status. The error, if there is
// one, went to Stdout as the specification wants it.
func (p *Plugin) Main(ctx context.Context) int { return p.main(ctx, p.run) }

// IPAMMain is Main for a program that another main plugin calls for addresses.
func (p *Plugin) IPAMMain(ctx context.Context) int { return p.main(ctx, p.runIPAM) }

func (p *Plugin) main(ctx context.Context, run func(context.Context, *Env, *Config) (any, error)) int {
	p.log = logs.New(logs.Config{Stderr: p.Stderr})
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
		return nil, spokenVersion(data), p.done(env, &Config{}, time.Now(), err)
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
		return nil, spokenVersion(data), p.done(env, &Config{}, time.Now(), err)
	}
	spoken := c.CNIVersion
	if minimum := map[string]string{"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}[env.Command]; minimum != "" && !c.atLeast(minimum) {
		return nil, spoken, fail(codeVersion, "%s needs a configuration with cniVersion %s or later; this one has %s", env.Command, minimum, c.CNIVersion)
	}
	p.openLog(c)
	begin := time.Now()
	answer, err := run(ctx, env, c)
	return answer, spoken, p.done(env, c, begin, err)
}

// done writes the one line that every command has in the log, and returns its error.
func (p *Plugin) done(env *Env, c *Config, begin time.Time, err error) error {
	attrs := []any{"command", env.Command}
	add := func(name, value string) {
		if value != "" {
			attrs = append(attrs, name, value)
		}
	}
	e := p.about
	add("network", c.Name)
	add("container", env.ContainerID)
	add("interface", env.IfName)
	add("namespace", cmp.Or(e.PodNamespace, env.Args["K8S_POD_NAMESPACE"]))
	add("pod", cmp.Or(e.PodName, env.Args["K8S_POD_NAME"]))
	add("host_interface", e.HostIfName)
	add("addresses", joinAddrs(e.Addrs))
	if env.Command == "GC" {
		attrs = append(attrs, "removed", p.swept)
	}
	attrs = append(attrs, "duration_ms", float64(time.Since(begin).Microseconds())/1000)
	if err != nil {
		p.log.Error("failed", append(attrs, "code", asError(err).Code, "error", err)...)
	} else {
		p.log.Info("done", attrs...)
	}
	return err
}

func (p *Plugin) run(ctx context.Context, env *Env, c *Config) (any, error) {
	if err := capability.Need("the plugin", capability.NetAdmin, capability.SysAdmin); err != nil { // to enter the pod's namespace
		if env.Command == "STATUS" {
			return nil, unavailable(err)
		}
		return nil, fail(codeKernel, "%s", err)
	}
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

// logging is how the configuration, and CARACAL_LOG_FORMAT where it does not say, want the log. The error names the key; what
// is wrong counts as not said, because DEL goes on with it.
func (c *Config) logging(getenv func(string) string) (logs.Config, error) {
	l := logs.Config{Path: c.LogFilePath, MaxSize: c.LogFileMaxSize, MaxAge: c.LogFileMaxAge, MaxCount: c.LogFileMaxCount}
	var levelErr, formErr, pathErr error
	if l.Level, levelErr = logs.ParseLevel(c.LogLevel); levelErr != nil {
		levelErr = fmt.Errorf("log_level %q: %w", c.LogLevel, levelErr)
	}
	if l.Format, formErr = logs.ParseFormat(c.LogFormat); formErr != nil {
		formErr = fmt.Errorf("log_format %q: %w", c.LogFormat, formErr)
	} else if c.LogFormat == "" {
		l.Format, _ = logs.ParseFormat(getenv(FormatVariable))
	}
	if l.Path != "" && !filepath.IsAbs(l.Path) {
		pathErr = fmt.Errorf("log_file_path %q: not an absolute path", l.Path)
		l.Path = ""
	}
	sizeErr := l.Check("log_file_max_size", "log_file_max_age", "log_file_max_count")
	if sizeErr != nil {
		l.MaxSize, l.MaxAge, l.MaxCount = 0, 0, 0
	}
	for _, err := range []error{levelErr, formErr, pathErr, sizeErr} {
		if err != nil {
			return l, fail(codeConfig, "%s", err)
		}
	}
	return l, nil
}

// FormatVariable is the environment variable that says how logs are written, text or json, where nothing else does.
const FormatVariable = "CARACAL_LOG_FORMAT"

func (p *Plugin) openLog(c *Config) {
	l, _ := c.logging(p.Getenv)
	l.Stderr, l.Quiet = p.Stderr, true // a runtime may show it to its user, with each command
	p.log = logs.New(l)
	caller, err := trace.Read(trace.Env(p.Getenv))
	p.trace = caller.Child()
	p.log = p.log.With(p.trace.LogAttrs()...)
	if err != nil {
		p.log.Debug("the runtime's trace context is left out", "error", err)
	}
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
	return &delegate{invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: p.Stderr}, PluginDecoder: version.PluginDecoder{}}, p.trace}
}

// delegate gives foreign plugins a place in the runtime's trace below ours.
type delegate struct {
	invoke.DefaultExec
	trace trace.Context
}

// ExecPlugin is libcni's.
func (d *delegate) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	return d.DefaultExec.ExecPlugin(ctx, path, stdin, d.trace.Environ(environ))
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
