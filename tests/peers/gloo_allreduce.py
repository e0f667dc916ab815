"""All-reduce of PyTorch's gloo backend between two processes, beside Drumline's.

    python tests/peers/gloo_allreduce.py [--ours 'COMMAND'] [--rounds 5]

COMMAND prints what `bench::run` measures as a JSON list, such as
`target/release/examples/bench 2 all_reduce json`. Both run in turn, round after round, so that
what else the machine does hits both; the medians over the rounds are printed as a table and JSON.
Needs: torch (any build with gloo). One thread a process, as in Drumline's benchmark.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = [1024 << (2 * step) for step in range(10)]
ROUND_SECONDS = 0.04


def worker(rank, ranks, store, out):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results = []
    for size in SIZES:
        x = torch.zeros(size // 4)
        dist.all_reduce(x)

        def round_of(n):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(n):
                dist.all_reduce(x)
            took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            return took.item()

        n = 1
        while round_of(n) * 2 < ROUND_SECONDS:
            n *= 2
        times = sorted(round_of(n) / n for _ in range(7))
        results.append({"bytes": size, "latency_us": times[3] * 1e6})
    if rank == 0:
        with open(out, "w") as f:
            json.dump(results, f)
    dist.barrier()
    dist.destroy_process_group()


def gloo_once(ranks):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        args = [sys.executable, __file__, "--store", os.path.join(folder, "store"), "--out", out]
        children = [
            subprocess.Popen([*args, "--ranks", str(ranks), "--worker", str(rank)])
            for rank in range(ranks)
        ]
        if any(child.wait() for child in children):
            sys.exit("a gloo process failed")
        with open(out) as f:
            return json.load(f)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--store")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker is not None:
        worker(args.worker, args.ranks, args.store, args.out)
        return

    seen = {"gloo": {}, "ours": {}}
    for _ in range(args.rounds):
        for row in gloo_once(args.ranks):
            seen["gloo"].setdefault(row["bytes"], []).append(row["latency_us"])
        if args.ours:
            printed = subprocess.run(shlex.split(args.ours), check=True, stdout=subprocess.PIPE)
            for row in json.loads(printed.stdout):
                if row["op"] == "all_reduce":
                    seen["ours"].setdefault(row["bytes"], []).append(row["latency_us"])
    rows = []
    for size in SIZES:
        row = {"bytes": size}
        for who, times in seen.items():
            if size in times:
                median = statistics.median(times[size])
                row[who + "_us"] = round(median, 2)
                row[who + "_gibps"] = round(size / median * 1e6 / 2**30, 3)
        if "ours_us" in row:
            row["speedup"] = round(row["gloo_us"] / row["ours_us"], 2)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    import torch

    print(json.dumps({"torch": torch.__version__, "rounds": args.rounds, "rows": rows}))


if __name__ == "__main__":
    main()
