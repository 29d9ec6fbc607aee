// Package cri drives a container runtime as a kubelet does: over the Container Runtime Interface (k8s.io/cri-api).
package cri

import (
	"context"
	"fmt"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client talks to one runtime. Its methods may be called concurrently.
type Client struct {
	v1.RuntimeServiceClient
	conn *grpc.ClientConn
}

// Dial makes a client of the runtime that listens on a unix socket. A runtime that is not there, or is started again, is
// noticed by the calls; they fail until it is there.
func Dial(socket string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", socket, err)
	}
	return &Client{v1.NewRuntimeServiceClient(conn), conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Pod is the configuration of a pod of its own network namespace, as a kubelet makes it.
func Pod(namespace, name, uid string) *v1.PodSandboxConfig {
	return &v1.PodSandboxConfig{
		Metadata:     &v1.PodSandboxMetadata{Name: name, Namespace: namespace, Uid: uid},
		Hostname:     name,
		LogDirectory: filepath.Join("/var/log/pods", namespace+"_"+name+"_"+uid),
		Labels: map[string]string{
			"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.uid": uid,
		},
		Annotations: map[string]string{},
		Linux:       &v1.LinuxPodSandboxConfig{},
	}
}

// Run starts a pod and returns its id.
func (c *Client) Run(ctx context.Context, pod *v1.PodSandboxConfig) (string, error) {
	r, err := c.RunPodSandbox(ctx, &v1.RunPodSandboxRequest{Config: pod})
	if err != nil {
		return "", err
	}
	return r.PodSandboxId, nil
}

// Addresses are those that the runtime knows of a pod.
func (c *Client) Addresses(ctx context.Context, id string) ([]string, error) {
	r, err := c.PodSandboxStatus(ctx, &v1.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return nil, err
	}
	addrs := []string{r.Status.GetNetwork().GetIp()}
	for _, more := range r.Status.GetNetwork().GetAdditionalIps() {
		addrs = append(addrs, more.Ip)
	}
	return addrs, nil
}

// Start starts a container in a pod and returns its id.
func (c *Client) Start(ctx context.Context, id string, pod *v1.PodSandboxConfig, container *v1.ContainerConfig) (string, error) {
	r, err := c.CreateContainer(ctx, &v1.CreateContainerRequest{PodSandboxId: id, SandboxConfig: pod, Config: container})
	if err != nil {
		return "", err
	}
	_, err = c.StartContainer(ctx, &v1.StartContainerRequest{ContainerId: r.ContainerId})
	return r.ContainerId, err
}

// Exec runs a program in a container and returns what it wrote to stdout. The error of one that fails carries its stderr.
func (c *Client) Exec(ctx context.Context, container string, arg ...string) (string, error) {
	r, err := c.ExecSync(ctx, &v1.ExecSyncRequest{ContainerId: container, Cmd: arg, Timeout: 30})
	if err == nil && r.ExitCode != 0 {
		err = &ExitError{Code: int(r.ExitCode), Stderr: string(r.Stderr)}
	}
	return string(r.GetStdout()), err
}

// ExitError is a program's that ended with another status than 0.
type ExitError struct {
	Code   int
	Stderr string
}

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d: %s", e.Code, e.Stderr) }

// Stop stops a pod and its containers: the runtime calls DEL.
func (c *Client) Stop(ctx context.Context, id string) error {
	_, err := c.StopPodSandbox(ctx, &v1.StopPodSandboxRequest{PodSandboxId: id})
	return err
}

// Remove removes a pod that is stopped.
func (c *Client) Remove(ctx context.Context, id string) error {
	_, err := c.RemovePodSandbox(ctx, &v1.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

// Pods lists the pods that the runtime knows, also stopped ones.
func (c *Client) Pods(ctx context.Context) ([]*v1.PodSandbox, error) {
	r, err := c.ListPodSandbox(ctx, &v1.ListPodSandboxRequest{})
	return r.GetItems(), err
}

// NetworkReady tells whether the runtime thinks that it can give pods a network, and if not why.
func (c *Client) NetworkReady(ctx context.Context) error {
	r, err := c.Status(ctx, &v1.StatusRequest{})
	if err != nil {
		return err
	}
	for _, condition := range r.Status.Conditions {
		if condition.Type == v1.NetworkReady && !condition.Status {
			return fmt.Errorf("%s: %s", condition.Reason, condition.Message)
		}
	}
	return nil
}
