#!/usr/bin/env bash
# Supervises training until it is done: checks the flags, creates the TPU,
# recreates it after a preemption, and resumes. Takes the flags of
# nfnet_jax.experiments.train.
#
#   launch/supervise.sh [--dry_run] --config=f3
#
# Exits with 0 when training is done, with 2 on bad input or settings, and with
# 1 if training failed twice at the same checkpoint or RETRIES steps failed in a
# row. Training that ends in any other way is resumed. With DELETE_WHEN_DONE=1
# the TPU is deleted when training is done and after bad input; else it stays.
source "$(dirname "$0")/lib.sh"
need WORKDIR
COMMIT=$(resolved_commit) # A recreated TPU runs this commit too.
export COMMIT
failed_at=never mixed_since=''
tpu='' # 'still exists', 'may still exist', or '' if there is none.
trap '[[ -z $tpu ]] || report_cost "$tpu"' EXIT

# Prints the step of the latest checkpoint. A checkpoint that is being saved
# has a folder, but not yet this file.
latest_checkpoint() {
  limited "$CALL_TIMEOUT" \
    gcloud storage ls "$WORKDIR/checkpoints/*/commit_success.txt" 2>&1 |
    sed -nE 's|.*/([0-9]+)/commit_success\.txt$|\1|p' | sort -n | tail -1
}

# Repeats a command until it succeeds: retry WHAT COMMAND...
retry() {
  local failures=0 delay=$RETRY_SECONDS
  until "${@:2}"; do
    ((++failures < RETRIES)) || fail 1 "$failures $1 failed in a row."
    log "That failed ($failures of $RETRIES); the next attempt is in $delay s."
    sleep "$delay"
    delay=$((delay * 2 < MAX_RETRY_SECONDS ? delay * 2 : MAX_RETRY_SECONDS))
  done
}

# Ends for good: finish EXIT_CODE MESSAGE.
finish() {
  log "${*:2}"
  if [[ $DELETE_WHEN_DONE = 1 ]]; then
    tpu='may still exist'
    retry deletions "$LAUNCH/delete.sh"
    tpu=''
    log "$TPU_NAME is deleted."
  fi
  exit "$1"
}

# Runs another script. Ends if it refuses the settings: a retry cannot help.
script() {
  local code=0
  "$LAUNCH/$1.sh" "${@:2}" || code=$?
  [[ $code != 2 ]] ||
    finish 2 "Bad settings: see the message of launch/$1.sh above."
  return "$code"
}

resume() { script resume "${ARGS[@]}"; }

recreate() {
  script delete || return
  tpu=''
  script create || { tpu='may still exist' && return 1; }
  tpu='still exists'
  resume
}

# Stops the workers that have waited too long for one that has ended.
stop_stragglers() {
  : "${mixed_since:=$SECONDS}"
  ((SECONDS - mixed_since >= STRAGGLER_TIMEOUT)) || return 0
  log 'A worker has ended and others still run: stopping them.'
  script stop
}

# Exits if training failed twice at the same checkpoint.
check_progress() {
  local checkpoint
  checkpoint=$(latest_checkpoint) || true
  [[ $checkpoint != "$failed_at" ]] ||
    fail 1 "Training failed again at checkpoint ${checkpoint:-none}."
  failed_at=$checkpoint
  log "Training failed at checkpoint ${checkpoint:-none}."
}

# Checks the workers of a ready TPU; resumes training if it has ended early.
check_workers() {
  local workers codes
  workers=$(worker_states) || return
  codes=" $(cut -d' ' -f2 <<<"$workers" | sort -u | xargs) "
  [[ $codes = *' running '* && $codes != ' running ' ]] || mixed_since=''
  case $codes in
    ' running ') return ;;
    *' running '*)
      stop_stragglers
      return
      ;;
    ' 0 ') finish 0 'Training is done.' ;;
    *' 2 '*) finish 2 'Bad input: launch/watch.sh shows it.' ;;
  esac
  log "$TPU_NAME is not training:$codes"
  # Interrupted and saved, or never started. All other codes are failures.
  [[ $codes =~ ^(\ (0|75|idle|bare))+\ $ ]] || check_progress
  resume
}

# Does what the state of the TPU requires.
step() {
  local now
  now=$(state) || return
  case $now in
    READY)
      tpu='still exists'
      check_workers
      ;;
    ABSENT | PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED | UNKNOWN)
      log "$TPU_NAME is $now: creating it."
      recreate
      ;;
    *) log "$TPU_NAME is $now." ;;
  esac
}

[[ -z $DRY_RUN ]] || log 'First:'
"$LAUNCH/check.sh" "${ARGS[@]}"
if [[ $DRY_RUN ]]; then
  log 'While training:'
  state >/dev/null
  worker_states
  log 'After a preemption:'
  recreate
  tpu=''
  exit
fi

tpu='may still exist'
while :; do
  retry steps step
  sleep "$POLL_SECONDS"
done
