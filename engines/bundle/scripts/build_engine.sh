#!/usr/bin/env bash
# Builds the engine on this device: checks every file of the bundle, compiles what has to be compiled here (the runner, and the plugin
# where the prebuilt one does not load), then runs trtexec. Where nothing can be compiled, the prebuilt plugin alone will do. Does nothing where the engine is there and nothing it was built from has
# changed. All it makes is in build/.
#
# Exit codes: 0 done; 2 bad arguments, a damaged bundle, or a model that TensorRT refuses; 3 this device lacks something.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./build_engine.sh [options] [-- options for trtexec]

  --precision P      a precision that the bundle holds a model in
  --batch A[:B[:C]]  batch sizes: 4, or 1:4 (smallest:largest), or 1:4:8 (smallest:usual:largest)
  --workspace MIB    limit of TensorRT's scratch memory while it tries kernels; no limit unless given
  --flavour F        tensorrt or tensorrt-rtx; by default the first that is installed
  --lowering L       the form of the model: plugin, or without it fused, decomposed or portable; by default what this
                     TensorRT is given, and portable where it refuses that
  --trtexec FILE     trtexec, or tensorrt_rtx; by default from PATH or where JetPack puts it
  --tf32             let fp32 products run in TF32: faster, and errors near 1e-3 instead of 1e-6
  --output FILE      put a copy of the engine there, as in MODELS/NAME_tensorrt/1/model.plan
  --rebuild          build even where nothing has changed
  --dry-run          print trtexec's command line and stop

Environment: TENSORRT_ROOT, CUDA_ROOT (where not in the usual places), CXX, FNA_RUNNER (a runner compiled elsewhere).
END
}

say() { printf '%s\n' "$*"; }
fail() {
  local code=$1
  shift
  printf 'build_engine.sh: %s\n' "$*" >&2
  exit "$code"
}

called_from=$PWD
called_with=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")"
script=$PWD/build_engine.sh

precision=
batch=
workspace=
flavour=
lowering=
trtexec=
output=
tf32=
rebuild=
dry_run=
extra=()
while (($#)); do
  case $1 in
    --precision | --batch | --workspace | --flavour | --lowering | --trtexec | --output)
      (($# >= 2)) || fail 2 "$1 needs a value; see --help"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --tf32) tf32=1 ;;
    --rebuild) rebuild=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      extra=("$@")
      break
      ;;
    *) fail 2 "unknown option $1; see --help" ;;
  esac
  shift
done

# Every file has to be what the manifest says, before any is used.
verify() {
  local report
  command -v sha256sum > /dev/null || fail 3 "sha256sum is not installed; apt-get install coreutils"
  [[ -f SHA256SUMS ]] || fail 2 "SHA256SUMS is missing; copy the whole bundle again"
  report=$(sha256sum --check --strict --quiet SHA256SUMS 2> /dev/null) \
    || fail 2 "damaged bundle: ${report%%:*} is missing or changed; copy the whole bundle again"
}

verify
# shellcheck source=/dev/null
source ./settings.sh
precision=${precision:-$DEFAULT_PRECISION}

one_of() { # VALUE OPTION CHOICE...
  local value=$1 option=$2 choice
  shift 2
  for choice in "$@"; do [[ $choice == "$value" ]] && return; done
  fail 2 "$option $value is not in this bundle; choose one of: $*"
}

# Finds trtexec (TensorRT) or tensorrt_rtx (TensorRT for RTX); prints its path.
find_tool() { # FLAVOUR
  local name=trtexec place
  [[ $1 == tensorrt-rtx ]] && name=tensorrt_rtx
  for place in "$(command -v "$name" || true)" "${TENSORRT_ROOT:-}/bin/$name" "/usr/src/tensorrt/bin/$name" "/opt/tensorrt/bin/$name"; do
    if [[ -n $place && -x $place ]]; then
      say "$place"
      return
    fi
  done
  return 1
}

choose_tool() {
  local candidate
  if [[ -n $trtexec ]]; then
    [[ $trtexec == /* ]] || trtexec=$called_from/$trtexec
    [[ -x $trtexec ]] || fail 2 "--trtexec $trtexec is no program; give trtexec's path"
    [[ -n $flavour ]] || case ${trtexec##*/} in *rtx*) flavour=tensorrt-rtx ;; *) flavour=tensorrt ;; esac
    tool=$trtexec
  else
    for candidate in ${flavour:-"${FLAVOURS[@]}"}; do
      if tool=$(find_tool "$candidate"); then
        flavour=$candidate
        break
      fi
    done
  fi
  [[ -n $tool ]] || fail 3 "no trtexec on this device (looked in PATH and /usr/src/tensorrt/bin); install TensorRT: apt-get install libnvinfer-bin, or give --trtexec"
  one_of "$flavour" --flavour "${FLAVOURS[@]}"
  # 10.3 prints "[TensorRT v100300]" before its help; TensorRT up to 8.6 "v8601".
  help=$("$tool" --help 2>&1 || true)
  number=$(sed -n 's/.*\[TensorRT v\([0-9]\{4,6\}\)\].*/\1/p' <<< "$help" | head -n 1)
  version=unknown
  if [[ -n $number && $flavour == tensorrt ]]; then
    local scale=10000
    ((number < 10000)) && scale=1000
    version=$((number / scale)).$((number % scale / 100)).$((number % 100))
    ((number >= MINIMUM_TENSORRT)) || fail 3 "$tool is TensorRT $version, but this bundle needs $MINIMUM_TENSORRT_TEXT or later; install a newer JetPack"
  fi
}

# What this version is given: the first rule for it, newest first. A tool that hides its version is taken to be new.
choose_lowering() {
  local rule runtime since form
  for rule in "${LOWERING_RULES[@]}"; do
    read -r runtime since form <<< "$rule"
    if [[ $runtime == "$flavour" ]] && ((${number:-999999} >= since)); then
      say "$form"
      return
    fi
  done
}

# Whether the tool knows an option. What it knows decides, not its version.
knows() { grep -qE -- "^ *--$1([ =,]|\$)" <<< "$help"; }
needs() { knows "$1" || fail 3 "$tool does not know --$1; this bundle needs TensorRT $MINIMUM_TENSORRT_TEXT or later"; }

# The first of some folders that holds a file.
folder_with() { # FILE FOLDER...
  local file=$1 folder
  shift
  for folder in "$@"; do
    if [[ -f $folder/$file ]]; then
      say "$folder"
      return
    fi
  done
  return 1
}

# What every compilation needs: a compiler and both sets of headers. Sets `lacking` where one is missing.
find_compiler() {
  local machine candidate
  machine=$(uname -m)
  cxx=
  for candidate in ${CXX:-g++ c++ clang++}; do
    if [[ -z $cxx ]] && command -v "$candidate" > /dev/null; then cxx=$candidate; fi
  done
  lacking="no C++ compiler is installed (${CXX:-g++, c++, clang++}); apt-get install g++"
  [[ -n $cxx ]] || return 1
  lacking="TensorRT's headers are not found; apt-get install libnvinfer-headers-dev, or set TENSORRT_ROOT"
  tensorrt_include=$(folder_with NvInferRuntime.h "${TENSORRT_ROOT:-/nowhere}/include" "${TENSORRT_ROOT:-/nowhere}" \
    "/usr/include/$machine-linux-gnu" /usr/include /usr/local/tensorrt/include) \
    || return 1
  lacking="CUDA's headers are not found; apt-get install cuda-cudart-dev-12-6 (or -13-0), or set CUDA_ROOT"
  cuda_include=$(folder_with cuda_runtime_api.h "${CUDA_ROOT:-/nowhere}/include" "${CUDA_ROOT:-/nowhere}" /usr/local/cuda/include \
    /usr/local/cuda/targets/*/include /usr/include) \
    || return 1
  lacking=
}

sha() { sha256sum "$@" | sha256sum | cut -d ' ' -f 1; }
# Whether FILE was made from what KEY stands for, and is still that file.
fresh() { [[ -z $rebuild && -s $1 && -f $1.key && $(< "$1.key") == "$2 $(sha "$1")" ]]; }
remember() { say "$2 $(sha "$1")" > "$1.key"; }
key_of() { printf '%s\n' "$@" | sha256sum | cut -d ' ' -f 1; }

compile() { # WHAT OUTPUT ARGUMENT...
  local what=$1 output=$2 key
  shift 2
  key=$(key_of "$@" "$bundle" "$("$cxx" --version | head -n 1)" "$(sha "$tensorrt_include"/NvInferVersion.h)")
  if fresh "$output" "$key"; then return; fi
  say "compiling $what against TensorRT's headers in $tensorrt_include"
  "$cxx" -std=c++17 -O2 -Wall -isystem "$tensorrt_include" -isystem "$cuda_include" "$@" -o "$output.part" \
    || fail 3 "$what does not compile here; the compiler's message is above"
  if [[ -n ${carried:-} ]]; then cat "$carried" >> "$output.part"; fi
  mv "$output.part" "$output"
  remember "$output" "$key"
}

make_runner() {
  local library=-lnvinfer place
  if [[ -n ${FNA_RUNNER:-} ]]; then
    runner=$FNA_RUNNER
    [[ $runner == /* ]] || runner=$called_from/$runner
    return
  fi
  [[ $flavour == tensorrt-rtx ]] && library=-ltensorrt_rtx
  if ! find_compiler; then
    [[ -z ${FNA_CHECK:-} ]] || fail 3 "the runner cannot be compiled here: $lacking"
    say "without the runner, which cannot be compiled here: $lacking"
    return
  fi
  runner=build/fna_runner-$flavour
  place=${TENSORRT_ROOT:+$TENSORRT_ROOT/lib}
  compile "the runner" "$runner" runner/fna_runner.cpp ${place:+-L"$place" -Wl,-rpath,"$place"} "$library" -ldl
}

# Where the self-registering library for this TensorRT is, for hosts that only open a plugin library, such as Triton: it calls what
# it finds by the major version of its headers. The prebuilt one names that of its own.
fits() { [[ -f $1 ]] && grep -qa "libnvinfer\.so\.${version%%.*}\b" "$1"; }

compile_register() {
  compile "the self-registering library" build/plugin/libfna_plugin_register.so -fPIC -shared -fvisibility=hidden -Iplugin/src \
    plugin/src/common/register.cpp plugin/src/common/host_version.cpp build/plugin/libfna_plugin.so "-Wl,-rpath,\$ORIGIN" -ldl
  if fits build/plugin/libfna_plugin_register.so; then
    register=build/plugin/libfna_plugin_register.so
  else
    say "Triton cannot use this bundle's plugin: the headers in $tensorrt_include are of another TensorRT than $version"
  fi
}

make_plugin() {
  local folder said
  folder=plugin/prebuilt/$(uname -m)
  if [[ " ${PREBUILT_FOR[*]} " == *" $(uname -m) "* ]]; then
    if [[ -z $runner ]] || said=$("$runner" --check-plugin "$folder/libfna_plugin.so" 2>&1); then
      plugin=$folder/libfna_plugin.so
      if fits "$folder/libfna_plugin_register.so"; then
        register=$folder/libfna_plugin_register.so
      elif find_compiler; then
        mkdir -p build/plugin # both in one place: the one looks for the other beside it
        cp "$plugin" build/plugin/libfna_plugin.so
        plugin=build/plugin/libfna_plugin.so
        compile_register
      else
        say "Triton cannot use this bundle's plugin with TensorRT $version: $lacking"
      fi
      return
    fi
    say "the prebuilt plugin does not load here ($said)"
  fi
  find_compiler || fail 3 "the plugin cannot be compiled here: $lacking"
  mkdir -p build/plugin
  plugin=build/plugin/libfna_plugin.so
  # It reads its kernels from the end of its own file.
  carried=plugin/kernels/kernels.bin compile "the plugin" "$plugin" -fPIC -shared -fvisibility=hidden -fvisibility-inlines-hidden \
    -Iplugin/src -Iplugin/kernels "${PLUGIN_SOURCES[@]}" \
    -Wl,-soname,libfna_plugin.so -Wl,--version-script=plugin/src/common/exports.map -Wl,--no-undefined -ldl
  if [[ -n $runner ]]; then
    said=$("$runner" --check-plugin "$plugin" 2>&1) || fail 3 "the plugin compiles, but does not load: $said"
  fi
  compile_register
}

# What trtexec's --minShapes and the like take: every input as name:BATCHx3x518x518.
shapes() { # BATCH
  local entry text=
  for entry in "${INPUT_SHAPES[@]}"; do text+="${text:+,}${entry%%=*}:$1x${entry#*=}"; done
  say "$text"
}

choose_batch() {
  local numbers
  IFS=: read -r -a numbers <<< "${batch:-$DEFAULT_BATCH}"
  [[ ${batch:-$DEFAULT_BATCH} =~ ^[1-9][0-9]{0,4}(:[1-9][0-9]{0,4}){0,2}$ ]] || fail 2 "--batch $batch cannot be read; write 4, 1:4 or 1:4:8"
  smallest=${numbers[0]}
  largest=${numbers[${#numbers[@]} - 1]}
  usual=$largest
  ((${#numbers[@]} == 3)) && usual=${numbers[1]}
  ((smallest <= usual && usual <= largest)) || fail 2 "--batch $batch does not ascend; write smallest:usual:largest"
  [[ -z $batch || $DYNAMIC_BATCH == 1 ]] || fail 2 "this model's batch size is fixed at $DEFAULT_BATCH; bundle it again from a file with an open batch"
}

device() {
  if [[ -r /proc/device-tree/model ]]; then tr -d '\0' < /proc/device-tree/model; fi
  if [[ -r /etc/nv_tegra_release ]]; then head -n 1 /etc/nv_tegra_release; fi
  if command -v nvidia-smi > /dev/null; then nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null || true; fi
}

one_of "$precision" --precision "${PRECISIONS[@]}"
if [[ -n $output ]]; then
  [[ $output == /* ]] || output=$called_from/$output
  [[ -d ${output%/*} && ! -d $output ]] || fail 2 "--output $output cannot be written; give a file in a folder that exists"
fi
if [[ -n $output && -f ${output%/*}/../source.sha256 && $(< "${output%/*}/../source.sha256") != "$ONNX_SHA256" ]]; then
  fail 2 "--output $output is in a repository of another file than this bundle's; write the repository again, or bundle that file"
fi
[[ -z $workspace || $workspace =~ ^[1-9][0-9]{0,6}$ ]] || fail 2 "--workspace $workspace cannot be read; give MiB, as in --workspace 2048"
choose_batch
tool=
choose_tool
[[ $flavour != tensorrt-rtx || $lowering != plugin ]] || fail 2 "TensorRT-RTX has no plugin layers; leave --lowering out"
asked=$lowering
lowering=${lowering:-$(choose_lowering)}
one_of "$lowering" --lowering "${LOWERINGS[@]}"
bundle=$(sha SHA256SUMS)
mkdir -p build

name=model-$precision-$lowering-$flavour
engine=build/$name.engine
log=build/$name.log
model=model.$lowering.onnx
[[ $precision == "$DEFAULT_PRECISION" ]] || model=model.$precision.$lowering.onnx

for option in onnx saveEngine skipInference; do needs "$option"; done
arguments=("--onnx=$model" --skipInference)
if [[ $DYNAMIC == 1 ]]; then
  for option in minShapes optShapes maxShapes; do needs "$option"; done
  arguments+=("--minShapes=$(shapes "$smallest")" "--optShapes=$(shapes "$usual")" "--maxShapes=$(shapes "$largest")")
fi
# Precision is in the file. From TensorRT 11 on that is the only way, and the option does nothing.
if knows stronglyTyped && ! grep -- --stronglyTyped <<< "$help" | grep -qi deprecated; then arguments+=(--stronglyTyped); fi
# Whatever the precision: FNA computes in fp32 inside.
if [[ -z $tf32 ]] && knows noTF32; then arguments+=(--noTF32); fi
if [[ -n $workspace ]]; then
  needs memPoolSize
  arguments+=("--memPoolSize=workspace:$workspace")
fi
if knows timingCacheFile; then arguments+=("--timingCacheFile=build/timing-$flavour-$version.cache"); fi
if knows profilingVerbosity; then arguments+=(--profilingVerbosity=detailed); fi

runner=
plugin=
register=
if [[ -z $dry_run ]]; then make_runner; fi
if [[ $lowering == plugin ]]; then
  needs dynamicPlugins
  if [[ -z $dry_run ]]; then make_plugin; fi
  arguments+=("--dynamicPlugins=${plugin:-build/plugin/libfna_plugin.so}")
fi
host_code=
for option in ${extra[@]+"${extra[@]}"}; do
  if [[ $option == --versionCompatible || $option == --vc ]]; then
    [[ $lowering != plugin ]] || fail 2 "$option has not been proven with a plugin inside the engine; add --lowering portable"
    host_code=1 # such an engine carries a runtime of its own, which the runner has to allow
  fi
done
arguments+=(${extra[@]+"${extra[@]}"})
if [[ -n $dry_run ]]; then
  printf '%q ' "$tool" "${arguments[@]}" "--saveEngine=$engine"
  printf '\n'
  exit 0
fi

key=$(key_of "${arguments[@]}" "$bundle" "$tool" "$version" "$(sha "$tool")" "$(device)" ${plugin:+"$(sha "$plugin")"})
refused=build/$name.refused
build_portable() {
  say "so the portable form is built"
  cd "$called_from"
  exec "$script" --lowering portable ${called_with[@]+"${called_with[@]}"}
}
if fresh "$engine" "$key"; then
  say "$engine is up to date"
elif [[ -z $rebuild && -z $asked && -f $refused && $(< "$refused") == "$key" ]]; then
  say "$tool refused the fused form before (its log is $log)"
  build_portable
else
  say "building $engine with $tool (TensorRT $version); this takes minutes, and its log is $log"
  rm -f "$engine" "$engine.key"
  if ! "$tool" "${arguments[@]}" "--saveEngine=$engine.part" > "$log" 2>&1 || [[ ! -s $engine.part ]]; then
    rm -f "$engine.part"
    if [[ -z $asked && $lowering == fused ]]; then
      say "$key" > "$refused"
      say "$tool refuses the fused form (its log is $log)"
      build_portable
    fi
    grep -E '\[E\]|[Ee]rror' "$log" | tail -n 5 >&2 || true
    fail 2 "$tool could not build the engine; its log is $log"
  fi
  mv "$engine.part" "$engine"
  remember "$engine" "$key"
  say "$engine: $(($(wc -c < "$engine") / 1000000)) MB"
fi
if [[ -n $output ]]; then
  cp "$engine" "$output.part"
  mv "$output.part" "$output"
  say "copied to $output"
fi
if [[ -n $register ]]; then say "for Triton: tritonserver --backend-config=tensorrt,plugins=$PWD/$register --model-repository=MODELS"; fi
printf '%s=%q\n' ENGINE "$engine" PLUGIN "$plugin" REGISTER "$register" PRECISION "$precision" LOWERING "$lowering" FLAVOUR "$flavour" RUNNER "$runner" \
  HOST_CODE "$host_code" \
  > build/last.sh
