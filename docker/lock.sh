#!/usr/bin/env bash
# Writes docker/locks/*.txt: every package of each image, pinned and hashed. Needs the package index and uv (extra `ops`).
# The versions are those that the tests run with (constraints-cpu.txt), but for vLLM, which pins a world of its own.
# Another release: change pyproject.toml, constraints-cpu.txt or requirements/*.in, run this, build, test, commit.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-.venv/bin/uv}

lock() {  # lock IMAGE ARGUMENTS...: keeps the versions a lock already has unless --upgrade is given
  local image=$1
  shift
  echo "locking $image" >&2
  "$UV" pip compile "$@" --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-emit-index-url --no-annotate --custom-compile-command docker/lock.sh --quiet \
    --output-file "docker/locks/$image.txt" ${UPGRADE:+--upgrade}
}

for image in "${@:-build train reward vllm}"; do
  for each in $image; do
    case $each in
      build) lock build docker/requirements/build.in ;;
      train) lock train pyproject.toml --constraints constraints-cpu.txt ;;
      reward) lock reward docker/requirements/reward.in --constraints constraints-cpu.txt ;;
      vllm) lock vllm docker/requirements/vllm.in ;;
      *) echo "no image $each; there are build, train, reward and vllm" >&2; exit 2 ;;
    esac
  done
done
