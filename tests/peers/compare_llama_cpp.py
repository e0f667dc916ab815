"""Compares Drumline's serving step with llama.cpp on a LLaMA shape of 110 million parameters.

Usage: compare_llama_cpp.py SERVE_RATE [--rounds N] [--threads 1,2] [--batches 1,2,4,8,16,32] [--no-peer]

SERVE_RATE is the example built by `cargo build --release -p drumline-engine --example serve_rate`. Both sides have
the same shape with random weights of their own. One process for each way to store weights and llama.cpp are asked in
turn, one round after the other, so that a busy machine slows all alike; times are of the day, medians count. The
memory bandwidth is measured in every round. Measured: prefill of 512 tokens; 64 decoded tokens after 128, one
sequence; then decoding of several sequences at once (ours alone); memory beside what was planned.

Needs: llama-cpp-python, gguf, numpy. Run by hand: the build takes minutes. Prints one JSON object a line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

try:
    import gguf
    import llama_cpp
    import numpy
except ImportError:
    print("llama-cpp-python, gguf or numpy is missing: only --no-peer works", file=sys.stderr)

LAYERS, WIDTH, FEED, HEADS, VOCAB, CONTEXT = 12, 768, 2048, 12, 32000, 1024
PROMPT, BEFORE, MADE = 512, 128, 64
# Tokens of the small cache that memory is shown with, and of prompts in a step, as a serving rank has them.
SMALL, RANK_PREFILL = 256, 128
WEIGHTS = ("bf16", "f16", "int8", "f32")


def write_model(path: str) -> None:
    """Writes random f16 weights of the shape, embeddings tied."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{i:02X}>".encode() for i in range(256)]
    tokens += [f"w{i}".encode() for i in range(VOCAB - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB)
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (VOCAB - 259)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = numpy.random.default_rng(1)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.normal(0, 0.02, (rows, columns)).astype(numpy.float16)
        writer.add_tensor(name, values)

    matrix("token_embd.weight", VOCAB, WIDTH)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            matrix(f"blk.{layer}.{part}.weight", FEED, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FEED)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", numpy.ones(WIDTH, numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(WIDTH, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """llama.cpp with one sequence."""

    def __init__(self, path: str, threads: int) -> None:
        self.model = llama_cpp.Llama(
            path, n_ctx=CONTEXT, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads, n_threads_batch=threads,
            verbose=False)

    def round(self) -> tuple[float, float]:
        """Returns tokens per second of prefill and of decoding (the median token)."""
        random = numpy.random.default_rng(2)
        self.model.reset()
        begin = time.perf_counter()
        self.model.eval(random.integers(300, VOCAB, PROMPT).tolist())
        prefill = PROMPT / (time.perf_counter() - begin)
        self.model.reset()
        self.model.eval(random.integers(300, VOCAB, BEFORE).tolist())
        steps = []
        for token in random.integers(300, VOCAB, MADE).tolist():
            begin = time.perf_counter()
            self.model.eval([token])
            steps.append(time.perf_counter() - begin)
        return prefill, 1 / statistics.median(steps)


class Ours:
    """One process of ours that is asked line by line."""

    def __init__(self, program: str, weights: str, threads: int, max_batch: int, context: int, prefill: int) -> None:
        cached = max(context, max_batch * 64)
        command = [program, "llama-110m", weights, *map(str, (threads, max_batch, context, cached, prefill))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = json.loads(self.process.stdout.readline())

    def ask(self, batch: int, prompt: int, made: int) -> dict[str, float]:
        self.process.stdin.write(f"{batch} {prompt} {made}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def round(self) -> dict[str, float]:
        """Returns the rates of one sequence."""
        decode = self.ask(1, BEFORE, MADE)
        return {
            "prefill": self.ask(1, PROMPT, 2)["prefill_tokens_per_second"],
            "decode": decode["decode_tokens_per_second"],
            "of_bandwidth": decode["decode_tokens_per_second"] / decode["bandwidth_bound"],
            "memory_gb_per_second": decode["memory_gb_per_second"],
        }

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def compare(program: str, path: str | None, threads: int, rounds: int, batches: list[int]) -> None:
    """Prints the rows of one number of threads."""
    peer = Peer(path, threads) if path else None
    if peer:
        peer.round()
    for weights in WEIGHTS:
        # A small cache and the step of a serving rank.
        ours = Ours(program, weights, threads, 1, SMALL, RANK_PREFILL)
        print(json.dumps({"row": "memory", **ours.about}), flush=True)
        ours.close()
    kinds = {weights: Ours(program, weights, threads, max(batches), PROMPT + 16, PROMPT) for weights in WEIGHTS}
    theirs, found = [], {weights: [] for weights in kinds}
    for _ in range(rounds):
        if peer:
            prefill, decode = peer.round()
            theirs.append({"prefill": prefill, "decode": decode})
        for weights, ours in kinds.items():
            found[weights].append(ours.round())
    their = median(theirs) if peer else None
    bf16 = median(found["bf16"])["decode"]
    for weights, results in found.items():
        own = median(results)
        row = {"row": "one sequence", "threads": threads, "weights": weights, "rounds": rounds,
               **{key: round(value, 2) for key, value in own.items()}, "decode_of_bf16": round(own["decode"] / bf16, 2)}
        for key in ("prefill", "decode") if peer else ():
            ratios = [r[key] / t[key] for r, t in zip(results, theirs)]
            row[f"llama_cpp_{key}"] = round(their[key], 1)
            row[f"{key}_ratio"] = round(own[key] / their[key], 2)
            row[f"{key}_ratio_of_rounds"] = [round(min(ratios), 2), round(max(ratios), 2)]
        print(json.dumps(row), flush=True)
    many = {weights: {batch: [] for batch in batches} for weights in kinds}
    for _ in range(min(rounds, 3)):
        for batch in batches:
            for weights, ours in kinds.items():
                many[weights][batch].append(ours.ask(batch, 32, 24)["decode_tokens_per_second"])
    for weights, by_batch in many.items():
        rates = {batch: statistics.median(results) for batch, results in by_batch.items()}
        row = {"row": "batches", "threads": threads, "weights": weights,
               "tokens_per_second": {batch: round(rate, 1) for batch, rate in rates.items()},
               "of_one": {batch: round(rate / rates[batches[0]], 2) for batch, rate in rates.items()}}
        print(json.dumps(row), flush=True)
    for ours in kinds.values():
        ours.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,2,4,8,16,32")
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    args = parser.parse_args()
    numbers = lambda text: [int(n) for n in text.split(",")]
    about = {
        "row": "settings", "model": f"{LAYERS} layers, width {WIDTH}, {VOCAB} tokens", "prompt": PROMPT,
        "decoded": [BEFORE, MADE], "rounds": args.rounds, "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    if not args.no_peer:
        about["llama_cpp_python"] = llama_cpp.__version__
        about["llama_cpp_system"] = llama_cpp.llama_print_system_info().decode()
        about["llama_cpp_settings"] = f"f16 weights, f16 cache, n_batch {PROMPT}, memory-mapped"
    print(json.dumps(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if not args.no_peer:
            path = os.path.join(folder, "model.gguf")
            write_model(path)
        for threads in numbers(args.threads):
            compare(args.program, path, threads, args.rounds, numbers(args.batches))


if __name__ == "__main__":
    main()
