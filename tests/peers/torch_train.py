"""The same training step in PyTorch, to compare with `drumline bench train`.

    python tests/peers/torch_train.py --preset gpt-10m --threads 2 --steps 6 [--bf16] [--compile]

Prints one JSON object. Models, batches and optimizer are those of crates/engine/src/bench.rs.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "gpt-10m": dict(layers=6, hidden=384, heads=6, vocab=256, context=256, batch=8, sequence=256),
    "gpt2-124m": dict(
        layers=12, hidden=768, heads=12, vocab=50257, context=1024, batch=1, sequence=512
    ),
}


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.project = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(d, dim=2)
        q, k, v = (z.view(b, t, self.heads, d // self.heads).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, p):
        super().__init__()
        d = p["hidden"]
        self.wte, self.wpe = nn.Embedding(p["vocab"], d), nn.Embedding(p["context"], d)
        self.blocks = nn.ModuleList(Block(d, p["heads"]) for _ in range(p["layers"]))
        self.ln_f = nn.LayerNorm(d)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def step(run, model, optimizer, data, bf16):
    """One optimizer step; bf16 is PyTorch's autocast: f32 weights, bf16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = run(data[:, :-1], data[:, 1:].contiguous())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="gpt-10m", choices=PRESETS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    p = PRESETS[args.preset]
    model = Gpt(p)
    decay = [q for q in model.parameters() if q.dim() == 2]
    plain = [q for q in model.parameters() if q.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-4, betas=(0.9, 0.95), fused=True,
    )
    run = torch.compile(model) if args.compile else model
    times, losses = [], []
    for _ in range(args.steps):
        data = torch.randint(0, p["vocab"], (p["batch"], p["sequence"] + 1))
        start = time.perf_counter()
        losses.append(step(run, model, optimizer, data, args.bf16))
        times.append(time.perf_counter() - start)
    tokens = p["batch"] * p["sequence"]
    times = times[1:]
    print(json.dumps({
        "peer": "torch", "version": torch.__version__, "preset": args.preset,
        "threads": args.threads, "bf16": args.bf16, "compiled": args.compile,
        "parameters": sum(q.numel() for q in model.parameters()),
        "tokens_per_second": round(tokens / statistics.median(times)),
        "best_tokens_per_second": round(tokens / min(times)),
        "loss": [losses[0], losses[-1]],
    }))


if __name__ == "__main__":
    main()
