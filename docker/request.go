package docker

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	nethelper "github.com/docker/go-plugins-helpers/network"

	"github.com/caracal-net/caracal/node"
)

// NetworkOption is the driver option that makes networks one which Docker knows as several: those of one name, on whichever
// hosts they were made.
const NetworkOption = "com.caracal.network"

const (
	shownID   = 12 // characters of an id that Docker shows its users
	ifNameID  = 11 // characters of an endpoint's id in its interface's name
	keyIfName = "cali0"
	prefix    = "cali" // of the interfaces in a container, which Docker numbers
)

// checkID tells whether an id is Docker's: lower case letters and digits.
func checkID(what, id string) error {
	ok := len(id) >= shownID && len(id) <= 64
	for _, r := range id {
		ok = ok && (r >= '0' && r <= '9' || r >= 'a' && r <= 'z')
	}
	if !ok {
		return fmt.Errorf("%s %.80q is none of Docker's", what, id)
	}
	return nil
}

// endpointKey names an endpoint in node.db.
func endpointKey(networkID, endpointID string) (node.Key, error) {
	if err := errors.Join(checkID("network id", networkID), checkID("endpoint id", endpointID)); err != nil {
		return node.Key{}, err
	}
	return node.Key{Network: keyNetwork + networkID[:shownID], ContainerID: endpointID, IfName: keyIfName}, nil
}

// keyNetwork begins the networks of all keys of Docker's in node.db. CNI networks may have such names too: see ours.
const keyNetwork = "docker-"

// requested names who holds an address that Docker has requested and not yet used.
func requested(a netip.Addr) node.Key {
	return node.Key{Network: keyNetwork + "requested", ContainerID: a.String(), IfName: keyIfName}
}

// ours tells whether a holder of addresses is Docker. Its keys have the form of CNI's, which they are removed by too, so the whole key
// decides: a CNI network's name alone may begin as theirs do.
func ours(k node.Key) bool {
	network, ok := strings.CutPrefix(k.Network, keyNetwork)
	if a, err := netip.ParseAddr(k.ContainerID); err == nil && k == requested(a) || k == assigning {
		return true
	}
	return ok && k.IfName == keyIfName && len(network) == shownID && checkID("", network) == nil && checkID("", k.ContainerID) == nil
}

// hostIfName is the name of an endpoint's interface on the host, as Calico derives it.
func hostIfName(endpointID string) string { return "cali" + endpointID[:ifNameID] }

// sharedName is the name that a network shares with others, "" when it is alone. Any other option of --opt, and what Docker
// itself asks for that is not done here, is an error that names it.
func sharedName(options map[string]any) (string, error) {
	if internal, _ := options["com.docker.network.internal"].(bool); internal {
		return "", fmt.Errorf("--internal: %w; what containers may send is policy's to say (docs/policy.md)", errUnsupported)
	}
	generic, given := options["com.docker.network.generic"]
	opts, ok := generic.(map[string]any)
	if given && generic != nil && !ok {
		return "", errors.New("com.docker.network.generic is no map of options")
	}
	unknown := slices.DeleteFunc(slices.Sorted(maps.Keys(opts)), func(key string) bool { return key == NetworkOption })
	if len(unknown) > 0 {
		return "", fmt.Errorf("driver options %s: %w; the only one is %s=NAME, which makes networks of several hosts one", strings.Join(quoted(unknown), ", "), errUnsupported, NetworkOption)
	}
	value, given := opts[NetworkOption]
	if !given {
		return "", nil
	}
	name, ok := value.(string)
	if !ok || !validShared(name) {
		return "", fmt.Errorf("driver option %s=%.80q: a name has 1 to 63 letters, digits, '_', '.' and '-', and begins with a letter or digit", NetworkOption, fmt.Sprint(value))
	}
	return name, nil
}

func validShared(name string) bool {
	for i, r := range name {
		alphanumeric := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if !alphanumeric && (i == 0 || !strings.ContainsRune("_.-", r)) {
			return false
		}
	}
	return name != "" && len(name) < 64
}

func quoted(all []string) []string {
	var q []string
	for _, s := range all {
		q = append(q, fmt.Sprintf("%.80q", s))
	}
	return q
}

// checkData makes sure that a network's addresses are ours to give.
func checkData(name string, data []*nethelper.IPAMData) error {
	for _, p := range data {
		if p == nil {
			continue
		}
		if !isSpace(p.AddressSpace) {
			return fmt.Errorf("address space %.80q: it is another IPAM driver's; create the network with --ipam-driver %s-ipam", p.AddressSpace, name)
		}
		if len(p.AuxAddresses) > 0 {
			return fmt.Errorf("--aux-address: %w; reserve addresses in the pool (caracalctl get ippools)", errUnsupported)
		}
		if gw := p.Gateway; gw != "" && gw != noGateway4 && gw != noGateway6 {
			return fmt.Errorf("--gateway %.80q: %w; every container's gateway is %s", gw, errUnsupported, "169.254.1.1")
		}
	}
	return nil
}

// wanted is what CreateEndpoint asks for.
type wanted struct {
	addrs []netip.Addr
	mac   net.HardwareAddr // nil: none
}

// readEndpoint reads the interface of a CreateEndpoint.
func readEndpoint(i *nethelper.EndpointInterface, options map[string]any) (wanted, error) {
	var w wanted
	if i == nil {
		return w, errors.New("the endpoint has no address; its network needs our IPAM driver (--ipam-driver)")
	}
	for _, s := range []string{i.Address, i.AddressIPv6} {
		if s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return w, fmt.Errorf("address %.80q: it is none", s)
		}
		w.addrs = append(w.addrs, p.Addr().Unmap())
	}
	if len(w.addrs) == 0 {
		return w, errors.New("the endpoint has no address; its network needs our IPAM driver (--ipam-driver)")
	}
	if i.MacAddress != "" {
		mac, err := net.ParseMAC(i.MacAddress)
		if err != nil || len(mac) != 6 || mac[0]&1 == 1 || slices.Equal(mac, make(net.HardwareAddr, 6)) {
			return w, fmt.Errorf("--mac-address %.80q: it is no unicast Ethernet address", i.MacAddress)
		}
		w.mac = mac
	}
	if ports, _ := options["com.docker.network.portmap"].([]any); len(ports) > 0 {
		return w, fmt.Errorf("published ports (-p): %w on this network; the container's own address can be reached from other hosts, as far as policy allows it", errUnsupported)
	}
	return w, nil
}
