"""Compares Drumline's serving step with llama.cpp on a LLaMA shape of 110 million parameters.

Usage: compare_llama_cpp.py SERVE_RATE [ROUNDS] [THREADS,...]

SERVE_RATE is the example built by `cargo build --release -p drumline-engine --example serve_rate`. Both sides have
the same shape with random weights of their own; the rounds alternate, so that a busy machine slows both alike, and
the medians count. Measured: prefill of 512 tokens, and 64 decoded tokens after 128, one sequence, no network.

Needs: llama-cpp-python, gguf, numpy. Run by hand: the build takes minutes. Prints one JSON object for each setting.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy

LAYERS, WIDTH, FEED, HEADS, VOCAB, CONTEXT = 12, 768, 2048, 12, 32000, 1024
PROMPT, BEFORE, MADE = 512, 128, 64


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


def ours(program: str, weights: str, threads: int) -> dict[str, float]:
    """Returns one round of ours."""
    def rate(prompt: int, made: int) -> dict[str, float]:
        command = [program, "llama-110m", weights, str(threads), "1", str(prompt), str(made)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)

    decode = rate(BEFORE, MADE)
    return {
        "prefill": rate(PROMPT, 2)["prefill_tokens_per_second"],
        "decode": decode["decode_tokens_per_second"],
        "bound": decode["bandwidth_bound"],
    }


def main() -> None:
    program = sys.argv[1]
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    counts = [int(t) for t in sys.argv[3].split(",")] if len(sys.argv) > 3 else [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        write_model(path)
        for threads in counts:
            peer = Peer(path, threads)
            peer.round()
            theirs, found = [], {weights: [] for weights in ("bf16", "f16", "int8")}
            for _ in range(rounds):
                theirs.append(peer.round())
                for weights, results in found.items():
                    results.append(ours(program, weights, threads))
            prefill = statistics.median(t[0] for t in theirs)
            decode = statistics.median(t[1] for t in theirs)
            for weights, results in found.items():
                own = {key: statistics.median(r[key] for r in results) for key in results[0]}
                print(json.dumps({
                    "threads": threads, "weights": weights, "rounds": rounds, "llama_cpp_python": llama_cpp.__version__,
                    "prefill": own["prefill"], "peer_prefill": round(prefill, 1),
                    "prefill_ratio": round(own["prefill"] / prefill, 2),
                    "decode": own["decode"], "peer_decode": round(decode, 1),
                    "decode_ratio": round(own["decode"] / decode, 2),
                    "decode_of_bandwidth": round(own["decode"] / own["bound"], 2),
                }), flush=True)


if __name__ == "__main__":
    main()
