"""Writes the report of a run on a card as Markdown. Usage: report.py FOLDER REPORT_FOLDER [EMULATED]"""

import datetime
import json
import os
import sys

folder, report = sys.argv[1:3]
emulated = len(sys.argv) > 3


def read(path):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


commit = read(os.path.join(folder, "commit")).replace("\n", " ") or "unknown"
doctor = json.loads(read(os.path.join(report, "doctor.json")) or "{}")
results = [json.loads(line) for line in read(os.path.join(report, "results.jsonl")).splitlines()]
now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")

if emulated:
    print("# The script of the GPU benches, on stand-ins\n")
    print("**No GPU was used**: the libraries are stand-ins that compute on the processor. This shows that every")
    print("line of `tests/gpu/run` runs; no figure below says anything of a GPU.\n")
else:
    print("# Benchmarks on GPUs\n")
    print("Written by `tests/gpu/run`; the last run on a card. Nothing is called done on a GPU that is not listed")
    print("here as run.\n")
print("| | |\n|---|---|")
print(f"| Date | {now} |")
print(f"| Commit | {cell(commit)} |")
gpus = doctor.get("gpus", [])
print(f"| GPUs | {cell(', '.join(gpu['model'] for gpu in gpus)) or 'none'} |")
print(f"| Driver | {cell(doctor.get('driver') or 'none')} |")
for library in (l for l in doctor.get("libraries", []) if l["name"] != "driver"):
    state = library["version"] or "found" if library["found"] else "not found"
    print(f"| {library['name']} | {cell(state)} |")

if not gpus:
    print("\nNo GPU: nothing was run.")
    sys.exit(0)

for part in dict.fromkeys(result["part"] for result in results):
    print(f"\n## {part[:1].upper() + part[1:]}\n")
    print("| Name | Outcome | Seconds | |\n|---|---|---|---|")
    for result in (r for r in results if r["part"] == part):
        print(f"| {cell(result['name'])} | {result['outcome']} | {result['seconds']:.0f} | {cell(result['note'])} |")


def log(name):
    return read(os.path.join(report, "log", name))


for name in ["train-gpt2-124m", "train-llama-1.3b", "collective", "serve", "profile"]:
    try:
        # Notes stand around it.
        text = log(f"bench-{name}.txt")
        measured, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
    except ValueError:
        continue
    print(f"\n## drumline bench {name}\n\n{measured.get('setting', '')}\n")
    print("| Figure | | |\n|---|---|---|")
    for figure in measured.get("figures", []):
        print(f"| {cell(figure['name'])} | {figure['value']:.4g} | {cell(figure['unit'])} |")

for model in ["gpt2-124m", "llama-1.3b"]:
    text = log(f"torch-{model}.txt")
    if text:
        print(f"\n## PyTorch, {model}\n\n```\n{text}\n```")
text = log("equivalence-splits.txt")
if text:
    print(f"\n## Splits on one card\n\n```\n{text}\n```")
