#!/usr/bin/env bash
# Installs what the tests run beside Python where it is missing and this user may: Chromium (the report), shellcheck (the bundle's
# scripts), CMake and compilers (the plugin). Never fails: tests skip with the reason.
set -uo pipefail

missing=()
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || missing+=(chromium)
command -v shellcheck > /dev/null || missing+=(shellcheck)
command -v cmake > /dev/null || missing+=(cmake)
command -v g++ > /dev/null || missing+=(g++)
command -v aarch64-linux-gnu-g++ > /dev/null || missing+=(g++-aarch64-linux-gnu)
[ "${#missing[@]}" = 0 ] && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not here, and only root on Debian can install it: ${missing[*]}; tests that need it will be skipped"
    exit 0
fi
echo "installing ${missing[*]}, which tests run"
log=$(mktemp)
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
    echo "could not be installed: $(tail -n 1 "$log")"
fi
rm -f "$log"
