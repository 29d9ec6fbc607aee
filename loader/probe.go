package loader

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"
)

// needs lists what the programs use beyond Linux 5.10, with the release that brought it.
var needs = []struct {
	what  string
	since string
	probe func() error
}{
	{"TC programs", "4.1", func() error { return features.HaveProgramType(ebpf.SchedCLS) }},
	{"bpf_redirect_peer", "5.10", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectPeer) }},
	{"bpf_redirect_neigh", "5.10", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectNeigh) }},
	{"bpf_check_mtu", "5.12", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnCheckMtu) }},
	{"bpf_for_each_map_elem", "5.13", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnForEachMapElem) }},
	{"SYSCALL programs", "5.14", func() error { return features.HaveProgramType(ebpf.Syscall) }},
	{"LRU hash maps", "4.10", func() error { return features.HaveMapType(ebpf.LRUHash) }},
	{"ring buffers", "5.8", func() error { return features.HaveMapType(ebpf.RingBuf) }},
	{"LPM trie maps", "4.11", func() error { return features.HaveMapType(ebpf.LPMTrie) }},
}

// Probe tells whether this kernel has all that the programs need: nil, or ErrKernel naming what is missing and which
// release brought it.
func Probe() error {
	for _, n := range needs {
		err := n.probe()
		if errors.Is(err, unix.EPERM) {
			return fmt.Errorf("probe for %s: %w; loading programs takes root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", n.what, err)
		}
		if err != nil {
			return fmt.Errorf("%w: no %s, which Linux %s brought (%w)", ErrKernel, n.what, n.since, err)
		}
	}
	return nil
}

// HasTCX tells whether interfaces take programs by TCX links (Linux 6.6); otherwise clsact is used.
func HasTCX() bool { return hasTCX() }

var hasTCX = sync.OnceValue(probeTCX)
