"""Guards the hot kernels: counts the instructions of each and compares them with stored counts.

Usage: count_instructions.py KERNEL_TIMES [--update]

KERNEL_TIMES is the example built by `cargo build --release -p drumline-tensor --example kernel_times`. Times are
noisy where other work runs; instructions are not. The count of one call is the difference of two runs of different
lengths. Callgrind up to 3.19 knows no AVX-512 and hides it from the program, so what is counted is the AVX2 path;
it shares its sources with the AVX-512 path except for the inner kernels in `cpu/panels`.

Exits 1 when a count is more than 3% above the stored one; `--update` stores what it finds. Needs: valgrind.
"""

import json
import pathlib
import re
import subprocess
import sys

STORED = pathlib.Path(__file__).with_name("instructions.json")
TOLERANCE = 0.03


def count(program: str, name: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, name, str(times)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stderr
    return int(re.search(r"Collected : (\d+)", told)[1])


def main() -> int:
    program = sys.argv[1]
    names = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60).stdout.split()
    found = {name: (count(program, name, 6) - count(program, name, 2)) // 4 for name in names}
    if "--update" in sys.argv:
        STORED.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    stored = json.loads(STORED.read_text())
    worse = 0
    for name, instructions in found.items():
        before = stored.get(name)
        ratio = instructions / before if before else float("inf")
        print(f"{name:20} {instructions:10} {ratio:6.3f} of the stored count")
        worse += ratio > 1 + TOLERANCE
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
