"""CPU seconds until a stage can begin: its imports, with the garbage collector and as `unigrpo.stages.run_stage` imports them.
Seconds of a `dvc repro` of the main job that finds nothing to do.

    python benchmarks/startup.py [--repeats 4] [--write FILE.md]

Every number is the least of several fresh processes, Python's own start included. CPU seconds depend little on what else runs.
`unigrpo --help` must take less than 0.3 of them, the `dvc repro` less than 2; that one needs the results of `make repro` and
says so where they are not there. Exits 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

from pages import put

from unigrpo.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
HELP, REPRO = 0.3, 2.0  # CPU seconds
MAIN = "report@tiny-main"
DVC = ("-m", "dvc")
LIBRARIES = ("torch", "transformers", "transformers.modeling_utils", "pandas")


def environment() -> dict[str, str]:
    """This one, in which `python` of dvc.yaml is this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "DVC_NO_ANALYTICS": "1", "PATH": path}


def seconds(*arguments: str, repeats: int) -> float:
    """Least user and system seconds of a Python process with these arguments."""
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def up_to_date() -> bool:
    """Whether the main job's results are here and of this code, so that `dvc repro` would find nothing to do."""
    subprocess.run([sys.executable, *DVC, "repro", "--quiet", "code"], check=True, cwd=ROOT, env=environment())
    status = subprocess.run([sys.executable, *DVC, "status", "--quiet", "--with-deps", MAIN], cwd=ROOT, env=environment())
    return status.returncode == 0


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
    idle = seconds(*DVC, "repro", "--quiet", MAIN, repeats=args.repeats) if up_to_date() else None
    lines += [f"`dvc repro {MAIN}` with nothing to do: " + (
        "not measured, `make repro` has to run first." if idle is None else f"{idle:.2f} s of at most {REPRO} s."), ""]
    print("\n".join(lines))
    if args.write is not None:
        put(args.write, "startup", lines)
    return int(shown > HELP or (idle or 0) > REPRO)


if __name__ == "__main__":
    sys.exit(main())
