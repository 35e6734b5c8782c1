#!/usr/bin/env bash
# Runs a stage on every worker of a Cloud TPU pod slice, and again after each preemption, until it is done.
#   launch/tpu_pod.sh STAGE --config FILE --workdir gs://BUCKET/DIR [--config.key=value …] [FLAG …]
#   launch/tpu_pod.sh --stop | --delete [FLAG …]
# It makes the TPU unless it is there, copies this working tree to every worker, installs, starts the stage in the
# background and shows worker 0's log. If this script or its connection ends, the stage runs on, and the same command
# takes its log up again.
#   --name NAME              TPU_NAME               of the TPU and of its queued resource (ard-jax)
#   --type TYPE              TPU_TYPE               v5litepod-16, v6e-64, v5p-32, v4-32, … (v5litepod-16)
#   --runtime VERSION        TPU_RUNTIME            of the software on it (by type)
#   --zone ZONE              TPU_ZONE               (gcloud's compute/zone)
#   --project PROJECT        TPU_PROJECT            (gcloud's)
#   --network NETWORK        TPU_NETWORK            (default)
#   --subnetwork NETWORK     TPU_SUBNETWORK         (the network's own)
#   --service-account EMAIL  TPU_SERVICE_ACCOUNT    must read and write the bucket (Compute Engine's default account)
#   --spot                   TPU_SPOT=1             cheaper, and may be preempted
#   --queued                 TPU_QUEUED=1           waits in line as a queued resource; otherwise asks until it is given
#   --restarts COUNT         TPU_RESTARTS           after preemptions, at most (100)
#   --poll SECONDS           TPU_POLL               between looks at the TPU (30)
#   --delete-when-done       TPU_DELETE_WHEN_DONE=1 deletes the TPU when the stage has ended, well or badly
#   --delete                 deletes the TPU and what runs on it
#   --stop                   asks the stage to save its state and end, and keeps the TPU
#   --dry-run                prints every command that it would run, and runs none
# Exit status: 0 done; the stage's own if it failed, which is not tried again (2 is a user's mistake); 1 if the TPU
# cannot be had or reached, or the stage was stopped by hand; 2 for a mistake in this command; 130 if interrupted.
# gcloud reaches several workers only with its key in an agent: ssh-add ~/.ssh/google_compute_engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ------------------------------------------------------------------------------------------------------------ settings

name=${TPU_NAME:-ard-jax}
type=${TPU_TYPE:-v5litepod-16}
runtime=${TPU_RUNTIME:-}
zone=${TPU_ZONE:-}
project=${TPU_PROJECT:-}
network=${TPU_NETWORK:-}
subnetwork=${TPU_SUBNETWORK:-}
service_account=${TPU_SERVICE_ACCOUNT:-}
spot=${TPU_SPOT:-0}
queued=${TPU_QUEUED:-0}
restarts=${TPU_RESTARTS:-100}
poll=${TPU_POLL:-30}
delete_when_done=${TPU_DELETE_WHEN_DONE:-0}
dry_run=0
action=run
config='' workdir=''
stage=()

say() {
  echo "tpu_pod: $*" >&2
}

refuse() { # a user's mistake, in one sentence
  say "$*"
  exit 2
}

parse() {
  local flag value
  while (($#)); do
    flag=${1%%=*}
    case "$flag" in
      -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --delete | --stop | --spot | --queued | --delete-when-done | --dry-run)
        [[ "$1" == "$flag" ]] || refuse "$flag takes no value: give it alone."
        case "$flag" in
          --delete | --stop) action=${flag#--} ;;
          *) set_to "$flag" 1 ;;
        esac
        ;;
      --name | --type | --runtime | --zone | --project | --network | --subnetwork | --service-account | --restarts | \
        --poll | --config | --workdir)
        value=${1#*=}
        if [[ "$1" == "$flag" ]]; then
          value=${2:-}
          (($# == 1)) || shift
        fi
        [[ -n "$value" ]] || refuse "$flag lacks its value: give $flag VALUE."
        set_to "$flag" "$value"
        ;;
      --config.* | --noconfig.*)
        stage+=("$1")
        if [[ "$1" == "$flag" && $# -gt 1 && "$2" != -* ]]; then # its value is the next word
          stage+=("$2")
          shift
        fi
        ;;
      -*) refuse "there is no flag $flag: --help lists them, and settings of the stage are given as --config.key=value." ;;
      *)
        [[ ${#stage[@]} == 0 ]] || refuse "'$1' is not understood: give the stage first, then flags."
        stage=("$1")
        ;;
    esac
    shift
  done
}

set_to() { # FLAG VALUE
  local variable=${1#--}
  printf -v "${variable//-/_}" %s "$2"
}

check() {
  ((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] >= 44)) ||
    refuse "bash $BASH_VERSION is too old, and 4.4 is needed: on macOS, brew install bash."
  [[ "$name" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "--name '$name' cannot be a TPU's: use small letters, digits and hyphens, a letter first."
  [[ "$restarts" =~ ^[0-9]+$ ]] || refuse "--restarts is '$restarts': give a whole number."
  [[ "$poll" =~ ^[0-9]+$ ]] || refuse "--poll is '$poll': give whole seconds."
  [[ "$spot$queued$delete_when_done" =~ ^[01]{3}$ ]] ||
    refuse "TPU_SPOT, TPU_QUEUED and TPU_DELETE_WHEN_DONE are 1 or 0: set them so, or use the flags."
  if [[ "$action" != run ]]; then
    [[ ${#stage[@]} == 0 ]] || refuse "--$action takes no stage: give it alone, with the flags that name the TPU."
    return
  fi
  [[ ${#stage[@]} != 0 && "${stage[0]}" != -* ]] || refuse "no stage is given: launch/tpu_pod.sh STAGE --config FILE …"
  case "${stage[0]}" in
    convert | export) refuse "'${stage[0]}' needs one machine and no pod: run python -m ard_jax ${stage[0]}." ;;
  esac
  [[ -f "ard_jax/stages/${stage[0]}.py" ]] ||
    refuse "there is no stage '${stage[0]}': python -m ard_jax --help lists them."
  [[ -n "$config" ]] || refuse "--config is missing: give --config FILE and --workdir gs://BUCKET/DIR."
  [[ -n "$workdir" ]] || refuse "--workdir is missing: give --config FILE and --workdir gs://BUCKET/DIR."
  case "${config%%:*}" in
    /* | .. | ../* | */../*) refuse "the config '${config%%:*}' must go with the code: name one in this repository." ;;
  esac
  [[ -f "${config%%:*}" ]] || refuse "the config file '${config%%:*}' is not there: name one, such as configs/digits.py."
  if [[ "$workdir" != gs://* ]]; then
    [[ ! "${type##*-}" =~ ^[0-9]+$ ]] || ((10#${type##*-} <= 8)) || # one worker has 8 at most, chips or cores by type
      refuse "the workers of a $type do not see each other's disks, which $workdir lies on: give --workdir gs://BUCKET/DIR."
    say "what the stage makes in $workdir lies on the workers' own disks and goes when they do: give gs://BUCKET/DIR."
  fi
  # Workers may come minutes apart, as one boots anew or waits for a bucket; a setting of the user's comes after this one.
  stage=("${stage[0]}" --config "$config" --workdir "$workdir" --config.run.join_timeout=1200 "${stage[@]:1}")
  if [[ -z "$runtime" ]]; then # https://cloud.google.com/tpu/docs/runtimes
    case "$type" in
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      v5e-* | v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      *) refuse "no runtime is known for a TPU of type '$type': give --runtime too, or see launch/xpk.md for GKE." ;;
    esac
  fi
}

# ------------------------------------------------------------------------------------------------------------ commands

quote() { # the words as any shell reads them back
  local word rest out separator='' mark="'"
  for word; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      out=$word
    else
      rest=$word out=$mark
      while [[ "$rest" == *"$mark"* ]]; do
        out=$out${rest%%"$mark"*}"'\\''"
        rest=${rest#*"$mark"}
      done
      out=$out$rest$mark
    fi
    printf '%s%s' "$separator" "$out"
    separator=' '
  done
}

call() { # runs a command, its errors kept for `complaint`; with --dry-run, prints it
  if ((dry_run)); then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@" </dev/null 2>"$scratch/errors"
  fi
}

complaint() { # what the last command said was wrong, short enough for a sentence
  local line
  line=$(grep -m 1 ERROR "$scratch/errors" || tail -n 1 "$scratch/errors")
  echo "${line:0:300}"
}

tpus() {
  call gcloud compute tpus "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"} --quiet
}

worker=ard_jax_pod/code/launch/tpu_worker.sh

ssh_to() { # WORKERS COMMAND; a connection that has died is noticed in a minute
  tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4
}

remote() { # WORKERS VERB [ARGUMENT …]
  ssh_to "$1" "$(quote bash "$worker" "${@:2}")"
}

# ----------------------------------------------------------------------------------------------------------- the TPU

describe() { # KIND KEY: prints the state, or ABSENT; fails if gcloud cannot tell
  local found
  if found=$(tpus "$1" describe "$name" "--format=value($2)"); then
    echo "${found:-UNKNOWN}"
  elif grep -q NOT_FOUND "$scratch/errors"; then
    echo ABSENT
  else
    return 1
  fi
}

look() { # sets `state`: that of the queued resource until it is active, then that of the TPU
  queue=ABSENT
  if ((queued)); then
    queue=$(describe queued-resources state.state) || return 1
    if [[ "$queue" != ABSENT && "$queue" != ACTIVE ]]; then
      state=$queue
      return
    fi
  fi
  state=$(describe tpu-vm state) || return 1
  if [[ "$queue" == ACTIVE && "$state" == ABSENT ]]; then
    state=SUSPENDING # on its way: an active resource has a TPU
  fi
}

create() {
  local options=("--accelerator-type=$type")
  ((spot)) && options+=(--spot)
  [[ -n "$network" ]] && options+=("--network=$network")
  [[ -n "$subnetwork" ]] && options+=("--subnetwork=$subnetwork")
  [[ -n "$service_account" ]] && options+=("--service-account=$service_account")
  if ((queued)); then
    tpus queued-resources create "$name" "--node-id=$name" "--runtime-version=$runtime" "${options[@]}"
  else
    tpus tpu-vm create "$name" "--version=$runtime" "${options[@]}"
  fi
}

remove() { # after `look`
  if [[ "$queue" != ABSENT ]]; then
    tpus queued-resources delete "$name" --force || grep -q NOT_FOUND "$scratch/errors"
  else
    tpus tpu-vm delete "$name" || grep -q NOT_FOUND "$scratch/errors"
  fi
}

bring_up() { # returns when the TPU is ready
  while :; do
    if ! look; then
      ((reached)) || refuse "gcloud cannot be asked about $name ($(complaint)): see to its login, --project and --zone."
      stumble "gcloud does not answer"
      continue
    fi
    reached=1
    [[ "$state" == "$said" ]] || say "$name is $state."
    said=$state
    case "$state" in
      READY) return ;;
      ABSENT)
        say "creating $name, a $type."
        if ! create >/dev/null; then
          if grep -qiE 'capacity|stockout|currently unavailable' "$scratch/errors"; then
            say "there is none to be had ($(complaint)): asking again every $poll seconds."
            sleep "$poll"
          elif ! grep -q ALREADY_EXISTS "$scratch/errors"; then
            say "$name cannot be created: $(complaint)"
            exit 1
          fi
        fi
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        [[ "$state" != FAILED ]] || say "gcloud compute tpus queued-resources describe $name says why."
        again "$name is $state"
        remove >/dev/null || stumble "$name cannot be deleted"
        ;;
      STOPPED | STOPPING) refuse "$name is stopped: start it with gcloud compute tpus tpu-vm start, or use --delete." ;;
      *) sleep "$poll" ;; # on its way up or down
    esac
  done
}

# ---------------------------------------------------------------------------------------------------------- the stage

pack() { # once: what starts again after a preemption is the code that was started first, whatever has changed here
  local file
  [[ ! -e "$scratch/code.tar.gz" ]] || return 0
  # Not only what is committed: the experiment that runs is the one that lies here, new files included.
  call git ls-files -z --cached --others --exclude-standard >"$scratch/listed" || return 1
  while IFS= read -r -d '' file; do
    if [[ -e "$file" || -L "$file" ]]; then # and not deleted here
      printf '%s\0' "$file"
    fi
  done <"$scratch/listed" >"$scratch/files"
  if call git check-ignore --quiet "${config%%:*}"; then # such as the one that `convert` writes
    printf '%s\0' "${config%%:*}" >>"$scratch/files"
  fi
  COPYFILE_DISABLE=1 call tar -czf "$scratch/code.tar.gz" --null -T "$scratch/files" # macOS would add files of its own
}

copy() {
  tpus tpu-vm scp "$scratch/code.tar.gz" "$name:ard_jax_pod.tar.gz" --worker=all >/dev/null
}

install() {
  ssh_to all "mkdir -p ard_jax_pod && cd ard_jax_pod && rm -rf code.new && mkdir code.new && \
tar -xzf ../ard_jax_pod.tar.gz -C code.new && bash code.new/launch/tpu_worker.sh install" >/dev/null
}

probing() { # the command that a worker answers with its state
  echo "if [ -e $worker ]; then $(quote bash "$worker" state "${stage[@]}"); else echo pod: idle; fi"
}

probe() { # sets `states`, a line a worker
  states=$(ssh_to all "$(probing)") && states=$(grep '^pod: ' <<<"$states")
}

some() { # whether a worker is in the state
  grep -qE "^pod: $1" <<<"$states"
}

all() { # whether every worker is
  ! grep -qvE "^pod: $1" <<<"$states"
}

begin() { # starts the stage, unless it runs already
  probe || return 1
  if some busy; then
    refuse "$name runs another command ($(sed -n 's/^pod: busy //p' <<<"$states" | head -n 1)): wait for it, or --stop it."
  fi
  if all running; then
    say "the stage runs already on $name: here is its log."
    return
  fi
  if some running; then # the rest of a start that failed
    remote all stop 30 || return 1
  fi
  if ! pack; then
    say "the code cannot be packed: $(complaint)"
    exit 1
  fi
  say "copying the code to $name."
  copy || return 1
  say "installing."
  if ! install; then
    installs=$((installs + 1))
    if ((installs == 2)); then
      say "installing on $name failed twice: $(complaint)"
      finish 1
    fi
    return 1
  fi
  installs=0
  if [[ "${stage[*]}" == *gs://* ]]; then # before any worker starts: it takes minutes where a machine updates itself
    remote all mount_buckets || return 1
  fi
  remote all start "${stage[@]}" || return 1
  trouble=0
  say "started: ${stage[*]}"
}

show() { # SECONDS: worker 0's log from where it was left, for so long at most
  remote 0 follow "$(($(wc -c <"$scratch/log") + 1))" "$1" | tee -a "$scratch/log" || true
}

watch() { # shows the log until the stage has ended, and sets `outcome`: its status, or a word
  local uneven=0
  : >"$scratch/log"
  while :; do
    show "$((10 * poll))" # no longer at once, in case another worker ends alone
    if ! probe; then
      if look; then
        case "$state" in
          PREEMPTED | TERMINATED | SUSPENDING | SUSPENDED | FAILED | STOPPED | STOPPING) outcome=gone && return ;;
          ABSENT) outcome=deleted && return ;;
        esac
      fi
      stumble "$name does not answer"
      continue
    fi
    trouble=0
    if some busy; then
      outcome=busy
    elif some stopped && { ! some running || ((++uneven > 3)); }; then # the others save yet
      outcome=stopped
    elif some 'lost|^pod: idle'; then
      outcome=lost
    elif some 'exited [^0]' && { all exited || ((++uneven > 3)); }; then # workers fail one after another
      outcome=$(worst)
    elif all exited; then
      outcome=0
    else
      if some 'exited|^pod: stopped'; then # and the others soon
        sleep "$poll"
      fi
      continue
    fi
    show 0 # what it said since
    return
  done
}

worst() { # of the workers' statuses, the one that says most: 2 a user's mistake, then 42 preempted and saved, then others
  local statuses
  statuses=$(sed -n 's/^pod: exited //p' <<<"$states" | grep -v '^0$')
  grep -m 1 -x 2 <<<"$statuses" || grep -m 1 -x 42 <<<"$statuses" || head -n 1 <<<"$statuses"
}

# ------------------------------------------------------------------------------------------------------------ the run

said=''    # the state that was told last
reached=0  # whether gcloud has ever answered
trouble=0  # how often it or the TPU has not, since it last did
installs=0 # how often in a row installing failed

stumble() { # bears with an hour or so of no network
  trouble=$((trouble + 1))
  ((trouble > 1)) || say "$1 ($(complaint)): asking again every $poll seconds."
  if ((trouble == 100)); then
    say "$1 ($(complaint)): what runs there runs on, and the same command takes it up again."
    exit 1
  fi
  sleep "$poll"
}

again() {
  if ((restarts == 0)); then
    say "$1, and no restart is left: the same command goes on from what is saved."
    finish 1
  fi
  restarts=$((restarts - 1))
  say "$1: starting again."
}

finish() { # STATUS
  if ((delete_when_done)); then
    say "deleting $name."
    if ! { look && { [[ "$state" == ABSENT ]] || remove >/dev/null; }; }; then
      say "$name could not be deleted ($(complaint)), and costs money as long as it is there: use --delete."
    fi
  fi
  exit "$1"
}

run() {
  while :; do
    bring_up
    if ! begin; then
      stumble "$name does not answer"
      continue
    fi
    watch
    if [[ "$outcome" == lost || "$outcome" =~ ^[1-9] ]]; then
      sleep "$poll" # what takes the TPU may end some workers before it shows
      if look; then
        case "$outcome $state" in
          *ABSENT | *DELETING) outcome=deleted ;;
          lost* | 42* | *READY) ;;
          *) outcome=gone ;; # that is why the stage failed
        esac
      fi
    fi
    case "$outcome" in
      0)
        say "done."
        finish 0
        ;;
      42)
        again "the stage was preempted and has saved its state"
        ;;
      lost) again "the stage ended on some worker and left no status" ;;
      gone) ;; # `bring_up` says so
      deleted)
        say "$name was deleted by somebody else: the same command goes on from what is saved."
        exit 1
        ;;
      stopped)
        say "the stage was stopped: the same command goes on from what is saved."
        exit 1
        ;;
      busy) refuse "somebody else has started another command on $name: wait for it, or --stop it." ;;
      *)
        remote all complain >&2 || true
        remote all stop 30 || true # the others wait for the one that failed
        say "the stage failed with status $outcome."
        finish "$outcome"
        ;;
    esac
  done
}

ask_to_stop() {
  ssh_to all "if [ -e ard_jax_pod/run/lock ]; then touch ard_jax_pod/run/stopped && bash $worker stop 300; fi"
}

stop() {
  look || refuse "gcloud cannot be asked about $name ($(complaint)): see to its login, --project and --zone."
  [[ "$state" == READY ]] || refuse "$name is $state: there is nothing to stop."
  if ! ask_to_stop; then
    say "the stage on $name could not be stopped: $(complaint)"
    exit 1
  fi
  say "stopped; $name is still there, and costs money until --delete."
}

delete() {
  look || refuse "gcloud cannot be asked about $name ($(complaint)): see to its login, --project and --zone."
  if [[ "$state" == ABSENT ]]; then
    say "there is no $name."
  elif ! remove >/dev/null; then
    say "$name could not be deleted: $(complaint)"
    exit 1
  fi
}

rehearse() { # what `call` prints of a run in which each thing happens once, as a script
  echo "# is it there?"
  ((queued)) && describe queued-resources state.state >/dev/null
  describe tpu-vm state >/dev/null
  queue=ABSENT
  ((queued)) && queue=ACTIVE
  case "$action" in
    stop) ask_to_stop ;;
    delete) remove ;;
    run)
      echo "# if not:"
      create
      echo "# does the stage run there already?"
      ssh_to all "$(probing)"
      echo "# if not:"
      pack
      copy
      install
      [[ "${stage[*]}" != *gs://* ]] || remote all mount_buckets
      remote all start "${stage[@]}"
      echo "# its log, and whether it has ended, until it has:"
      remote 0 follow 1 "$((10 * poll))"
      ssh_to all "$(probing)"
      echo "# after a preemption, and then from the top:"
      remove
      if ((delete_when_done)); then
        echo "# when it has ended:"
        remove
      fi
      ;;
  esac
}

interrupted() {
  say "interrupted: what was started on $name runs on; the same command shows its log, --stop and --delete end it."
  exit 130
}

parse "$@"
check
exec 3>&1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if ((dry_run)); then
  rehearse
  exit 0
fi
command -v gcloud >/dev/null ||
  refuse "gcloud is not there: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install) and log in."
trap interrupted INT TERM
"$action"
