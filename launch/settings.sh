# shellcheck shell=bash disable=SC2034
# Settings of launch/*.sh. Edit them here, or override any of them in the
# environment: ZONE=europe-west4-a launch/create.sh.

# The TPU. The first three settings have no default.
: "${PROJECT_ID:=}"
: "${ZONE:=}" # A zone that has the accelerator.
: "${TPU_NAME:=}"
: "${ACCELERATOR_TYPE:=v3-128}"
: "${RUNTIME_VERSION:=}"       # Default: depends on the accelerator.
: "${PROVISIONING:=on_demand}" # Or spot, queued, queued_spot.
: "${VALID_UNTIL:=24h}"        # Lifetime of a queued request.
: "${CREATE_FLAGS:=}"          # Further flags for gcloud, such as --reserved.

# The run.
: "${WORKDIR:=}"     # gs://BUCKET/runs/NAME; required for training.
: "${DATA_DIR:=}"    # gs://BUCKET/datasets, which training reads.
: "${MOUNT_POINT:=}" # If set, workers mount DATA_DIR here and read it here.
: "${COMMIT:=HEAD}"  # All workers run this commit.
: "${PYTHON_VERSION:=3.12}"
: "${UV_VERSION:=0.13.9}" # uv installs that Python on the workers.

# On this machine: the Python that checks flags and prepares data, and the
# folder for prepared data.
: "${PYTHON:=.venv/bin/python}"
: "${DATASETS:=datasets}"

# What is checked before a TPU is rented: plan (also compiles the training step,
# which takes minutes), config (only the flags) or none.
: "${CHECK:=plan}"
: "${PRICE_PER_CHIP_HOUR:=}" # If set, the estimated cost is printed.
: "${DELETE_WHEN_DONE:=0}"   # 1: supervise.sh deletes the TPU at the end.

# Seconds.
: "${CALL_TIMEOUT:=300}"
: "${CREATE_TIMEOUT:=3600}"
: "${SETUP_TIMEOUT:=1800}"
: "${READY_TIMEOUT:=90000}"    # Includes the time in the queue.
: "${STOP_TIMEOUT:=600}"       # For saving a checkpoint.
: "${STRAGGLER_TIMEOUT:=600}"  # For workers that still run after one has ended.
: "${POLL_SECONDS:=60}"
: "${RETRY_SECONDS:=10}" # Doubles after every failure, up to the maximum.
: "${MAX_RETRY_SECONDS:=900}"

: "${RETRIES:=50}" # Failures in a row after which supervise.sh gives up.
