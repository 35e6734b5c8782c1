#!/usr/bin/env bash
# The half of tpu_pod.sh that runs on a worker of the pod, which calls it there:
#   tpu_worker.sh install                 makes code.new, the copy that has just arrived, the one that runs
#   tpu_worker.sh mount_buckets           shows Cloud Storage's buckets as folders, unless it does already
#   tpu_worker.sh start STAGE [FLAG …]    starts the stage in the background, unless one is running
#   tpu_worker.sh state [STAGE FLAG …]    says in one line how it stands: idle, running, busy (with another command),
#                                         exited STATUS, stopped (by hand) or lost (it ended and nothing says how)
#   tpu_worker.sh follow BYTE SECONDS     prints the stage's log from that byte on, until it ends or the time is over
#   tpu_worker.sh complain                prints the end of the log of a stage that failed
#   tpu_worker.sh stop SECONDS            asks the stage to save and end, and kills it after that time
# Everything lies in ~/ard_jax_pod: code/, buckets/ where Cloud Storage is mounted, and run/ with the stage's command,
# log, pid, exit status and lock.
set -euo pipefail

home=$HOME/ard_jax_pod
run=$home/run

install() {
  cd "$home"
  if [[ -e code/.venv/installed-requirements.txt ]]; then # otherwise it was cut off, and is made anew
    mv code/.venv code.new/.venv
  fi
  rm -rf code
  mv code.new code
  cd code
  if [[ ! -x .venv/bin/python ]]; then
    # The images of TPU VMs have Python 3.10; and every worker, now and after a preemption, has the same one this way.
    export PIP_BREAK_SYSTEM_PACKAGES=1 # newer images protect their Python from pip
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
    export PYTHON
  fi
  # shellcheck source=launch/env.sh disable=SC1091 # it lies there on the worker
  source launch/env.sh
  # No --upgrade: requirements.txt has just brought the newest jax, and a run that resumes here shall keep its own.
  "$python" -m pip install --quiet --disable-pip-version-check "jax[tpu]"
}

start() {
  mkdir -p "$run"
  local arguments=("${@//gs:\/\//$home/buckets/}")
  # Whoever holds the lock is the stage: it inherits it, and the kernel takes it back when the last of its processes is
  # gone, so that neither two that start at once nor a pid that a reboot has given to another can be mistaken.
  exec 9>"$run/lock"
  if ! flock --timeout 2 9; then
    return # it runs already
  fi
  rm -f "$run"/{command,exit,stopped,pid}
  if [[ -e "$run/log" ]]; then
    mv "$run/log" "$run/log.before"
  fi
  words "$@" >"$run/command.new"
  mv "$run/command.new" "$run/command"
  cd "$home/code"
  # Process 0 listens where Cloud TPU's own firewall rule lets the others in; jax's port since 0.8.1 is not among them
  # (https://github.com/jax-ml/jax/issues/35905).
  export JAX_COORDINATOR_PORT=${JAX_COORDINATOR_PORT:-8476}
  # The stage outlives the ssh connection that starts it: in a session of its own, and until it has that, deaf to its end.
  trap '' HUP
  # shellcheck disable=SC2016 # for the inner shell to expand
  setsid bash -c '
    run=$1
    trap : TERM # the stage saves and ends, and this shell writes how
    status=0
    bash launch/stage.sh "${@:2}" || status=$?
    echo "$status" >"$run/exit.new"
    mv "$run/exit.new" "$run/exit"
  ' ard_jax "$run" "${arguments[@]}" >"$run/log" 2>&1 </dev/null &
  echo "$!" >"$run/pid" # of the group too
}

mount_buckets() {
  if mountpoint --quiet "$home/buckets"; then
    return
  fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    # A machine that has just started is often busy updating itself.
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y gcsfuse >/dev/null
  fi
  mkdir -p "$home/buckets"
  # Without a bucket's name, gcsfuse shows each bucket as a folder. Hosts must see each other's files at once, hence no
  # cache of names; finished checkpoints are renamed folders, which gcsfuse refuses by default.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 "$home/buckets" >/dev/null
}

is_running() {
  [[ -e "$run/lock" ]] && ! flock --shared --nonblock "$run/lock" true
}

words() { # the arguments, quoted, as one line
  printf '%q ' "$@"
  echo
}

state() {
  local command
  if is_running; then
    command=$(cat "$run/command" 2>/dev/null || true) # empty in the moment before it is known
    if [[ -z "$command" || "$command" == "$(words "$@")" ]]; then
      echo "pod: running"
    else
      echo "pod: busy $command"
    fi
  elif [[ -e "$run/stopped" ]]; then
    echo "pod: stopped"
  elif [[ -e "$run/exit" ]]; then
    echo "pod: exited $(cat "$run/exit")"
  elif [[ -e "$run/command" ]]; then
    echo "pod: lost"
  else
    echo "pod: idle"
  fi
}

follow() {
  local from=$1 end=$((SECONDS + $2)) size ended
  while [[ -e "$run/log" ]]; do
    ended=true
    if is_running; then # asked before the log is read, so that its last words are not missed
      ended=false
    fi
    size=$(wc -c <"$run/log")
    if ((size >= from)); then
      tail -c "+$from" "$run/log" | head -c "$((size - from + 1))" || true # the log may have grown since
      from=$((size + 1))
    fi
    if [[ $ended == true ]] || ((SECONDS >= end)); then
      break
    fi
    sleep 1
  done
}

complain() {
  if [[ -e "$run/exit" && "$(cat "$run/exit")" != 0 ]]; then
    tail -n 20 "$run/log" | sed "s/^/$(hostname): /"
  fi
}

stop() {
  local end=$((SECONDS + $1)) group
  is_running || return 0
  group=$(cat "$run/pid")
  pkill -TERM -P "$group" || true # stage.sh; its parent waits to write how it ended
  while is_running && ((SECONDS < end)); do
    sleep 0.2
  done
  if is_running; then
    kill -KILL -- "-$group"
  fi
}

"$@"
