package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/bpf"
)

// ErrNoInterface says that a packet is to come by an interface that is not there.
var ErrNoInterface = errors.New("no such interface")

const markDeferred = 0x00200000 // mark_deferred in state.h

// Arrival says how a packet meets a program.
type Arrival struct {
	Hook    string // from_pod, to_pod, from_net, to_net
	IfIndex uint32 // that the hook is on
	From    uint32 // by which interface the host's stack had got it; 0: by none, a process of the host sent it

	Deferred bool // the pod behind From sent it to a Service, and nobody has judged it
}

// Runner runs a node's programs on packets that no interface sees: where the programs send a packet on, nothing is sent. But
// flows, counters and events become what such packets make of them, so it is for maps that are a copy. A Runner is the only
// one to read their events, and not for concurrent use. Its caller stays in the node's network namespace.
type Runner struct {
	programs map[string]*ebpf.Program
	events   *Events
	told     *ebpf.Map
	quiet    []bpf.DataplaneTold // of no CPU that has told of anything
	drops    int
}

// Runner opens the programs. Its owner closes it.
func (m *Maps) Runner() (_ *Runner, err error) {
	r := &Runner{programs: make(map[string]*ebpf.Program)}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	for _, hook := range []string{bpf.DataplaneProgFromPod, bpf.DataplaneProgToPod, bpf.DataplaneProgFromNet, bpf.DataplaneProgToNet} {
		if r.programs[hook], err = m.program(hook); err != nil {
			return nil, err
		}
	}
	if r.told, err = m.pinned(bpf.DataplaneMapCaracalTold); err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	r.quiet = make([]bpf.DataplaneTold, cpus)
	if r.events, err = m.Events(); err != nil {
		return nil, err
	}
	r.events.SetDeadline(time.Unix(1, 0)) // what was told is there
	return r, nil
}

// Close closes the programs.
func (r *Runner) Close() error {
	var errs []error
	for _, p := range r.programs {
		errs = append(errs, p.Close())
	}
	if r.told != nil {
		errs = append(errs, r.told.Close())
	}
	if r.events != nil {
		errs = append(errs, r.events.Close())
	}
	return errors.Join(errs...)
}

// Run shows a frame to a program. What it says of the frame is nil if it lets it pass, else the drop. ErrNoInterface.
func (r *Runner) Run(a Arrival, frame []byte) (*Event, error) {
	const shot = 2                   // TC_ACT_SHOT
	var ctx [192]byte                // struct __sk_buff
	const mark, iif, dev = 8, 36, 40 // mark, ingress_ifindex, ifindex
	if a.Deferred {
		binary.NativeEndian.PutUint32(ctx[mark:], markDeferred)
	}
	binary.NativeEndian.PutUint32(ctx[iif:], a.From)
	binary.NativeEndian.PutUint32(ctx[dev:], a.IfIndex)
	action, err := r.programs[a.Hook].Run(&ebpf.RunOptions{Data: frame, Context: ctx[:]})
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("%w: %d", ErrNoInterface, a.IfIndex)
	}
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", a.Hook, err)
	}
	if action != shot {
		return nil, nil
	}
	// A CPU tells of so many in a second only.
	if r.drops++; r.drops%64 == 0 {
		if err := r.told.Put(uint32(0), r.quiet); err != nil {
			return nil, fmt.Errorf("reset what was told: %w", err)
		}
	}
	for {
		e, err := r.events.Read()
		if err != nil {
			return nil, fmt.Errorf("%s dropped a packet and did not say why: %w", a.Hook, err)
		}
		if e.Kind == "drop" {
			return &e, nil
		}
	}
}
