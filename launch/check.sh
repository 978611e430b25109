#!/usr/bin/env bash
# Checks the flags of training on this machine before a TPU is rented: names,
# values, and that the batch divides over the TPU's cores. If libtpu is
# installed, also that the step fits into memory, with the estimated chip-hours
# and, for PRICE_PER_CHIP_HOUR, the cost. The compilation takes minutes.
#
#   launch/check.sh [--dry_run] --config=f3
#
# create.sh and supervise.sh call it. CHECK=config leaves the compilation out,
# CHECK=none the whole check. Exits with 2 if training would refuse the flags.
source "$(dirname "$0")/lib.sh"

[[ $CHECK != none ]] || exit 0
cd "$LAUNCH/.." # --config=PATH is relative to the repository.
if [[ -z $DRY_RUN ]] && ! "$PYTHON" -c 'import nfnet_jax' 2>/dev/null; then
  log "The flags of training are not checked: PYTHON='$PYTHON' cannot import" \
    "nfnet_jax. Install it there with: pip install -c constraints.txt '.[plan]'"
  exit
fi

flags=(--accelerator_type="$ACCELERATOR_TYPE")
[[ $CHECK = plan ]] || flags+=(--noplan)
[[ -z $PRICE_PER_CHIP_HOUR ]] ||
  flags+=(--price_per_chip_hour="$PRICE_PER_CHIP_HOUR")
code=0
limited 0 "$PYTHON" -m nfnet_jax.experiments.check "${ARGS[@]}" \
  "${flags[@]}" || code=$?
[[ $code = [02] ]] ||
  log 'The check failed. CHECK=config leaves the compilation out, CHECK=none' \
    'the whole check.'
exit "$code"
