"""Compares a served model with the same model in `transformers`, token by token.

Usage: hf_served.py EXPORTED_DIR GATEWAY_URL KEY_FILE MODEL [PROMPT]

EXPORTED_DIR is what `drumline export` wrote of the checkpoint that is served as MODEL. For each token of a
greedy completion, the log-probabilities of the 20 likeliest tokens are compared; log-probabilities that agree
mean logits that agree up to the constant that no softmax sees. Prints one JSON object and exits 1 above 1e-4.

Needs: torch, transformers, openai. Run by hand: the packages are large.
"""

import json
import sys

import openai
import torch
import transformers


def main() -> int:
    folder, url, key_file, model_name = sys.argv[1:5]
    prompt = sys.argv[5] if len(sys.argv) > 5 else "The control plane"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open(key_file) as file:
        client = openai.OpenAI(base_url=url, api_key=file.read().strip())
    ids = tokenizer(prompt)["input_ids"]
    worst, compared = 0.0, 0
    for _ in range(24):
        # One token at a time: the text of a token alone may not be decodable, its id always is.
        ours = client.completions.create(
            model=model_name, prompt=ids, max_tokens=1, temperature=0, logprobs=20
        ).choices[0]
        with torch.no_grad():
            theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
        top = theirs.topk(20)
        told = sorted(ours.logprobs.top_logprobs[0].values(), reverse=True)
        for mine, reference in zip(told, top.values.tolist()):
            worst, compared = max(worst, abs(mine - reference)), compared + 1
        ids.append(int(top.indices[0]))
    report = {"model": folder, "transformers": transformers.__version__, "compared": compared, "max_difference": worst}
    print(json.dumps(report))
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
