"""A headless browser of this machine, driven by its DevTools protocol over two pipes: no package and no port is needed.

    with Browser.start(path, profile=tmp_path) as browser:
        page = browser.open("file:///.../report.html")
        page.evaluate("document.title")

Messages are JSON between NUL bytes; the browser reads them from file descriptor 3 and writes to 4.
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
TIMEOUT_S = 120.0
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars",
    "--no-sandbox",  # containers and root have none to offer; the only page is our own
)  # fmt: skip
# The pipes may have any number here, and the browser wants 3 and 4: move both out of the way, then into place.
_EXEC = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The path of the first browser that is installed here."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One process; `call` sends a command and waits for its answer, events that come meanwhile are kept."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers = commands, answers
        self.events: list[dict[str, Any]] = []
        self._unread, self._last_id = b"", 0

    @classmethod
    @contextmanager
    def start(cls, path: str, *, profile: Path) -> Iterator["Browser"]:
        to_browser, from_browser = os.pipe(), os.pipe()
        ends = (to_browser[0], from_browser[1])
        command = [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, *map(str, ends), *command],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        browser = cls(to_browser[1], from_browser[0])
        try:
            yield browser
        finally:
            browser._close(process)

    def open(self, url: str) -> "Page":
        """A new tab with the page loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.wait_for("Page.loadEventFired")
        return page

    def call(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        os.write(self.commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def next_message(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._unread:
            is_ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
            assert is_ready, f"the browser said nothing for {TIMEOUT_S} s"
            piece = os.read(self.answers, 1 << 20)
            assert piece, "the browser has gone"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def _close(self, process: subprocess.Popen) -> None:
        with suppress(AssertionError, OSError):
            self.call("Browser.close")
        os.close(self.commands)
        os.close(self.answers)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, session=self.session, **parameters)

    def events(self, method: str) -> list[dict[str, Any]]:
        """What the page has reported so far."""
        return [
            event["params"]
            for event in self.browser.events
            if event["method"] == method and event.get("sessionId") == self.session
        ]

    def wait_for(self, method: str) -> None:
        while not self.events(method):
            self.browser.next_message()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press_tab(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)

    def look(self, *, width: int, scheme: str = "light", media: str = "screen") -> None:
        """As on a window so wide, by somebody whose system is light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(shot["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])
