"""Alternates `drumline bench train` with the same step in PyTorch and prints medians and their ratio.

    python tests/peers/compare_train.py DRUMLINE [--rounds 3] [--model gpt-10m] [--threads 2]
        [--precision f32|bf16] [--data 1]
    python tests/peers/compare_train.py DRUMLINE --table [--rounds 3] [--only TEXT]

Both sides run in turn on the same machine, so that a change of its speed hits both alike. With
`--data N` the peer is DistributedDataParallel over gloo with N processes (torch_ddp.py), and
`--threads` is of each rank. `--table` measures every row of the table in docs/benchmarks.md (both
models, both precisions, 1 and 2 threads, and two ranks), all rows in turn in each round, and prints
it as Markdown; `--only` keeps the rows whose title contains the text. Needs: torch, in the Python
that runs this script.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).parent
TITLES = {"gpt-10m": "GPT 10.8M, 8 x 256", "gpt2-124m": "GPT-2 124M, 1 x 512"}
# Of the large model fewer steps: each is as long as ten of the small one's.
STEPS = {"gpt2-124m": 3}


class Row:
    """One comparison: what it is of, and what was seen."""

    def __init__(self, model, precision, threads, data, steps):
        self.model, self.precision, self.threads, self.data = model, precision, threads, data
        # The first step of each run does not count.
        self.steps = STEPS.get(model, steps) + 1
        self.ours, self.theirs, self.seconds, self.version = [], [], 0.0, None

    def title(self):
        ranks = "" if self.data == 1 else f", {self.data} data-parallel ranks"
        return f"{TITLES.get(self.model, self.model)}, {self.precision}{ranks}"

    def goal(self):
        return 1.1 if self.precision == "bf16" and self.data == 1 else 1.15

    def measure(self, drumline):
        start = time.monotonic()
        shared = ["--threads", str(self.threads), "--steps", str(self.steps)]
        mine = last_json([
            drumline, "bench", "train", "--model", self.model, "--precision", self.precision,
            "--data", str(self.data), *shared, "--output", "json",
        ])
        self.ours.append(next(f["value"] for f in mine["figures"] if f["name"] == "tokens"))
        peer = ["torch_train.py"] if self.data == 1 else ["torch_ddp.py", "--ranks", str(self.data)]
        peer += ["--preset", self.model, *shared, *(["--bf16"] if self.precision == "bf16" else [])]
        other = last_json([sys.executable, str(FOLDER / peer[0]), *peer[1:]])
        self.theirs.append(other["tokens_per_second"])
        self.version = other["version"]
        self.seconds += time.monotonic() - start

    def ratios(self):
        return [a / b for a, b in zip(self.ours, self.theirs)]

    def medians(self):
        return statistics.median(self.ours), statistics.median(self.theirs)

    def as_json(self):
        ours, theirs = self.medians()
        return {
            "model": self.model, "precision": self.precision, "threads": self.threads,
            "data": self.data, "rounds": len(self.ours), "torch_version": self.version,
            "drumline": round(ours, 1), "torch": round(theirs, 1), "ratio": round(ours / theirs, 3),
            "ratio_by_round": [round(ratio, 3) for ratio in self.ratios()],
            "seconds": round(self.seconds),
        }

    def as_markdown(self):
        ours, theirs = self.medians()
        low, high = min(self.ratios()), max(self.ratios())
        threads = f"{self.threads} each" if self.data > 1 else self.threads
        return (
            f"| {self.title()} | {threads} | {ours:,.0f} | {theirs:,.0f} "
            f"| {ours / theirs:.2f} ({low:.2f} to {high:.2f}) | {self.goal()} |"
        )


def last_json(command):
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    return json.loads(out[out.index("{") :])


def table(steps):
    rows = [
        Row(model, precision, threads, 1, steps)
        for model in TITLES
        for precision in ("f32", "bf16")
        for threads in (2, 1)
    ]
    return rows + [Row("gpt-10m", precision, 1, 2, steps) for precision in ("f32", "bf16")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("drumline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="gpt-10m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if not args.table:
        row = Row(args.model, args.precision, args.threads, args.data, args.steps)
        for _ in range(args.rounds):
            row.measure(args.drumline)
        print(json.dumps(row.as_json()))
        return

    rows = [row for row in table(args.steps) if args.only in row.title()]
    for number in range(args.rounds):
        for row in rows:
            row.measure(args.drumline)
            last = f"{row.ours[-1]:,.0f} beside {row.theirs[-1]:,.0f} tokens/s"
            print(f"round {number + 1}: {row.title()}, {row.threads} threads: {last}", file=sys.stderr)
    print("| Model | Threads | Drumline, tokens/s | PyTorch, tokens/s | Ratio (rounds) | Goal |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(row.as_markdown())
    print(json.dumps([row.as_json() for row in rows]), file=sys.stderr)


if __name__ == "__main__":
    main()
