#!/usr/bin/env bash
# Unpacks what `make ops-check` and tests/ops need and PyPI does not have, without installing anything: promtool and
# prometheus, and the compose schema, from Debian's packages, into .venv/ops. Needs apt and dpkg (Debian, Ubuntu), no
# rights, and no package lists: where there are none it reads them into a folder of its own.
# Does nothing when it has been done; prints one line with the reason and exits with 1 when it cannot be done.
set -euo pipefail
cd "$(dirname "$0")/../.."
PACKAGES=(prometheus docker-compose)
TARGET=$PWD/.venv/ops
STAMP=$TARGET/.complete

cannot() {
  echo "${PACKAGES[*]} cannot be fetched into .venv/ops ($1): tests that need them are skipped, \`make ops-check\` fails" >&2
  exit 1
}

if [[ -e $STAMP ]]; then exit 0; fi
for program in apt-get dpkg-deb; do
  command -v "$program" >/dev/null || cannot "there is no $program"
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
OPTIONS=(-o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o Acquire::Retries=1)
OWN_LISTS=(-o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch/cache" -o "APT::Sandbox::User=$(id -un)")

apt() { (cd "$scratch" && timeout 120 apt-get --quiet "${OPTIONS[@]}" "$@" >>"$scratch/log" 2>&1); }
download() { apt "$@" download "${PACKAGES[@]}"; }

echo "fetching ${PACKAGES[*]} (Debian packages, once)"
download || { apt "${OWN_LISTS[@]}" update && download "${OWN_LISTS[@]}"; } || {
  reason=$( (grep -m1 -E 'Could not|Failed to fetch' "$scratch/log" || tail -1 "$scratch/log") | sed 's/^ *//')
  cannot "${reason:-apt-get gave up}"
}
rm -rf "$TARGET"
mkdir -p "$TARGET"
for package in "$scratch"/*.deb; do
  dpkg-deb --extract "$package" "$TARGET" 2>>"$scratch/log" || cannot "$(basename "$package") cannot be unpacked"
done
"$TARGET/usr/bin/promtool" --version >/dev/null 2>&1 || cannot "their promtool does not run here"
touch "$STAMP"
