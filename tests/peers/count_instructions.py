"""Guards the hot kernels: counts the instructions of each and compares them with stored counts.

Usage: count_instructions.py KERNEL_TIMES [--update]

KERNEL_TIMES is the example built by `cargo build --release -p drumline-tensor --example kernel_times`. Times are
noisy where other work runs; instructions are not. The count of one call is the difference of two runs of different
lengths. Counts are stored by the instruction set that the program found, as it says itself: callgrind up to 3.19 knows
no AVX-512 and hides it, so that every x86-64 machine counts the AVX2 path there; a newer one counts what it has.

Exits 1 when a count is more than 3% above the stored one, or none is stored for a kernel on this instruction set;
`--update` stores what it finds, beside those of other sets. Needs: valgrind.
"""

import json
import pathlib
import re
import subprocess
import sys

STORED = pathlib.Path(__file__).with_name("instructions.json")
TOLERANCE = 0.03


def count(program: str, name: str, times: int) -> tuple[int, str]:
    """Returns the instructions of a run and the instruction set that it used."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, name, str(times)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return int(re.search(r"Collected : (\d+)", run.stderr)[1]), run.stdout.strip()


def main() -> int:
    program = sys.argv[1]
    names = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    found, kind = {}, ""
    for name in names:
        (few, kind), (more, _) = count(program, name, 2), count(program, name, 6)
        found[name] = (more - few) // 4
    stored = json.loads(STORED.read_text())
    if "--update" in sys.argv:
        STORED.write_text(json.dumps({**stored, kind: found}, indent=2) + "\n")
        return 0
    stored = stored.get(kind, {})
    print(f"instruction set: {kind}")
    worse = 0
    for name, instructions in found.items():
        before = stored.get(name)
        ratio = instructions / before if before else float("inf")
        print(f"{name:20} {instructions:10} {ratio:6.3f} of the stored count")
        worse += ratio > 1 + TOLERANCE
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
