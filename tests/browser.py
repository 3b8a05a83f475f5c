"""Headless Chromium, driven over its own protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-port=0 --window-size=1400,900"
)
LISTEN = """
window.answers = [];
const fetch_ = window.fetch;
window.fetch = async (...given) => {
  const answer = await fetch_(...given);
  answer.clone().text().then((text) => window.answers.push(text), () => {});
  return answer;
};
"""


class Browser:
    """One page; every answer that it fetches is kept in `window.answers`."""

    def __init__(self, folder: Path):
        import websocket

        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [CHROMIUM, *WORDS.split(), f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
        )
        where = folder / "DevToolsActivePort"
        for _ in range(240):
            if where.is_file() and where.read_text().strip():
                break
            time.sleep(0.25)
        port = where.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=30))
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=120)
        self.calls = 0
        self("Page.enable")
        self("Page.addScriptToEvaluateOnNewDocument", source=LISTEN)

    def __call__(self, method: str, **words: Any) -> dict[str, Any]:
        self.calls += 1
        self.socket.send(json.dumps({"id": self.calls, "method": method, "params": words}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        self("Page.navigate", url=address)

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        message = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in message, message
        return message["result"].get("value")

    def wait(self, expression: str, seconds: float = 240) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(expression):
                return value
            time.sleep(0.25)
        raise AssertionError(f"not within {seconds} s: {expression}\n{self.run('document.body?.innerText')[:2000]}")

    def image(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))
        return path

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
