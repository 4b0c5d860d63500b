"""The `unigrpo` command. Heavy imports wait until a command needs them, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unigrpo.commands import doctor, export, generate, import_bagel, parse_prompts, prompts, score, serve_rewards, verify


def project_root() -> Path:
    """The nearest folder upwards that holds dvc.yaml and params/. Raises ValueError if there is none."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params").is_dir():
            return folder
    raise ValueError(f"run this inside the project: no folder from {here} upwards holds dvc.yaml and params/")


def experiment_command(args: argparse.Namespace) -> int:
    """Write params/experiment.yaml and the experiments' inputs in dvc.yaml."""
    from unigrpo.experiment import make_request, write

    root = project_root()
    changed = write(root, make_request(root, args.scale, sets=args.set, runs=args.run, seeds=args.seed))
    print("\n".join(f"wrote {path.relative_to(root)}" for path in changed) or "nothing to change")
    return 0


def names_command(args: argparse.Namespace) -> int:
    """Print the items of `train` or `evaluate` in dvc.yaml, one a line: what can run side by side."""
    from unigrpo.stages import read_experiment

    items = read_experiment(project_root())[{"train": "trainings", "evaluate": "evaluations"}[args.stage]]
    print("\n".join(f"{args.stage}@{name}" for name, item in items.items() if item["scale"] == args.scale))
    return 0


def arms_command(args: argparse.Namespace) -> int:
    """Bring every arm up to date, some at a time."""
    import signal

    from unigrpo.arms import run_experiments

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as after Ctrl-C, no arm is left running
    return 1 if run_experiments(project_root(), args.scale, args.jobs, args.only, show=args.show) else 0


def store_command(args: argparse.Namespace) -> int:
    """Make MLflow's database, or bring it to the installed version, and send it what stages could not."""
    from unigrpo.journal import prepare_store

    prepare_store(project_root())
    return 0


def stage_command(args: argparse.Namespace) -> int:
    """Run a stage function in this process: for debugging, without DVC and Metaflow."""
    from unigrpo.stages import run_stage

    metrics = run_stage(args.stage, args.name, project_root())
    for key, value in sorted(metrics.items()):
        print(f"{key} {value:.6g}")
    return 0


def plan_command(args: argparse.Namespace) -> int:
    """Print what a run will do: counts, memory, seconds."""
    from unigrpo.plan import plan_run

    print(plan_run(args.scale, args.run, project_root(), probe=not args.no_probe, gpu=args.gpu, gpus=args.gpus,
                   price=args.price, thinking=args.thinking))
    return 0


def report_command(args: argparse.Namespace) -> int:
    """Print a report's results and where to look, or write them into the README."""
    root = project_root()
    if args.readme:
        from unigrpo.report.readme import write_readme

        changed = write_readme(root, args.scale)
        print("\n".join(f"wrote {path.relative_to(root)}" for path in changed) or "nothing to change")
        return 0
    from unigrpo.report.table import results_table

    folder = Path("artifacts") / args.scale / args.which
    print(results_table(root / folder / "report.json"))
    print(f"\nreport      {folder}/report.html\nruns        make ui (MLflow)\n"
          f"samples     {folder.parent}/<checkpoint>/samples/")
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their arguments."""
    top = argparse.ArgumentParser(prog="unigrpo", description="UniGRPO: one policy that thinks, then draws.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    experiment = commands.add_parser("experiment", help="the list of trainings and evaluations")
    actions = experiment.add_subparsers(dest="action", required=True)
    names = actions.add_parser("names", help="the trainings or evaluations of a scale, as dvc names them")
    names.add_argument("--stage", choices=["train", "evaluate"], required=True)
    names.add_argument("--scale", default="tiny")
    names.set_defaults(function=names_command)
    arms = actions.add_parser("run", help="bring every training and evaluation of a scale up to date, some at a time")
    arms.add_argument("--scale", default="tiny")
    arms.add_argument("--jobs", type=int, help="arms at a time; at most, and by default, compute.slots")
    arms.add_argument("--only", nargs="+", metavar="NAME", help="arms such as tiny-unigrpo-0")
    arms.add_argument("--show", action="store_true", help="the stages' own lines in place of logs")
    arms.set_defaults(function=arms_command)
    writes = actions.add_parser("write", help="sets of runs x seeds into params/ and dvc.yaml")
    writes.add_argument("--scale", nargs="+", required=True, help="files of params/scales/")
    writes.add_argument("--set", nargs="+", help="entries of params/sets.yaml; all of them by default")
    writes.add_argument("--run", nargs="+", help="entries of params/runs.yaml, in place of sets")
    writes.add_argument("--seed", nargs="+", type=int, help="with --run; 0 1 2 by default")
    writes.set_defaults(function=experiment_command)

    stage = commands.add_parser("stage", help="run one stage in this process, without DVC and Metaflow")
    stage.add_argument("stage")
    stage.add_argument("name")
    stage.set_defaults(function=stage_command)

    plan = commands.add_parser("plan", help="what a run will do: prompts, images, updates, memory, seconds")
    plan.add_argument("--scale", default="tiny")
    plan.add_argument("--run", default="unigrpo", help="an entry of params/runs.yaml")
    plan.add_argument("--no-probe", action="store_true", help="no time estimate, which takes a few steps of training")
    plan.add_argument("--gpu", choices=["h100", "h200", "a100-80"], help="plan for this GPU by its roofline")
    plan.add_argument("--gpus", type=int, help="how many; compute.resources.gpu by default")
    plan.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    plan.add_argument("--thinking", type=int, help="tokens of thinking on average; the longest allowed by default")
    plan.set_defaults(function=plan_command)

    store = commands.add_parser("store", help="make MLflow's database, or bring it up to date; send it what waits")
    store.set_defaults(function=store_command)

    report = commands.add_parser("report", help="a report's results as a table, or into the README")
    report.add_argument("--scale", default="tiny")
    report.add_argument("--which", choices=["report", "experiments"], default="report", help="a folder of artifacts/<scale>/")
    report.add_argument("--readme", action="store_true", help="rewrite the results in README.md and docs/")
    report.set_defaults(function=report_command)
    generate.add_parser(commands)
    import_bagel.add_parser(commands)
    export.add_parser(commands)
    score.add_parser(commands)
    parse_prompts.add_parser(commands)
    doctor.add_parser(commands)
    serve_rewards.add_parser(commands)
    prompts.add_parser(commands)
    verify.add_parser(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for a user's mistake, named on stderr."""
    args = parser().parse_args(arguments)
    try:
        return int(args.function(args))
    except (ValueError, OSError) as error:
        print(f"unigrpo {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"unigrpo {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
