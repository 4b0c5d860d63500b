"""Which modules a stage imports, directly or not, read from the source; `python -m unigrpo.closure` is dvc.yaml's stage `code`.

It writes artifacts/code/<stage>.json, a line per module that can move the stage's numbers, and each stage depends on its one
file: DVC writes no list of seventy modules into every entry of dvc.lock, and `git diff artifacts/code` shows what made a stage
stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from unigrpo.digests import RECORDERS, sha256_inputs
from unigrpo.stages import STAGES

CODE = "artifacts/code"


def module_file(root: Path, module: str) -> Path | None:
    """The file of a module of this package, relative to `root`; None if there is no such module."""
    path = Path(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if (root / file).is_file()), None)


def imports(root: Path, module: str) -> set[str]:
    """Modules of this package that `module` imports anywhere, inside functions too, and the packages they lie in.

    Imports for type checkers only count as well: they cost a needless rerun at worst, where a miss costs a stale number.
    """
    file = module_file(root, module)
    assert file is not None, module
    names: set[str] = set()
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"), file.as_posix())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[:len(package) - node.level + 1], *filter(None, [base])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}  # a name may be a submodule
    parents = {".".join(name.split(".")[:n]) for name in names for n in range(1, name.count(".") + 1)}
    return {name for name in names | parents if name.split(".")[0] == "unigrpo" and module_file(root, name) is not None}


def closure(root: Path, module: str) -> set[str]:
    """All modules of this package that importing `module` reaches, itself included; recorders are not looked into."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        if name not in RECORDERS:
            todo += imports(root, name)
    return found


def module_files(root: Path, module: str) -> list[str]:
    """The files of a module's closure that can move numbers. Empty modules cannot."""
    files = {module_file(root, name) for name in closure(root, module) - RECORDERS}
    return sorted(file.as_posix() for file in files if file is not None and (root / file).read_text(encoding="utf-8").strip())


def files_digest(root: Path, files: Iterable[str]) -> str:
    """16 hex digits: sha256 over names and bytes of files, whatever their order; "none" where there are none."""
    names = sorted(set(files))
    content = "".join(f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in names)
    return hashlib.sha256(content.encode()).hexdigest()[:16] if names else "none"


def stage_digests(root: Path, stage: str) -> dict[str, str]:
    """The content of artifacts/code/<stage>.json: file -> sha256."""
    return sha256_inputs(root, module_files(root, f"unigrpo.stages.{stage}"))


def changed_files(root: Path, stage: str) -> list[str]:
    """The modules of a stage that are not as artifacts/code/<stage>.json says, those that came or went among them."""
    path = root / CODE / f"{stage}.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return sorted({file for file, _ in written.items() ^ stage_digests(root, stage).items()})


def write_digests(root: Path) -> None:
    """Write the digests of every stage's code. Raises SyntaxError, naming file and line, where a module cannot be read."""
    texts = {stage: json.dumps(stage_digests(root, stage), indent=1) + "\n" for stage in STAGES}
    (root / CODE).mkdir(parents=True, exist_ok=True)
    for stage, text in texts.items():
        (root / CODE / f"{stage}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        write_digests(Path.cwd())
    except SyntaxError as error:
        sys.exit(f"{error.filename}, line {error.lineno}: {error.msg}")
