"""`unigrpo doctor run ID`: what an MLflow run leads to, link by link, and which links hold today."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

OK, DIFFERS, UNKNOWN = "ok", "differs", "unknown"
SHORT = 12  # hex digits of a digest that are shown


@dataclass(frozen=True)
class Link:
    """One link of the chain: where the run leads, and whether that is so today.

    Args:
        name: of the link. state: ok, differs or unknown. text: in words. then: a command that goes further, or "".
    """

    name: str
    state: str
    text: str
    then: str = ""

    def lines(self) -> list[str]:
        """For the terminal."""
        return [f"{self.name:12} {self.state:8} {self.text}", *([f"{'':21} {self.then}"] if self.then else [])]


def run_command(args: argparse.Namespace) -> int:
    """Print the chain; returns 0 if every link holds, 1 if one does not or is unknown."""
    from unigrpo.cli import project_root
    from unigrpo.journal import open_client

    root = project_root()
    client = open_client(root)
    found = find_runs(client, args.id)
    run = found[0]
    print("\n".join(heading(run, len(found))))
    links = list(chain(root, run, lambda tag, value: search(client, f"tags.`{tag}` = '{value}'")))
    print("\n".join(line for link in links for line in link.lines()))
    for state in (DIFFERS, UNKNOWN):
        if names := list(dict.fromkeys(link.name for link in links if link.state == state)):
            print(f"{state}: {', '.join(names)}")
    return int(any(link.state != OK for link in links))


def search(client: Any, filter_string: str) -> list[Any]:
    """Runs of all experiments, the latest first."""
    experiments = [found.experiment_id for found in client.search_experiments()]
    return list(client.search_runs(experiments, filter_string, order_by=["attributes.start_time DESC"]))


def find_runs(client: Any, words: Sequence[str]) -> list[Any]:
    """The runs of one name that `words` mean, the latest first.

    Args:
        words: an id or its beginning (4 hex digits or more); a stage and a name, apart or joined by / or @; a name alone
            where one stage has it; a Metaflow pathspec, of a run or of a task; the name of a DVC experiment.
    Raises: ValueError where nothing is found, or more than one name.
    """
    text = "/".join(words).replace("@", "/")
    if not re.fullmatch(r"[\w./-]+", text):
        raise ValueError(f"a run is named by letters, digits and . _ - / only, got {text!r}")
    filters = []
    if re.fullmatch("[0-9a-f]{4,32}", text):
        filters.append(f"attributes.run_id LIKE '{text}%'")
    if re.match(r"[A-Z]\w*Flow/", text):
        filters += [f"tags.`metaflow.pathspec` = '{text}'", f"tags.`metaflow.pathspec` LIKE '{text.rstrip('/')}/%'"]
    filters += [f"attributes.run_name = '{text}'", f"attributes.run_name LIKE '%/{text}'", f"tags.`dvc.exp` = '{text}'"]
    found = next((runs for query in filters if (runs := search(client, query))), [])
    if not found:
        raise ValueError(f"no run has the id, name or pathspec {text!r}; `make ui` lists the runs there are")
    names = list(dict.fromkeys(run.info.run_name for run in found))
    if len(names) > 1 or (len(found) > 1 and found[0].info.run_id.startswith(text)):
        listing = ", ".join(f"{run.info.run_name} ({run.info.run_id[:12]})" for run in found[:6])
        raise ValueError(f"{text!r} means {len(found)} runs; name one: {listing}")
    return found


def heading(run: Any, alike: int) -> list[str]:
    """Which run this is about."""
    start, end = run.info.start_time, run.info.end_time
    when = datetime.fromtimestamp(start / 1000).strftime("%Y-%m-%d %H:%M")
    took = f", {(end - start) / 1000:.0f} s" if end else ""
    of = f"; the latest of {alike} of this name" if alike > 1 else ""
    return [f"MLflow run   {run.info.run_id}{of}", f"{'':12} {run.info.run_name}, {run.info.status}, {when}{took}"]


def chain(root: Path, run: Any, made_by: Callable[[str, str], list[Any]]) -> Iterator[Link]:
    """Every link of a run.

    Args:
        root: the project. run: as MLflow has it. made_by: (tag, value) -> runs with that tag.
    """
    from unigrpo.links import address_of
    from unigrpo.stages import Job, parse_name

    tags: dict[str, str] = run.data.tags
    stage, _, name = run.info.run_name.partition("/")
    job: Job | None
    try:
        job = parse_name(stage, name, root)
    except ValueError:
        job = None
    yield commit_link(root, tags)
    yield code_link(tags)
    yield params_link(run, job, root)
    yield inputs_link(tags, job, root)
    address = address_of(tags, stage, name)
    yield from lock_links(root, address, tags, run, made_by)
    yield from checkpoint_links(root, tags, run, made_by)
    yield metaflow_link(root, tags, stage)


def git(root: Path, *arguments: str) -> str | None:
    """git's answer; None where it has none."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_link(root: Path, tags: Mapping[str, str]) -> Link:
    """The commit, whether this repository has it, and whether it is the whole truth."""
    commit, dirty = tags.get("git.commit", UNKNOWN), tags.get("git.dirty", UNKNOWN)
    if commit == UNKNOWN:
        return Link("commit", UNKNOWN, "the run was started without git")
    subject = git(root, "log", "-1", "--format=%h %s", commit)
    if subject is None:
        return Link("commit", DIFFERS, f"{commit[:SHORT]} is not in this repository")
    behind = git(root, "rev-list", "--count", f"{commit}..HEAD") or "?"
    where = "HEAD" if behind == "0" else f"{behind} commits before HEAD" if git(
        root, "merge-base", "--is-ancestor", commit, "HEAD") is not None else "not an ancestor of HEAD"
    then = f"git show {commit[:SHORT]}"
    if dirty != "false":
        why = "with changes that were not committed" if dirty == "true" else "whether files were changed is not known"
        return Link("commit", UNKNOWN, f"{subject} ({where}), {why}", then)
    return Link("commit", OK, f"{subject} ({where}), nothing changed", then)


def code_link(tags: Mapping[str, str]) -> Link:
    """The modules that move numbers, then and now."""
    from unigrpo.digests import sha256_code

    then, now = tags.get("code.sha256"), sha256_code()
    if then is None:
        return Link("code", UNKNOWN, "the run recorded no digest of its modules")
    if then == now:
        return Link("code", OK, f"{now[:SHORT]}, the modules that move numbers are as they were")
    return Link("code", DIFFERS, f"{then[:SHORT]} then, {now[:SHORT]} now: modules that can move numbers have changed")


def params_link(run: Any, job: Any, root: Path) -> Link:
    """The resolved config, then and now, key by key where they differ."""
    from unigrpo.config import load_config
    from unigrpo.digests import flatten, sha256_json
    from unigrpo.journal import TEXT_LIMIT

    then = run.data.tags.get("params.sha256", UNKNOWN)
    if job is None:
        return Link("params", UNKNOWN, f"{then[:SHORT]}; params/ does not list this run any more")
    values = load_config(job.scale, run=job.run, seed=job.seed or 0, root=root).model_dump(mode="json")
    if then == sha256_json(values):
        return Link("params", OK, f"{then[:SHORT]}, as params/ say today")
    now = {key: str(value)[:TEXT_LIMIT] for key, value in flatten(values).items()}
    old = run.data.params
    keys = sorted(key for key in set(now) | set(old) if now.get(key) != old.get(key))
    shown = ", ".join(f"{key} {old.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys[:4])
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    if then == UNKNOWN:
        return Link("params", DIFFERS if keys else OK, shown + more or "as params/ say today (no digest was recorded)")
    return Link("params", DIFFERS, f"{then[:SHORT]}; today {shown or 'another type of some value'}{more}")


def inputs_link(tags: Mapping[str, str], job: Any, root: Path) -> Link:
    """The files the stage read, then and now."""
    from unigrpo.digests import sha256_inputs, sha256_json

    then = tags.get("inputs.sha256", UNKNOWN)
    if then == UNKNOWN or job is None:
        return Link("inputs", UNKNOWN, "the run recorded no digest of its inputs" if then == UNKNOWN else f"{then[:SHORT]}; "
                    "what the stage reads is not listed any more")
    if not job.inputs:
        return Link("inputs", OK, "none but code and params")
    try:
        now = sha256_json(sha256_inputs(root, job.inputs))
    except ValueError as error:
        return Link("inputs", DIFFERS, str(error))
    if now == then:
        return Link("inputs", OK, f"{then[:SHORT]}, {len(job.inputs)} as they were")
    return Link("inputs", DIFFERS, f"{then[:SHORT]} then, {now[:SHORT]} now: {', '.join(job.inputs[:3])}", "dvc status")


def lock_links(root: Path, address: str, tags: Mapping[str, str], run: Any,
               made_by: Callable[[str, str], list[Any]]) -> Iterator[Link]:
    """The DVC stage, its entry in dvc.lock against what the run made, and the workspace and the cache against both."""
    from unigrpo.dvcfiles import cache_folder, dvc_md5, lock_entry, missing_in_cache
    from unigrpo.links import OUT, below

    entry = lock_entry(root, address)
    made = {key.removeprefix(OUT): value for key, value in tags.items() if key.startswith(OUT)}
    if entry is None:
        yield Link("stage", UNKNOWN, f"dvc.lock has no {address}", f"dvc repro {address}")
        return
    if not made:
        yield Link("stage", UNKNOWN, f"{address}; the run recorded no digests of outputs" + (
            "" if run.info.status == "FINISHED" else f", as it is {run.info.status}"), f"dvc status {address}")
    else:
        others = [path for path, md5 in entry.outs.items() if made.get(below(path)) != md5]
        if not others:
            yield Link("stage", OK, f"{address}: its entry in dvc.lock has this run's outputs", f"dvc status {address}")
        else:
            path = others[0]
            later = [other for other in made_by(OUT + below(path), entry.outs[path]) if other.info.run_id != run.info.run_id]
            whose = f"those of run {later[0].info.run_id[:SHORT]}" if later else "those of a run that MLflow does not know"
            yield Link("stage", DIFFERS, f"{address}: dvc.lock has other outputs, {whose}: {', '.join(map(below, others))}")
    cache = cache_folder(root)
    for path, md5 in entry.outs.items():
        here, missing = dvc_md5(root / path), missing_in_cache(cache, md5)
        where = "as locked" if here == md5 else "missing in the workspace" if here is None else "changed in the workspace"
        # Small metrics and plots are in git, not in DVC's cache.
        kept = "in the cache" if not missing else "in git" if git(root, "ls-files", "--error-unmatch", path) is not None else \
            f"{missing} objects missing in the cache"
        state = OK if here == md5 and (not missing or kept == "in git") else DIFFERS
        yield Link("  output", state, f"{path} {md5[:SHORT]}: {where}, {kept}", "" if state == OK else f"dvc checkout {path}")


def checkpoint_links(root: Path, tags: Mapping[str, str], run: Any,
                     made_by: Callable[[str, str], list[Any]]) -> Iterator[Link]:
    """The weights that the run made, and those it started from with the run that made them."""
    from unigrpo.digests import sha256_path
    from unigrpo.links import IN, OUT, WEIGHTS

    scale = run.data.params.get("scale", UNKNOWN)
    for key in sorted(tags):
        if key.startswith(OUT) and key.endswith("checkpoint"):
            path = Path("artifacts", scale, key.removeprefix(OUT), WEIGHTS)
            then = tags.get("checkpoint.sha256")
            now = sha256_path(root / path) if (root / path).is_file() else None
            state = UNKNOWN if then is None else OK if then == now else DIFFERS
            said = "is missing" if now is None else f"has sha256 {now[:SHORT]}"
            made = "" if state == OK else f", the run made {(then or UNKNOWN)[:SHORT]}"
            yield Link("checkpoint", state, f"{path} {said}{made}")
        elif key.startswith(IN):
            found = [other for other in made_by(OUT + key.removeprefix(IN), tags[key])]
            text = f"from artifacts/{scale}/{key.removeprefix(IN)} {tags[key][:SHORT]}"
            if found:
                yield Link("checkpoint", OK, f"{text}, made by {found[0].info.run_name}",
                           f"unigrpo doctor run {found[0].info.run_id[:SHORT]}")
            else:
                yield Link("checkpoint", UNKNOWN, f"{text}, made by a run that MLflow does not know")


def metaflow_link(root: Path, tags: Mapping[str, str], stage: str) -> Link:
    """The Metaflow task, and whether this machine has it."""
    pathspec = tags.get("metaflow.pathspec", UNKNOWN)
    if pathspec == UNKNOWN:
        return Link("Metaflow", UNKNOWN, "the stage ran without Metaflow")
    folder = root / ".metaflow" / pathspec
    if not folder.is_dir():
        return Link("Metaflow", UNKNOWN, f"{pathspec} is not in .metaflow (removed, or run elsewhere)")
    done = any(folder.glob("*.DONE.lock"))
    card = "/".join(pathspec.split("/")[1:])
    return Link("Metaflow", OK, f"{pathspec}, {'ended' if done else 'not ended'}; data.mlflow_run leads back",
                f"python flows/{stage}_flow.py card view {card}" if stage in ("train", "evaluate") else "")
