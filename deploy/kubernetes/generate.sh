#!/bin/sh
# Writes caracal.yaml: what kustomization.yaml names, in one file.
set -eu
cd "$(dirname "$0")"
{
	echo "# Made by deploy/kubernetes/generate.sh (make generate) of the files beside it."
	for f in $(sed -n 's/^- //p' kustomization.yaml); do
		echo "---"
		cat "$f"
	done
} >caracal.yaml
