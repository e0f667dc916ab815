"""Measures PyTorch, compiled and with its flash attention, on the models that the engine is held
against. Usage: torch_bench.py gpt2-124m|llama-1.3b"""

import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

MODELS = {
    # layers, hidden, heads, inner, vocabulary, sequences, tokens
    "gpt2-124m": (12, 768, 12, 3072, 50304, 16, 1024),
    "llama-1.3b": (24, 2048, 16, 5504, 32000, 4, 4096),
}


class Block(nn.Module):
    def __init__(self, hidden, heads, inner, gated):
        super().__init__()
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.heads, self.gated = heads, gated
        self.norm1, self.norm2 = norm(hidden), norm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=not gated)
        self.out = nn.Linear(hidden, hidden, bias=not gated)
        self.up = nn.Linear(hidden, inner * (2 if gated else 1), bias=not gated)
        self.down = nn.Linear(inner, hidden, bias=not gated)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.gated:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        h = self.up(self.norm2(x))
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate="tanh")
        return x + self.down(h)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Model(nn.Module):
    def __init__(self, layers, hidden, heads, inner, vocab, tokens, gated):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.positions = None if gated else nn.Embedding(tokens, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, inner, gated) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden) if gated else nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if not gated:
            self.head.weight = self.embed.weight
        half = hidden // heads // 2
        angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def main():
    layers, hidden, heads, inner, vocab, batch, tokens = MODELS[sys.argv[1]]
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Model(layers, hidden, heads, inner, vocab, tokens, "llama" in sys.argv[1]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step = torch.compile(model)
    data = torch.randint(0, vocab, (batch, tokens + 1), device="cuda")

    def train():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step(data[:, :-1], data[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(5):
        loss = train()
    torch.cuda.synchronize()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        loss = train()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = sorted(times)[len(times) // 2]
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{sys.argv[1]}, {batch} x {tokens} tokens, bf16: {batch * tokens / median:.0f} tokens/s,")
    print(f"median step {median * 1e3:.1f} ms of {len(times)}, loss {loss.item():.3f}")


main()
