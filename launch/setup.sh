#!/usr/bin/env bash
# Installs the same commit and the same packages on every worker.
#
#   launch/setup.sh [--dry_run]
#
# Uncommitted changes are not copied. constraints.txt pins the packages.
source "$(dirname "$0")/lib.sh"
no_arguments

commit=$(resolved_commit)
root=$LAUNCH/..
[[ -z $(git -C "$root" status --porcelain -- ':!launch/settings.sh') ]] ||
  log 'Uncommitted changes are not copied.'

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
limited "$CALL_TIMEOUT" git -C "$root" archive --format=tar.gz \
  --output="$folder/nfnet_jax.tar.gz" "$commit"
log "Setting up every worker of $TPU_NAME with commit $commit."
tpus "$SETUP_TIMEOUT" tpu-vm scp "$folder/nfnet_jax.tar.gz" "$TPU_NAME:" \
  --worker=all
ssh_all "$SETUP_TIMEOUT" "rm -rf nfnet_jax/new && mkdir -p nfnet_jax/new && \
tar -xzf nfnet_jax.tar.gz -C nfnet_jax/new && \
nfnet_jax/new/launch/worker.sh setup $(quoted "$PYTHON_VERSION" "$UV_VERSION")"
log 'Every worker is set up.'
