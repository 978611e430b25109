#!/usr/bin/env bash
# Shows the log of every worker until training ends. Ctrl-C does not stop it.
#
#   launch/watch.sh [--dry_run]
source "$(dirname "$0")/lib.sh"
no_arguments
ssh_all 0 "$WORKER log 20"
report_cost 'still exists'
