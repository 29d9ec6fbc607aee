package docker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	helper "github.com/docker/go-plugins-helpers/network"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/node"
)

// containerMAC is the address that a container's interface has unless another is asked for, as on a Calico node.
var containerMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// onLink is libnetwork's type of a static route without a next hop.
const onLink = 1

// networkDriver attaches containers.
type networkDriver struct {
	*Drivers
	name string
}

func (n *networkDriver) GetCapabilities() (*helper.CapabilitiesResponse, error) {
	return &helper.CapabilitiesResponse{Scope: n.Scope, ConnectivityScope: n.Scope}, nil
}

// CreateNetwork makes the network's profile.
func (n *networkDriver) CreateNetwork(r *helper.CreateNetworkRequest) (err error) {
	defer n.answer("CreateNetwork", time.Now(), &err, "network", r.NetworkID)
	ctx, cancel := n.request()
	defer cancel()
	if err := checkID("network id", r.NetworkID); err != nil {
		return err
	}
	shared, err := sharedName(r.Options)
	if err == nil {
		err = checkData(n.name, r.IPv4Data)
	}
	if err == nil {
		err = checkData(n.name, r.IPv6Data)
	}
	if err != nil {
		return err
	}
	if err := n.createProfile(ctx, r.NetworkID, shared); err != nil {
		return err
	}
	n.lookSoon()
	return nil
}

// DeleteNetwork removes the network's profile. Docker has made sure that nobody is on it.
func (n *networkDriver) DeleteNetwork(r *helper.DeleteNetworkRequest) (err error) {
	defer n.answer("DeleteNetwork", time.Now(), &err, "network", r.NetworkID)
	ctx, cancel := n.request()
	defer cancel()
	if err := checkID("network id", r.NetworkID); err != nil {
		return err
	}
	return n.deleteProfile(ctx, r.NetworkID)
}

func (n *networkDriver) AllocateNetwork(*helper.AllocateNetworkRequest) (*helper.AllocateNetworkResponse, error) {
	return nil, fmt.Errorf("networks of a swarm: %w", errUnsupported)
}

func (n *networkDriver) FreeNetwork(*helper.FreeNetworkRequest) error {
	return fmt.Errorf("networks of a swarm: %w", errUnsupported)
}

// CreateEndpoint gives the endpoint the addresses that Docker has requested for it.
func (n *networkDriver) CreateEndpoint(r *helper.CreateEndpointRequest) (_ *helper.CreateEndpointResponse, err error) {
	defer n.answer("CreateEndpoint", time.Now(), &err, "network", r.NetworkID, "endpoint", r.EndpointID)
	ctx, cancel := n.request()
	defer cancel()
	key, err := endpointKey(r.NetworkID, r.EndpointID)
	if err != nil {
		return nil, err
	}
	want, err := readEndpoint(r.Interface, r.Options)
	if err != nil {
		return nil, err
	}
	if err := n.checkProfile(ctx, r.NetworkID); err != nil {
		return nil, err
	}
	err = n.attacher.Update(ctx, func(tx *node.Tx) error {
		for _, a := range want.addrs {
			owner, err := tx.Owner(a)
			if errors.Is(err, node.ErrNotFound) {
				return fmt.Errorf("address %s was not requested from this node; create the network with --ipam-driver %s-ipam", a, n.name)
			}
			if err != nil {
				return err
			}
			if owner != key && owner != requested(a) {
				return fmt.Errorf("%s: %w by %s", a, ipam.ErrTaken, owner)
			}
			if err := tx.Transfer(a, key); err != nil {
				return err
			}
		}
		return tx.PutSetting(macSetting+r.EndpointID, want.mac.String())
	})
	if err != nil {
		return nil, err
	}
	if err := n.step("docker-created"); err != nil {
		return nil, err
	}
	answer := &helper.EndpointInterface{} // it may only say what was not said
	if want.mac == nil {
		answer.MacAddress = containerMAC.String()
	}
	return &helper.CreateEndpointResponse{Interface: answer}, nil
}

// macSetting is before an endpoint's id: the MAC address that its container is to have.
const macSetting = "docker/mac/"

func forgetMAC(tx *node.Tx, endpointID string) error { return tx.PutSetting(macSetting+endpointID, "") }

// DeleteEndpoint removes what Leave has not. The addresses stay Docker's until it releases them.
func (n *networkDriver) DeleteEndpoint(r *helper.DeleteEndpointRequest) (err error) {
	defer n.answer("DeleteEndpoint", time.Now(), &err, "network", r.NetworkID, "endpoint", r.EndpointID)
	ctx, cancel := n.request()
	defer cancel()
	key, err := endpointKey(r.NetworkID, r.EndpointID)
	if err != nil {
		return err
	}
	if err := n.attacher.Detach(ctx, key); err != nil {
		return err
	}
	return n.attacher.Update(ctx, func(tx *node.Tx) error { return forgetMAC(tx, r.EndpointID) })
}

func (n *networkDriver) EndpointInfo(r *helper.InfoRequest) (*helper.InfoResponse, error) {
	if err := checkID("endpoint id", r.EndpointID); err != nil {
		return nil, err
	}
	return &helper.InfoResponse{Value: map[string]string{"interface": hostIfName(r.EndpointID)}}, nil
}

// Join attaches the container; policy is in force when it answers. Docker moves the container's end into its namespace then.
func (n *networkDriver) Join(r *helper.JoinRequest) (_ *helper.JoinResponse, err error) {
	defer n.answer("Join", time.Now(), &err, "network", r.NetworkID, "endpoint", r.EndpointID, "sandbox", r.SandboxKey)
	ctx, cancel := n.request()
	defer cancel()
	key, err := endpointKey(r.NetworkID, r.EndpointID)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(r.SandboxKey) {
		return nil, fmt.Errorf("sandbox %.80q: it is no path of a network namespace", r.SandboxKey)
	}
	mac, err := n.vacant(ctx, key)
	if err != nil {
		return nil, err
	}
	e, err := n.attacher.Attach(ctx, cni.Outline{
		Key: key, HostIfName: hostIfName(r.EndpointID), PodIfName: "tmp" + r.EndpointID[:ifNameID], Netns: r.SandboxKey,
		MAC: mac, Profile: profileName(r.NetworkID), NetworkID: r.NetworkID,
	})
	if err != nil {
		return nil, err
	}
	n.working.Go(func() {
		if err := n.attacher.Complete(n.ctx, e); err != nil && n.ctx.Err() == nil {
			n.Log.Warn("docker", "endpoint", r.EndpointID, "error", err)
		}
		n.lookSoon()
	})
	return joined(e, "tmp"+r.EndpointID[:ifNameID]), nil
}

// vacant makes sure that no container has an endpoint already, and tells which MAC address its container is to have. One whose
// Join was not answered is made anew.
func (n *networkDriver) vacant(ctx context.Context, key node.Key) (net.HardwareAddr, error) {
	mac := containerMAC
	var before node.Endpoint
	err := n.attacher.View(ctx, func(tx *node.Tx) (err error) {
		before, err = tx.Endpoint(key)
		if err != nil && !errors.Is(err, node.ErrNotFound) {
			return err
		}
		s := tx.Setting(macSetting + key.ContainerID)
		if s == "" {
			return nil
		}
		mac, err = net.ParseMAC(s)
		if err != nil {
			return fmt.Errorf("setting %s%s: %w", macSetting, strconv.Quote(key.ContainerID), err)
		}
		return nil
	})
	if err != nil || before.HostIfName == "" {
		return mac, err
	}
	alive, err := n.attacher.Alive(before)
	if err == nil && alive {
		err = fmt.Errorf("endpoint %s: a container has it, in %s; it must leave first", key.ContainerID, before.Netns)
	}
	return mac, err
}

// joined says how Docker is to configure a container's end.
func joined(e node.Endpoint, ifName string) *helper.JoinResponse {
	r := &helper.JoinResponse{InterfaceName: helper.InterfaceName{SrcName: ifName, DstPrefix: prefix}}
	first := e.Docker.Gateway == cni.Gateway4
	for _, a := range e.Addrs {
		if a.Is4() {
			r.Gateway = e.Docker.Gateway.String()
			r.StaticRoutes = append(r.StaticRoutes, route(e.Docker.Gateway))
			continue
		}
		r.GatewayIPv6 = cni.Gateway6.String()
		if first { // any other interface reaches it by its link-local route
			r.StaticRoutes = append(r.StaticRoutes, route(cni.Gateway6))
		}
	}
	return r
}

func route(to netip.Addr) *helper.StaticRoute {
	return &helper.StaticRoute{Destination: netip.PrefixFrom(to, to.BitLen()).String(), RouteType: onLink}
}

// Leave takes the container off the network.
func (n *networkDriver) Leave(r *helper.LeaveRequest) (err error) {
	defer n.answer("Leave", time.Now(), &err, "network", r.NetworkID, "endpoint", r.EndpointID)
	ctx, cancel := n.request()
	defer cancel()
	key, err := endpointKey(r.NetworkID, r.EndpointID)
	if err != nil {
		return err
	}
	return n.attacher.Detach(ctx, key)
}

func (n *networkDriver) DiscoverNew(*helper.DiscoveryNotification) error    { return nil }
func (n *networkDriver) DiscoverDelete(*helper.DiscoveryNotification) error { return nil }

func (n *networkDriver) ProgramExternalConnectivity(*helper.ProgramExternalConnectivityRequest) error {
	return nil
}

func (n *networkDriver) RevokeExternalConnectivity(*helper.RevokeExternalConnectivityRequest) error {
	return nil
}
