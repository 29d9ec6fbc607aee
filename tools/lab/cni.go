package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"text/template"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/caracal-net/caracal/internal/netns"
)

// ConflistData is what a Config.Conflist template sees: {{.StateDir}}, {{json .IPv4Pools}}, ...
type ConflistData struct {
	Lab, Host, Network, CNIVersion string
	StateDir, BPFDir, BootIDFile   string
	IPv4Pools, IPv6Pools           []netip.Prefix
}

// conflist renders the configuration list of one host.
func conflist(cfg Config, h *Host) ([]byte, error) {
	if cfg.Conflist == "" {
		return defaultConflist(cfg, h)
	}
	t, err := template.New("conflist").Option("missingkey=error").Funcs(template.FuncMap{"json": func(v any) (string, error) {
		b, err := json.Marshal(v)
		return string(b), err
	}}).Parse(cfg.Conflist)
	if err != nil {
		return nil, fmt.Errorf("parse conflist template: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, ConflistData{Lab: h.lab.Name, Host: h.Name, Network: cfg.Network, CNIVersion: cfg.CNIVersion,
		StateDir: h.StateDir(), BPFDir: h.BPFDir(), BootIDFile: h.BootIDFile(),
		IPv4Pools: h.file.IPv4Pools, IPv6Pools: h.file.IPv6Pools}); err != nil {
		return nil, fmt.Errorf("render conflist template: %w", err)
	}
	if _, err := libcni.NetworkConfFromBytes(out.Bytes()); err != nil {
		return nil, fmt.Errorf("conflist template gives no configuration list: %w", err)
	}
	return out.Bytes(), nil
}

func defaultConflist(cfg Config, h *Host) ([]byte, error) {
	plugin := map[string]any{
		"type":         "caracal",
		"state_dir":    h.StateDir(),
		"bpffs_dir":    h.BPFDir(),
		"boot_id_file": h.BootIDFile(),
		"agent_socket": h.Socket(),
		"nodename":     h.Name,
		"ipam":         map[string]any{"type": "caracal-ipam", "ipv4_pools": h.file.IPv4Pools, "ipv6_pools": h.file.IPv6Pools},
	}
	if cfg.Cluster {
		plugin["ipam"] = map[string]any{"type": "caracal-ipam", "cluster": true}
	}
	for k, v := range cfg.Plugin {
		plugin[k] = v
	}
	out, err := json.MarshalIndent(map[string]any{
		"cniVersion": cfg.CNIVersion,
		"name":       cfg.Network,
		"plugins":    append([]map[string]any{plugin}, cfg.Chain...),
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode conflist: %w", err)
	}
	return append(out, '\n'), nil
}

// libcni returns libcni as this host's runtime uses it, with plugins started in the host's network namespace and env
// added to their environment.
func (h *Host) libcni(env []string) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(h.CNIPath(), h.CacheDir(), &hostExec{
		RawExec: invoke.RawExec{Stderr: appendTo(h.LogFile())},
		ns:      h.Netns(),
		env:     append(append([]string{}, h.Namespace().env...), env...),
	})
}

// LogFile is where plugins' stderr goes. New's cleanup logs it when a test failed.
func (h *Host) LogFile() string { return filepath.Join(h.Dir(), "cni.log") }

// appendTo appends each write to the file of that name.
type appendTo string

func (name appendTo) Write(p []byte) (int, error) {
	f, err := os.OpenFile(string(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return 0, fmt.Errorf("open log: %w", err)
	}
	n, err := f.Write(p)
	return n, errors.Join(err, f.Close())
}

// hostExec is libcni's way to run a plugin, from inside a host's network namespace.
type hostExec struct {
	invoke.RawExec
	version.PluginDecoder
	ns  string
	env []string
}

func (e *hostExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) (out []byte, err error) {
	var pluginErr error // kept apart: libcni looks at its type
	err = netns.Do(e.ns, func() error {
		out, pluginErr = e.RawExec.ExecPlugin(ctx, path, stdin, append(environ, e.env...))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, pluginErr
}

// loadConf reads the host's configuration list and puts what a pod asks for into each plugin's args.cni.
func (h *Host) loadConf(cniArgs map[string]any) (*libcni.NetworkConfigList, error) {
	data, err := os.ReadFile(h.ConfFile())
	if err != nil {
		return nil, fmt.Errorf("read configuration list: %w", err)
	}
	if len(cniArgs) > 0 {
		if data, err = withArgs(data, cniArgs); err != nil {
			return nil, fmt.Errorf("add args to %s: %w", h.ConfFile(), err)
		}
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", h.ConfFile(), err)
	}
	return list, nil
}

// withArgs merges values into plugins[*].args.cni, the place that CNI's conventions give them.
func withArgs(conflist []byte, values map[string]any) ([]byte, error) {
	var list map[string]any
	if err := json.Unmarshal(conflist, &list); err != nil {
		return nil, err
	}
	plugins, _ := list["plugins"].([]any)
	for _, p := range plugins {
		plugin, ok := p.(map[string]any)
		if !ok {
			continue
		}
		cni := child(child(plugin, "args"), "cni")
		for k, v := range values {
			cni[k] = v
		}
	}
	return json.Marshal(list)
}

func child(m map[string]any, key string) map[string]any {
	c, ok := m[key].(map[string]any)
	if !ok {
		c = map[string]any{}
		m[key] = c
	}
	return c
}

// GC tells the network's plugins which attachments are valid: those of all pods that the lab knows on this host, and
// removes what libcni's cache holds of others.
func (h *Host) GC(ctx context.Context) error {
	unlock, err := h.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := h.loadConf(nil)
	if err != nil {
		return err
	}
	pods, err := h.Pods()
	if err != nil {
		return err
	}
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, p := range pods {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.ContainerID(), IfName: p.IfName()})
	}
	if err := h.libcni(nil).GCNetworkList(ctx, list, args); err != nil {
		return fmt.Errorf("GC on %s: %w", h.Name, err)
	}
	return nil
}

// Status asks the network's plugins whether they are ready for an ADD (CNI STATUS).
func (h *Host) Status(ctx context.Context) error {
	unlock, err := h.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := h.loadConf(nil)
	if err != nil {
		return err
	}
	if err := h.libcni(nil).GetStatusNetworkList(ctx, list); err != nil {
		return fmt.Errorf("STATUS on %s: %w", h.Name, err)
	}
	return nil
}

// Cached lists the container ids for which libcni's cache of this host holds an attachment.
func (h *Host) Cached() ([]string, error) {
	atts, err := h.libcni(nil).GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(h.CacheDir(), "results"), err)
	}
	var ids []string
	for _, a := range atts {
		ids = append(ids, a.ContainerID)
	}
	return ids, nil
}
