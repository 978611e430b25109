#!/usr/bin/env bash
# Makes training save and stop on every worker; launch/train.sh resumes it.
#
#   launch/stop.sh [--dry_run]
source "$(dirname "$0")/lib.sh"
no_arguments
ssh_all $((STOP_TIMEOUT + CALL_TIMEOUT)) "$WORKER stop $STOP_TIMEOUT"
report_cost 'still exists'
