#!/bin/sh
# Builds the container image from built binaries, with the local engine (DOCKER=podman for another). Nothing is downloaded.
set -eu
[ $# = 2 ] || { echo "usage: $0 DIRECTORY_OF_BINARIES TAG" >&2; exit 2; }
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
mkdir -p "$context/root/usr/bin" "$context/root/run" "$context/root/var"
ln -s /run "$context/root/var/run" # runtimes name namespaces by the one or the other
cp "$1/caracal" "$1/caracald" "$context/root/usr/bin/"
ln -s caracal "$context/root/usr/bin/caracal-ipam"
ln -s caracald "$context/root/usr/bin/caracalctl"
cp "$(dirname "$0")/Dockerfile" "$context/"
"${DOCKER:-docker}" build -q -t "$2" "$context"
