#!/usr/bin/env bash
# Runs on a worker, called by the other scripts. ~/nfnet_jax holds source/,
# venv/, and run/ with the log, the exit code and a lock held during a run.
#
#   worker.sh setup PYTHON UV | mount BUCKET FOLDER MOUNT_POINT
#   worker.sh start MODULE ARGS... | status | log LINES | stop SECONDS
set -euo pipefail
cd "$HOME/nfnet_jax"
mkdir -p run
host=$(hostname)
worker=w-${host##*-w-} # The hosts are named t1v-n-ID-w-NUMBER.

refuse() {
  echo "$worker $1" >&2
  exit 2
}

is_running() { ! flock --nonblock run/lock true; }

setup() {
  ! is_running || refuse 'is training. launch/stop.sh stops it.'
  rm -rf ready source
  mv new source
  # The image's Python is too old.
  python3 -m pip install --quiet --user "uv==$2"
  ~/.local/bin/uv venv --quiet --clear --python "$1" venv
  ~/.local/bin/uv pip install --quiet --python venv/bin/python \
    --constraint source/constraints.txt './source[train,tpu]'
  touch ready
}

mount_bucket() {
  ! mountpoint --quiet "$3" || return 0
  if ! command -v gcsfuse >/dev/null; then
    local google=https://packages.cloud.google.com/apt
    local key=/usr/share/keyrings/cloud.google.asc
    curl --silent --fail "$google/doc/apt-key.gpg" | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] $google gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A new worker first installs its own updates.
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse
  fi
  sudo install -d -o "$(id -un)" "$3"
  gcsfuse --implicit-dirs --only-dir "$2" -o ro "$1" "$3"
}

start() {
  [[ -e ready ]] || refuse 'is not set up. Run launch/setup.sh.'
  exec 9>run/lock # The run inherits it.
  flock --timeout 1 9 || refuse 'is already training.'
  rm -f run/exit_code
  echo "--- $(date --utc --iso-8601=seconds) $*" >>run/log
  setsid nohup source/launch/worker.sh run "$@" </dev/null >>run/log 2>&1 &
  echo $! >run/pid
}

run() {
  local code=0
  cd source # --config=PATH is relative to the repository.
  ../venv/bin/python -m "$@" || code=$?
  echo "$code" >../run/exit_code
}

status() {
  local state=idle
  if is_running; then
    state=running
  elif [[ ! -e ready ]]; then
    state=bare
  elif [[ -e run/exit_code ]]; then
    state=$(cat run/exit_code)
  elif [[ -e run/pid ]]; then
    state=lost
  fi
  echo "$worker $state"
}

log() {
  [[ ! -e run/pid ]] ||
    tail --lines="$1" --follow=name --pid="$(cat run/pid)" run/log |
    sed --unbuffered "s/^/$worker /"
  status
}

# Signals only the program: its child processes must serve it until it ends.
stop() {
  local pid
  pid=$(cat run/pid 2>/dev/null) || refuse 'has never trained.'
  pkill -TERM --parent "$pid" || true
  flock --timeout "$1" run/lock true || pkill -KILL --parent "$pid" || true
  status
}

verb=$1
shift
case $verb in
  mount) mount_bucket "$@" ;;
  setup | start | run | status | log | stop) "$verb" "$@" ;;
  *) refuse "has no command '$verb'." ;;
esac
