# shellcheck shell=bash
# Shared by the scripts: settings, dry runs, calls with a timeout, TPU states.
set -euo pipefail
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORKER=nfnet_jax/source/launch/worker.sh # On a worker, from its home.
# shellcheck source=launch/settings.sh
source "$LAUNCH/settings.sh"
exec 3>&1 # Dry runs print here, also from within $(...).

log() { printf 'launch: %s\n' "$*" >&2; }

# Logs a message and exits: fail EXIT_CODE MESSAGE.
fail() {
  log "${*:2}"
  exit "$1"
}

# ARGS holds the script's arguments except --dry_run and --help.
DRY_RUN=${DRY_RUN:-} ARGS=()
for word in "$@"; do
  case $word in
    --dry_run) export DRY_RUN=1 ;;
    --help)
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      exit
      ;;
    *) ARGS+=("$word") ;;
  esac
done

no_arguments() {
  ((${#ARGS[@]} == 0)) || fail 2 "Unexpected argument '${ARGS[0]}'."
}

# Checks that settings have a value: need NAME...
need() {
  local name
  for name in "$@"; do
    [[ ${!name} ]] ||
      fail 2 "Set $name, in launch/settings.sh or in the environment."
  done
}

# Checks the value of a setting: one_of NAME VALUE...
one_of() {
  [[ " ${*:2} " = *" ${!1} "* ]] ||
    fail 2 "$1='${!1}' is not possible. Choose one of: ${*:2}."
}

check_settings() {
  local name
  need PROJECT_ID ZONE TPU_NAME
  one_of PROVISIONING on_demand spot queued queued_spot
  one_of CHECK plan config none
  one_of DELETE_WHEN_DONE 0 1
  for name in WORKDIR DATA_DIR; do
    [[ -z ${!name} || ${!name} = gs://?* ]] ||
      fail 2 "$name='${!name}' is no bucket (gs://...). A worker's disk is" \
        "deleted with the worker."
  done
  [[ $DRY_RUN ]] || command -v gcloud >/dev/null ||
    fail 2 'gcloud is not on PATH. Install it from https://cloud.google.com/sdk.'
}

# Prints the commit that all workers run.
resolved_commit() {
  git -C "$LAUNCH" rev-parse --verify --quiet "$COMMIT^{commit}" ||
    fail 2 "COMMIT='$COMMIT' is no commit of this repository."
}

# Prints words as one line, quoted for a shell.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Runs a command with a timeout, or prints it in a dry run:
# limited SECONDS COMMAND... (0 for no timeout).
limited() {
  local seconds=$1 code=0
  shift
  if [[ $DRY_RUN ]]; then
    quoted "$@" >&3
    return
  fi
  # In the foreground, so that Ctrl-C reaches the command.
  timeout --foreground --kill-after=10 "$seconds" "$@" </dev/null || code=$?
  [[ $seconds = 0 || $code != @(124|137) ]] ||
    log "No answer within $seconds s: $(quoted "${@:1:5}")"
  return "$code"
}

# Logs that the TPU costs money, and how to delete it: report_cost 'still exists'.
report_cost() {
  [[ $DRY_RUN ]] ||
    log "$TPU_NAME $1. It costs money until you delete it:" \
      "$(quoted "PROJECT_ID=$PROJECT_ID" "ZONE=$ZONE" "TPU_NAME=$TPU_NAME" \
        "PROVISIONING=$PROVISIONING" launch/delete.sh)"
}

tpus() {
  limited "$1" gcloud compute tpus "${@:2}" \
    --project="$PROJECT_ID" --zone="$ZONE" --quiet
}

# Runs a line of shell on every worker, and fails if it fails on one:
# ssh_all SECONDS LINE.
ssh_all() {
  local code=0
  tpus "$1" tpu-vm ssh "$TPU_NAME" --worker=all --command="$2" || code=$?
  # On a worker, tar and uv exit with 2 on any failure. Here 2 is bad input.
  [[ $code != 2 ]] || code=1
  return "$code"
}

# Prints a field of the TPU or of its request, or ABSENT if there is none:
# describe KIND FIELD.
describe() {
  local errors code=0
  errors=$(mktemp)
  tpus "$CALL_TIMEOUT" "$1" describe "$TPU_NAME" --format="value($2)" \
    2>"$errors" || code=$?
  if grep -q NOT_FOUND "$errors"; then
    echo ABSENT
    code=0
  else
    cat "$errors" >&2
  fi
  rm -f "$errors"
  return "$code"
}

# Prints the state of the TPU, or of its request until that is granted.
state() {
  local request=ACTIVE
  if [[ $PROVISIONING = queued* ]]; then
    request=$(describe queued-resources state.state) || return
  fi
  if [[ $DRY_RUN || $request = ACTIVE ]]; then
    describe tpu-vm state || return
    [[ -z $DRY_RUN ]] || echo READY
  else
    echo "$request"
  fi
}

wait_until_ready() {
  local begin=$SECONDS now
  while now=$(state) && [[ $now != READY ]]; do
    case $now in
      # A new request may not be listed at once.
      ABSENT)
        ((SECONDS - begin < CALL_TIMEOUT)) || fail 1 "There is no $TPU_NAME."
        ;;
      PREEMPTED | TERMINATED | SUSPEND* | FAILED | STOP*)
        fail 1 "$TPU_NAME is $now."
        ;;
    esac
    ((SECONDS - begin < READY_TIMEOUT)) ||
      fail 1 "$TPU_NAME is still $now after $READY_TIMEOUT s."
    log "$TPU_NAME is $now."
    sleep "$POLL_SECONDS"
  done
  [[ $now = READY ]] || fail 1 "Cannot get the state of $TPU_NAME."
}

# Prints one line per worker: its name, and bare (not set up), idle, running,
# lost (ended without an exit code) or the exit code of its last run.
worker_states() {
  local answer
  answer=$(ssh_all "$CALL_TIMEOUT" "if [ -x $WORKER ]; then $WORKER status; \
else echo \"\$(hostname) bare\"; fi") || return
  [[ $DRY_RUN ]] ||
    grep -E '^\S+ (bare|idle|running|lost|[0-9]+)$' <<<"$answer" ||
    { log "No worker of $TPU_NAME answered." && return 1; }
}

check_settings # Before any call.
