package cni

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/caracal-net/caracal/commit"
	"github.com/caracal-net/caracal/ipam"
	"github.com/caracal-net/caracal/loader"
	"github.com/caracal-net/caracal/node"
)

// Error codes of the CNI specification 1.1.0, section 5 "Error", and our own from 100 on.
const (
	codeVersion      = 1
	codeField        = 2
	codeUnknown      = 3 // container unknown: no DEL needed
	codeEnvironment  = 4
	codeIO           = 5
	codeDecode       = 6
	codeConfig       = 7
	codeTryAgain     = 11
	codeUnavailable  = 50
	codeLimited      = 51
	codeInternal     = 100
	codeExhausted    = 101 // no address left
	codeAddress      = 102 // the requested address can't be given
	codeConflict     = 103 // an interface of that name exists, or a port is published
	codeInconsistent = 104 // CHECK found a difference
	codeKernel       = 105
	codeState        = 106 // node.db or the pinned maps can't be used
)

// Error is what a plugin prints when it fails (CNI specification 1.1.0, section 5 "Error").
type Error struct {
	CNIVersion string `json:"cniVersion"`
	Code       uint   `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + "; " + e.Details
}

func fail(code uint, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// codes says which code an error of our own rooms gets.
var codes = []struct {
	err  error
	code uint
}{
	{ipam.ErrExhausted, codeExhausted},
	{ipam.ErrTaken, codeAddress},
	{commit.ErrAddressTaken, codeAddress},
	{ipam.ErrOutsidePool, codeAddress},
	{ipam.ErrReserved, codeAddress},
	{ipam.ErrPool, codeConfig},
	{ipam.ErrNotClaimed, codeAddress},
	{ipam.ErrNoCluster, codeTryAgain},
	{node.ErrLocked, codeTryAgain},
	{node.ErrNoSpace, codeIO},
	{node.ErrReadOnly, codeIO},
	{node.ErrCorrupt, codeState},
	{node.ErrVersion, codeState},
	{loader.ErrKernel, codeKernel},
	{loader.ErrVersion, codeState},
	{loader.ErrNotBPFFS, codeState},
}

// asError gives any error its code. A delegate's error keeps its own.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	var delegate *types.Error
	if errors.As(err, &delegate) {
		return &Error{Code: delegate.Code, Msg: err.Error(), Details: delegate.Details}
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return &Error{Code: c.code, Msg: err.Error()}
		}
	}
	return &Error{Code: codeInternal, Msg: err.Error()}
}
