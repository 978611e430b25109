#!/usr/bin/env bash
# Starts training on every worker in the background, or resumes the run in
# WORKDIR. Takes the flags of nfnet_jax.experiments.train.
#
#   launch/train.sh [--dry_run] --config=f3
source "$(dirname "$0")/lib.sh"
need WORKDIR

workers=$(worker_states)
! grep ' running$' <<<"$workers" >&2 ||
  fail 1 "$TPU_NAME is already training. launch/watch.sh shows it," \
    'launch/stop.sh stops it.'
! grep ' bare$' <<<"$workers" >&2 ||
  fail 1 "$TPU_NAME is not set up. Run launch/setup.sh."

ARGS+=(--workdir="$WORKDIR" --require_platform=tpu)
data_dir=${MOUNT_POINT:-$DATA_DIR}
[[ -z $data_dir ]] || ARGS+=(--config.run.data_dir="$data_dir")
# A new TPU reuses the programs that the previous one compiled.
ssh_all "$CALL_TIMEOUT" \
  "$(quoted env "JAX_COMPILATION_CACHE_DIR=$WORKDIR/programs" \
    "$WORKER" start nfnet_jax.experiments.train "${ARGS[@]}")"
log "$TPU_NAME is training in $WORKDIR; launch/watch.sh shows it."
