package bpf

import (
	"unsafe"

	"github.com/cilium/ebpf"
)

// SchemaVersion is the version of the maps' layout, SCHEMA_VERSION in maps.h.
const SchemaVersion = 1

// StateSize and StateBuildOffset place the state's fields, bytes.
const (
	StateSize        = unsafe.Sizeof(DataplaneState{})
	StateBuildOffset = unsafe.Offsetof(DataplaneState{}.Build)
)

// WorkSize is what the programs need for caracal_work, bytes.
const WorkSize = unsafe.Sizeof(DataplaneWork{})

// Object is the compiled programs as an ELF file. It must not be changed.
func Object() []byte { return _DataplaneBytes }

// Maps are the maps of loaded objects by their kernel names, caracal_<noun>.
func Maps(o *DataplaneObjects) map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		DataplaneMapCaracalChurn:   o.CaracalChurn,
		DataplaneMapCaracalCounts:  o.CaracalCounts,
		DataplaneMapCaracalEvents:  o.CaracalEvents,
		DataplaneMapCaracalFlows:   o.CaracalFlows,
		DataplaneMapCaracalFrags:   o.CaracalFrags,
		DataplaneMapCaracalNat:     o.CaracalNat,
		DataplaneMapCaracalNatopen: o.CaracalNatopen,
		DataplaneMapCaracalOpens:   o.CaracalOpens,
		DataplaneMapCaracalPeers:   o.CaracalPeers,
		DataplaneMapCaracalPods:    o.CaracalPods,
		DataplaneMapCaracalPolicy:  o.CaracalPolicy,
		DataplaneMapCaracalQuota:   o.CaracalQuota,
		DataplaneMapCaracalRoutes:  o.CaracalRoutes,
		DataplaneMapCaracalRules:   o.CaracalRules,
		DataplaneMapCaracalService: o.CaracalService,
		DataplaneMapCaracalSlots:   o.CaracalSlots,
		DataplaneMapCaracalState:   o.CaracalState,
		DataplaneMapCaracalTold:    o.CaracalTold,
		DataplaneMapCaracalUplinks: o.CaracalUplinks,
		DataplaneMapCaracalWork:    o.CaracalWork,
	}
}

// Programs are the programs of loaded objects by their names.
func Programs(o *DataplaneObjects) map[string]*ebpf.Program {
	return map[string]*ebpf.Program{
		DataplaneProgFromPod:     o.FromPod,
		DataplaneProgToPod:       o.ToPod,
		DataplaneProgFromNet:     o.FromNet,
		DataplaneProgToNet:       o.ToNet,
		DataplaneProgToHost:      o.ToHost,
		DataplaneProgPurge:       o.Purge,
		DataplaneProgSweep:       o.Sweep,
		DataplaneProgClock:       o.Clock,
		DataplaneProgPlaceholder: o.Placeholder,
	}
}
