// Command ipamdelegate is an IPAM plugin for tests: it writes down what it is called with, and answers GC and STATUS, which
// the plugins that Debian packages do not.
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// conf is what it reads of the network configuration.
type conf struct {
	CNIVersion string `json:"cniVersion"`
	IPAM       struct {
		Address string `json:"address"` // that ADD answers with
		Record  string `json:"record"`  // file that every call is appended to
		Refuse  string `json:"refuse"`  // command that fails with code 50
	} `json:"ipam"`
}

// call is one line of the record.
type call struct {
	Command, ContainerID, Netns, IfName string
	Traceparent, Tracestate, Baggage    string
	Config                              json.RawMessage
}

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: note, Check: note, GC: note, Status: note}, version.All, "ipamdelegate")
}

func note(args *skel.CmdArgs) error {
	_, err := noted(args)
	return err
}

func add(args *skel.CmdArgs) error {
	c, err := noted(args)
	if err != nil {
		return err
	}
	ip, network, err := net.ParseCIDR(c.IPAM.Address)
	if err != nil {
		return err
	}
	network.IP = ip
	return types.PrintResult(&types100.Result{IPs: []*types100.IPConfig{{Address: *network}}}, c.CNIVersion)
}

func noted(args *skel.CmdArgs) (*conf, error) {
	c := &conf{}
	if err := json.Unmarshal(args.StdinData, c); err != nil {
		return nil, err
	}
	command := os.Getenv("CNI_COMMAND")
	line, err := json.Marshal(call{
		command, args.ContainerID, args.Netns, args.IfName, os.Getenv("TRACEPARENT"), os.Getenv("TRACESTATE"), os.Getenv("BAGGAGE"), args.StdinData,
	})
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(c.IPAM.Record, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := fmt.Fprintf(f, "%s\n", line); err != nil {
		return nil, err
	}
	if c.IPAM.Refuse == command {
		return nil, types.NewError(50, "refused "+command, "")
	}
	return c, nil
}
