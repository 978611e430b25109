#!/usr/bin/env bash
# Deletes the TPU, and its request if it was queued, without confirmation.
#
#   launch/delete.sh [--dry_run]
source "$(dirname "$0")/lib.sh"
no_arguments

kind=tpu-vm flags=()
[[ $PROVISIONING != queued* ]] || kind=queued-resources flags=(--force)
found=$(describe "$kind" name)
if [[ $found = ABSENT ]]; then
  log "There is no $TPU_NAME in $ZONE of $PROJECT_ID; nothing to delete."
  exit
fi
log "Deleting $kind $TPU_NAME in $ZONE of $PROJECT_ID."
tpus "$CREATE_TIMEOUT" "$kind" delete "$TPU_NAME" "${flags[@]}"
