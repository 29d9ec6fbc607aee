package store_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/caracal-net/caracal/store"
	"github.com/caracal-net/caracal/store/etcd"
	"github.com/caracal-net/caracal/store/storetest"
)

// counter counts in one key by compare-and-swap and remembers every revision that was acknowledged.
type counter struct {
	store store.Store
	key   string

	mu    sync.Mutex
	acked []int // what was written for certain
}

// add counts one further. Nobody knows whether one that failed happened, so it is read again.
func (c *counter) add(ctx context.Context) error {
	kv, err := c.store.Get(ctx, c.key)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	n := 0
	fmt.Sscan(string(kv.Value), &n)
	if kv.Revision == 0 {
		_, err = c.store.Create(ctx, c.key, fmt.Append(nil, n+1))
	} else {
		_, err = c.store.Update(ctx, c.key, fmt.Append(nil, n+1), kv.Revision)
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.acked = append(c.acked, n+1)
	return nil
}

// sequence follows a counter's key and fails at whatever is not the next number.
type sequence struct {
	watch store.Watch
	last  int
	at    store.Revision
}

func (s *sequence) follow(t *testing.T, until int) {
	t.Helper()
	ctx := storetest.Context(t)
	for s.last < until {
		e, err := s.watch.Next(ctx)
		if errors.Is(err, store.ErrUnavailable) {
			continue // it goes on
		}
		if err != nil {
			t.Fatalf("after %d of %d: %v", s.last, until, err)
		}
		if string(e.Value) != fmt.Sprint(s.last+1) || e.Revision <= s.at {
			t.Fatalf("told %q at %d after %d at %d", e.Value, e.Revision, s.last, s.at)
		}
		s.last, s.at = s.last+1, e.Revision
	}
}

// Members are killed one after the other, each time the one that serves our watch among them, while changes go on: the
// watch tells each change once, in order, and what was acknowledged is there.
func TestMembersKilledDuringWatch(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	writer := &counter{store: open(t, etcd.Config{Endpoints: c.endpoints()}), key: "/n"}
	var watches []*sequence
	for _, m := range c.members { // each begins at another member
		endpoints := []string{m.client}
		for _, other := range c.members {
			if other != m {
				endpoints = append(endpoints, other.client)
			}
		}
		w, err := open(t, etcd.Config{Endpoints: endpoints}).Watch(storetest.Context(t), "/n", 0)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		watches = append(watches, &sequence{watch: w})
	}
	ctx, stop := context.WithCancel(storetest.Context(t))
	done := make(chan struct{})
	failed := 0
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := writer.add(ctx); err != nil && ctx.Err() == nil {
				failed++
				if !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, store.ErrConflict) {
					t.Errorf("count: %v", err)
					return
				}
			}
		}
	}()
	count := func() int {
		writer.mu.Lock()
		defer writer.mu.Unlock()
		return len(writer.acked)
	}
	more := func(n int) { // acknowledged changes
		t.Helper()
		want := count() + n
		until(t, "changes go on", func() error {
			if got := count(); got < want {
				return fmt.Errorf("%d of %d", got, want)
			}
			return nil
		})
	}
	more(20)
	for _, m := range c.members {
		m.kill(t)
		more(20)
		m.start(t)
		c.await(t)
	}
	more(20)
	stop()
	<-done
	kv, err := writer.store.Get(storetest.Context(t), "/n")
	if err != nil {
		t.Fatal(err)
	}
	last := 0
	fmt.Sscan(string(kv.Value), &last)
	if acked := writer.acked[len(writer.acked)-1]; last < acked {
		t.Errorf("%d was acknowledged, %d is there", acked, last)
	}
	for _, w := range watches {
		w.follow(t, last)
	}
	t.Logf("%d changes, %d of them were not acknowledged", last, failed)
}

// With one of three members away everything works, also through a client that asks it first.
func TestOneMemberKilled(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	s := open(t, etcd.Config{Endpoints: c.endpoints()})
	storetest.Put(t, s, "/k", "1")
	c.leader(t).kill(t)
	fresh := open(t, etcd.Config{Endpoints: c.endpoints()})
	for i := range 20 {
		for _, s := range []*etcd.Store{s, fresh} {
			// The members need a moment for a new leader; what was on its way to the old one may be lost.
			until(t, "write", func() error {
				_, err := s.Update(storetest.Context(t), "/k", fmt.Append(nil, i), 0)
				return err
			})
			if kv, err := s.Get(storetest.Context(t), "/k"); err != nil || string(kv.Value) != fmt.Sprint(i) {
				t.Errorf("%d: read %q, %v", i, kv.Value, err)
			}
		}
	}
}

// Without a quorum every operation says so within its deadline, and the same store works again when the quorum is back:
// members that are gone, and members that are there but silent.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	const timeout = time.Second
	for _, test := range []struct {
		name       string
		lose, back func(testing.TB, *member)
	}{
		{"killed", func(t testing.TB, m *member) { m.kill(t) }, func(t testing.TB, m *member) { m.start(t) }},
		{"stopped", func(t testing.TB, m *member) { m.signal(t, unix.SIGSTOP) }, func(t testing.TB, m *member) { m.signal(t, unix.SIGCONT) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			c := startCluster(t, 3)
			s := open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: timeout})
			at := storetest.Put(t, s, "/k", "1")
			w, err := s.Watch(storetest.Context(t), "", at)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			for _, m := range c.members[:2] {
				test.lose(t, m)
			}
			ctx := storetest.Context(t)
			for what, fn := range map[string]func() error{
				"get":    func() error { _, err := s.Get(ctx, "/k"); return err },
				"list":   func() error { _, _, err := s.List(ctx, ""); return err },
				"create": func() error { _, err := s.Create(ctx, "/new", nil); return err },
				"watch":  func() error { _, err := s.Watch(ctx, "", 0); return err },
				// It may try twice: to hear of it, and to ask why.
				"next": func() error { _, err := w.Next(ctx); return err },
			} {
				begin := time.Now()
				err := fn()
				if !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "running pods keep running") {
					t.Errorf("%s: %v", what, err)
				}
				if took := time.Since(begin); took > timeout+slack && (what != "next" || took > 2*timeout+slack) {
					t.Errorf("%s took %s", what, took)
				}
			}
			short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			if _, err := s.Get(short, "/k"); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("get with a shorter deadline: %v", err)
			}
			for _, m := range c.members[:2] {
				test.back(t, m)
			}
			until(t, "it works again", func() error {
				_, err := s.Update(context.Background(), "/back", nil, 0)
				return err
			})
			for {
				e, err := w.Next(ctx)
				if errors.Is(err, store.ErrUnavailable) {
					continue
				}
				if err != nil {
					t.Fatalf("next: %v", err)
				}
				if e.Key == "/new" { // it may have happened after all
					continue
				}
				if e.Key != "/back" {
					t.Errorf("told %+v", e)
				}
				break
			}
		})
	}
}

// A member that is there but silent must not keep a watch from what happens. Several watches, because the library chooses
// the member: some begin at the one that is stopped.
func TestSilentMember(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3)
	silent := c.members[0]
	if c.leader(t) == silent {
		silent = c.members[1]
	}
	var others []string
	for _, m := range c.members {
		if m != silent {
			others = append(others, m.client)
		}
	}
	writer := &counter{store: open(t, etcd.Config{Endpoints: others}), key: "/n"}
	var watches []*sequence
	for range 6 {
		s := open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: 2 * time.Second})
		w, err := s.Watch(storetest.Context(t), "/n", 0)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		watches = append(watches, &sequence{watch: w})
	}
	count := func(n int) {
		for range n {
			if err := writer.add(storetest.Context(t)); err != nil {
				t.Fatal(err)
			}
		}
	}
	count(3)
	for _, w := range watches {
		w.follow(t, 3)
	}
	silent.signal(t, unix.SIGSTOP)
	count(3)
	begin := time.Now()
	for _, w := range watches {
		w.follow(t, 6)
	}
	t.Logf("all heard of it after %s", time.Since(begin).Round(time.Millisecond))
	silent.signal(t, unix.SIGCONT)
}

// A watch that asks for what was compacted is told so, and goes on from a list.
func TestCompacted(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	s := open(t, etcd.Config{Endpoints: c.endpoints()})
	first := storetest.Put(t, s, "/k", "0")
	w, err := s.Watch(storetest.Context(t), "", first)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var last store.Revision
	for i := range 10 {
		last = storetest.Put(t, s, "/k", fmt.Sprint(i))
	}
	if _, err := c.raw(t).Compact(storetest.Context(t), int64(last), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	// One that goes has heard it all.
	for i := range 10 {
		if e := storetest.Next(t, w); string(e.Value) != fmt.Sprint(i) {
			t.Fatalf("told %+v, want %d", e, i)
		}
	}
	for _, after := range []store.Revision{0, first, last - 2} {
		late, err := s.Watch(storetest.Context(t), "", after)
		if err == nil {
			_, err = late.Next(storetest.Context(t))
			late.Close()
		}
		if !errors.Is(err, store.ErrCompacted) {
			t.Errorf("after %d, compacted up to %d: %v", after, last, err)
		}
	}
	kvs, at, err := s.List(storetest.Context(t), "")
	if err != nil || len(kvs) != 1 {
		t.Fatalf("list: %v, %v", kvs, err)
	}
	again, err := s.Watch(storetest.Context(t), "", at)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	storetest.Put(t, s, "/k", "new")
	if e := storetest.Next(t, again); string(e.Value) != "new" {
		t.Errorf("told %+v", e)
	}
}

// A watch that is away while its next revision is compacted must not skip what it missed without a word.
func TestCompactedWhileAway(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	s := open(t, etcd.Config{Endpoints: c.endpoints(), Timeout: time.Second})
	at := storetest.Put(t, s, "/k", "0")
	w, err := s.Watch(storetest.Context(t), "", at)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	m := c.members[0]
	proxied := m.client
	m.kill(t)
	// While it is away the member is changed behind another address.
	m.args = replaced(m.args, proxied, "http://"+freeAddr(t))
	m.client = m.args[6]
	m.start(t)
	c.await(t)
	other := open(t, etcd.Config{Endpoints: []string{m.client}})
	var last store.Revision
	for i := range 5 {
		last = storetest.Put(t, other, "/k", fmt.Sprint(i))
	}
	raw := c.raw(t)
	if _, err := raw.Compact(storetest.Context(t), int64(last), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	m.kill(t)
	m.args = replaced(m.args, m.client, proxied)
	m.client = proxied
	m.start(t)
	ctx := storetest.Context(t)
	for {
		e, err := w.Next(ctx)
		if errors.Is(err, store.ErrUnavailable) {
			continue
		}
		if !errors.Is(err, store.ErrCompacted) {
			t.Errorf("next: %+v, %v", e, err)
		}
		return
	}
}

func replaced(args []string, old, new string) []string {
	var all []string
	for _, a := range args {
		if a == old {
			a = new
		}
		all = append(all, a)
	}
	return all
}

// Who is not let in is told so, and gets in with the same store when that is mended.
func TestDenied(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1)
	raw := c.raw(t)
	ctx := storetest.Context(t)
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	_, err := raw.UserAdd(ctx, "root", "rootpw")
	must("add root", err)
	_, err = raw.UserGrantRole(ctx, "root", "root")
	must("grant root", err)
	_, err = raw.RoleAdd(ctx, "caracal")
	must("add role", err)
	_, err = raw.RoleGrantPermission(ctx, "caracal", "/caracal/v1/", clientv3.GetPrefixRangeEnd("/caracal/v1/"),
		clientv3.PermissionType(clientv3.PermReadWrite))
	must("grant", err)
	_, err = raw.UserAdd(ctx, "node", "right")
	must("add user", err)
	_, err = raw.UserGrantRole(ctx, "node", "caracal")
	must("grant role", err)
	_, err = raw.AuthEnable(ctx)
	must("enable", err)

	good := open(t, etcd.Config{Endpoints: c.endpoints(), Username: "node", Password: "right"})
	storetest.Put(t, good, "/k", "1")
	w, err := good.Watch(ctx, "", 0)
	must("watch", err)
	defer w.Close()
	if e := storetest.Next(t, w); e.Key != "/k" {
		t.Errorf("told %+v", e)
	}
	wrong := etcd.Config{Endpoints: c.endpoints(), Username: "node", Password: "wrong"}
	for name, cfg := range map[string]etcd.Config{
		"wrong password": wrong,
		"no user":        {Endpoints: c.endpoints()},
		"unknown user":   {Endpoints: c.endpoints(), Username: "nobody", Password: "right"},
		"other prefix":   {Endpoints: c.endpoints(), Username: "node", Password: "right", Prefix: "/caracal/v2"},
	} {
		s := open(t, cfg)
		begin := time.Now()
		_, err := s.Get(ctx, "/k")
		_, _, listErr := s.List(ctx, "")
		_, writeErr := s.Update(ctx, "/k", []byte("2"), 0)
		_, watchErr := s.Watch(ctx, "", 0)
		for what, err := range map[string]error{"get": err, "list": listErr, "update": writeErr, "watch": watchErr} {
			if !errors.Is(err, store.ErrDenied) {
				t.Errorf("%s: %s: %v", name, what, err)
			}
			if cfg.Username != "" && !strings.Contains(fmt.Sprint(err), cfg.Username) || strings.Contains(fmt.Sprint(err), "wrong") {
				t.Errorf("%s: %s: %v", name, what, err)
			}
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("%s took %s", name, took)
		}
	}
	if kv, err := good.Get(ctx, "/k"); err != nil || string(kv.Value) != "1" {
		t.Errorf("changed: %q, %v", kv.Value, err)
	}
	// The password that was wrong becomes right, the login of the other ends with the member.
	late := open(t, wrong)
	if _, err := late.Get(ctx, "/k"); !errors.Is(err, store.ErrDenied) {
		t.Errorf("get: %v", err)
	}
	admin, err := clientv3.New(clientv3.Config{Endpoints: c.endpoints(), Username: "root", Password: "rootpw", DialTimeout: 5 * time.Second})
	must("log in", err)
	defer admin.Close()
	_, err = admin.UserChangePassword(ctx, "node", "wrong")
	must("change the password", err)
	if _, err := late.Get(ctx, "/k"); err != nil {
		t.Errorf("get with what is the password now: %v", err)
	}
	_, err = admin.UserChangePassword(ctx, "node", "right")
	must("change the password", err)
	c.members[0].kill(t)
	c.members[0].start(t)
	until(t, "the store logs in again", func() error { _, err := good.Get(ctx, "/k"); return err })
	storetest.Put(t, good, "/k", "3")
	for {
		e, err := w.Next(ctx)
		if errors.Is(err, store.ErrUnavailable) {
			continue
		}
		if err != nil || string(e.Value) != "3" {
			t.Errorf("told %+v, %v", e, err)
		}
		break
	}
}
