"""python -m benchmarks.quickstart WORKDIR …: the quickstart's results, one run a row, as Markdown tables.

for seed in 0 1 2; do launch/quickstart.sh runs/seed$seed --config.seed=$seed; done
python -m benchmarks.quickstart runs/seed0 runs/seed1 runs/seed2
"""

import pathlib
import sys

from ard_jax.files import read_json


def main(workdirs: list[str]) -> None:
    runs = [read_json(pathlib.Path(workdir) / "report" / "results.json") for workdir in workdirs]
    for suffix, points, target in (("", "x0 points", "x0"), ("_noisy", "noisy points", "xt")):
        print(f"\n{points.capitalize()}, S = 4:\n")
        print("| seed | FD teacher | FD step distillation | FD ARD | degradation ratio | PSNR step | PSNR ARD |")
        print("|---|---|---|---|---|---|---|")
        for run in runs:
            if f"ard{suffix}" not in run:
                continue
            step, ard = run[f"step{suffix}"], run[f"ard{suffix}"]
            ratio = run["degradation_ratios"].get(target)
            print(
                f"| {run['config']['seed']} | {run['teacher']['fd']:.2f} | {step['fd']:.2f} | {ard['fd']:.2f} "
                f"| {f'{ratio:.1f}' if ratio else '–'} | {step['psnr']:.1f} | {ard['psnr']:.1f} |"
            )
    print("\n| seed | " + " | ".join(runs[0]["seconds"]) + " | sum |")
    print("|---" * (len(runs[0]["seconds"]) + 2) + "|")
    for run in runs:
        seconds = run["seconds"].values()
        print(f"| {run['config']['seed']} | " + " | ".join(f"{s:.0f}" for s in seconds) + f" | {sum(seconds):.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
