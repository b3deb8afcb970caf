#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice until the run is finished, through preemptions: see usage below.
set -euo pipefail

usage() {
  cat <<'END'
usage: scripts/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTION ...] [-- ARGUMENT ...]

Trains on a Cloud TPU pod slice. All files of the run are in a bucket, so the pod may be lost at
any time. It needs gcloud, and runs on any machine but the pod.

commands:
  run      create the pod, install, start training and watch it. After a preemption, or if training
           ends too early, begin again. When the run is finished, delete the pod. Arguments after
           -- are the flags of `convit train`, without --workdir
  create   request the pod and wait until it is active
  install  copy this checkout to all hosts and install it there
  start    start training on all hosts, detached. Arguments as for run
  status   print the state of the pod, of training on each host, and of the run
  logs     print the last lines of the log of each host
  stop     let training save and stop after the same step on all hosts; the pod stays
  ssh      run the command after -- on all hosts, at the same time
  delete   delete the pod. The bucket stays

options:
  --name=NAME          name of the pod, and of the queued resource that requests it
  --zone=ZONE          zone of the pod, such as us-west4-a
  --project=PROJECT    project of the pod; by default that of gcloud's configuration
  --type=TYPE          kind and number of chips (default: v5litepod-16)
  --runtime=VERSION    software of the hosts; by default the one for TYPE, such as
                       v2-alpha-tpuv5-lite for v5e
  --spot               take a pod that may be preempted; by default it is on demand
  --workdir=gs://...   folder of the run. The run is finished when weights.safetensors is in it
  --extras=EXTRAS      extras to install (default: train,tpu,gcs)
  --keep               do not delete the pod at the end of run
  --poll=SECONDS       time between two looks at the pod (default: 60)
  --tries=N            end run after N failures without a new checkpoint (default: 5)
  --lines=N            number of lines that logs prints (default: 20)
  --create_flag=FLAG   one more flag of `gcloud compute tpus queued-resources create`; repeatable
  --ssh_flag=FLAG      one more flag of `gcloud compute tpus tpu-vm ssh` and `scp`; repeatable

Ctrl-C ends run. Training goes on, and the same command watches it again.
END
}

say() { printf '%s  %s\n' "$(date '+%F %T')" "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

parse() {
  case ${1:-} in
    -h | --help)
      usage
      exit 0
      ;;
    run | create | install | start | status | logs | stop | ssh | delete) command=$1 ;;
    *)
      usage >&2
      die "expected a command, got '${1:-}'"
      ;;
  esac
  shift
  name='' zone='' type=v5litepod-16 runtime='' workdir='' extras=train,tpu,gcs
  keep=false poll=60 tries=5 lines=20
  create_flags=() ssh_flags=(--quiet --strict-host-key-checking=no) where=() arguments=()
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --zone=*) zone=${1#*=} where+=("$1") ;;
      --project=*) where+=("$1") ;;
      --type=*) type=${1#*=} ;;
      --runtime=*) runtime=${1#*=} ;;
      --spot) create_flags+=(--spot) ;;
      --workdir=*) workdir=${1#*=} ;;
      --extras=*) extras=${1#*=} ;;
      --keep) keep=true ;;
      --poll=*) poll=${1#*=} ;;
      --tries=*) tries=${1#*=} ;;
      --lines=*) lines=${1#*=} ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
      --)
        shift
        arguments=("$@")
        break
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) die "unknown option '$1'; $0 --help lists them" ;;
    esac
    shift
  done
}

# Refuses what would fail, or cost money, later.
check() {
  [ -n "$name" ] || die "--name: expected the name of the pod"
  [ -n "$zone" ] || die "--zone: expected the zone of the pod, such as us-west4-a"
  command -v gcloud >/dev/null || die "gcloud is missing: https://cloud.google.com/sdk/docs/install"
  workdir=${workdir%/}
  case $command in
    run | start)
      [[ $workdir == gs://*/* ]] ||
        die "--workdir: expected a folder in a bucket, gs://BUCKET/RUN, got '$workdir'"
      [ ${#arguments[@]} -gt 0 ] || die "expected -- and the flags of convit train, as --config=..."
      ;;
    ssh) [ ${#arguments[@]} -gt 0 ] || die "expected -- and a command" ;;
    *) [ ${#arguments[@]} -eq 0 ] || die "$command takes no arguments, got '${arguments[*]}'" ;;
  esac
  local argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ $command == ssh || $argument != --workdir* ]] ||
      die "--workdir: expected before --, since $0 reads it too"
  done
  [ -n "$runtime" ] || runtime=$(default_runtime)
}

default_runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--runtime: expected one, since $0 does not know that of --type=$type" ;;
  esac
}

# ---- the pod ----

# Prints the state of the queued resource, MISSING if there is none, or UNKNOWN if gcloud fails.
pod_state() {
  local found
  if found=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>"$scratch/error"); then
    echo "${found:-UNKNOWN}"
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo MISSING
  else
    say "gcloud cannot tell the state of $name: $(tail -n 1 "$scratch/error")"
    echo UNKNOWN
  fi
}

# Prints what gcloud tells of the state, such as the reason of a failure.
why() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='yaml(state)' >&2 ||
    true
}

request_pod() {
  say "requesting $name: $type, $runtime"
  gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="$type" --runtime-version="$runtime" \
    ${create_flags[@]+"${create_flags[@]}"}
}

# With --force, the hosts of an active pod are deleted too.
delete_pod() {
  say "deleting $name"
  gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Runs a command on all hosts, and fails if it fails on one of them.
on_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "${ssh_flags[@]}" \
    --command="$1" </dev/null
}

# ---- the hosts ----

# Copies the checkout as it was at the first call, with changes that are not committed.
install_on_hosts() {
  local archive=$scratch/convit.tar.gz
  say "installing on all hosts"
  [ -e "$archive" ] || COPYFILE_DISABLE=1 tar -C "$(dirname "$0")/.." --exclude=__pycache__ \
    -czf "$archive" setup.cfg pyproject.toml README.md LICENSE main.py convit_jax configs scripts &&
    gcloud compute tpus tpu-vm scp "$archive" "$name:" "${where[@]}" --worker=all \
      "${ssh_flags[@]}" &&
    on_hosts "rm -rf convit && mkdir convit && tar -C convit -xzf convit.tar.gz &&
      bash convit/scripts/tpu_host.sh install $extras"
}

start_on_hosts() {
  say "starting training on all hosts"
  on_hosts "bash convit/scripts/tpu_host.sh start --workdir=$(quoted "$workdir" "${arguments[@]}")"
}

quoted() { printf '%q ' "$@"; }

host_states() {
  local host=convit/scripts/tpu_host.sh
  on_hosts "if [ -e $host ]; then bash $host state ${workdir:+$(quoted "$workdir")}
    else echo 'convit-state: none'; fi"
}

# Prints what the hosts do together: NONE, BUSY, RUNNING, ENDED, MIXED or UNREACHABLE.
training_state() {
  local found
  if ! found=$(host_states 2>"$scratch/error"); then
    echo UNREACHABLE
    return
  fi
  grep -o 'convit-log: .*step [0-9]*/.*' <<<"$found" | cut -c 13- | tail -n 1 >"$scratch/step" || true
  found=$(grep -o 'convit-state: [a-z]*' <<<"$found" | sort -u)
  case $found in
    '') echo UNREACHABLE ;;
    *busy*) echo BUSY ;;
    *none*) echo NONE ;;
    'convit-state: running') echo RUNNING ;;
    'convit-state: ended') echo ENDED ;;
    *) echo MIXED ;;
  esac
}

# ---- the run ----

# Returns 0 if the run is finished, 1 if it is not, and 2 if gcloud cannot tell. The weights are the
# last file that a run writes.
is_finished() {
  if gcloud storage ls "$workdir/weights.safetensors" >/dev/null 2>"$scratch/error"; then
    return 0
  fi
  grep -q 'matched no objects' "$scratch/error" && return 1
  say "gcloud cannot tell whether the run is finished: $(tail -n 1 "$scratch/error")"
  return 2
}

# Counts a failure, and ends if there are too many since the last new checkpoint.
failed() {
  local now
  now=$(gcloud storage ls "$workdir/checkpoints/" 2>/dev/null || true)
  [ "$now" = "$checkpoints" ] || failures=0
  checkpoints=$now
  failures=$((failures + 1))
  say "$1 (failure $failures of $tries)"
  [ "$failures" -lt "$tries" ] || give_up
}

give_up() {
  on_hosts "bash convit/scripts/tpu_host.sh logs $lines" >&2 || true
  $keep || delete_pod || say "could not delete $name: it may still cost money"
  die "$failures failures without a new checkpoint in $workdir"
}

# Installs, starts or starts again what should run on an active pod.
look_after_training() {
  local now
  now=$(training_state)
  [ "$now" = MIXED ] || mixed=0
  [ "$now" = UNREACHABLE ] || unreachable=0
  case $now in
    BUSY) die "another run than that of $workdir trains on $name" ;;
    NONE) { install_on_hosts && start_on_hosts; } || failed "training could not be started" ;;
    RUNNING)
      if [ -s "$scratch/step" ] && ! cmp -s "$scratch/step" "$scratch/shown"; then
        say "$(cat "$scratch/step")"
        cp "$scratch/step" "$scratch/shown"
      fi
      ;;
    ENDED) start_again "training ended before the run was finished" ;;
    MIXED)
      # A host whose process dies ends the others within a minute.
      mixed=$((mixed + 1))
      [ "$mixed" -lt 3 ] || start_again "training ended on some hosts only"
      ;;
    UNREACHABLE)
      unreachable=$((unreachable + 1))
      say "not all hosts answer: $(tail -n 1 "$scratch/error")"
      if [ "$unreachable" -ge "$tries" ]; then
        unreachable=0
        failed "the hosts of $name do not answer"
        delete_pod || failed "$name could not be deleted"
      fi
      ;;
  esac
}

start_again() {
  is_finished && return
  failed "$1"
  on_hosts "bash convit/scripts/tpu_host.sh logs 3; bash convit/scripts/tpu_host.sh stop" >&2 || true
  start_on_hosts || failed "training could not be started"
}

run() {
  local now last='' finished=0 was_active=false
  failures=0 mixed=0 unreachable=0 checkpoints=''
  is_finished || finished=$?
  [ "$finished" -ne 2 ] || die "--workdir: cannot read $workdir: $(tail -n 1 "$scratch/error")"
  trap 'say "training goes on; the same command watches it again, \"$0 delete\" ends it"; exit 130' INT
  until is_finished; do
    now=$(pod_state)
    [ "$now" = "$last" ] || say "$name: $now"
    last=$now
    case $now in
      MISSING)
        was_active=false
        request_pod || failed "$name could not be requested"
        ;;
      ACTIVE)
        was_active=true
        look_after_training
        ;;
      SUSPENDED | FAILED) # preempted, or never there
        why
        [ "$now" = SUSPENDED ] || $was_active || failed "the request for $name failed"
        delete_pod || failed "$name could not be deleted"
        ;;
    esac
    sleep "$poll"
  done
  say "the run is finished: $workdir/weights.safetensors"
  if ! $keep && [ "$(pod_state)" != MISSING ]; then delete_pod; fi
}

create() {
  local now last=''
  [ "$(pod_state)" != MISSING ] || request_pod
  while now=$(pod_state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$last" ] || say "$name: $now"
    last=$now
    case $now in
      SUSPENDED | FAILED | MISSING)
        why
        die "$name is $now; delete it and create it again"
        ;;
    esac
    sleep "$poll"
  done
  say "$name: ACTIVE"
}

status() {
  local finished=0
  echo "pod: $(pod_state)"
  host_states || true
  [ -n "$workdir" ] || return 0
  is_finished || finished=$?
  case $finished in
    0) echo "run: finished" ;;
    1) echo "run: not finished" ;;
    *) echo "run: not known" ;;
  esac
}

parse "$@"
check
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2016 # the hosts expand it
path='export PATH=$HOME/convit-env/bin:$PATH;'
case $command in
  run | create | status) "$command" ;;
  install) install_on_hosts ;;
  start) start_on_hosts ;;
  logs) on_hosts "bash convit/scripts/tpu_host.sh logs $lines" ;;
  stop) on_hosts "bash convit/scripts/tpu_host.sh stop" ;;
  ssh) on_hosts "$path ${arguments[*]}" ;;
  delete) delete_pod ;;
esac
