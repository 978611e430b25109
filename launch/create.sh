#!/usr/bin/env bash
# Creates the TPU according to PROVISIONING, and waits until it is ready. If it
# is given the flags of training, it first checks them with launch/check.sh.
#
#   launch/create.sh [--dry_run] [--config=f3]
source "$(dirname "$0")/lib.sh"

case $ACCELERATOR_TYPE in
  v[234]-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    fail 2 "ACCELERATOR_TYPE='$ACCELERATOR_TYPE' is not in the Cloud TPU API," \
      "which serves v2 to v6e. See launch/README.md for other TPUs."
    ;;
esac
runtime=${RUNTIME_VERSION:-$runtime}

((${#ARGS[@]} == 0)) || "$LAUNCH/check.sh" "${ARGS[@]}"

read -ra flags <<<"$CREATE_FLAGS"
flags+=(--accelerator-type="$ACCELERATOR_TYPE")
[[ $PROVISIONING != *spot ]] || flags+=(--spot)

log "Creating $TPU_NAME: $ACCELERATOR_TYPE, $PROVISIONING, in $ZONE."
status='may exist' # Even if the call fails or Ctrl-C ends it.
trap 'report_cost "$status"' EXIT
if [[ $PROVISIONING = queued* ]]; then
  tpus "$CALL_TIMEOUT" queued-resources create "$TPU_NAME" --async \
    --node-id="$TPU_NAME" --runtime-version="$runtime" \
    --valid-until-duration="$VALID_UNTIL" "${flags[@]}"
else
  tpus "$CREATE_TIMEOUT" tpu-vm create "$TPU_NAME" --version="$runtime" \
    "${flags[@]}"
fi
wait_until_ready
status=exists
log "$TPU_NAME is ready."
