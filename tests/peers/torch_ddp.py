"""The training step of torch_train.py in PyTorch's DistributedDataParallel over gloo: one process a copy.

    python tests/peers/torch_ddp.py --preset gpt-10m --ranks 2 --steps 6 [--bf16]

Prints one JSON object. The global batch of the preset is divided among the ranks, as
`drumline bench train --data RANKS` divides it; `--threads` is of each rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from torch_train import PRESETS, Gpt, step


def worker(args):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.store}", rank=args.rank, world_size=args.ranks
    )
    p = PRESETS[args.preset]
    model = Gpt(p)
    run = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [q for q in model.parameters() if q.dim() == 2], "weight_decay": 0.1},
            {"params": [q for q in model.parameters() if q.dim() == 1], "weight_decay": 0.0},
        ],
        lr=3e-4, betas=(0.9, 0.95), fused=True,
    )
    batch = max(1, p["batch"] // args.ranks)
    times, losses = [], []
    for _ in range(args.steps):
        data = torch.randint(0, p["vocab"], (batch, p["sequence"] + 1))
        dist.barrier()
        start = time.perf_counter()
        losses.append(step(run, model, optimizer, data, args.bf16))
        times.append(time.perf_counter() - start)
    times = times[1:]
    if args.rank == 0:
        tokens = batch * args.ranks * p["sequence"]
        print(json.dumps({
            "peer": "torch-ddp-gloo", "version": torch.__version__, "preset": args.preset,
            "ranks": args.ranks, "threads": args.threads, "bf16": args.bf16,
            "tokens_per_second": round(tokens / statistics.median(times)),
            "best_tokens_per_second": round(tokens / min(times)),
            "loss": [losses[0], losses[-1]],
        }))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="gpt-10m", choices=PRESETS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--store")
    args = parser.parse_args()
    if args.rank is not None:
        worker(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--store", store]
            )
            for rank in range(args.ranks)
        ]
        try:
            failed = any([child.wait(timeout=600) for child in children])
        finally:
            for child in children:
                child.kill()
    if failed:
        sys.exit("a DDP process failed")


if __name__ == "__main__":
    main()
