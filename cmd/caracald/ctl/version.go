package ctl

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// Version and Commit are set when the binary is built: -ldflags "-X .../ctl.Version=v1.2.3 -X .../ctl.Commit=...".
// Otherwise the build information of Go speaks.
var Version, Commit string

// versions is what works here.
type versions struct {
	Version        string `json:"version"`
	Commit         string `json:"commit"`
	Go             string `json:"go"`
	Schema         int    `json:"schema"`         // of the kernel maps, that this binary knows
	DatabaseSchema int    `json:"databaseSchema"` // of node.db, that this binary knows
	Build          string `json:"build"`          // of the programs in this binary
	Loaded         loaded `json:"loaded"`
	Kernel         string `json:"kernel"`
	Attach         string `json:"attach"` // tcx, clsact
}

// loaded is what is pinned on this node.
type loaded struct {
	Dir    string `json:"dir"`
	Schema uint32 `json:"schema,omitempty"`
	Build  string `json:"build,omitempty"`
	Node   string `json:"node,omitempty"`
	Note   string `json:"note"` // how it compares with this binary, or why it can't be told
}

func newVersionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show versions: of this program, the loaded programs and the kernel",
		Long: `version shows what this program is, which build of the eBPF programs it carries, which one is loaded on this node, and
how the kernel lets programs be attached.`,
		Example: `  caracalctl version
  caracalctl version -o json | jq -r .loaded.build`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runVersion(cmd, g) },
	}
}

func runVersion(cmd *cobra.Command, g *globals) error {
	v := versions{Go: runtime.Version(), Schema: loader.SchemaVersion, DatabaseSchema: node.SchemaVersion, Build: build(), Loaded: g.loaded(), Attach: loader.ByClsact}
	v.Version, v.Commit = own()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("read kernel version: %w", err)
	}
	v.Kernel = unix.ByteSliceToString(u.Release[:])
	if loader.HasTCX() {
		v.Attach = loader.ByTCX
	}
	t := newTable("WHAT", "VERSION", "NOTE")
	t.add("caracalctl", v.Version, fmt.Sprintf("commit %s, %s", v.Commit, v.Go))
	t.add("map schema", v.Schema, "of this program")
	t.add("database schema", v.DatabaseSchema, "of this program")
	t.add("programs", v.Build, "in this program")
	t.add("loaded programs", v.Loaded.Build, v.Loaded.Note)
	t.add("kernel", v.Kernel, "programs are attached by "+v.Attach)
	return g.print(cmd, v, t)
}

// build identifies the programs in this binary as State.Build does.
func build() string { return fmt.Sprintf("%x", loader.Build()) }

// own is the version and commit of this binary.
func own() (version, commit string) {
	version, commit = Version, Commit
	if info, ok := debug.ReadBuildInfo(); ok {
		if version == "" {
			version = info.Main.Version
		}
		dirty := ""
		for _, s := range info.Settings {
			switch {
			case s.Key == "vcs.revision" && commit == "":
				commit = s.Value
			case s.Key == "vcs.modified" && s.Value == "true" && Commit == "":
				dirty = " with changes"
			}
		}
		if commit != "" {
			commit += dirty
		}
	}
	if version == "" {
		version = "(devel)"
	}
	if commit == "" {
		commit = "unknown"
	}
	return version, commit
}

// loaded reads what is pinned, as far as it can.
func (g *globals) loaded() loaded {
	l := loaded{Dir: g.bpffsDir}
	m, err := g.maps()
	if err == nil {
		defer m.Close()
		s, stateErr := m.State()
		if err = stateErr; err == nil {
			l.Schema, l.Build, l.Node = s.Version, s.Build, s.Node
			l.Note = "the same as in this program"
			if l.Build != build() {
				l.Note = "another build than in this program; caracalctl upgrade replaces it"
			}
			return l
		}
	}
	l.Note = err.Error()
	if errors.Is(err, errNotLoaded) {
		l.Note = "none in " + g.bpffsDir
	}
	return l
}
