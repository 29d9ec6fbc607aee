package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/caracal-net/caracal/internal/netns"
)

// PodState says how far a pod has come.
type PodState string

const (
	PodNew    PodState = "new"    // its namespace is there or being made; no ADD has been called
	PodAdding PodState = "adding" // ADD was called and has not succeeded (it may still run, have failed or been killed)
	PodReady  PodState = "ready"  // ADD succeeded
	PodDead   PodState = "dead"   // its host was rebooted: no namespace, and no DEL yet
)

// PodOptions are what a pod asks for. The zero value asks for nothing.
type PodOptions struct {
	IPs          []netip.Addr      // addresses it wants, by args.cni.ips
	Labels       map[string]string // by args.cni.labels
	Namespace    string            // K8S_POD_NAMESPACE; default "default"
	UID          string            // K8S_POD_UID; default: 32 random hex digits
	ContainerID  string            // default: 64 random hex digits
	IfName       string            // default "eth0"
	Args         [][2]string       // more CNI_ARGS, behind IgnoreUnknown, K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID
	NoKubernetes bool              // leave out the K8S_ arguments, as other runtimes do
	Env          []string          // more environment for the plugin ("NAME=value")
	Capabilities map[string]any    // runtimeConfig for the plugins that declare them (bandwidth, portMappings, ...)
}

// Pod is a pod of a host: a network namespace with at most one attachment.
type Pod struct {
	Name string
	host *Host
	file podFile
}

func (h *Host) podsDir() string { return filepath.Join(h.Dir(), "pods") }

func (h *Host) podPath(name string) string { return filepath.Join(h.podsDir(), name+".json") }

// AddPod makes a pod's namespace and calls ADD. When ADD fails it does what a runtime does, DEL and removal of the
// namespace, and returns ADD's error (a *types.Error of libcni is in its chain).
func (h *Host) AddPod(ctx context.Context, name string, opts PodOptions) (*Pod, error) {
	p, err := h.NewPod(ctx, name, opts)
	if err != nil {
		return nil, err
	}
	if err := p.Add(ctx); err != nil {
		return nil, errors.Join(err, p.Delete(context.WithoutCancel(ctx)))
	}
	return p, nil
}

// NewPod makes a pod's namespace (its loopback up) without calling the plugin. The error is ErrExists when the host has
// a pod of that name.
func (h *Host) NewPod(ctx context.Context, name string, opts PodOptions) (*Pod, error) {
	if !podName.MatchString(name) {
		return nil, fmt.Errorf("pod name %q: want lower-case letters, digits, '-' and '.', at most 63", name)
	}
	unlock, err := h.lab.use(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	f := podFile{Name: name, Namespace: opts.Namespace, UID: opts.UID, ContainerID: opts.ContainerID,
		Netns: h.file.Netns + "-" + name, IfName: opts.IfName, State: PodNew,
		IPs: opts.IPs, Labels: opts.Labels, Env: opts.Env, Caps: opts.Capabilities}
	if f.Namespace == "" {
		f.Namespace = "default"
	}
	if f.UID == "" {
		f.UID = randomHex(16)
	}
	if f.ContainerID == "" {
		f.ContainerID = randomHex(32)
	}
	if f.IfName == "" {
		f.IfName = "eth0"
	}
	f.Args = [][2]string{{"IgnoreUnknown", "1"}}
	if !opts.NoKubernetes {
		f.Args = append(f.Args, [2]string{"K8S_POD_NAMESPACE", f.Namespace}, [2]string{"K8S_POD_NAME", name},
			[2]string{"K8S_POD_INFRA_CONTAINER_ID", f.ContainerID}, [2]string{"K8S_POD_UID", f.UID})
	}
	f.Args = append(f.Args, opts.Args...)
	p := &Pod{Name: name, host: h, file: f}
	if _, err := os.Stat(h.podPath(name)); err == nil {
		return nil, fmt.Errorf("pod %s/%s: %w", h.Name, name, ErrExists)
	}
	if _, err := os.Lstat(p.Netns()); err == nil {
		return nil, fmt.Errorf("network namespace %s, which is not a lab's: %w", f.Netns, ErrExists)
	}
	if err := writeJSON(h.podPath(name), f, os.Link); errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("pod %s/%s: %w", h.Name, name, ErrExists)
	} else if err != nil {
		return nil, err
	}
	if err := netns.Create(f.Netns); err != nil {
		return nil, errors.Join(err, os.Remove(h.podPath(name)))
	}
	if err := p.Do(loopbackUp); err != nil {
		return nil, errors.Join(err, p.remove())
	}
	return p, nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// Pod finds a pod by name. The error is ErrNotFound.
func (h *Host) Pod(name string) (*Pod, error) {
	if !podName.MatchString(name) {
		return nil, fmt.Errorf("pod %s/%s: %w", h.Name, name, ErrNotFound)
	}
	p := &Pod{Name: name, host: h}
	data, err := os.ReadFile(h.podPath(name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("pod %s/%s: %w", h.Name, name, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read pod: %w", err)
	}
	if err := json.Unmarshal(data, &p.file); err != nil {
		return nil, fmt.Errorf("read %s: %w", h.podPath(name), err)
	}
	return p, nil
}

// Pods lists the host's pods by name, those whose ADD failed or was cut off included.
func (h *Host) Pods() ([]*Pod, error) {
	entries, err := os.ReadDir(h.podsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	var pods []*Pod
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !podName.MatchString(name) {
			continue
		}
		p, err := h.Pod(name)
		if errors.Is(err, ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// DelPod calls DEL for the pod and removes its namespace, whatever state it is in. The error is ErrNotFound when the
// host has no such pod. If DEL fails the pod stays, so that it can be deleted again.
func (h *Host) DelPod(ctx context.Context, name string) error {
	p, err := h.Pod(name)
	if err != nil {
		return err
	}
	return p.Delete(ctx)
}

// CheckPod calls CHECK for the pod.
func (h *Host) CheckPod(ctx context.Context, name string) error {
	p, err := h.Pod(name)
	if err != nil {
		return err
	}
	return p.Check(ctx)
}

// Add calls ADD. The pod keeps its namespace if that fails.
func (p *Pod) Add(ctx context.Context) error {
	unlock, err := p.host.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := p.conf()
	if err != nil {
		return err
	}
	p.file.State, p.file.Result = PodAdding, nil
	if err := p.save(); err != nil {
		return err
	}
	res, err := p.host.libcni(p.file.Env).AddNetworkList(ctx, list, p.runtimeConf())
	if err != nil {
		return fmt.Errorf("ADD of %s/%s: %w", p.host.Name, p.Name, err)
	}
	full, err := types100.NewResultFromResult(res)
	if err != nil {
		return fmt.Errorf("ADD of %s/%s: read result: %w", p.host.Name, p.Name, err)
	}
	if p.file.Result, err = json.Marshal(full); err != nil {
		return fmt.Errorf("ADD of %s/%s: encode result: %w", p.host.Name, p.Name, err)
	}
	p.file.State = PodReady
	return p.save()
}

// Del calls DEL and leaves the namespace alone; it may be called again.
func (p *Pod) Del(ctx context.Context) error {
	unlock, err := p.host.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return p.del(ctx)
}

func (p *Pod) del(ctx context.Context) error {
	list, err := p.conf()
	if err != nil {
		return err
	}
	rt := p.runtimeConf()
	if p.file.State == PodDead || !p.namespaceMade() {
		rt.NetNS = ""
	}
	if err := p.host.libcni(p.file.Env).DelNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("DEL of %s/%s: %w", p.host.Name, p.Name, err)
	}
	return nil
}

// namespaceMade is false only for a pod whose making was cut off between the name and the namespace: foreign plugins
// take offence at the empty file there.
func (p *Pod) namespaceMade() bool {
	ns, err := netns.Open(p.Netns())
	if err == nil {
		ns.Close()
	}
	return !errors.Is(err, netns.ErrNotNamespace)
}

// Check calls CHECK with the result that libcni's cache holds.
func (p *Pod) Check(ctx context.Context) error {
	unlock, err := p.host.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	list, err := p.conf()
	if err != nil {
		return err
	}
	if err := p.host.libcni(p.file.Env).CheckNetworkList(ctx, list, p.runtimeConf()); err != nil {
		return fmt.Errorf("CHECK of %s/%s: %w", p.host.Name, p.Name, err)
	}
	return nil
}

// Delete calls DEL, ends the processes in the pod's namespace and removes it.
func (p *Pod) Delete(ctx context.Context) error {
	unlock, err := p.host.lab.use(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.del(ctx); err != nil {
		return err
	}
	if err := endProcesses(ctx, "", []string{p.file.Netns}); err != nil {
		return err
	}
	return p.remove()
}

// Crash removes the pod's namespace without DEL, as the machine does when the last process of a container dies under a
// runtime that forgot it. The pod is still listed; Delete forgets it.
func (p *Pod) Crash(ctx context.Context) error {
	if err := endProcesses(ctx, "", []string{p.file.Netns}); err != nil {
		return err
	}
	return netns.Delete(p.file.Netns)
}

// remove forgets the pod: its namespace first, its file last.
func (p *Pod) remove() error {
	if err := netns.Delete(p.file.Netns); err != nil {
		return err
	}
	if err := os.Remove(p.host.podPath(p.Name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}

func (p *Pod) save() error { return writeJSON(p.host.podPath(p.Name), p.file, os.Rename) }

func (p *Pod) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: p.file.ContainerID, NetNS: p.Netns(), IfName: p.file.IfName,
		Args: p.file.Args, CapabilityArgs: p.file.Caps}
}

// conf is the host's configuration list with the pod's wishes in it.
func (p *Pod) conf() (*libcni.NetworkConfigList, error) {
	args := map[string]any{}
	if len(p.file.IPs) > 0 {
		args["ips"] = p.file.IPs
	}
	if len(p.file.Labels) > 0 {
		type label struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		}
		labels := []label{}
		for k, v := range p.file.Labels {
			labels = append(labels, label{k, v})
		}
		sort.Slice(labels, func(i, j int) bool { return labels[i].Key < labels[j].Key })
		args["labels"] = labels
	}
	return p.host.loadConf(args)
}

// Host is the host that the pod is on.
func (p *Pod) Host() *Host { return p.host }

// ContainerID is the pod's CNI_CONTAINERID.
func (p *Pod) ContainerID() string { return p.file.ContainerID }

// IfName is the pod's CNI_IFNAME.
func (p *Pod) IfName() string { return p.file.IfName }

// State says how far the pod had come when it was read.
func (p *Pod) State() PodState { return p.file.State }

// Netns is the path of the pod's network namespace.
func (p *Pod) Netns() string { return netns.Path(p.file.Netns) }

// Namespace is the pod's network namespace to run things in.
func (p *Pod) Namespace() Namespace {
	return Namespace{Netns: p.Netns(), env: append(p.host.lab.env(),
		"CARACAL_LAB_HOST="+p.host.Name, "CARACAL_LAB_POD="+p.Name)}
}

// Do runs fn on a thread inside the pod. See Namespace.Do.
func (p *Pod) Do(fn func() error) error { return p.Namespace().Do(fn) }

// Exec runs a program inside the pod. See Namespace.Exec.
func (p *Pod) Exec(ctx context.Context, arg ...string) (string, error) {
	return p.Namespace().Exec(ctx, arg...)
}

// Do runs fn on a thread inside the host. See Namespace.Do.
func (h *Host) Do(fn func() error) error { return h.Namespace().Do(fn) }

// Exec runs a program inside the host. See Namespace.Exec.
func (h *Host) Exec(ctx context.Context, arg ...string) (string, error) {
	return h.Namespace().Exec(ctx, arg...)
}

// Result is ADD's result in the format of CNI 1.0.0 (1.1.0's only addition are fields); nil unless the pod is ready.
func (p *Pod) Result() *types100.Result {
	if len(p.file.Result) == 0 {
		return nil
	}
	res := &types100.Result{}
	if json.Unmarshal(p.file.Result, res) != nil {
		return nil
	}
	return res
}

// Addrs are the addresses of ADD's result, in its order.
func (p *Pod) Addrs() []netip.Addr {
	res := p.Result()
	if res == nil {
		return nil
	}
	var addrs []netip.Addr
	for _, ip := range res.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			addrs = append(addrs, a.Unmap())
		}
	}
	return addrs
}

// Addr is the pod's first IPv4 address; the zero Addr if it has none.
func (p *Pod) Addr() netip.Addr { return p.first(netip.Addr.Is4) }

// Addr6 is the pod's first IPv6 address; the zero Addr if it has none.
func (p *Pod) Addr6() netip.Addr { return p.first(netip.Addr.Is6) }

func (p *Pod) first(want func(netip.Addr) bool) netip.Addr {
	for _, a := range p.Addrs() {
		if want(a) {
			return a
		}
	}
	return netip.Addr{}
}

// HostIfName is the name of the host's end of the pod's first pair, as ADD's result tells; "" if it does not.
func (p *Pod) HostIfName() string {
	res := p.Result()
	if res == nil {
		return ""
	}
	for _, i := range res.Interfaces {
		if i.Sandbox == "" && (strings.HasPrefix(i.Name, "cali") || strings.HasPrefix(i.Name, "veth")) {
			return i.Name
		}
	}
	return ""
}
