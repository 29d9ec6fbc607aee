package ctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/node"
)

// What became of a resource, or of a field of one.
const (
	wasCreated   = "created"
	wasChanged   = "changed" // the resource in the store; or the field, on its way
	wasUnchanged = "unchanged"
	noEffect     = "no effect"     // left out, and nothing is lost by it
	leftOut      = "left out"      // something is lost by it, and --skip was given
	notPossible  = "can't be"      // something would be lost by it
	toBeWritten  = "to be written" // until the store was asked
)

// importedItem is what became of one resource of an export.
type importedItem struct {
	Line   int             `json:"line"`
	Kind   string          `json:"kind"`
	Name   string          `json:"name"`
	Result string          `json:"result"`
	Why    string          `json:"why,omitempty"`
	Fields []importedField `json:"fields,omitempty"`

	resource *api.Resource // to be written
	claim    *agent.Block  // to be written
}

// importedField is what became of a field that was not taken as it is.
type importedField struct {
	Line   int    `json:"line"`
	Field  string `json:"field"`
	Result string `json:"result"`
	Why    string `json:"why"`
}

// foreignKinds are kinds of Calico's that have no place here. why begins with what they are.
var foreignKinds = map[string]struct {
	lost bool // without it something is not as it was
	why  string
}{
	"FelixConfiguration":            {false, "settings of Calico's agent"},
	"ClusterInformation":            {false, "what Calico notes of itself"},
	"KubeControllersConfiguration":  {false, "settings of Calico's controllers"},
	"CalicoNodeStatus":              {false, "what Calico's agent reports"},
	"IPAMConfig":                    {false, "a block always belongs to one host here, which claims as many as it needs"},
	"IPAMConfiguration":             {false, "a block always belongs to one host here, which claims as many as it needs"},
	"IPAMHandle":                    {false, "each host records who has which address; adopt does that"},
	"StagedNetworkPolicy":           {false, "it is not in force in Calico either; try it with what-if"},
	"StagedGlobalNetworkPolicy":     {false, "it is not in force in Calico either; try it with what-if"},
	"StagedKubernetesNetworkPolicy": {false, "it is not in force in Calico either; try it with what-if"},
	"HostEndpoint":                  {true, "policy is for pods, hosts themselves are not protected; do that with the host's firewall"},
	"IPReservation":                 {true, "write its addresses into ipam.reservations of each host's network configuration"},
}

// fieldRule says what becomes of a field that no kind here has, or not with every value.
type fieldRule struct {
	path string
	none []string // values as JSON that ask for nothing, beside null, false, 0, "" and empty lists
	lost bool     // without it something is not as it was
	why  string
}

var tunnelRules = "each host has addresses of its own in the tunnel"

var fieldRules = map[string][]fieldRule{
	"IPPool": {
		{"namespaceSelector", []string{`"all()"`}, true, "pools are for pods of all namespaces"},
		{"assignmentMode", []string{`"Automatic"`}, true, "addresses would be given to any pod; set disabled: true instead"},
		{"disableBGPExport", nil, true, "hosts tell each other of all blocks"},
	},
	"Node": {
		{"orchRefs", nil, false, "a node has one name"},
		{"interfaces", nil, false, "the agent finds them itself"},
		{"bgp.ipv4IPIPTunnelAddr", nil, false, "there is no IPIP"},
		{"ipv4VXLANTunnelAddr", nil, false, tunnelRules},
		{"ipv6VXLANTunnelAddr", nil, false, tunnelRules},
		{"vxlanTunnelMACAddr", nil, false, tunnelRules},
		{"vxlanTunnelMACAddrV6", nil, false, tunnelRules},
		{"wireguard", nil, false, "there is no WireGuard"},
	},
	"BGPConfiguration": {
		{"bindMode", nil, false, "the agent listens on all addresses"},
		{"ignoredInterfaces", nil, false, "interfaces' own prefixes are not announced"},
		{"programClusterRoutes", nil, false, "the agent writes all routes"},
		{"ipv4NormalRoutePriority", nil, false, "routes have no priority"},
		{"ipv6NormalRoutePriority", nil, false, "routes have no priority"},
		{"ipv4ElevatedRoutePriority", nil, false, "routes have no priority"},
		{"ipv6ElevatedRoutePriority", nil, false, "routes have no priority"},
		{"serviceClusterIPs", nil, true, "addresses of services are not announced; write prefixAdvertisements"},
		{"serviceExternalIPs", nil, true, "addresses of services are not announced; write prefixAdvertisements"},
		{"serviceLoadBalancerIPs", nil, true, "addresses of services are not announced; write prefixAdvertisements"},
		{"serviceLoadBalancerAggregation", []string{`"Enabled"`}, true, "addresses of services are not announced"},
		{"localWorkloadPeeringIPV4", nil, true, "pods are no BGP peers"},
		{"localWorkloadPeeringIPV6", nil, true, "pods are no BGP peers"},
	},
	"BGPPeer": {
		{"nextHopMode", []string{`"Auto"`}, true, "the next hop is told on, or is the node, by the kind of session"},
		{"reversePeering", []string{`"Auto"`}, true, "nodes that are selected as peers always peer back"},
		{"birdGatewayMode", nil, false, "there is no BIRD"},
		{"keepaliveTime", nil, false, "it is a third of the hold time, 90 s"},
		{"failureDetectionMode", []string{`"None"`}, true, "there is no BFD"},
		{"restartMode", []string{`"GracefulRestart"`}, true, "sessions restart gracefully"},
		{"numAllowedLocalASNumbers", nil, true, "routes with the own AS number are refused"},
		{"localASNumber", nil, true, "a node has one AS number"},
		{"localWorkloadSelector", nil, true, "pods are no BGP peers"},
		{"reachableBy", nil, true, "the peer is reached by the host's own routes; add one there"},
	},
	"WorkloadEndpoint": {
		{"ipNATs", nil, true, "pods have no floating addresses"},
		{"allowSpoofedSourcePrefixes", nil, true, "a pod sends from its own addresses alone"},
		{"qosControls", nil, true, "bandwidth is the bandwidth plugin's"},
		{"ipv4Gateway", nil, false, "it is the same for all pods"},
		{"ipv6Gateway", nil, false, "it is the same for all pods"},
	},
	"FelixConfiguration": {
		{"wireguardEnabled", nil, true, "nothing encrypts what goes from host to host"},
		{"wireguardEnabledV6", nil, true, "nothing encrypts what goes from host to host"},
	},
}

// importer turns what Calico exports into what is to be written. It asks nobody.
type importer struct {
	ipip string // what IPIPMode becomes: "vxlan", "none"; "": it can't be
	skip bool   // what can't be is left out
	live bool   // it is from the API, not a file that people have

	items  []*importedItem
	blocks map[netip.Prefix]*calicoBlock
}

// calicoBlock is a block of Calico's IPAM.
type calicoBlock struct {
	item   *importedItem
	node   string // "": nobody's
	usedBy map[string][]string
}

// read takes a file in. The error is of a file that can't be read at all.
func (im *importer) read(data []byte) error {
	items, err := manifest.Items(data)
	if err != nil {
		return err
	}
	im.blocks = make(map[netip.Prefix]*calicoBlock)
	for _, item := range items {
		im.take(item)
	}
	im.countHandles()
	return nil
}

// countHandles makes one item of all IPAMHandles: there is one for each pod.
func (im *importer) countHandles() {
	var first *importedItem
	n := 0
	im.items = slices.DeleteFunc(im.items, func(it *importedItem) bool {
		if it.Kind != "IPAMHandle" || it.Result != noEffect || strings.HasPrefix(it.Name, "(") {
			return false
		}
		if n++; first == nil {
			first = it
		}
		return it != first
	})
	if n > 1 {
		first.Name = fmt.Sprintf("(%d of them)", n)
	}
}

// lost is the result of what can't be.
func (im *importer) lost() string {
	if im.skip {
		return leftOut
	}
	return notPossible
}

// refuse ends with an item that can't be imported.
func (im *importer) refuse(it *importedItem, format string, args ...any) {
	it.Result, it.Why = im.lost(), fmt.Sprintf(format, args...)
	it.resource, it.claim = nil, nil
}

type object = map[string]any

// take turns one item.
func (im *importer) take(item manifest.Item) {
	it := &importedItem{Line: item.Line(""), Kind: "?", Result: toBeWritten}
	im.items = append(im.items, it)
	var fields object
	if json.Unmarshal(item.JSON, &fields) != nil || fields == nil {
		im.refuse(it, "it is no resource")
		return
	}
	if _, has := fields["kind"]; !has && im.isMigration(fields) {
		im.items = im.items[:len(im.items)-1]
		im.takeMigration(item)
		return
	}
	it.Kind, _ = fields["kind"].(string)
	clean(fields)
	meta, _ := fields["metadata"].(object)
	it.Name, _ = meta["name"].(string)
	if ns, _ := meta["namespace"].(string); ns != "" {
		it.Name = ns + "/" + it.Name
	}
	spec, _ := fields["spec"].(object)
	for _, rule := range fieldRules[it.Kind] {
		im.drop(it, item, spec, rule)
	}
	if foreign, ok := foreignKinds[it.Kind]; ok {
		if it.Result, it.Why = noEffect, foreign.why; foreign.lost {
			im.refuse(it, "%s", foreign.why)
		}
		return
	}
	switch it.Kind {
	case "IPAMBlock", "BlockAffinity":
		im.takeBlock(it, spec)
		return
	case "IPPool":
		if !im.pool(it, item, spec) {
			return
		}
	case "WorkloadEndpoint":
		endpoint(meta, spec)
	case "BGPPeer":
		if spec["nextHopMode"] == "Keep" {
			delete(spec, "nextHopMode")
			spec["keepOriginalNextHop"] = true
			it.changed(item, "spec.nextHopMode", "keepOriginalNextHop: true in its place")
		}
	}
	text, err := json.Marshal(fields)
	if err != nil {
		im.refuse(it, "%v", err)
		return
	}
	var r api.Resource
	if err := json.Unmarshal(text, &r); err != nil {
		var field *api.FieldError
		if errors.As(err, &field) {
			it.Line = item.Line(field.Path)
			err = field
		}
		im.refuse(it, "%v", err)
		return
	}
	r.Metadata.Revision, r.Metadata.Created, r.Metadata.UID = "", "", ""
	it.Kind, it.Name, it.resource = r.Kind.String(), r.Metadata.FullName(), &r
}

// endpoint takes out of a pod's endpoint what every pod has: labels that follow from its namespace, and Kubernetes' profiles, which
// allow everything.
func endpoint(meta, spec object) {
	labels, _ := meta["labels"].(object)
	for _, key := range []string{"projectcalico.org/namespace", "projectcalico.org/orchestrator", "projectcalico.org/serviceaccount"} {
		delete(labels, key)
	}
	profiles, ok := spec["profiles"].([]any)
	if !ok {
		return
	}
	spec["profiles"] = slices.DeleteFunc(profiles, func(p any) bool {
		name, _ := p.(string)
		return strings.HasPrefix(name, "kns.") || strings.HasPrefix(name, "ksa.") || name == "projectcalico-default-allow"
	})
}

// clean takes out what Kubernetes and calicoctl put beside a resource, and the group that Calico's resources have in Kubernetes.
func clean(fields object) {
	if v, _ := fields["apiVersion"].(string); v == "crd.projectcalico.org/v1" {
		fields["apiVersion"] = api.Group
	}
	delete(fields, "status")
	meta, _ := fields["metadata"].(object)
	for key := range meta {
		if !slices.Contains([]string{"name", "namespace", "labels", "annotations"}, key) {
			delete(meta, key)
		}
	}
	annotations, _ := meta["annotations"].(object)
	// Calico keeps a resource's own labels there when it lies in Kubernetes.
	if text, ok := annotations["projectcalico.org/metadata"].(string); ok {
		var own struct {
			Labels object `json:"labels"`
		}
		if json.Unmarshal([]byte(text), &own) == nil && len(own.Labels) > 0 {
			meta["labels"] = own.Labels
		}
	}
	delete(annotations, "projectcalico.org/metadata")
	delete(annotations, "kubectl.kubernetes.io/last-applied-configuration")
}

func (it *importedItem) note(item manifest.Item, field, result, why string) {
	it.Fields = append(it.Fields, importedField{item.Line(field), field, result, why})
}

func (it *importedItem) changed(item manifest.Item, field, why string) {
	it.note(item, field, wasChanged, why)
}

// drop takes a field out.
func (im *importer) drop(it *importedItem, item manifest.Item, spec object, rule fieldRule) {
	in, name := spec, rule.path
	for head, rest, deeper := strings.Cut(name, "."); deeper; head, rest, deeper = strings.Cut(name, ".") {
		in, _ = in[head].(object)
		name = rest
	}
	value, there := in[name]
	text, err := json.Marshal(value)
	if !there || err != nil {
		return
	}
	if rule.path == "nextHopMode" && string(text) == `"Keep"` {
		return
	}
	delete(in, name)
	if slices.Contains(append(rule.none, "null", "false", "0", `""`, "[]", "{}"), string(text)) {
		return
	}
	result := noEffect
	if rule.lost {
		result = im.lost()
	}
	it.note(item, "spec."+rule.path, result, rule.why)
}

// pool rewrites what pools of ours do not have. false: nothing is to be written.
func (im *importer) pool(it *importedItem, item manifest.Item, spec object) bool {
	if uses, ok := spec["allowedUses"].([]any); ok && len(uses) > 0 {
		workload := slices.Contains(uses, any("Workload"))
		if !workload {
			it.Result, it.Why = noEffect, "no pod gets an address of it (allowedUses)"
			return false
		}
		if len(uses) > 1 {
			spec["allowedUses"] = []any{"Workload"}
			it.changed(item, "spec.allowedUses", "Workload alone: "+tunnelRules)
		}
	}
	mode, _ := spec["ipipMode"].(string)
	if mode == "" || mode == "Never" {
		delete(spec, "ipipMode")
		return true
	}
	why := "there is no IPIP"
	switch im.ipip {
	case "vxlan":
		delete(spec, "ipipMode")
		spec["vxlanMode"] = mode
		it.changed(item, "spec.ipipMode", why+"; vxlanMode "+mode+" in its place")
	case "none":
		delete(spec, "ipipMode")
		it.changed(item, "spec.ipipMode", why+"; pods' packets go from host to host as they are")
	default:
		delete(spec, "ipipMode")
		it.note(item, "spec.ipipMode", im.lost(), why+"; say what in its place: --ipip vxlan, or --ipip none where hosts reach each other's pods without")
	}
	return true
}

// migration is what `calicoctl datastore migrate export` writes behind the resources.
type migration struct {
	Affinities []struct {
		Key   string
		Value struct {
			State string `json:"state"`
		}
	} `json:"block_affinities"`
	Blocks []struct {
		Value blockSpec
	} `json:"blocks"`
	Handles []json.RawMessage `json:"handles"`
	Config  json.RawMessage   `json:"config"`
}

// blockSpec is Calico's IPAMBlock and BlockAffinity, which share no field but cidr.
type blockSpec struct {
	CIDR        string  `json:"cidr"`
	Affinity    *string `json:"affinity"`
	Allocations []*int  `json:"allocations"`
	Attributes  []struct {
		Handle    string            `json:"handle_id"`
		Secondary map[string]string `json:"secondary"`
	} `json:"attributes"`

	State   string `json:"state"`
	Node    string `json:"node"`
	Deleted any    `json:"deleted"`
}

func (im *importer) isMigration(fields object) bool {
	for _, key := range []string{"block_affinities", "blocks", "handles", "config"} {
		if _, ok := fields[key]; ok {
			return true
		}
	}
	return false
}

func (im *importer) takeMigration(item manifest.Item) {
	var m migration
	if err := json.Unmarshal(item.JSON, &m); err != nil {
		it := &importedItem{Line: item.Line(""), Kind: "IPAM"}
		im.items = append(im.items, it)
		im.refuse(it, "%v", err)
		return
	}
	for i, b := range m.Blocks {
		it := &importedItem{Line: item.Line(fmt.Sprintf("blocks[%d]", i)), Kind: "IPAMBlock", Result: toBeWritten}
		im.items = append(im.items, it)
		im.block(it, b.Value)
	}
	for i, a := range m.Affinities {
		it := &importedItem{Line: item.Line(fmt.Sprintf("block_affinities[%d]", i)), Kind: "BlockAffinity", Result: toBeWritten}
		im.items = append(im.items, it)
		host, cidr, err := affinityKey(a.Key)
		if err != nil {
			im.refuse(it, "%v", err)
			continue
		}
		im.block(it, blockSpec{CIDR: cidr.String(), Node: host, State: a.Value.State})
	}
	for _, rest := range []struct {
		there bool
		key   string
		kind  string
		name  string
	}{{len(m.Handles) > 0, "handles", "IPAMHandle", fmt.Sprintf("(%d of them)", len(m.Handles))}, {len(m.Config) > 0 && string(m.Config) != "null", "config", "IPAMConfig", "default"}} {
		if rest.there {
			im.items = append(im.items, &importedItem{Line: item.Line(rest.key), Kind: rest.kind, Name: rest.name, Result: noEffect, Why: foreignKinds[rest.kind].why})
		}
	}
}

// affinityKey reads "/calico/ipam/v2/host/NODE/ipv4/block/10-244-1-0-26".
func affinityKey(key string) (host string, cidr netip.Prefix, err error) {
	wrong := fmt.Errorf("key %.120q is no block affinity's", key)
	words := strings.Split(key, "/")
	if len(words) < 5 || words[len(words)-2] != "block" {
		return "", cidr, wrong
	}
	host, family, name := words[len(words)-4], words[len(words)-3], words[len(words)-1]
	separator := "."
	if family == "ipv6" {
		separator = ":"
	}
	cut := strings.LastIndexByte(name, '-')
	if cut < 0 {
		return "", cidr, wrong
	}
	if cidr, err = netip.ParsePrefix(strings.ReplaceAll(name[:cut], "-", separator) + "/" + name[cut+1:]); err != nil {
		return "", cidr, wrong
	}
	return host, cidr, nil
}

// takeBlock reads a resource IPAMBlock or BlockAffinity.
func (im *importer) takeBlock(it *importedItem, spec object) {
	var b blockSpec
	text, err := json.Marshal(spec)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		im.refuse(it, "spec: %v", err)
		return
	}
	im.block(it, b)
}

// block notes whose a block is. IPAMBlock and BlockAffinity say it both; they are one claim here.
func (im *importer) block(it *importedItem, b blockSpec) {
	cidr, err := netip.ParsePrefix(b.CIDR)
	it.Name = b.CIDR
	if err != nil || cidr != cidr.Masked() || cidr.Addr().BitLen()-cidr.Bits() > node.MaxBlockBits {
		im.refuse(it, "%.60q is no block", b.CIDR)
		return
	}
	if deleted := fmt.Sprint(b.Deleted); deleted == "true" {
		it.Result, it.Why = noEffect, "it is being deleted"
		return
	}
	if b.State != "" && b.State != "confirmed" {
		it.Result, it.Why = noEffect, "Calico had not finished with it: "+b.State
		return
	}
	host := b.Node
	if b.Affinity != nil {
		kind, name, _ := strings.Cut(*b.Affinity, ":")
		if host = name; kind != "host" {
			it.Result, it.Why = noEffect, "it is for no host: "+*b.Affinity
			return
		}
	}
	known := im.blocks[cidr]
	if known == nil {
		known = &calicoBlock{item: it, node: host, usedBy: make(map[string][]string)}
		im.blocks[cidr] = known
	} else {
		if known.node != "" && host != "" && known.node != host {
			im.refuse(it, "it is of node %s here and of node %s in line %d", host, known.node, known.item.Line)
			return
		}
		known.node = max(known.node, host)
		it.Result, it.Why = noEffect, fmt.Sprintf("line %d says it already", known.item.Line)
		if im.live {
			it.Why = "an IPAMBlock, or another, says it already"
		}
	}
	for ordinal, index := range b.Allocations {
		if index == nil || ordinal >= (node.Block{CIDR: cidr}).Size() || *index < 0 || *index >= len(b.Attributes) {
			continue
		}
		a := b.Attributes[*index]
		at := a.Secondary["node"]
		if at == "" {
			continue
		}
		who := a.Secondary["pod"]
		if ns := a.Secondary["namespace"]; ns != "" {
			who = ns + "/" + who
		}
		if who == "" {
			who = a.Handle
		}
		address := (node.Block{CIDR: cidr}).At(ordinal).String()
		known.usedBy[at] = append(known.usedBy[at], strings.TrimSpace(who+" "+address))
	}
}

// claims makes claims of the blocks, once all pools are known.
func (im *importer) claims(pools map[string]api.IPPool) {
	for cidr, b := range im.blocks {
		b.item.Kind = "IPAMBlock"
		pool, ok := poolOf(pools, cidr)
		switch {
		case b.node == "" && len(b.usedBy) == 0:
			b.item.Result, b.item.Why = noEffect, "it is no host's, and nobody has an address of it"
			continue
		case b.node == "":
			im.refuse(b.item, "it is no host's, but pods have addresses of it: %s; recreate them, then export again", users(b.usedBy))
			continue
		case !ok:
			im.refuse(b.item, "no pool has it, neither in the file nor in the store")
			continue
		}
		b.item.claim = &agent.Block{CIDR: cidr, Pool: pool.CIDR, Node: b.node}
		delete(b.usedBy, b.node)
		if len(b.usedBy) > 0 {
			b.item.Fields = append(b.item.Fields, importedField{b.item.Line, "allocations", im.lost(),
				"pods of other nodes have addresses of node " + b.node + "'s block: " + users(b.usedBy) + "; recreate them, then export again, or the node will give these addresses to others"})
		}
	}
}

func users(by map[string][]string) string {
	var all []string
	for host, list := range by {
		for _, who := range list {
			all = append(all, who+" on "+host)
		}
	}
	slices.Sort(all)
	if len(all) > 5 {
		all = append(all[:5], "and "+strconv.Itoa(len(all)-5)+" more")
	}
	return strings.Join(all, ", ")
}

func poolOf(pools map[string]api.IPPool, cidr netip.Prefix) (api.IPPool, bool) {
	for _, p := range pools {
		if p.CIDR.Bits() <= cidr.Bits() && p.CIDR.Contains(cidr.Addr()) {
			return p, true
		}
	}
	return api.IPPool{}, false
}
