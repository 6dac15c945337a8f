#!/usr/bin/env bash
# Unpacks what `make ops-check` needs and PyPI does not have, without installing anything: promtool and prometheus, and
# the compose schema, from Debian's packages, into .venv/ops. Needs apt and dpkg (Debian, Ubuntu).
set -euo pipefail
cd "$(dirname "$0")/../.."
TARGET=$PWD/.venv/ops
mkdir -p "$TARGET"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
apt-get download --quiet prometheus docker-compose
for package in ./*.deb; do
  dpkg-deb --extract "$package" "$TARGET"
done
"$TARGET/usr/bin/promtool" --version
