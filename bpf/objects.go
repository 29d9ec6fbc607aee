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

// Object is the compiled programs as an ELF file. It must not be changed.
func Object() []byte { return _DataplaneBytes }

// Maps are the maps of loaded objects by their kernel names, caracal_<noun>.
func Maps(o *DataplaneObjects) map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		DataplaneMapCaracalCounts:  o.CaracalCounts,
		DataplaneMapCaracalFlows:   o.CaracalFlows,
		DataplaneMapCaracalFrags:   o.CaracalFrags,
		DataplaneMapCaracalNat:     o.CaracalNat,
		DataplaneMapCaracalNatopen: o.CaracalNatopen,
		DataplaneMapCaracalOpens:   o.CaracalOpens,
		DataplaneMapCaracalPods:    o.CaracalPods,
		DataplaneMapCaracalQuota:   o.CaracalQuota,
		DataplaneMapCaracalRoutes:  o.CaracalRoutes,
		DataplaneMapCaracalSlots:   o.CaracalSlots,
		DataplaneMapCaracalState:   o.CaracalState,
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
		DataplaneProgPurge:       o.Purge,
		DataplaneProgClock:       o.Clock,
		DataplaneProgPlaceholder: o.Placeholder,
	}
}
