#!/usr/bin/env bash
# Pins every base image by digest: `image:tag` becomes `image:tag@sha256:...`, in the Dockerfiles and compose.yaml.
# Needs a registry that answers and docker with buildx. Digests are asked for, never guessed: when one cannot be had,
# nothing is changed. `--print` only shows them.
set -euo pipefail
cd "$(dirname "$0")"

FILES=(*.Dockerfile compose.yaml)
IMAGES=$(sed -nE 's/^FROM +([^ @]+:[^ @]+)( .*)?$/\1/p; s/^ +image: +([^ @$]+:[^ @$]+)$/\1/p' "${FILES[@]}" |
  { grep -v '^salon-' || true; } | sort -u)

declare -A digests
for image in $IMAGES; do
  digest=$(docker buildx imagetools inspect "$image" --format '{{.Manifest.Digest}}') || digest=
  if [[ ! $digest =~ ^sha256:[0-9a-f]{64}$ ]]; then
    echo "no digest of $image: is a registry reachable? Nothing was changed." >&2
    exit 1
  fi
  digests[$image]=$digest
  echo "$image@$digest"
done

[[ ${1:-} == --print ]] && exit 0
for image in "${!digests[@]}"; do
  name=${image//./\\.}
  sed -i -E "s#^(FROM +|  +image: +)${name}( |\$)#\1${image}@${digests[$image]}\2#" "${FILES[@]}"
done
