#!/usr/bin/env bash
# Coloured pictures from words on a laptop's CPU: the shipped teacher and its student of four calls draw what captions
# say; then students of two calls are distilled from the teacher's own trajectories, by ARD and by step distillation, and
# all are measured and shown, in some twenty minutes after the first pictures.
#   launch/emoji.sh [WORKDIR] [--prompt "woman astronaut dark skin tone"] … [--config.key=value …]
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

workdir=runs/emoji
if [[ $# -gt 0 && "$1" != --* ]]; then
  workdir=$1
  shift
fi
# never empty, which in macOS's bash 3.2 would be an error
draw=(-m examples.draw_emoji)
flags=(--workdir "$workdir")
while [[ $# -gt 0 ]]; do
  case "$1" in
    --prompt)
      draw+=(--prompt "${2:?--prompt needs words}")
      shift 2
      ;;
    --prompt=*)
      draw+=(--prompt "${1#--prompt=}")
      shift
      ;;
    --config.*)
      flags+=("$1")
      shift
      ;;
    *)
      echo "error: $1 is no flag of launch/emoji.sh: give --prompt TEXT or --config.KEY=VALUE." >&2
      exit 2
      ;;
  esac
done
started=$SECONDS
"$python" "${draw[@]}" --out "$workdir/first.png"
echo "emoji: first pictures after $((SECONDS - started)) seconds; look at $workdir/first.png"
"$python" -m ard_jax convert --source pipelines/openmoji-teacher --workdir "$workdir"
"$python" -m ard_jax convert --source pipelines/openmoji-ard --workdir "$workdir" --name shipped
config=configs/openmoji.py:budget=quick,steps=2,target=xt,student
"$python" -m ard_jax run captions,trajectories --config "$config=ard" "${flags[@]}" \
  "then" distill --config "$config=ard" "${flags[@]}" \
  beside distill --config "$config=step" "${flags[@]}" \
  "then" "sample,evaluate,report" --config "$config=ard" "${flags[@]}" \
  "--config.sample.models=('teacher', 'ard', 'step', 'shipped')"
"$python" "${draw[@]}" --out "$workdir/all.png" --workdir "$workdir"
echo "emoji: $((SECONDS - started)) seconds; open $workdir/report/index.html"
