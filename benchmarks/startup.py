"""CPU seconds until a stage can begin: its imports, with the garbage collector and as `unigrpo.stages.run_stage` imports them.

    python benchmarks/startup.py [--repeats 4] [--write FILE.md]

Every number is the least of several fresh processes, Python's own start included; `unigrpo --help` is one of them and must
take less than 0.3 s. CPU seconds depend little on what else runs. Exits 1 where that bound is missed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from pages import put

from unigrpo.stages import STAGES

HELP = 0.3  # seconds
LIBRARIES = ("torch", "transformers", "transformers.modeling_utils", "pandas")


def seconds(*arguments: str, repeats: int) -> float:
    """Least user and system seconds of a Python process with these arguments."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks, or to its end")
    args = parser.parse_args()
    shown = seconds("-m", "unigrpo", "--help", repeats=args.repeats)
    lines = ["| module | plain import | as a stage imports it |", "|---|---|---|"]
    for module in (*LIBRARIES, *(f"unigrpo.stages.{stage}" for stage in STAGES)):
        plain = seconds("-c", f"import {module}", repeats=args.repeats)
        quick = seconds("-c", f"from unigrpo.stages import quick_import; quick_import({module!r})", repeats=args.repeats)
        lines.append(f"| `{module}` | {plain:.2f} s | {quick:.2f} s |")
    lines += ["", f"`unigrpo --help`: {shown:.2f} s of at most {HELP} s.", ""]
    print("\n".join(lines))
    if args.write is not None:
        put(args.write, "startup", lines)
    return int(shown > HELP)


if __name__ == "__main__":
    sys.exit(main())
