#!/usr/bin/env bash
# Prepares a dataset on this machine and copies it to DATA_DIR, or mounts
# DATA_DIR on every worker.
#
#   launch/data.sh [--dry_run] prepare imagenet2012 --manual_dir=tars
#   launch/data.sh [--dry_run] mount
#
# Preparing needs this package, and more disk space than a worker has.
# Mounting is optional: training can also read the bucket directly.
source "$(dirname "$0")/lib.sh"
need DATA_DIR

case ${ARGS[0]:-} in
  prepare)
    name=${ARGS[1]:-}
    [[ $name && $name != -* ]] || fail 2 'Name the dataset to prepare.'
    limited 0 "$PYTHON" -m nfnet_jax.experiments.prepare "${ARGS[@]:1}" \
      --data_dir="$DATASETS"
    name=${name%%:*}
    limited 0 gcloud storage rsync --recursive "$DATASETS/$name" \
      "$DATA_DIR/$name"
    ;;
  mount)
    need MOUNT_POINT
    bucket=${DATA_DIR#gs://}
    folder=${bucket#*/}
    [[ $bucket = */?* ]] || fail 2 "DATA_DIR='$DATA_DIR' names no folder."
    ssh_all "$SETUP_TIMEOUT" \
      "$(quoted "$WORKER" mount "${bucket%%/*}" "$folder" "$MOUNT_POINT")"
    ;;
  *) fail 2 "Pass 'prepare DATASET' or 'mount'." ;;
esac
