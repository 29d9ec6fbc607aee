package ipam

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caracal-net/caracal/api"
	"github.com/caracal-net/caracal/node"
)

// TestMain also is the other process of the tests that kill one, or run many.
func TestMain(m *testing.M) {
	if job := strings.Fields(os.Getenv("CARACAL_TEST_PODS")); len(job) == 5 {
		if err := churn(job[0], job[1], job[2], job[3], job[4]); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// churnConfig is small enough that addresses come back soon.
var churnConfig = Config{
	Pools:        []api.IPPool{pool("10.1.0.0/23", 28), pool("2001:db8::/119", 124)},
	Reservations: []netip.Prefix{netip.MustParsePrefix("10.1.0.1/32")},
}

// churn attaches and detaches the pods of one prefix at random, and reboots now and then if it may. It says what it
// begins and what is done:
//
//	begin alone17
//	up alone17 10.1.0.4,2001:db8::4
//	begin boot 4711-5
//	begin alone17
//	down alone17
func churn(dir, boot, prefix, seed, ops string) error {
	o := node.Options{BootIDFile: boot}
	s, err := strconv.ParseUint(seed, 10, 64)
	n, nerr := strconv.Atoi(ops)
	if err := errors.Join(err, nerr); err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(s, s))
	alone := prefix == "alone"
	for i := range n {
		if alone && random.IntN(40) == 0 {
			id := fmt.Sprintf("%d-%d", s, i)
			fmt.Println("begin boot", id)
			if err := os.WriteFile(boot+".new", []byte(id), 0o600); err != nil {
				return err
			}
			if err := os.Rename(boot+".new", boot); err != nil {
				return err
			}
		}
		name := fmt.Sprint(prefix, random.IntN(24))
		fmt.Println("begin", name)
		if err := flip(dir, o, node.Key{Network: "net", ContainerID: name, IfName: "eth0"}); err != nil {
			return err
		}
	}
	return nil
}

// flip attaches a pod that is not there, and detaches one that is.
func flip(dir string, o node.Options, k node.Key) error {
	db, err := node.Open(context.Background(), dir, o)
	if err != nil {
		return err
	}
	defer db.Close()
	said := ""
	err = db.Update(func(tx *node.Tx) error {
		if _, err := tx.Endpoint(k); err == nil {
			said = "down " + k.ContainerID
			return forget(tx, k)
		} else if !errors.Is(err, node.ErrNotFound) {
			return err
		}
		addrs, err := record(tx, churnConfig, Request{Key: k, V4: true, V6: true})
		said = "up " + k.ContainerID + " " + joined(addrs)
		return err
	})
	if err == nil {
		fmt.Println(said)
	}
	return err
}

func joined(addrs []netip.Addr) string {
	var s []string
	for _, a := range addrs {
		s = append(s, a.String())
	}
	return strings.Join(s, ",")
}

// believed is what the lines of killed processes promise.
type believed struct {
	pods    map[string]string // container -> addresses
	pending string            // the one that was begun and not done: either is right
	boot    string            // likewise, a reboot
	done    int               // operations that were
}

// hear reads what a process says until its end.
func (b *believed) hear(r io.Reader, first func()) error {
	b.pending, b.boot = "", ""
	heard := false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if !heard {
			heard = true
			first()
		}
		f := strings.Fields(lines.Text())
		switch {
		case len(f) == 3 && f[0] == "begin" && f[1] == "boot":
			b.boot = f[2]
		case len(f) == 2 && f[0] == "begin":
			b.settle(b.boot)
			b.pending = f[1]
		case len(f) == 3 && f[0] == "up":
			b.pods[f[1]] = f[2]
			b.pending = ""
			b.done++
		case len(f) == 2 && f[0] == "down":
			delete(b.pods, f[1])
			b.pending = ""
			b.done++
		default:
			return fmt.Errorf("it said %q", lines.Text())
		}
	}
	return lines.Err()
}

// settle ends a pending reboot, knowing which boot it is: if it is the new one, whoever opens the database next releases
// everything.
func (b *believed) settle(boot string) {
	if b.boot != "" && b.boot == boot {
		clear(b.pods)
	}
	b.boot = ""
}

func pods(dir, boot, prefix string, seed uint64, ops int) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("CARACAL_TEST_PODS=%s %s %s %d %d", dir, boot, prefix, seed, ops))
	return cmd
}

// Kills a process at random moments, also while it makes the database. Afterwards nothing is leaked or given twice, and
// all that it said was done is there.
func TestKill(t *testing.T) {
	const kills, databases = 240, 24
	done := 0
	for d := range databases {
		dir, o := memory(t), bootFile(t, "first")
		if d%3 == 0 {
			dir = t.TempDir() // a disk takes its time, so the kill falls into its waiting
		}
		b := believed{pods: make(map[string]string)}
		for k := range kills / databases {
			random := rand.New(rand.NewPCG(uint64(d), uint64(k)))
			cmd := pods(dir, o.BootIDFile, "alone", random.Uint64N(1<<32), 1<<30)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			// The first line comes before the first opening.
			err = b.hear(out, func() {
				time.AfterFunc(time.Duration(random.Int64N(int64(8*time.Millisecond))), func() { cmd.Process.Signal(syscall.SIGKILL) })
			})
			cmd.Wait()
			if err != nil {
				t.Fatal(err)
			}
			id, err := os.ReadFile(o.BootIDFile)
			if err != nil {
				t.Fatal(err)
			}
			b.settle(string(id))
			b.compare(t, dir, o)
			if t.Failed() {
				t.Fatalf("database %d, kill %d", d, k)
			}
		}
		done += b.done
	}
	if t.Logf("%d kills, %d operations", kills, done); done < kills {
		t.Error("the processes did not come to anything before they were killed")
	}
}

// compare checks a database against what is believed, and believes it of what was pending.
func (b *believed) compare(t *testing.T, dir string, o node.Options) {
	t.Helper()
	db, err := node.Open(context.Background(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	checkClean(t, dir, o)
	look(t, dir, o, func(tx *node.Tx) error {
		found := make(map[string]string)
		err := tx.Endpoints(func(e node.Endpoint) error {
			found[e.ContainerID] = joined(e.Addrs)
			return nil
		})
		for name := range either(b.pods, found) {
			if name != b.pending && b.pods[name] != found[name] {
				t.Errorf("%s: has %q, said to have %q", name, found[name], b.pods[name])
			}
		}
		b.pods = found
		return err
	})
}

// either is the union of keys.
func either(all ...map[string]string) map[string]bool {
	keys := make(map[string]bool)
	for _, m := range all {
		for k := range m {
			keys[k] = true
		}
	}
	return keys
}

// Many processes at once: what each was told is there in the end, and no address is there twice.
func TestManyProcesses(t *testing.T) {
	const processes, ops = 16, 50
	dir, o := t.TempDir(), bootFile(t, "first")
	all := make([]believed, processes)
	done := make(chan error, processes)
	for i := range processes {
		all[i].pods = make(map[string]string)
		cmd := pods(dir, o.BootIDFile, fmt.Sprintf("p%d-", i), uint64(i), ops)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go func() { done <- errors.Join(all[i].hear(out, func() {}), cmd.Wait()) }()
	}
	for range processes {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	together := believed{pods: make(map[string]string)}
	holder := make(map[string]string)
	for _, b := range all {
		for name, addrs := range b.pods {
			together.pods[name] = addrs
			for a := range strings.SplitSeq(addrs, ",") {
				if other, ok := holder[a]; ok {
					t.Errorf("%s and %s both have %s", name, other, a)
				}
				holder[a] = name
			}
		}
	}
	together.compare(t, dir, o)
	if len(together.pods) == 0 {
		t.Error("no pod is left to look at")
	}
}
