#!/usr/bin/env bash
# Resumes training on a new TPU: waits until the TPU is ready, sets it up and
# starts training. Takes the same flags as launch/train.sh.
#
#   launch/resume.sh [--dry_run] --config=f3
source "$(dirname "$0")/lib.sh"
need WORKDIR
wait_until_ready
"$LAUNCH/setup.sh"
[[ -z $MOUNT_POINT ]] || "$LAUNCH/data.sh" mount
"$LAUNCH/train.sh" "${ARGS[@]}"
