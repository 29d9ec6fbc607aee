package ctl

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/deploy"
	"github.com/caracal-net/caracal/internal/atomicfile"
)

// Where the agent goes, and what its unit reads.
const (
	agentDir  = "/usr/local/bin"
	unitFile  = "/etc/systemd/system/caracald.service"
	agentFile = "/etc/caracal/caracald.env"
)

// The main packages of our programs, by which a file is known to be ours.
const (
	pluginPackage = "github.com/caracal-net/caracal/cmd/caracal"
	agentPackage  = "github.com/caracal-net/caracal/cmd/caracald"
)

// pluginNames are the plugin's own names, calicoNames those of Calico's that it answers to as well.
var (
	pluginNames = []string{"caracal", "caracal-ipam"}
	calicoNames = []string{"calico", "calico-ipam"}
)

// What is done to a file.
const (
	doneInstalled = "installed"
	doneReplaced  = "replaced"
	doneUnchanged = "unchanged"
	doneKept      = "kept"    // as it is, on wish
	doneSkipped   = "skipped" // on wish
)

// item is one file that install puts in place.
type item struct {
	Kind string `json:"kind"` // plugin, agent, unit, settings, pool, network
	Name string `json:"name"` // its path; of a pool, its name
	Done string `json:"done"` // installed, replaced, unchanged, kept, skipped, created

	mode   fs.FileMode
	text   []byte // what is in it, or
	source string // the file that it is a copy of, or
	target string // where it links to
}

func (i item) writes() bool { return i.Done == doneInstalled || i.Done == doneReplaced }

func (i item) stage(d *atomicfile.Dir) (*atomicfile.File, error) {
	name := filepath.Base(i.Name)
	if i.target != "" {
		return d.Link(name, i.target)
	}
	if i.source == "" {
		return d.Write(name, i.mode, bytes.NewReader(i.text))
	}
	f, err := os.Open(i.source)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return d.Write(name, i.mode, f)
}

// compare says what there is to do, from what is there.
func (i item) compare() (string, error) {
	there, err := os.Lstat(i.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return doneInstalled, nil
	}
	if err != nil {
		return "", err
	}
	if there.IsDir() {
		return "", fmt.Errorf("%s: a directory is there", i.Name)
	}
	if i.target != "" {
		if target, err := os.Readlink(i.Name); err == nil && target == i.target {
			return doneUnchanged, nil
		}
		return doneReplaced, nil
	}
	if !there.Mode().IsRegular() || there.Mode().Perm() != i.mode {
		return doneReplaced, nil
	}
	same, err := i.sameContent(there.Size())
	if err != nil || !same {
		return doneReplaced, err
	}
	return doneUnchanged, nil
}

func (i item) sameContent(size int64) (bool, error) {
	there, err := os.Open(i.Name)
	if err != nil {
		return false, err
	}
	defer there.Close()
	if i.source == "" {
		text, err := io.ReadAll(there)
		return bytes.Equal(text, i.text), err
	}
	from, err := os.Open(i.source)
	if err != nil {
		return false, err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil || info.Size() != size {
		return false, err
	}
	a, b := make([]byte, 1<<16), make([]byte, 1<<16)
	for {
		n, errA := io.ReadFull(there, a)
		m, errB := io.ReadFull(from, b)
		if n != m || !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			return errA == errB, nil //nolint:errorlint // both at the end, or one was cut off meanwhile
		}
	}
}

// plan says of every file what there is to do, in the order in which it is to be done. What is not ours is refused.
func (o *installOptions) plan(network []byte) ([]item, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	from := o.from
	if from == "" {
		from = filepath.Dir(self)
		if _, err := os.Stat(filepath.Join(from, pluginNames[0])); errors.Is(err, fs.ErrNotExist) && ownProgram(filepath.Join(o.binDir, pluginNames[0])) {
			from = o.binDir // an earlier install has put this program elsewhere: the plugin stays
		}
	}
	plugin := filepath.Join(from, pluginNames[0])
	if err := checkPlugin(plugin); err != nil {
		return nil, fmt.Errorf("%s: %w", o.by("from"), err)
	}
	items, err := o.planPlugins(plugin, network)
	if err != nil {
		return nil, err
	}
	if o.agent {
		items = append(items,
			item{Kind: "agent", Name: filepath.Join(agentDir, "caracald"), source: self, mode: 0o755},
			item{Kind: "agent", Name: filepath.Join(agentDir, "caracalctl"), target: "caracald"},
			item{Kind: "unit", Name: unitFile, text: deploy.Unit, mode: 0o644})
		if settings := o.agentSettings(); settings != nil {
			items = append(items, item{Kind: "settings", Name: agentFile, text: settings, mode: 0o600})
		}
	}
	var foreign []string
	place := item{Kind: "network", Name: filepath.Join(o.confDir, o.confName), text: network, mode: 0o600}
	if o.deferNetwork {
		if _, err := os.Lstat(place.Name); err == nil && !o.force && !ours(place, o.binDir) {
			foreign = append(foreign, place.Name)
		}
		place.Name = filepath.Join(o.stateDir, agent.DeferredNetwork)
	}
	items = append(items, place)
	for n := range items {
		i := &items[n]
		if i.Done != "" {
			continue
		}
		if i.Done, err = i.compare(); err != nil {
			return nil, err
		}
		if i.Done != doneReplaced {
			continue
		}
		switch {
		case i.Kind == "plugin" && !o.update, i.Kind == "settings":
			i.Done = doneKept
		case !o.force && !ours(*i, o.binDir):
			foreign = append(foreign, i.Name)
		}
	}
	if foreign != nil {
		return nil, fmt.Errorf("not Caracal's: %s; nothing was changed. Move them away, leave plugins out (SKIP_CNI_BINARIES, --skip), or replace them with --force", strings.Join(foreign, ", "))
	}
	return items, o.checkLinks(items)
}

// planPlugins lists the plugins: one program, and links to it.
func (o *installOptions) planPlugins(plugin string, network []byte) ([]item, error) {
	names := slices.Clone(pluginNames)
	for _, name := range calicoNames {
		if o.calicoNames || slices.Contains(programs(network), name) {
			names = append(names, name)
		}
	}
	var items []item
	for _, name := range names {
		i := item{Kind: "plugin", Name: filepath.Join(o.binDir, name), mode: 0o755}
		if name == pluginNames[0] {
			i.source = plugin
		} else {
			i.target = pluginNames[0]
		}
		if slices.Contains(o.skip, name) {
			i.Done = doneSkipped
		}
		items = append(items, i)
	}
	return items, nil
}

// checkLinks refuses links to a program that is not there, or another one.
func (o *installOptions) checkLinks(items []item) error {
	main := items[0]
	if main.writes() || main.Done == doneUnchanged {
		return nil
	}
	for _, i := range items {
		if i.target == pluginNames[0] && i.writes() && programOf(main.Name) != pluginPackage {
			return fmt.Errorf("%s is %s, but %s links to it: leave that out too (SKIP_CNI_BINARIES, --skip), or neither", main.Name, main.Done, filepath.Base(i.Name))
		}
	}
	return nil
}

func checkPlugin(path string) error {
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("there is no plugin to install: %w; say which directory holds it (--from DIR)", err)
	}
	if programOf(path) != pluginPackage {
		return fmt.Errorf("%s is not Caracal's plugin; say which directory holds it (--from DIR)", path)
	}
	return nil
}

// programOf is the main package of a Go program, "" of anything else.
func programOf(path string) string {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return ""
	}
	return info.Path
}

// ours tells whether a file that is there is Caracal's.
func ours(i item, binDir string) bool {
	switch i.Kind {
	case "plugin", "agent":
		return ownProgram(i.Name)
	case "unit":
		return ownUnit(i.Name)
	}
	return ownNetwork(i.Name, binDir)
}

// ownProgram tells whether a file is one of our programs, or a link to one, be it gone or not.
func ownProgram(path string) bool {
	if p := programOf(path); p == pluginPackage || p == agentPackage {
		return true
	}
	target, err := os.Readlink(path)
	if err != nil || filepath.Base(target) != target {
		return false
	}
	_, err = os.Stat(path)
	return errors.Is(err, fs.ErrNotExist) && slices.Contains([]string{"caracal", "caracald"}, target)
}

func ownUnit(path string) bool {
	text, err := os.ReadFile(path)
	return err == nil && bytes.Contains(text, []byte("Description=Caracal agent\n"))
}

// ownNetwork tells whether a file is a network of ours: it calls caracal, or calico where that is ours.
func ownNetwork(path, binDir string) bool {
	text, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	all := programs(text)
	return slices.Contains(all, "caracal") || slices.Contains(all, "calico") && ownProgram(filepath.Join(binDir, "calico"))
}

// programs are the programs that a network calls: its plugins, and their IPAM's.
func programs(network []byte) []string {
	type entry struct {
		Type string `json:"type"`
		IPAM struct {
			Type string `json:"type"`
		} `json:"ipam"`
	}
	var conf struct {
		entry
		Plugins []entry `json:"plugins"`
	}
	if json.Unmarshal(network, &conf) != nil {
		return nil
	}
	var all []string
	for _, e := range append(conf.Plugins, conf.entry) {
		for _, name := range []string{e.Type, e.IPAM.Type} {
			if name != "" && !slices.Contains(all, name) {
				all = append(all, name)
			}
		}
	}
	return all
}

// agentSettings is what the agent's unit reads: what this program was told in variables that the agent has too; nil: nothing.
func (o *installOptions) agentSettings() []byte {
	var b bytes.Buffer
	for _, name := range agentVariables() {
		// Quoted as systemd.exec(5), EnvironmentFile=, has it.
		fmt.Fprintf(&b, "%s=\"%s\"\n", name, strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", "$", `\$`).Replace(os.Getenv(name)))
	}
	return b.Bytes()
}
