"""Writes crates/engine/tests/golden/*.json: five training steps of tiny models in PyTorch.

Run by hand when the models change:  python tests/peers/golden_train.py crates/engine/tests/golden
Needs torch and transformers. Weights come from a formula of name and index that the Rust test
repeats, so the files hold results only: losses, gradient norms, and for every tensor the norm and
some elements of the first step's gradient and of the weights after the last step.
"""

import json
import math
import sys

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

STEPS, BATCH, SEQUENCE, VOCAB = 5, 4, 16, 61
PEAK, FLOOR, WARMUP = 3e-3, 3e-4, 2
BETAS, EPSILON, DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 0.5


def pattern(name, shape):
    hash_ = 0x811C9DC5
    for byte in name.encode():
        hash_ = ((hash_ ^ byte) * 0x01000193) & 0xFFFFFFFF
    index = np.arange(math.prod(shape), dtype=np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    z = (np.uint64(hash_) ^ ((index * np.uint64(0x9E3779B9)) & mask)) & mask
    z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & mask
    z = ((z ^ (z >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & mask
    z ^= z >> np.uint64(16)
    uniform = (z >> np.uint64(8)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    values = uniform * np.float32(0.4)
    if ("norm" in name or "ln_" in name) and name.endswith("weight"):
        values = values + np.float32(1.0)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def sequence(s):
    return [(s * 131 + i * i * 7 + i * 3) % VOCAB for i in range(SEQUENCE + 1)]


def rate(step):
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return FLOOR + (PEAK - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


def summary(tensor):
    flat = tensor.detach().double().flatten()
    step = max(1, flat.numel() // 12)
    probes = {str(i): flat[i].item() for i in range(0, flat.numel(), step)}
    return {"norm": flat.norm().item(), "values": probes}


def train(model):
    model.train()
    named = dict(model.named_parameters())  # a tied matrix appears once
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(pattern(name, tuple(parameter.shape)))
    decay = [p for n, p in named.items() if p.dim() == 2 and "wpe" not in n]
    plain = [p for n, p in named.items() if p.dim() == 1 or "wpe" in n]
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPSILON)
    out = {"losses": [], "grad_norms": [], "learning_rates": [], "tensors": {n: {} for n in named}}
    for step in range(STEPS):
        data = torch.tensor([sequence(step * BATCH + i) for i in range(BATCH)])
        logits = model(input_ids=data[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCAB), data[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in named.items():
                out["tensors"][name]["gradient"] = summary(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        out["losses"].append(loss.item())
        out["grad_norms"].append(norm.item())
        out["learning_rates"].append(rate(step))
    for name, parameter in named.items():
        out["tensors"][name]["weights"] = summary(parameter)
    out["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    return out


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    folder = sys.argv[1]
    gpt2 = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=4, n_head=8, n_inner=48,
        activation_function="gelu_new", layer_norm_epsilon=1e-5,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=True,
    )
    llama = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=16, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    for name, model in [("gpt2", GPT2LMHeadModel(gpt2)), ("llama", LlamaForCausalLM(llama))]:
        with open(f"{folder}/{name}.json", "w") as file:
            json.dump(train(model), file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
