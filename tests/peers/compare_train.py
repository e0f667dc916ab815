"""Alternates `drumline bench train` with the same step in PyTorch and prints medians and their ratio.

Usage: compare_train.py DRUMLINE_BINARY [ROUNDS] [MODEL] [THREADS]

Both sides run in turn on the same machine, so that a change of its speed hits both alike.
Needs: torch, in the Python that runs this script.
"""

import json
import pathlib
import statistics
import subprocess
import sys


def last_json(command):
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out[out.index("{") :])


def main():
    binary = sys.argv[1]
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    model = sys.argv[3] if len(sys.argv) > 3 else "gpt-10m"
    threads = sys.argv[4] if len(sys.argv) > 4 else "2"
    peer = pathlib.Path(__file__).with_name("torch_train.py")
    ours, theirs = [], []
    for _ in range(rounds):
        mine = last_json(
            [binary, "bench", "train", "--model", model, "--threads", threads, "--steps", "7", "--output", "json"]
        )
        ours.append(next(f["value"] for f in mine["figures"] if f["name"] == "tokens"))
        other = last_json([sys.executable, str(peer), "--preset", model, "--threads", threads, "--steps", "6"])
        theirs.append(other["tokens_per_second"])
    result = {
        "model": model,
        "threads": int(threads),
        "rounds": rounds,
        "drumline": round(statistics.median(ours), 1),
        "torch": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
        "ratio_by_round": [round(a / b, 3) for a, b in zip(ours, theirs)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
