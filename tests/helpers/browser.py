"""A headless Chromium for tests, driven over its DevTools protocol with `websockets`, which vLLM's list has anyway.

Only what the report's tests need: open a file, run script, press keys, move the pointer, take pictures, and everything
that the page logged or asked the network for.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 40
"""How long anything may take on a busy machine."""


def installed() -> str | None:
    """The path of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def started(program: str, folder: Path) -> Browser:
    """A browser with a profile in `folder`. On a machine at its limit a start may fail, so there are three."""
    for attempt in range(3):
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            return Browser(program, folder / f"profile-{attempt}")
    raise RuntimeError(f"{program} does not start")


class Browser:
    """One process with one page. A context manager."""

    def __init__(self, program: str, profile: Path):
        options = ["--headless", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--disable-gpu"]
        # Root has no sandbox, and a container little shared memory; nothing but the test's own files is opened.
        options += ["--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--mute-audio"]
        options += ["--disable-extensions", "--disable-component-update", "--disable-background-networking"]
        # A group of its own: the program may be a shell script that waits for the browser.
        self._process = subprocess.Popen(
            [program, *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._open = contextlib.ExitStack()
        self.events: list[dict[str, Any]] = []
        self._last = 0
        try:
            address = self._address(profile)
            self._socket = self._open.enter_context(connect(address, max_size=None, proxy=None, open_timeout=SECONDS))
            page = self._send("Target.createTarget", session=None, url="about:blank")["targetId"]
            attached = self._send("Target.attachToTarget", session=None, targetId=page, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self._send(f"{domain}.enable")
        except BaseException:
            self._kill()
            raise

    def _address(self, profile: Path) -> str:
        file, end = profile / "DevToolsActivePort", time.monotonic() + SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.05)
        raise RuntimeError(f"Chromium did not start (exit code {self._process.poll()})")

    def _send(self, method: str, session: str | None = "", **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=SECONDS))
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def open(
        self, page: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
    ) -> None:
        """Show a file or an address in a window of that size, and wait until scripts have run and charts are drawn."""
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.events.clear()
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])
        self._send("Page.navigate", url=address)
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({address.split('#')[0]!r})")
        self.settle()

    def wait_for(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"not so after {SECONDS} s: {script}"
            time.sleep(0.05)

    def settle(self) -> None:
        """Wait for two frames, in which layout and whatever observes it are done."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key such as "Tab" or "ArrowLeft"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            self._send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])

    def type(self, text: str) -> None:
        self._send("Input.insertText", text=text)

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the window or of the whole page."""
        shown = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        file.write_bytes(base64.b64decode(shown["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        size = self._send("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}

    def complaints(self) -> list[str]:
        """Whatever the page logged, threw, or was refused by its policy."""
        self.run("1")
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Every address that was asked for, the page's own included."""
        self.run("1")
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def close(self) -> None:
        self._open.close()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(SECONDS)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
