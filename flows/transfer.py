"""Between a workspace and the datastore, by hand:

    python flows/transfer.py send SCALE           the files that params name, for a deployment; prints their manifest's sha256
    python flows/transfer.py fetch SCALE RUN      what a run of the whole graph wrote, such as ExperimentFlow/12
"""

from __future__ import annotations

import sys

import remote
from graph import branches
from places import ROOT
from store import Store

from unigrpo.closure import write_digests
from unigrpo.config import load_config
from unigrpo.digests import sha256_json
from unigrpo.stages import parse_name


def send(scale: str) -> str:
    """Store the files that params name for any stage of a scale. Returns the sha256 of their manifest, "" for none."""
    trainings, given, _ = branches(scale)
    jobs = [("curate", scale), ("base", scale), ("sft", scale), *(("train", name) for name in trainings),
            *(("evaluate", name) for name in (*trainings, *given))]
    names: set[str] = set()
    for stage, name in jobs:
        job = parse_name(stage, name, ROOT)
        names |= set(remote.named_files(job, load_config(scale, run=job.run, seed=job.seed or 0, root=ROOT)))
    if not names:
        return ""
    store = Store.configured()
    files = store.send(ROOT, names)
    store.put_json(f"manifests/{sha256_json(files)}.json", files)
    return sha256_json(files)


def fetch(scale: str, run: str) -> int:
    """Bring a run's files to the workspace, and write the digests of the code beside them. Returns how many came."""
    store = Store.configured()
    files = store.get_json(f"runs/{run}.json")
    if files is None:
        raise ValueError(f"RUN must be a finished run of the whole graph in {store.storage.datastore_root}, such as "
                         f"ExperimentFlow/12, got {run!r}")
    made = (f"artifacts/{scale}/", remote.MADE[1])
    wanted = {name: (str(sha), int(size)) for name, (sha, size) in files.items() if name.startswith(made)}
    remote.put_outputs(store, wanted)
    write_digests(ROOT)
    return len(wanted)


def main(arguments: list[str]) -> int:
    """The command line. Returns the exit status."""
    try:
        if arguments[:1] == ["send"] and len(arguments) == 2:
            print(send(arguments[1]))
        elif arguments[:1] == ["fetch"] and len(arguments) == 3:
            print(f"{fetch(arguments[1], arguments[2])} files; `dvc commit --force` has DVC take them for its own")
        else:
            print(__doc__, file=sys.stderr)
            return 2
    except ValueError as error:
        print(f"transfer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
