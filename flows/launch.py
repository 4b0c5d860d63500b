"""Start one stage: `python flows/launch.py <stage> <name>`, the constant command of every stage in dvc.yaml.

DVC hashes a stage's command, so where the stage runs is not part of it: UNIGRPO_BACKEND says so (local by default; rehearsal,
kubernetes or batch). This module checks the name and the params, records who asks for what, sets the environment the numbers
depend on, and starts the stage's Metaflow flow as a child that cannot outlive it.

    python flows/launch.py experiment <scale> [run | argo-workflows create | step-functions create ...]

is the whole graph of a scale as one flow (flows/experiment_flow.py), with any command of Metaflow; `run` by default.
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
    import surroundings
    from process import LAUNCHER, die_with_parent

    from unigrpo.closure import changed_files
    from unigrpo.config import Config, load_config
    from unigrpo.digests import sha256_inputs, sha256_json, sha256_path
    from unigrpo.preemption import PREEMPTED
    from unigrpo.resume import STATE, hold, home
    from unigrpo.stages import SHARED, Job, parse_name
except ImportError as error:
    sys.exit(f"{error}; `python` is {sys.executable}: activate the environment first (. .venv/bin/activate), "
             "or use make, which sets it up")

DEPLOYERS = {"argo-workflows": "kubernetes", "step-functions": "batch"}   # of Metaflow, and where they run steps
BACKENDS = ("local", "rehearsal", "kubernetes", "batch")  # as places.BACKENDS, which imports Metaflow
CODE = ("unigrpo", "flows", "params", "dvc.yaml", "pyproject.toml", "constraints.txt")  # a change here makes a run dirty

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\[\d+/\w+/\d+ \(pid \d+\)\] ?)?")  # Metaflow's, on every line
CHATTER = re.compile("|".join((r"\s*$", "Workflow starting", "Task is starting", "Task finished successfully", "Done!$",
                               "Flushing logs", r"\d+ tasks? (is|are) running", r"\S+ tasks? (is|are) waiting",
                               r"\w+ step has not started", r"Terminating \d", r"\[KILLED BY", r"Killing \d",
                               "This failed task")))


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
    """The environment of the stage's flow: everything numbers depend on is set, whatever the shell had."""
    env = surroundings.environment(config, base, ROOT) | {LAUNCHER: str(os.getpid())}
    if backend() == "local":
        env |= {"METAFLOW_DEFAULT_DATASTORE": "local", "METAFLOW_DEFAULT_METADATA": "local"}
    if env.get("METAFLOW_DEFAULT_METADATA", "local") == "local":  # records of a run, and the files of a rehearsal without S3
        env |= {"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(home(ROOT))}
    if not env.get("METAFLOW_USER"):  # Metaflow refuses the user root, and containers without one
        user = env.get("USERNAME") or env.get("USER") or ""
        env["METAFLOW_USER"] = user if user not in ("", "root") else "unigrpo"
    return env


def backend() -> str:
    """Where stages run. Raises ValueError listing the choices."""
    wanted = os.environ.get("UNIGRPO_BACKEND") or "local"
    if wanted not in BACKENDS:
        raise ValueError(f"UNIGRPO_BACKEND must be one of {list(BACKENDS)}, got {wanted!r}")
    return wanted


def check_remote(config: Config, *stages: str) -> None:
    """What a cluster needs that no default can know, and whether its machines can share the stages. Raises ValueError naming
    all of it."""
    remote, where = config.compute.remote, backend()
    if where == "local":
        return
    for stage in (stage for stage in SHARED if stage in stages):
        surroundings.per_node(config.processes(stage), remote.nodes, config.processes_key(stage))
    if where == "rehearsal":
        return
    from metaflow import metaflow_config  # the environment, or the file that `metaflow configure` wrote

    missing = []
    if not (remote.image or getattr(metaflow_config, f"{where.upper()}_CONTAINER_IMAGE")):
        missing.append("compute.remote.image, which holds the packages (see Dockerfile)")
    if where == "batch" and not (remote.queue or metaflow_config.BATCH_JOB_QUEUE):
        missing.append("compute.remote.queue")
    if missing:
        raise ValueError(f"UNIGRPO_BACKEND={where} needs {' and '.join(missing)}; set it in params/scales/{config.scale}.yaml, "
                         "or configure Metaflow (docs/cluster.md)")


def check_code(stage: str) -> None:
    """Where DVC starts the stage: the code that will run is what its lock will name. Raises ValueError naming files."""
    if "DVC_STAGE" in os.environ and (files := changed_files(ROOT, stage)):
        raise ValueError(f"artifacts/code/{stage}.json, which dvc.lock would name, is of other code: {', '.join(files[:3])}"
                         f"{f' and {len(files) - 3} more' * (len(files) > 3)} changed since; run `dvc repro code` first, as "
                         "`dvc repro` without -s does")


def run_flow(job: Job, config: Config) -> int:
    """Run the stage's flow on this machine and wait for it. Returns its exit status, or 75 where SIGTERM has ended it."""
    fields = [part for key, value in provenance(job, config).items() for part in (f"--{key}", value)]
    several = config.compute.remote.nodes > 1 and job.stage in SHARED and not (
        job.stage == "base" and config.base.source == "imported")
    flow = job.stage if backend() == "local" else "nodes" if several else "remote"
    command = [sys.executable, str(ROOT / "flows" / f"{flow}_flow.py"), "--quiet", "--no-pylint", "run",
               "--item", job.name, *fields]
    return run_child(command, environment(config, os.environ) | {"UNIGRPO_STAGE": job.stage}, f"{job.stage} {job.name}")


def run_child(command: list[str], env: dict[str, str], what: str) -> int:
    """Run a flow and show what it says without Metaflow's stamps. Returns its exit status."""
    child = subprocess.Popen(command, cwd=ROOT, env=env, text=True, errors="replace",
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
        print(f"{what}: interrupted; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    return PREEMPTED if asked and status else status


def experiment(scale: str, arguments: list[str]) -> int:
    """The whole graph of a scale as one flow: Metaflow's command line with our environment. Returns its exit status."""
    deployer = DEPLOYERS.get(arguments[0]) if arguments else None
    asked = backend()
    if deployer is not None and asked not in ("local", deployer):
        raise ValueError(f"{arguments[0]} runs steps on {deployer}, got UNIGRPO_BACKEND={asked}; unset it")
    os.environ["UNIGRPO_BACKEND"] = deployer or ("rehearsal" if asked == "local" else asked)  # its files always move
    config = load_config(scale, root=ROOT)
    check_remote(config, *SHARED)
    facts = provenance(parse_name("curate", scale, ROOT), config) | {"params_sha256": "", "inputs_sha256": ""}
    env = environment(config, os.environ) | surroundings.told(facts)
    sent = subprocess.run([sys.executable, str(ROOT / "flows" / "transfer.py"), "send", scale], cwd=ROOT, env=env, text=True,
                          stdout=subprocess.PIPE)
    if sent.returncode:
        return sent.returncode
    if (several := config.compute.remote.nodes > 1) and config.base.source == "scratch":
        raise ValueError(f"compute.remote.nodes={config.compute.remote.nodes} and base.source=scratch: the flow of the whole "
                         "graph trains no base on several machines; run `UNIGRPO_BACKEND=... dvc repro`, stage by stage")
    flow = "experiment_nodes_flow.py" if several else "experiment_flow.py"
    command = [sys.executable, str(ROOT / "flows" / flow), "--quiet", "--no-pylint", *(arguments or ["run"])]
    return run_child(command, env | {"UNIGRPO_MANIFEST": sent.stdout.strip().rpartition("\n")[2]}, f"experiment {scale}")


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status: 0, the flow's, or 2 for a mistake that is named on stderr."""
    whole = arguments[:1] == ["experiment"] and len(arguments) > 1
    if len(arguments) != 2 and not whole:
        print(__doc__, file=sys.stderr)
        return 2
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    try:
        if whole:
            return experiment(arguments[1], arguments[2:])
        job = parse_name(arguments[0], arguments[1], ROOT)
        check_code(job.stage)
        config = load_config(job.scale, run=job.run, seed=job.seed or 0, root=ROOT)
        check_remote(config, job.stage)
        with hold(ROOT / STATE / "locks" / f"{job.stage}-{job.name}.lock", f"{job.stage} {job.name}"):
            status = run_flow(job, config)
    except ValueError as error:
        print(f"{arguments[0]} {arguments[1]}: {error}", file=sys.stderr)
        return 2
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
