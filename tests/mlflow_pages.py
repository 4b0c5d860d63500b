"""MLflow's pages of a store in a browser: `python tests/mlflow_pages.py STORE.db SCALE FOLDER` writes pictures of them.

The store is copied first; artifacts are read where they lie.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from browser import PATIENCE, Page, find_browser

from unigrpo.commands.doctor_run import search

SIZE = (1280, 800)
SEARCH = 'input[placeholder="Search metric charts"]'
QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def served(store: Path) -> Iterator[str]:
    """MLflow's pages of a database, as `make ui` serves them; their address."""
    base = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{store.resolve()}", "--workers", "1",
               "--port", base.rpartition(":")[2]]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, cwd=store.parent, env=os.environ | QUIET, stdin=subprocess.DEVNULL, stdout=log,
                                  stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 2 * PATIENCE
            while True:
                try:
                    urllib.request.urlopen(f"{base}/health", timeout=5).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise RuntimeError(f"MLflow does not serve: {log.read().decode(errors='replace')[-2000:]}") from None
                    time.sleep(0.3)
            yield base
        finally:
            server.terminate()
            server.wait(30)


class Pages:
    """MLflow's pages of one scale's runs, in a browser.

    Args: page: the browser. base: MLflow's address. store: an MLflow client. scale: the experiment's name. folder: of pictures.
    """

    def __init__(self, page: Page, base: str, client: object, scale: str, folder: Path) -> None:
        self.page, self.base, self.folder, self.scale = page, base, folder, scale
        runs = search(client, "")
        self.runs = {run.info.run_name: run.info.run_id for run in reversed(runs)}  # of one name the latest
        self.experiment = next(run.info.experiment_id for run in runs if run.info.run_name.partition("/")[2].startswith(scale))

    def address(self, rest: str = "") -> str:
        """An address below the experiment's runs, among MLflow's pages for training."""
        return f"{self.base}/#/experiments/{self.experiment}/runs/{rest}".rstrip("/") + "?workflowType=machine_learning"

    def shoot(self, name: str) -> None:
        """A picture once the charts stand still: without the assistant that MLflow opens beside its pages, the charts' tools,
        and the folder this project lies in."""
        if self.page.js("document.body.innerText.includes('MLflow Assistant')"):
            self.page.js("""(() => { const button = [...document.querySelectorAll('button')].find(b =>
                /close/i.test(b.getAttribute('aria-label') || '') || /close/i.test(b.dataset.componentId || ''));
                if (button) button.click(); })()""")
        self.page.js("""document.querySelectorAll('.modebar-container').forEach(e => e.style.display = 'none')""")
        self.page.js("""(() => { const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
            while (walk.nextNode()) walk.currentNode.nodeValue =
                walk.currentNode.nodeValue.replace(/file:\\/\\/\\S*\\/mlartifacts/, 'file:///.../mlartifacts') })()""")
        time.sleep(2)
        self.page.picture(self.folder / f"mlflow_{name}.png")

    def listing(self, *names: str) -> str:
        """The experiment's list of runs."""
        self.page.open(f"{self.base}/#/experiments", "Model training", self.scale)
        self.page.click("Model training")  # MLflow opens its pages for prompts and agents; the browser remembers the choice
        time.sleep(1)
        self.page.click(self.scale, "a")
        text = self.page.wait(*names)
        self.shoot("runs")
        return text

    def charts(self, names: Sequence[str], metrics: str, query: str | None = None) -> str:
        """The curves of some runs side by side; `metrics` is searched for among the charts, `query` among the runs."""
        query = query or f"attributes.run_id IN ({', '.join(repr(self.runs[name]) for name in names)})"
        self.page.open(f"{self.address()}&compareRunsMode=CHART&searchFilter={quote(query)}", *names)
        self.page.wait_for(f"document.querySelector({SEARCH!r}) !== null")
        self.page.js(f"document.querySelector({SEARCH!r}).focus()")
        self.page.call("Input.insertText", text=metrics)
        self.page.wait_for(f"document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= {len(names)}")
        self.shoot("curves")
        return self.page.text()

    def compare(self, names: Sequence[str], *words: str) -> str:
        """The page that compares some runs, params and metrics in columns."""
        runs, experiments = quote(json.dumps([self.runs[name] for name in names])), quote(json.dumps([self.experiment]))
        self.page.open(f"{self.base}/#/compare-runs?runs={runs}&experiments={experiments}", *names, "Show diff only")
        self.page.click("Show diff only")
        text = self.page.wait(*words)
        self.page.js("[...document.querySelectorAll('*')].find(e => e.innerText === 'Show diff only').scrollIntoView()")
        self.shoot("compare")
        return text

    def run(self, name: str, *words: str) -> str:
        """A run's page: description, params, metrics, tags."""
        text = self.page.open(self.address(self.runs[name]), name, *words)
        self.shoot("run")
        return text

    def gallery(self, name: str, file: str = "gallery.html") -> str:
        """The page of a run's gallery, as MLflow shows the artifact."""
        self.page.open(self.address(f"{self.runs[name]}/artifacts/{file}"), name, file)
        self.page.wait_for("document.querySelector('iframe') !== null")
        text = self.page.framed()
        self.shoot("gallery")
        return text


def main(store: Path, scale: str, folder: Path) -> int:
    """Pictures of the pages of one scale's trainings."""
    from mlflow import MlflowClient

    program = find_browser()
    if program is None:
        raise SystemExit("no Chromium on PATH; install one, or name it in UNIGRPO_BROWSER")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copy2(store, Path(place) / "mlflow.db"))
        with served(copy) as base, Page(program, *SIZE) as page:
            pages = Pages(page, base, MlflowClient(base), scale, folder)
            names = [name for name in pages.runs if name.startswith(f"train/{scale}-")]
            pages.listing(names[0])
            pages.charts(names, "image/(velocity_mse|latent_kl|clip_fraction)$|reward/mean$|probe/exact$",
                         "attributes.run_name LIKE 'train/%'")
            pages.compare(names)
            pages.run(names[0])
            pages.gallery(names[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
