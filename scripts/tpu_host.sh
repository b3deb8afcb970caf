#!/usr/bin/env bash
# Installs and runs training on one host of a TPU pod slice; tpu_pod.sh runs it on all hosts.
#
#   tpu_host.sh install EXTRAS     install the checkout that this file is part of, in ~/convit-env
#   tpu_host.sh start --workdir=WORKDIR FLAG ...
#                                  start `convit train` with these flags, detached
#   tpu_host.sh state [WORKDIR]    print "convit-state: " and none, running, "ended STATUS", or busy
#                                  if another run than that of WORKDIR is training
#   tpu_host.sh stop               send SIGTERM to training, and wait until it has ended
#   tpu_host.sh logs LINES         print the last lines of ~/convit-run/log
set -euo pipefail

checkout=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/convit-env
files=$HOME/convit-run # log, pid and exit status of training

# The Python of a TPU VM may be older than the 3.11 that convit needs: uv brings its own.
install() {
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  uv venv --quiet --allow-existing --python=3.12 "$environment"
  uv pip install --quiet --reinstall-package=convit-jax --python="$environment/bin/python" \
    "${checkout}[$1]"
}

state() {
  local found='ended without a status'
  if [ ! -e "$files/pid" ]; then
    found=none
  elif [ -e "$files/status" ]; then
    found="ended $(cat "$files/status")"
  elif kill -0 "$(cat "$files/pid")" 2>/dev/null; then
    found=running
  fi
  if [ $# -gt 0 ] && [ "$found" != none ] && [ "--workdir=$1" != "$(cat "$files/workdir")" ]; then
    if [ "$found" = running ]; then found=busy; else found=none; fi
  fi
  echo "$found"
}

start() {
  if [ "$(state)" = running ]; then
    echo "error: training runs on this host already" >&2
    exit 1
  fi
  mkdir -p "$files"
  # A killed process leaves libtpu's lock, which the next one would not take.
  rm -f "$files/status" "$files/pid" "${TMPDIR:-/tmp}/libtpu_lockfile"
  echo "$1" >"$files/workdir"
  setsid nohup bash "$0" train "$@" >>"$files/log" 2>&1 </dev/null &
  for _ in $(seq 500); do
    [ ! -e "$files/pid" ] || return 0
    sleep 0.02
  done
  echo "error: training did not start, see $files/log" >&2
  exit 1
}

# Runs training in the foreground of the process that `start` leaves behind.
train() {
  local status=0
  export PATH=$environment/bin:$PATH
  convit train "$@" &
  echo $! >"$files/pid"
  wait $! || status=$?
  echo "$status" >"$files/status"
}

stop() {
  [ "$(state)" = running ] || return 0
  kill "$(cat "$files/pid")"
  while [ "$(state)" = running ]; do sleep 0.02; done
}

case ${1:-} in
  install | start | train | stop) "$@" ;;
  state)
    echo "convit-state: $(state "${@:2}")"
    [ ! -e "$files/log" ] || echo "convit-log: $(tail -n 1 "$files/log")"
    ;;
  logs) tail -n "$2" "$files/log" ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
