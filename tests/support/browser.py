"""A real browser without a window: Chromium, driven over its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium")


class Page:
    """One page of a browser of its own.

    Args:
        url: what it opens.
        folder: an empty folder for the browser's files.
    """

    def __init__(self, url: str, folder: Path) -> None:
        assert CHROMIUM is not None
        self.requested: list[str] = []
        self.received = b""
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                "--window-size=1000,700",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._port(folder / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30) as answer:
                (target,) = (each for each in json.load(answer) if each["type"] == "page")
            address = target["webSocketDebuggerUrl"]
            self._socket = self._stack.enter_context(connect(address, max_size=None))
            self.call("Network.enable")
            self.call("Page.enable")
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)
            self.call("Page.navigate", url=url)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _port(self, file: Path) -> int:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "the browser has ended"
            if file.exists() and file.read_text():
                return int(file.read_text().splitlines()[0])
            time.sleep(0.05)
        raise AssertionError("the browser does not start")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer of the browser."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(30))
            if message.get("id") == number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found
            self._take(message)

    def _take(self, message: dict[str, Any]) -> None:
        """Remember what the page requested, and what its WebSocket received."""
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif method == "Network.webSocketFrameReceived":
            frame = parameters["response"]
            if frame["opcode"] == 2:
                self.received += base64.b64decode(frame["payloadData"])

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < deadline, (script, self.received[-500:])
            time.sleep(0.1)

    def until_received(self, words: bytes, seconds: float = 60.0) -> None:
        """Wait until the WebSocket has received some words from now on."""
        self.received, deadline = b"", time.monotonic() + seconds
        while words not in self.received:
            assert time.monotonic() < deadline, self.received[-500:]
            self.evaluate("1")
            time.sleep(0.1)

    def press(self, key: str) -> None:
        """Press a key that types a character."""
        self.call("Input.dispatchKeyEvent", type="keyDown", text=key, key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self) -> bytes:
        """Return a picture of the page, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End the browser."""
        self._stack.close()
        self._process.terminate()
        self._process.wait(30)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
