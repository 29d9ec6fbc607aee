package ctl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/caracal-net/caracal/cni"
	"github.com/caracal-net/caracal/store/config"
)

// containerName is the name of the agent's container.
const containerName = "caracal-node"

// imageArguments are the arguments of docker that run the agent: with the least that it works with. CAP_SYS_ADMIN stands for CAP_BPF
// and CAP_PERFMON, which Docker 20.10 does not know. The host's /run is what namespaces, Docker and the plugin are asked in.
func (o *nodeRunOptions) imageArguments(agent []string) []string {
	argv := []string{
		"run", "--detach", "--name=" + containerName, "--restart=always", "--net=host", "--pid=host",
		"--cap-drop=ALL", "--cap-add=NET_ADMIN", "--cap-add=NET_BIND_SERVICE", "--cap-add=SYS_ADMIN", "--security-opt=systempaths=unconfined",
		"--volume=/run:/run:rslave", "--volume=/etc/caracal:/etc/caracal:ro",
	}
	for _, dir := range []string{filepath.Dir(o.bpffsDir), o.stateDir} {
		argv = append(argv, "--volume="+dir+":"+dir)
	}
	if dir := filepath.Dir(o.socket); !strings.HasPrefix(dir, "/run/") {
		argv = append(argv, "--volume="+dir+":"+dir)
	}
	for _, file := range []string{o.configFile(), o.bootIDFile} {
		if file != "" && filepath.Dir(file) != "/etc/caracal" {
			argv = append(argv, "--volume="+file+":"+file+":ro")
		}
	}
	for _, name := range agentVariables() {
		argv = append(argv, "--env="+name) // docker takes the value from its own environment: passwords show nowhere
	}
	return append(append(argv, o.image, "caracald"), agent...)
}

// configFile is the file that says where the store is, "" if there is none.
func (o *nodeRunOptions) configFile() string {
	if o.config != "" {
		return o.config
	}
	if _, err := os.Stat(DefaultConfigFile); err == nil {
		return DefaultConfigFile
	}
	if _, err := os.Stat(config.CalicoFile); err == nil {
		return config.CalicoFile
	}
	return ""
}

// agentNames are the variables that caracald reads beside etcd's.
var agentNames = []string{
	"DATASTORE_TYPE", "NODENAME", "IP", "IP6", config.Variable, "CARACAL_NODENAME", "CARACAL_LABELS", "CARACAL_MASQUERADE_PORTS", "CARACAL_CONFIG",
	"CARACAL_STATE_DIR", "CARACAL_BPFFS_DIR", "CARACAL_BOOT_ID_FILE", "CARACAL_SOCKET", "CARACAL_DOCKER", "CARACAL_DOCKER_SCOPE", "CARACAL_DOCKER_ENGINE",
	"CARACAL_LOG_FILE", "CARACAL_LOG_LEVEL", cni.FormatVariable, "CARACAL_IPAM", "USE_POD_CIDR", "CARACAL_NETWORK",
}

// agentVariables are the names of the variables that are set here and that caracald reads.
func agentVariables() []string {
	var names []string
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		plain := strings.TrimPrefix(name, "CALICO_")
		if value != "" && (strings.HasPrefix(plain, "ETCD_") || slices.Contains(agentNames, plain)) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// runImage runs the agent as a container.
func (o *nodeRunOptions) runImage(cmd *cobra.Command, agent []string) error {
	argv := o.imageArguments(agent)
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "Running command to start the node:\n\n%s %s\n\n", o.docker, strings.Join(argv, " "))
	if o.dryRun {
		return nil
	}
	if _, err := agentStatus(cmd.Context(), o.socket); err == nil {
		return fmt.Errorf("%s: an agent answers there already; look at it (caracalctl node status)", o.socket)
	}
	var started, refused bytes.Buffer
	run := exec.CommandContext(cmd.Context(), o.docker, argv...)
	run.Stdout, run.Stderr = &started, &refused
	if err := run.Run(); err != nil {
		return fmt.Errorf("%s run: %w: %s; a container that is left of an earlier try: docker rm -f %s", o.docker, err, strings.TrimSpace(refused.String()), containerName)
	}
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	logs := exec.CommandContext(ctx, o.docker, "logs", "--follow", containerName)
	logs.Stdout, logs.Stderr, logs.WaitDelay = out, out, time.Second
	if err := logs.Start(); err != nil {
		return fmt.Errorf("%s logs: %w", o.docker, err)
	}
	defer func() {
		cancel()
		_ = logs.Wait() // it was ended, so it says nothing new
	}()
	return o.await(ctx, out, func() {}, o.containerEnded(ctx))
}

// containerEnded tells when the agent in the container has ended, though it is started again then.
func (o *nodeRunOptions) containerEnded(ctx context.Context) <-chan error {
	ended := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			state, err := exec.CommandContext(ctx, o.docker, "inspect", "--format", "{{.RestartCount}} {{.State.Status}}", containerName).Output()
			if err == nil && strings.TrimSpace(string(state)) != "0 running" && !strings.HasPrefix(string(state), "0 created") {
				ended <- errors.New("the container is restarted")
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return ended
}

// follow copies what is appended to a file.
func follow(file io.Reader, out io.Writer) func() {
	return func() { _, _ = io.Copy(out, file) } // it is a courtesy: whether the node is ready is asked elsewhere
}
