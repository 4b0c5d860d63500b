"""`make audit`: asks pip-audit about every pinned package; says what is missing where it cannot, and fails on findings only."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import urllib.error
import urllib.request

SERVICE = "https://pypi.org/pypi/pip/json"  # where pip-audit asks


def reachable(url: str = SERVICE) -> bool:
    """Whether the service answers within seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def main(pins: str) -> int:
    """Returns 1 for findings, 0 for none or where nothing could be asked."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: nothing was checked: pip-audit is not installed. `.venv/bin/pip install pip-audit` installs it here, "
              f"`pipx run pip-audit -r {pins} --no-deps --disable-pip` runs it from elsewhere")
        return 0
    if not reachable():
        print(f"audit: nothing was checked: no answer from {SERVICE}; run it on a machine with a network")
        return 0
    return subprocess.run([sys.executable, "-m", "pip_audit", "--requirement", pins, "--no-deps", "--disable-pip"]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
