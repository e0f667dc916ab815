"""Alternates `drumline bench train` with the same step in PyTorch and prints medians and their ratio.

    python tests/peers/compare_train.py DRUMLINE [--rounds 3] [--model gpt-10m] [--threads 2]
        [--precision f32|bf16] [--data 1]

Both sides run in turn on the same machine, so that a change of its speed hits both alike. With
`--data N` the peer is DistributedDataParallel over gloo with N processes (torch_ddp.py), and
`--threads` is of each rank. Needs: torch, in the Python that runs this script.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys


def last_json(command):
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    return json.loads(out[out.index("{") :])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drumline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="gpt-10m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--data", type=int, default=1)
    args = parser.parse_args()
    folder = pathlib.Path(__file__).parent
    shared = ["--threads", str(args.threads), "--steps"]
    ours = [
        args.drumline, "bench", "train", "--model", args.model, "--precision", args.precision,
        "--data", str(args.data), *shared, str(args.steps + 1), "--output", "json",
    ]
    if args.data > 1:
        theirs = [sys.executable, str(folder / "torch_ddp.py"), "--ranks", str(args.data)]
    else:
        theirs = [sys.executable, str(folder / "torch_train.py")]
    theirs += ["--preset", args.model, *shared, str(args.steps + 1)]
    if args.precision == "bf16":
        theirs.append("--bf16")
    seen, version = ([], []), None
    for _ in range(args.rounds):
        mine = last_json(ours)
        seen[0].append(next(f["value"] for f in mine["figures"] if f["name"] == "tokens"))
        other = last_json(theirs)
        seen[1].append(other["tokens_per_second"])
        version = other["version"]
    medians = [statistics.median(side) for side in seen]
    print(json.dumps({
        "model": args.model, "precision": args.precision, "threads": args.threads,
        "data": args.data, "rounds": args.rounds, "torch_version": version,
        "drumline": round(medians[0], 1), "torch": round(medians[1], 1),
        "ratio": round(medians[0] / medians[1], 3),
        "ratio_by_round": [round(a / b, 3) for a, b in zip(*seen)],
    }))


if __name__ == "__main__":
    main()
