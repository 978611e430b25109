#!/usr/bin/env bash
# Keeps training going until it is done: recreates the TPU after a preemption
# and resumes. Takes the flags of nfnet_jax.experiments.train.
#
#   launch/supervise.sh [--dry_run] --config=f3
#
# Exits with 0 once training is done, with 2 at once on bad input or settings, and with 1
# if training failed twice at the same checkpoint or RETRIES steps failed in a
# row. Whatever else ends training, it is resumed.
source "$(dirname "$0")/lib.sh"
need WORKDIR
COMMIT=$(resolved_commit) # The branch may move on; the run does not.
export COMMIT
troubles=0 failed_at=never mixed_since=''

# A checkpoint that is being saved has its folder, but not yet this file.
latest_checkpoint() {
  limited "$CALL_TIMEOUT" \
    gcloud storage ls "$WORKDIR/checkpoints/*/commit_success.txt" 2>&1 |
    sed -nE 's|.*/([0-9]+)/commit_success\.txt$|\1|p' | sort -n | tail -1
}

# Runs another script. Settings that it refuses get no better by waiting.
script() {
  local code=0
  "$LAUNCH/$1.sh" "${@:2}" || code=$?
  [[ $code != 2 ]] || fail 2 "Bad settings: launch/$1.sh says above which."
  return "$code"
}

resume() { script resume "${ARGS[@]}"; }

recreate() { script delete && script create && resume; }

# Workers wait for one that has ended, so they are stopped if that lasts.
watch_stragglers() {
  : "${mixed_since:=$SECONDS}"
  ((SECONDS - mixed_since >= STRAGGLER_TIMEOUT)) || return 0
  say 'A worker has ended and others have not: stopping them.'
  script stop
}

judge_failure() {
  local checkpoint
  checkpoint=$(latest_checkpoint) || true
  [[ $checkpoint != "$failed_at" ]] ||
    fail 1 "Training failed again at checkpoint ${checkpoint:-none}."
  failed_at=$checkpoint
  say "Training failed at checkpoint ${checkpoint:-none}."
}

tend() {
  local workers codes
  workers=$(worker_states) || return
  codes=" $(cut -d' ' -f2 <<<"$workers" | sort -u | xargs) "
  [[ $codes = *' running '* && $codes != ' running ' ]] || mixed_since=''
  case $codes in
    ' running ') return ;;
    *' running '*)
      watch_stragglers
      return
      ;;
    ' 0 ')
      say 'Training is done.'
      exit 0
      ;;
    *' 2 '*) fail 2 'Bad input: launch/watch.sh shows it.' ;;
  esac
  say "$TPU_NAME does not train:$codes"
  # Interrupted and saved, or never started; all else is a failure.
  [[ $codes =~ ^(\ (0|75|idle|bare))+\ $ ]] || judge_failure
  resume
}

step() {
  local now
  now=$(state) || return
  case $now in
    READY) tend ;;
    ABSENT | PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED | UNKNOWN)
      say "$TPU_NAME is $now: creating it anew."
      recreate
      ;;
    *) say "$TPU_NAME is $now." ;;
  esac
}

if [[ $DRY_RUN ]]; then
  say 'While training:'
  state >/dev/null
  worker_states
  say 'After a preemption:'
  recreate
  exit
fi

delay=$RETRY_SECONDS
while :; do
  if step; then
    troubles=0 delay=$RETRY_SECONDS
    sleep "$POLL_SECONDS"
  else
    ((++troubles < RETRIES)) || fail 1 "$troubles steps failed in a row."
    say "That failed ($troubles of $RETRIES); the next attempt is in $delay s."
    sleep "$delay"
    delay=$((delay * 2 < MAX_RETRY_SECONDS ? delay * 2 : MAX_RETRY_SECONDS))
  fi
done
