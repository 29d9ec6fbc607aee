#!/bin/sh
# Builds the container image from built binaries, with the local engine (DOCKER=podman for another). Nothing is downloaded.
set -eu
[ $# = 2 ] || { echo "usage: $0 DIRECTORY_OF_BINARIES TAG" >&2; exit 2; }
docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || { echo "$0: no program $docker here: install Docker, or name another engine (DOCKER=podman)" >&2; exit 1; }
[ -x "$1/caracal" ] && [ -x "$1/caracald" ] || { echo "$0: caracal and caracald are not in $1: make build puts them into bin" >&2; exit 1; }
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir -p "$context/root/usr/bin" "$context/root/run" "$context/root/var"
ln -s /run "$context/root/var/run" # runtimes name namespaces by the one or the other
cp "$1/caracal" "$1/caracald" "$context/root/usr/bin/"
ln -s caracal "$context/root/usr/bin/caracal-ipam"
ln -s caracald "$context/root/usr/bin/caracalctl"
cp "$(dirname "$0")/Dockerfile" "$context/"
"$docker" build -q -t "$2" "$context"
