"""A headless Chromium, driven over a pipe by the Chrome DevTools protocol: no package, no port."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for an answer
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13,
}  # fmt: skip


def find() -> str | None:
    """Where the browser is, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. ``problems`` and ``requests`` are what the page said and asked for since it was opened."""

    def __init__(self, program: str, folder: Path) -> None:
        theirs_in, self.out = _high_pipe()
        self.into, theirs_out = _high_pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder / 'profile'}"]
        self.process = os.posix_spawn(
            program,
            [program, *flags, "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, theirs_in, 3),
                (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out):
            os.close(end)
        self.numbers, self.rest, self.session = itertools.count(1), b"", ""
        self.folder, self.events = folder, list[dict[str, Any]]()
        tab = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder), eventsEnabled=True)

    def close(self) -> None:
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        for end in (self.out, self.into):
            os.close(end)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def wait(self, method: str) -> dict[str, Any]:
        """The next event of this name, the ones that have come already included."""
        while True:
            for index, event in enumerate(self.events):
                if event.get("method") == method:
                    del self.events[: index + 1]
                    parameters: dict[str, Any] = event["params"]
                    return parameters
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            if not select.select([self.into], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            some = os.read(self.into, 1 << 20)
            if not some:
                raise RuntimeError("the browser has gone")
            self.rest += some
        line, _, self.rest = self.rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def open(self, html: str, dark: bool = False, width: int = 1000, height: int = 900) -> None:
        path = self.folder / "page.html"
        path.write_text(html, encoding="utf-8")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        """What a JavaScript expression is on the page; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        where = f"document.querySelector({json.dumps(selector)})"
        box = self.ask(
            f"{where}.scrollIntoView({{block: 'center'}}), (({{left, top, width, height}}) => "
            f"({{x: left + width / 2, y: top + height / 2}}))({where}.getClientRects()[0])"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **box, **button)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    @property
    def problems(self) -> list[str]:
        """Errors, warnings and uncaught exceptions that the console shows."""
        self.call("Runtime.evaluate", expression="1")  # what was said before has come by then
        seen = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in seen]

    @property
    def requests(self) -> list[str]:
        """Addresses that were asked for, but for the page itself."""
        self.call("Runtime.evaluate", expression="1")
        sent = [event["params"] for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["type"] != "Document"]


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not the 3 and 4 that the browser reads and writes."""
    low, ends = os.pipe(), []
    for end in low:
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends[0], ends[1]
