package cni

import (
	"net"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// result is ADD's answer in the version of the question: what came before us in the chain, then the host's and the
// pod's interface.
func (a *adding) result() (any, error) {
	r := &types100.Result{CNIVersion: types100.ImplementedSpecVersion}
	if a.c.prev != nil {
		r = a.c.prev
	}
	host := &types100.Interface{Name: a.veth.hostName, Mac: hostMAC.String()}
	pod := &types100.Interface{Name: a.veth.podName, Mac: a.veth.mac.String(), Sandbox: a.env.Netns}
	if a.c.atLeast("1.1.0") {
		host.Mtu, pod.Mtu = a.veth.mtu, a.veth.mtu
	}
	r.Interfaces = append(r.Interfaces, host, pod)
	index := len(r.Interfaces) - 1
	for _, addr := range a.veth.addrs {
		ip := &types100.IPConfig{Interface: types100.Int(index), Address: *hostNet(addr), Gateway: net.IP(Gateway4.AsSlice())}
		if addr.Is6() {
			ip.Gateway = net.IP(Gateway6.AsSlice())
		}
		r.IPs = append(r.IPs, ip)
	}
	for _, dst := range a.veth.routes {
		gw := Gateway4
		if dst.Addr().Is6() {
			gw = Gateway6
		}
		r.Routes = append(r.Routes, &types.Route{Dst: *network(dst), GW: gw.AsSlice()})
	}
	if d := a.c.dns(); len(d.Nameservers)+len(d.Search)+len(d.Options) > 0 || d.Domain != "" {
		r.DNS = d
	}
	return r.GetAsVersion(a.c.CNIVersion)
}
