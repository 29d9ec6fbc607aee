package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/agent"
	"github.com/caracal-net/caracal/api/manifest"
	"github.com/caracal-net/caracal/maps"
	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/tools/lab"
)

func appPolicy(i, port int) string {
	return fmt.Sprintf(`---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: policy%d}
spec: {podSelector: {matchLabels: {app: app%d}}, ingress: [{from: [{podSelector: {matchLabels: {app: app%d}}}], ports: [{port: %d}]}]}
`, i, i%50, (i+1)%50, port)
}

// BenchmarkPolicyChange is how long it takes until a change of one policy of 1,000 is in force on a node with 250 pods: since it
// was sent to etcd, and since etcd said that it is committed. The commit itself is between the two.
func BenchmarkPolicyChange(b *testing.B) {
	const pods, policies = 250, 1000
	l := newCluster(b, 1)
	h := l.Host(1)
	for i := range pods {
		h.TestPod(b, fmt.Sprint("pod", i), lab.PodOptions{Labels: map[string]string{"app": fmt.Sprint("app", i%50)}})
	}
	var all strings.Builder
	for i := range policies {
		all.WriteString(appPolicy(i, 80))
	}
	ctl(b, h, all.String(), "apply", "-f", "-")
	is(b, h, "has all in force", func(s agent.Status) bool {
		return s.Policy.Policies == policies && s.Policy.Pods == pods && s.Policy.Resources == pods+policies
	})
	changer := exec.CommandContext(b.Context(), os.Args[0])
	changer.Env = append(os.Environ(), changerVariable+"="+l.EtcdEndpoints()+" "+h.BPFDir())
	changer.Stderr = os.Stderr
	ask, err := changer.StdinPipe()
	must(b, err)
	answer, err := changer.StdoutPipe()
	must(b, err)
	must(b, h.Namespace().Start(changer))
	answers := bufio.NewScanner(answer)
	var sinceSent, sinceCommitted []time.Duration
	for b.Loop() {
		fmt.Fprintln(ask, appPolicy(500, 8000+len(sinceSent)%1000))
		fmt.Fprintln(ask, "...")
		if !answers.Scan() {
			b.Fatal("the changer ended: ", changer.Wait())
		}
		var sent, committed time.Duration
		_, err := fmt.Sscan(answers.Text(), (*int64)(&sent), (*int64)(&committed))
		must(b, err)
		sinceSent, sinceCommitted = append(sinceSent, sent), append(sinceCommitted, committed)
		time.Sleep(200 * time.Millisecond) // one at a time: the one before is settled
	}
	ask.Close()
	must(b, changer.Wait())
	for name, took := range map[string][]time.Duration{"sent": sinceSent, "committed": sinceCommitted} {
		slices.Sort(took)
		b.ReportMetric(took[len(took)/2].Seconds()*1e3, "p50-ms-since-"+name)
		b.ReportMetric(took[len(took)*9/10].Seconds()*1e3, "p90-ms-since-"+name)
	}
}

// changerVariable makes the test binary a process that changes policy: the store's endpoints, and the host's directory in bpffs.
const changerVariable = "CARACAL_TEST_CHANGER"

// runChanger puts each resource that it reads, up to a line of dots, into the store, and writes how long it took until the
// epoch was raised, ns, since it was sent and since it was committed. It is a process of its own because the store's client must be in the host's network namespace.
func runChanger(config string, in io.Reader, out io.Writer) error {
	endpoints, bpffs, _ := strings.Cut(config, " ")
	s, err := etcd.Open(etcd.Config{Endpoints: strings.Split(endpoints, ",")})
	if err != nil {
		return err
	}
	defer s.Close()
	m, err := maps.Open(bpffs)
	if err != nil {
		return err
	}
	defer m.Close()
	var text strings.Builder
	for lines := bufio.NewScanner(in); lines.Scan(); {
		if lines.Text() != "..." {
			fmt.Fprintln(&text, lines.Text())
			continue
		}
		sent, committed, err := change(s, m, text.String())
		if err != nil {
			return err
		}
		fmt.Fprintln(out, int64(sent), int64(committed))
		text.Reset()
	}
	return nil
}

func change(s store.Store, m *maps.Maps, text string) (sinceSent, sinceCommitted time.Duration, err error) {
	all, err := manifest.Parse([]byte(text))
	if err != nil {
		return 0, 0, err
	}
	value, err := all[0].MarshalJSON()
	if err != nil {
		return 0, 0, err
	}
	before, err := m.State()
	if err != nil {
		return 0, 0, err
	}
	sent := time.Now()
	if _, err := s.Update(context.Background(), all[0].Key(), value, store.Revision(0)); err != nil {
		return 0, 0, err
	}
	committed := time.Now()
	for time.Since(committed) < time.Minute {
		if now, err := m.State(); err != nil || now.Epoch != before.Epoch {
			return time.Since(sent), time.Since(committed), err
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 100_000}, nil)
	}
	return 0, 0, errors.New("it did not come into force in a minute")
}
