"""Prints the logits that `transformers` computes for given tokens, as JSON.

Run by hand, because the packages are large: `pip install torch transformers`, then

    drumline export CHECKPOINT DIR
    python tests/peers/hf_logits.py DIR 1 2 3 4 > theirs.json

The output is {"architecture", "tokens", "loss", "logits": [[...] per token]}. With --text TEXT the
tokens are those of the exported tokenizer. With --compare FILE the logits are compared with those
of FILE, in the same form; the greatest difference is printed, and the exit code is 1 when it is
above --tolerance.
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="exported folder")
    parser.add_argument("tokens", nargs="*", type=int, help="token ids of one sequence")
    parser.add_argument("--text", help="text to encode with the folder's tokenizer")
    parser.add_argument("--compare", help="JSON file with logits to compare with")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()

    tokens = arguments.tokens
    if arguments.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
        tokens = tokenizer.encode(arguments.text, add_special_tokens=False)
        if tokenizer.decode(tokens) != arguments.text:
            print("the tokenizer does not give the text back", file=sys.stderr)
            return 1
    if not tokens:
        parser.error("name tokens or --text")

    model, report = AutoModelForCausalLM.from_pretrained(
        arguments.folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {k: sorted(map(str, v)) for k, v in report.items() if v}
    if wrong:
        print(f"the weights do not fit the model: {wrong}", file=sys.stderr)
        return 1
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([tokens])
        out = model(ids, labels=ids if len(tokens) > 1 else None)
    logits = out.logits[0]
    result = {
        "architecture": type(model).__name__,
        "tokens": tokens,
        "loss": out.loss.item() if out.loss is not None else None,
        "logits": logits.tolist(),
    }
    if arguments.compare is None:
        json.dump(result, sys.stdout)
        print()
        return 0
    with open(arguments.compare, encoding="utf-8") as file:
        other = json.load(file)
    if other["tokens"] != tokens:
        print("the files are of different tokens", file=sys.stderr)
        return 1
    difference = (torch.tensor(other["logits"]) - logits).abs().max().item()
    scale = logits.abs().max().item()
    print(f"greatest difference {difference:.3e}, greatest logit {scale:.3f}")
    return 0 if difference <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
