"""Start one stage: `python flows/launch.py <stage> <name>`, the constant command of every stage in dvc.yaml.

DVC hashes a stage's command, so where the stage runs is not part of it: UNIGRPO_BACKEND says so (local by default). This
module checks the name and the params, records who asks for what, sets the environment the numbers depend on, and starts the
stage's Metaflow flow as a child that cannot outlive it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "flows")]  # this checkout's code, also where an editable install points elsewhere

try:
    from process import LAUNCHER, die_with_parent

    from unigrpo.config import Config, load_config
    from unigrpo.digests import sha256_inputs, sha256_json, sha256_path
    from unigrpo.preemption import PREEMPTED
    from unigrpo.resume import STATE, hold, home
    from unigrpo.stages import Job, parse_name
except ImportError as error:
    sys.exit(f"{error}; `python` is {sys.executable}: activate the environment first (. .venv/bin/activate), "
             "or use make, which sets it up")

BACKENDS = ("local", "kubernetes", "batch")
CODE = ("unigrpo", "flows", "params", "dvc.yaml", "pyproject.toml", "constraints.txt")  # a change here makes a run dirty

# glibc returns large blocks to the kernel when they are freed and faults every page in again when they are asked for next.
# Element-wise work on activations is bound by these page faults: one GELU of 8192 x 512 floats takes 19.5 ms with the
# defaults and 0.5 ms when freed blocks up to 32 MiB stay in the heap. Read once at process start, so it is set here.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "8589934592"}
# A thread of libgomp that waits for work spins first. Its default, 300,000 turns, costs nothing where the cores are idle; where
# another process wants them a step of RL takes five times as long as with 2,000, which cost nothing on idle cores either.
WAITING = {"GOMP_SPINCOUNT": "2000"}

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "true",
           "MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1", "ITERATIVE_DO_NOT_TRACK": "1"}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\[\d+/\w+/\d+ \(pid \d+\)\] ?)?")  # Metaflow's, on every line
CHATTER = re.compile("|".join((r"\s*$", "Workflow starting", "Task is starting", "Task finished successfully", "Done!$",
                               "Flushing logs", r"Terminating \d", r"\[KILLED BY", r"Killing \d", "This failed task",
                               r"\d+ tasks? (is|are) running", "No tasks are waiting", r"\d+ steps? ha(s|ve) not started")))


def git(*arguments: str) -> str | None:
    """git's answer, or None where there is no git or no repository."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def provenance(job: Job, config: Config) -> dict[str, str]:
    """Who asks for what: known here and not on the machine that runs the step. "unknown" where it is, never a guess."""
    inside = git("rev-parse", "--show-toplevel")
    known = inside is not None and Path(inside).resolve() == ROOT
    commit = git("rev-parse", "HEAD") if known else None
    changes = git("status", "--porcelain", "--", *CODE) if commit is not None else None
    lock = ROOT / "dvc.lock"
    return {
        "git_commit": commit or "unknown",
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "dvc_stage": os.environ.get("DVC_STAGE") or "unknown",
        "dvc_exp": os.environ.get("DVC_EXP_NAME") or "none",
        "dvc_lock_sha256": sha256_path(lock) if lock.is_file() else "none",
        "params_sha256": sha256_json(config.model_dump(mode="json")),
        "inputs_sha256": sha256_json(sha256_inputs(ROOT, job.inputs)),
    }


def environment(config: Config, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of the stage: everything numbers depend on is set, whatever the shell had."""
    env = WAITING | dict(base) | MALLOC | OFFLINE | {name: str(config.compute.threads) for name in THREADS}
    env |= {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), base.get("PYTHONPATH", "")])),
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home(ROOT)), "METAFLOW_DEFAULT_DATASTORE": "local",
            "METAFLOW_DEFAULT_METADATA": "local", "UNIGRPO_SCALE": config.scale, "UNIGRPO_ROOT": str(ROOT),
            "MPLBACKEND": "Agg", LAUNCHER: str(os.getpid())}
    if not env.get("METAFLOW_USER"):  # Metaflow refuses the user root, and containers without one
        user = env.get("USERNAME") or env.get("USER") or ""
        env["METAFLOW_USER"] = user if user not in ("", "root") else "unigrpo"
    return env


def run_flow(job: Job, config: Config) -> int:
    """Run the stage's flow on this machine and wait for it. Returns its exit status, or 75 where SIGTERM has ended it."""
    fields = [part for key, value in provenance(job, config).items() for part in (f"--{key}", value)]
    command = [sys.executable, str(ROOT / "flows" / f"{job.stage}_flow.py"), "--quiet", "--no-pylint", "run",
               "--item", job.name, *fields]
    child = subprocess.Popen(command, cwd=ROOT, env=environment(config, os.environ), text=True, errors="replace",
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # Ctrl-C reaches the whole group: the step stops where it can go on later, and we wait for it to do so.
    interrupts: list[int] = []
    asked: list[int] = []

    def leave(*_: object) -> None:
        asked.append(1)
        child.terminate()  # it hands the signal on to the step, which finishes what it does and saves

    signal.signal(signal.SIGINT, lambda *_: interrupts.append(1))
    signal.signal(signal.SIGTERM, leave)
    assert child.stdout is not None
    for line in child.stdout:
        if not CHATTER.match(line := STAMP.sub("", line)):
            print(line, end="", flush=True)
    status = child.wait()
    if interrupts and status:
        print(f"{job.stage} {job.name}: interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    return PREEMPTED if asked and status else status


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status: 0, the flow's, or 2 for a mistake that is named on stderr."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    backend = os.environ.get("UNIGRPO_BACKEND") or "local"
    if backend not in BACKENDS:
        print(f"UNIGRPO_BACKEND must be one of {list(BACKENDS)}, got {backend!r}", file=sys.stderr)
        return 2
    if backend != "local":
        print(f"UNIGRPO_BACKEND={backend} is known, but this version runs stages on this machine only: inputs and outputs do "
              "not move through a datastore yet. Unset it, or set UNIGRPO_BACKEND=local", file=sys.stderr)
        return 2
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    try:
        job = parse_name(arguments[0], arguments[1], ROOT)
        config = load_config(job.scale, run=job.run, seed=job.seed or 0, root=ROOT)
        with hold(ROOT / STATE / "locks" / f"{job.stage}-{job.name}.lock", f"{job.stage} {job.name}"):
            status = run_flow(job, config)
    except ValueError as error:
        print(f"{arguments[0]} {arguments[1]}: {error}", file=sys.stderr)
        return 2
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
