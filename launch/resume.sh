#!/usr/bin/env bash
# Resumes training on a TPU that was created anew: waits for it, sets it up and
# starts training, with the flags with which training was started.
#
#   launch/resume.sh [--dry_run] --config=f3
source "$(dirname "$0")/lib.sh"
need WORKDIR
wait_until_ready
"$LAUNCH/setup.sh"
[[ -z $MOUNT_POINT ]] || "$LAUNCH/data.sh" mount
"$LAUNCH/train.sh" "${ARGS[@]}"
