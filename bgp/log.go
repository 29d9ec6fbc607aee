package bgp

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	gobgplog "github.com/osrg/gobgp/v3/pkg/log"
	"github.com/osrg/gobgp/v3/pkg/packet/bgp"
)

// logger is GoBGP's log, in ours. It is also the only place where GoBGP says why a session broke. Panic and Fatal end
// nothing: GoBGP goes on behind them as behind other errors.
type logger struct{ s *Speaker }

func (l *logger) Panic(msg string, f gobgplog.Fields) { l.write(slog.LevelError, msg, f) }
func (l *logger) Fatal(msg string, f gobgplog.Fields) { l.write(slog.LevelError, msg, f) }
func (l *logger) Error(msg string, f gobgplog.Fields) { l.write(slog.LevelError, msg, f) }
func (l *logger) Warn(msg string, f gobgplog.Fields)  { l.write(slog.LevelWarn, msg, f) }

// Info is GoBGP's running commentary; what matters of it we log ourselves.
func (l *logger) Info(msg string, f gobgplog.Fields) { l.write(slog.LevelDebug, msg, f) }

// Debug would be every message with all its attributes.
func (l *logger) Debug(string, gobgplog.Fields) {}
func (l *logger) SetLevel(gobgplog.LogLevel)    {}
func (l *logger) GetLevel() gobgplog.LogLevel   { return gobgplog.InfoLevel }

func (l *logger) write(level slog.Level, msg string, f gobgplog.Fields) {
	l.note(msg, f)
	if !l.s.log.Enabled(context.Background(), level) {
		return
	}
	names := make([]string, 0, len(f))
	for name := range f {
		names = append(names, name)
	}
	slices.Sort(names)
	var attrs []slog.Attr
	for _, name := range names {
		attrs = append(attrs, slog.String(name, fmt.Sprint(f[name])))
	}
	l.s.log.LogAttrs(context.Background(), level, "gobgp: "+msg, attrs...)
}

// troubles are GoBGP's messages that say what is wrong with a session.
var troubles = []string{
	"sent notification", "received notification", "hold timer expired", "graceful restart timer expired",
	"Session will be reset due to malformed BGP Header", "Session will be reset due to malformed BGP message",
	"Session will be reset due to malformed BGP update message", "the received Update message was treated as withdraw",
	"Some attributes were discarded", "cannot set TTL for peer", "failed to set md5",
}

// note passes trouble on. GoBGP holds locks while it logs, so nothing may wait here: a note too many is dropped.
func (l *logger) note(msg string, f gobgplog.Fields) {
	if !slices.Contains(troubles, msg) {
		return
	}
	peer, err := netip.ParseAddr(fmt.Sprint(f["Key"]))
	if err != nil {
		return
	}
	text := msg
	code, coded := f["Code"].(uint8)
	subcode, _ := f["Subcode"].(uint8)
	switch e := f["Data"].(type) {
	case *bgp.MessageError:
		code, subcode, coded = e.TypeCode, e.SubTypeCode, true
		if e.Message != "" {
			text += ": " + e.Message
		}
	case error:
		text += ": " + e.Error()
	}
	for _, name := range []string{"Error", "Err", "error"} {
		if e, ok := f[name]; ok {
			text += ": " + fmt.Sprint(e)
		}
	}
	if coded {
		text += " (" + bgp.NewNotificationErrorCode(code, subcode).String() + ")"
	}
	select {
	case l.s.notes <- Alarm{Kind: Session, Peer: peer, Text: formatf("session with %s: %s", peer, text)}:
	default:
	}
}
