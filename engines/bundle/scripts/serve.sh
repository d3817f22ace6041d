#!/usr/bin/env bash
# Builds the engine into a Triton model repository of the same file, where it is not there yet, and starts Triton with it and the plugin:
# what a container of Triton's image runs.
#
# Exit codes: 2 and 3 as build_engine.sh; then tritonserver's.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./serve.sh REPOSITORY [options of build_engine.sh] [-- options for tritonserver]

  REPOSITORY  what fna bundle --triton-repository wrote, from the file that this bundle is of
END
}

fail() {
  local code=$1
  shift
  printf 'serve.sh: %s\n' "$*" >&2
  exit "$code"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  usage
  exit 0
fi
(($#)) || fail 2 "which model repository? see --help"
repository=$(cd "$1" 2> /dev/null && pwd) || fail 2 "$1 is no folder; give a model repository"
shift
build=()
while (($#)) && [[ $1 != -- ]]; do
  build+=("$1")
  shift
done
(($# == 0)) || shift
cd "$(dirname "${BASH_SOURCE[0]}")"
command -v tritonserver > /dev/null || fail 3 "tritonserver is not on this machine; run this in Triton's image"
# shellcheck source=/dev/null
source ./settings.sh
place=
for source in "$repository"/*/source.sha256; do
  if [[ -f $source && $(< "$source") == "$ONNX_SHA256" ]]; then place=${source%/*}; fi
done
[[ -n $place ]] || fail 2 "$repository has no model of the file that this bundle is of; write both from one file"
./build_engine.sh --output "$place/1/model.plan" ${build[@]+"${build[@]}"}
# shellcheck source=/dev/null
source ./build/last.sh
options=("--model-repository=$repository")
if [[ -n $REGISTER ]]; then
  options+=("--backend-config=tensorrt,plugins=$PWD/$REGISTER")
elif [[ -n $PLUGIN ]]; then
  fail 3 "the engine needs the plugin, but there is no library that registers it in this TensorRT; build_engine.sh says why above"
fi
exec tritonserver "${options[@]}" "$@"
