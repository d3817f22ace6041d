#!/usr/bin/env bash
# Builds the engine if it is not there, runs it on the recorded photographs, compares its outputs with the recorded ones, and times
# it. Needs no Python. Prints the power mode and the clocks beside the latency, which means nothing without them.
#
# Exit codes: 0 within tolerance; 1 an output is out of tolerance, or a layer of the plugin is missing or runs in another precision;
# 2 and 3 as build_engine.sh.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./check.sh [--runs N] [--graph] [--streams N] [options of build_engine.sh]

  --runs N      timed runs (100); 0 checks only
  --graph       time a CUDA graph instead of single launches
  --streams N   time N streams at once: what several cameras get
END
}

say() { printf '%s\n' "$*"; }
fail() {
  local code=$1
  shift
  printf 'check.sh: %s\n' "$*" >&2
  exit "$code"
}

cd "$(dirname "${BASH_SOURCE[0]}")"
runs=100
options=()
build=()
while (($#)); do
  case $1 in
    --runs)
      [[ ${2:-} =~ ^[0-9]{1,7}$ ]] || fail 2 "--runs needs a number; see --help"
      runs=$2
      shift
      ;;
    --streams)
      [[ ${2:-} =~ ^[1-9][0-9]{0,2}$ ]] || fail 2 "--streams needs a number; see --help"
      options+=(--streams "$2")
      shift
      ;;
    --graph) options+=(--graph) ;;
    --dry-run) fail 2 "--dry-run is an option of build_engine.sh" ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      build+=("$@")
      break
      ;;
    *) build+=("$1") ;;
  esac
  shift
done

FNA_CHECK=1 ./build_engine.sh ${build[@]+"${build[@]}"}
# shellcheck source=/dev/null
source ./settings.sh
# shellcheck source=/dev/null
source ./build/last.sh

power() {
  if [[ -r /proc/device-tree/model ]]; then say "machine: $(tr -d '\0' < /proc/device-tree/model)"; fi
  if [[ -r /etc/nv_tegra_release ]]; then say "release: $(head -n 1 /etc/nv_tegra_release)"; fi
  if command -v nvpmodel > /dev/null; then nvpmodel -q --verbose 2> /dev/null || true; fi
  if command -v jetson_clocks > /dev/null; then
    # It wants root; ask only where that needs no password.
    if clocks=$(jetson_clocks --show 2> /dev/null || sudo -n jetson_clocks --show 2> /dev/null); then
      say "$clocks" | grep -E 'GPU|EMC|cpu0' || true
    else
      say "jetson_clocks --show needs root; run it with sudo to see whether the clocks are fixed"
    fi
  fi
  local unit
  for unit in /sys/class/devfreq/*gpu* /sys/class/devfreq/*gpc*; do
    if [[ -r $unit/cur_freq ]]; then
      say "GPU clock: ${unit##*/} $(($(< "$unit/cur_freq") / 1000000)) MHz, at most $(($(< "$unit/max_freq") / 1000000)) MHz"
    fi
  done
  if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu --format=csv 2> /dev/null || true
  fi
}

# Text as a JSON string.
quoted() { printf '"%s"' "$(tr '\n\t' '  ' <<< "$1" | sed 's/[\\"]/\\&/g; s/ *$//')"; }

# Adds to the runner's numbers what they depend on: the power mode, the clocks before and after, and tegrastats between.
record_power() {
  local mode=
  [[ -s build/check.json ]] || return 0
  if command -v nvpmodel > /dev/null; then mode=$(nvpmodel -q 2> /dev/null || true); fi
  sed -i '$ s/}$//' build/check.json
  {
    printf ', "power_mode": %s, "power_before": %s, "power_after": %s' "$(quoted "$mode")" "$(quoted "$1")" "$(quoted "$2")"
    if [[ -s build/tegrastats.log ]]; then awk "$tegrastats_summary" build/tegrastats.log; fi
    say "}"
  } >> build/check.json
}

# Of tegrastats' lines: mean and largest power of each rail (VDD_IN 4612mW/4500mW), largest temperature of each sensor (gpu@43.2C).
# shellcheck disable=SC2016
tegrastats_summary='
  { for (i = 1; i <= NF; i++) {
      if ($i ~ /^[0-9]+mW(\/|$)/) {
        rail = $(i - 1); power = $i + 0; sum[rail] += power; seen[rail]++
        if (power > most[rail]) most[rail] = power
      } else if ($i ~ /^[a-zA-Z0-9_]+@-?[0-9.]+C$/) {
        split($i, part, "@"); heat = part[2] + 0
        if (!(part[1] in hottest) || heat > hottest[part[1]]) hottest[part[1]] = heat
      } } }
  END {
    printf ", \"tegrastats\": {\"samples\": %d, \"power_mw\": {", NR
    for (rail in sum) { printf "%s\"%s\": {\"mean\": %.0f, \"largest\": %d}", mark, rail, sum[rail] / seen[rail], most[rail]; mark = ", " }
    mark = ""; printf "}, \"largest_celsius\": {"
    for (name in hottest) { printf "%s\"%s\": %g", mark, name, hottest[name]; mark = ", " }
    printf "}}"
  }'

tolerance=TOLERANCE_$PRECISION
read -r relative_l2 cosine <<< "${!tolerance}"
options+=(--relative-l2 "$relative_l2" --cosine "$cosine" --runs "$runs" --json build/check.json)
for entry in ${TASK_TOLERANCES[@]+"${TASK_TOLERANCES[@]}"}; do options+=(--task-tolerance "$entry"); done
for entry in "${CHECK_INPUTS[@]}"; do options+=(--input "$entry"); done
for entry in "${CHECK_OUTPUTS[@]}"; do options+=(--expect "$entry"); done
if [[ -n $HOST_CODE ]]; then options+=(--allow-host-code); fi
if [[ -n $PLUGIN ]]; then options+=(--plugin "$PLUGIN" --plugin-layers "check/plugin_layers.$PRECISION.txt"); fi

say "reference: $REFERENCE; tolerance at $PRECISION: relative L2 $relative_l2, cosine $cosine${TASK_TOLERANCES:+; ${TASK_TOLERANCES[*]}}"
before=$(power)
say "$before"
rm -f build/check.json build/tegrastats.log
sampler=
if ((runs > 0)) && command -v tegrastats > /dev/null; then
  tegrastats --interval 200 > build/tegrastats.log &
  sampler=$!
fi
code=0
"$RUNNER" "$ENGINE" "${options[@]}" || code=$?
if [[ -n $sampler ]]; then kill "$sampler" 2> /dev/null || true; fi
after=$(power)
if ((runs > 0 && code < 2)); then
  say "after the timed runs:"
  say "$after"
fi
record_power "$before" "$after"
case $code in
  0) say "check passed; numbers in build/check.json" ;;
  1) say "check FAILED; numbers in build/check.json" >&2 ;;
esac
exit "$code"
