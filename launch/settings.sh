# shellcheck shell=bash disable=SC2034
# Settings of launch/*.sh. Edit them, or override any from the environment, as
# in ZONE=europe-west4-a launch/create.sh.

# Where and what. The first three have no default.
: "${PROJECT_ID:=}"
: "${ZONE:=}" # One that has the accelerator.
: "${TPU_NAME:=}"
: "${ACCELERATOR_TYPE:=v3-128}"
: "${RUNTIME_VERSION:=}"       # The generation's own if empty.
: "${PROVISIONING:=on_demand}" # Or spot, queued, queued_spot.
: "${VALID_UNTIL:=24h}"        # A queued request expires after this.
: "${CREATE_FLAGS:=}"          # More for gcloud, as in '--reserved'.

# What runs there.
: "${WORKDIR:=}"     # gs://BUCKET/runs/NAME: no default, needed to train.
: "${DATA_DIR:=}"    # gs://BUCKET/datasets: what training reads.
: "${MOUNT_POINT:=}" # If set, workers mount DATA_DIR here and read that.
: "${COMMIT:=HEAD}"  # All workers run this commit.
: "${PYTHON_VERSION:=3.12}"
: "${UV_VERSION:=0.13.9}" # Installs that Python on the workers.

# What data.sh prepares with, and where, on this machine.
: "${PYTHON:=.venv/bin/python}"
: "${DATASETS:=datasets}"

# Seconds.
: "${CALL_TIMEOUT:=300}"
: "${CREATE_TIMEOUT:=3600}"
: "${SETUP_TIMEOUT:=1800}"
: "${READY_TIMEOUT:=90000}"    # Waiting in the queue included.
: "${STOP_TIMEOUT:=600}"       # What saving may take.
: "${STRAGGLER_TIMEOUT:=600}"  # Workers left over by one that ended.
: "${POLL_SECONDS:=60}"
: "${RETRY_SECONDS:=10}" # Doubles from failure to failure, up to ...
: "${MAX_RETRY_SECONDS:=900}"
: "${RETRIES:=50}" # ... and so many failures in a row end supervise.sh.
