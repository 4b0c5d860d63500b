"""A Chromium without a window, driven over its debugging protocol: open a page, wait for words, click, take pictures.

No driver needs to be installed: the protocol is JSON over one WebSocket, and aiohttp comes with DVC.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0  # seconds that a page may take on a busy machine


def find_browser() -> str | None:
    """UNIGRPO_BROWSER, or the first of NAMES on PATH."""
    return os.environ.get("UNIGRPO_BROWSER") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. Use it as a context: the browser ends with it.

    Attributes: errors: uncaught exceptions of the pages' scripts. requests: addresses asked for.
    """

    def __init__(self, program: str, width: int = 1400, height: int = 900) -> None:
        self.size = (width, height)
        self.folder = Path(tempfile.mkdtemp(prefix="unigrpo-browser-"))
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                   "--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
                   "--disable-sync", "--disable-features=IsolateSandboxedIframes",  # framed() looks into them
                   "--remote-debugging-port=0", f"--user-data-dir={self.folder}", f"--window-size={width},{height}"]
        self.process = subprocess.Popen([program, *options, "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.number = 0
        self.runner = asyncio.Runner()
        self.session: Any = None
        self.socket: Any = None

    def __enter__(self) -> Page:
        try:
            self.runner.run(self._connect())
            for domain in ("Page", "Runtime", "Network"):
                self.call(f"{domain}.enable")
            self.call("Emulation.setDeviceMetricsOverride", width=self.size[0], height=self.size[1], deviceScaleFactor=1,
                      mobile=False)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and forget its profile."""
        async def leave() -> None:
            if self.socket is not None:
                await self.socket.close()
            if self.session is not None:
                await self.session.close()

        self.runner.run(leave())
        self.runner.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _connect(self) -> None:
        """The browser writes its port into its profile; the tab's socket is in the list it serves there."""
        note = self.folder / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE
        while not (note.is_file() and note.read_text().strip()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the browser did not start (exit status {self.process.poll()})")
            await asyncio.sleep(0.05)
        port = note.read_text().split()[0]
        self.session = aiohttp.ClientSession(trust_env=False)
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(entry for entry in await answer.json() if entry["type"] == "page")
        self.socket = await self.session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol and its answer; what happened meanwhile is noted."""
        self.number += 1

        async def exchange() -> dict[str, Any]:
            await self.socket.send_json({"id": self.number, "method": method, "params": params})
            while True:
                message = await self.socket.receive_json(timeout=PATIENCE)
                if message.get("id") == self.number:
                    if "error" in message:
                        raise RuntimeError(f"{method}: {message['error']['message']}")
                    return dict(message["result"])
                self._note(message)

        return self.runner.run(exchange())

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            details = message["params"]["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details.get("text", ""))
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def open(self, url: str, *words: str) -> str:
        """Go to a page and wait for words on it. Returns the page's text."""
        self.call("Page.navigate", url=url)
        return self.wait(*words)

    def text(self) -> str:
        """What can be read on the page, in frames of the same origin too."""
        return str(self.js("""[document, ...[...document.querySelectorAll('iframe')].map(f => {
            try { return f.contentDocument } catch (e) { return null } })].filter(d => d && d.body)
            .map(d => d.body.innerText).join('\\n')"""))

    def framed(self) -> str:
        """What can be read in a frame that scripts of the page may not look into, such as MLflow's view of an HTML artifact."""
        deadline = time.monotonic() + PATIENCE
        while True:
            tree = self.call("Page.getFrameTree")["frameTree"]
            for child in tree.get("childFrames", []):
                world = self.call("Page.createIsolatedWorld", frameId=child["frame"]["id"])["executionContextId"]
                answer = self.call("Runtime.evaluate", contextId=world, returnByValue=True, expression="""JSON.stringify({
                    text: document.body ? document.body.innerText : '',
                    pictures: [...document.images].filter(image => image.naturalWidth).length})""")
                found = json.loads(answer["result"].get("value") or "{}")
                if found.get("text"):
                    return f"{found['text']}\n{found['pictures']} pictures drawn"
            assert time.monotonic() < deadline, f"no frame with words on the page:\n{self.text()[:2000]}"
            time.sleep(0.2)

    def wait(self, *words: str, timeout: float = PATIENCE) -> str:
        """Wait until all the words are on the page. Returns the page's text. Raises AssertionError naming what is missing."""
        deadline = time.monotonic() + timeout
        while True:
            text = self.text()
            missing = [word for word in words if word not in text]
            if not missing:
                return text
            assert time.monotonic() < deadline, f"the page lacks {missing}; it says:\n{text[:3000]}"
            time.sleep(0.2)

    def wait_for(self, expression: str, timeout: float = PATIENCE) -> Any:
        """Wait until a JavaScript expression is true; its value."""
        deadline = time.monotonic() + timeout
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"never true on the page: {expression}\nit says:\n{self.text()[:3000]}"
            time.sleep(0.2)
        return value

    def click(self, text: str, selector: str = "a, button, [role=tab], [role=treeitem], label, li, span, div") -> None:
        """Click the smallest visible element with this text (or, where none is exactly so, that begins with it)."""
        found = self.wait_for(f"""(() => {{
            const all = [...document.querySelectorAll({selector!r})].filter(e => e.offsetParent !== null);
            const say = e => (e.innerText || '').trim();
            const some = all.filter(e => say(e) === {text!r}), near = all.filter(e => say(e).startsWith({text!r}));
            const best = (some.length ? some : near).sort((a, b) => a.innerHTML.length - b.innerHTML.length)[0];
            if (!best) return null;
            best.scrollIntoView({{block: 'center'}});
            const box = best.getBoundingClientRect();
            return {{x: box.x + box.width / 2, y: box.y + box.height / 2}} }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=found["x"], y=found["y"], button="left", clickCount=1)

    def picture(self, path: Path, colors: int = 256) -> Path:
        """The window as a PNG with a palette: small, and letters stay sharp."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        with Image.open(io.BytesIO(data)) as image:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        return path
