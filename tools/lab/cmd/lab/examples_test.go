package main

import (
	"testing"

	"github.com/caracal-net/caracal/tests/testenv"
)

func TestExamples(t *testing.T) { testenv.Examples(t, newCommand) }
