"""A stage's progress in the datastore while it works, so that another machine can go on where this one was.

What a restart needs lies in .unigrpo (unigrpo.resume): the newest training state, pictures so far, the journal of the tracker.
It is copied to one of two places by turns, and a head names the newer one after all of it has arrived; so one place is always
whole, and no more than two are kept. Nothing is deleted: where the stage ends well, the head is emptied.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from store import Files, Store, side_by_side

from unigrpo.digests import sha256_path
from unigrpo.resume import STATE

KEPT = ("resume", "tracking", "good")   # folders of .unigrpo
LEFT = (".lock", ".holder", ".part", ".partial", ".damaged", ".old")   # endings of files and folders that stay behind
STATES = "state"                        # a folder of this name is written whole, then renamed: its files never change
PLACES = ("a", "b")
Seen = tuple[int, int, int]             # of a file: inode, time, bytes


class Mirror:
    """The progress of one stage.

    Args:
        store: the datastore. key: the stage, and a digest of all that decides its result. root: the folder it works in.
        sent: whether a tracking server took the records; its notes travel only then, or another machine would not send again.
    """

    def __init__(self, store: Store, key: str, root: Path, *, sent: bool = False) -> None:
        self.store, self.key, self.root, self.sent = store, f"states/{key}", root, sent
        self.places: dict[str, Files] = {}
        self.newest: str | None = None
        self.known: dict[str, tuple[Seen, str]] = {}
        self.saved: dict[str, Seen] = {}

    def restore(self) -> bool:
        """Fetch the newest progress that is whole. Returns whether there was any."""
        head = self.store.get_json(f"{self.key}/head.json") or {}
        self.places = {name: {path: (str(sha), int(size)) for path, (sha, size) in files.items()}
                       for name, files in (head.get("places") or {}).items()}
        self.newest = head.get("newest")
        order = [name for name in (self.newest, *PLACES) if name in self.places]
        for name in dict.fromkeys(order):
            try:
                self.store.receive(self.root, self.places[name], key=lambda path, name=name: f"{self.key}/{name}/{path}")
                return True
            except ValueError as error:
                print(f"the progress kept in the datastore is damaged and not used: {error}", file=sys.stderr, flush=True)
        return False

    def save(self) -> bool:
        """Copy what is new. Returns whether there was anything."""
        seen = self.look()
        resume = {name: s for name, s in seen.items() if name.startswith(f"{STATE}/resume/")}
        if not resume or resume == self.saved:  # a stage that ended well has none left; its last state is kept until `clear`
            return False
        snapshot = self.root / STATE / "snapshot"
        target = next(name for name in PLACES if name != self.newest)
        old = self.places.get(target, {})
        files: Files = {}
        try:
            for name in sorted(seen, key=lambda name: f"/{STATES}/" not in name):  # what a state names lies there before it
                if (content := self.content(name, seen[name], old, snapshot)) is None:
                    return False  # replaced by a newer one while we looked: next time
                files[name] = content
            self.places.pop(target, None)  # not what it was from here on, whatever happens
            side_by_side(lambda name: self.store.put(f"{self.key}/{target}/{name}", snapshot / name),
                         [name for name in files if old.get(name) != files[name]])
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)
        self.places[target], self.newest = files, target
        self.store.put_json(f"{self.key}/head.json", {"newest": target, "places": self.places})
        self.saved = resume
        return True

    def clear(self) -> None:
        """Forget it: the stage has ended well."""
        if self.places:
            self.store.put_json(f"{self.key}/head.json", {})
            self.places, self.newest = {}, None

    def look(self) -> dict[str, Seen]:
        """What there is now."""
        return {path.relative_to(self.root).as_posix(): sight(path) for path in progress_files(self.root, sent=self.sent)}

    def content(self, name: str, seen: Seen, old: Files, snapshot: Path) -> tuple[str, int] | None:
        """(sha256, bytes) of a file, and a copy of it in the snapshot where the place has another; None if it is gone."""
        if name in self.known and self.known[name][0] == seen and old.get(name) == (self.known[name][1], seen[2]):
            return old[name]
        copy = snapshot / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if f"/{STATES}/" in name:
                os.link(self.root / name, copy)
                if sight(copy)[0] != seen[0]:
                    return None
            else:
                shutil.copyfile(self.root / name, copy)  # it may grow under our hands; the copy does not
        except FileNotFoundError:
            return None
        if f"/{STATES}/" not in name or self.known.get(name, (None, ""))[0] != seen:
            self.known[name] = (seen, sha256_path(copy))
        digest = self.known[name][1]
        return digest, copy.stat().st_size


def sight(path: Path) -> Seen:
    """What tells a file from another of its name, without reading it."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def progress_files(root: Path, *, sent: bool) -> Iterator[Path]:
    """The files of .unigrpo that a restart needs, wherever it happens."""
    for folder in KEPT:
        for path in sorted((root / STATE / folder).rglob("*")):
            parts = path.relative_to(root).parts[1:]
            left = any(part.endswith(LEFT) for part in parts) or (path.suffix == ".sent" and not sent)
            if not left and path.is_file():
                yield path
