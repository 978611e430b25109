#!/usr/bin/env bash
# Prepares a dataset here and copies it to DATA_DIR, or mounts DATA_DIR.
#
#   launch/data.sh [--dry_run] prepare imagenet2012 --manual_dir=tars
#   launch/data.sh [--dry_run] mount
#
# Preparing needs this package, and the disk space that a worker lacks.
# Mounting is by choice: training reads the bucket as well.
source "$(dirname "$0")/lib.sh"
need DATA_DIR

case ${ARGS[0]:-} in
  prepare)
    name=${ARGS[1]:-}
    [[ $name && $name != -* ]] || fail 2 'Say which dataset to prepare.'
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
  *) fail 2 "Say 'prepare DATASET' or 'mount'." ;;
esac
