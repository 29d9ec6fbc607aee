package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/internal/nl"
)

// How programs hang on a pod's host interface.
const (
	AttachTCX    = "tcx"
	AttachClsact = "clsact"
	AttachNone   = "none"
)

// attachOf tells how the interface's ingress programs are attached. The caller is inside the interface's namespace.
func attachOf(ifindex int) (string, error) {
	res, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	if err == nil && len(res.Programs) > 0 {
		return AttachTCX, nil
	}
	// A kernel before 6.6 does not know the attach type and answers EINVAL.
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, link.ErrNotSupported) {
		return "", fmt.Errorf("query TCX programs of interface %d: %w", ifindex, err)
	}
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return "", fmt.Errorf("find interface %d: %w", ifindex, err)
	}
	filters, err := nl.Dump(func() ([]netlink.Filter, error) { return netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS) })
	if err != nil {
		return "", fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
	}
	for _, f := range filters {
		if _, ok := f.(*netlink.BpfFilter); ok {
			return AttachClsact, nil
		}
	}
	return AttachNone, nil
}

// redirector loads the shortest program a redirecting datapath can have: every packet goes to the peer of the
// interface with index to, in the same softirq.
func redirector(to int) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "podbench_redir",
		Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(to)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirectPeer.Call(),
			asm.Return(),
		},
		License: "Apache-2.0",
	})
	if err != nil {
		return nil, fmt.Errorf("load redirecting program (bpf_redirect_peer needs kernel 5.10): %w", err)
	}
	return p, nil
}

// attachRedirect makes ingress of interface from redirect to the peer of interface to, as how says (empty: TCX or else
// clsact), and returns how it was done and a function that detaches. The caller is inside their namespace.
func attachRedirect(from, to int, how string) (string, func() error, error) {
	prog, err := redirector(to)
	if err != nil {
		return "", nil, err
	}
	defer prog.Close() // the attachment holds it
	if how != AttachClsact {
		l, err := link.AttachTCX(link.TCXOptions{Interface: from, Program: prog, Attach: ebpf.AttachTCXIngress})
		if err == nil {
			return AttachTCX, l.Close, nil
		}
		if how == AttachTCX || !errors.Is(err, ebpf.ErrNotSupported) {
			return "", nil, fmt.Errorf("attach redirecting program by TCX: %w", err)
		}
	}
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(qdisc); err != nil {
		return "", nil, fmt.Errorf("add clsact qdisc: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		},
		Fd: prog.FD(), Name: "podbench_redir", DirectAction: true,
	}
	if err := netlink.FilterAdd(filter); err != nil {
		return "", nil, fmt.Errorf("attach redirecting program by clsact: %w", err)
	}
	return AttachClsact, func() error { return nil }, nil // goes with the interface
}
