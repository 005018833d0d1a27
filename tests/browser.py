"""Real Chromium and real JupyterLab for tests: offline, and intolerant of errors."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Frame, Page, sync_playwright

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

TOKEN = "test"
SETTINGS = {
    # Every cell is in the page, also those that a reader would have to scroll to.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser that reaches this machine only."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, **options) -> Iterator[Page]:
    """A page at `url`; fails at its end when it logged an error or asked another machine."""
    page = browser.new_page(**options)
    problems = []

    def request(request):
        if urlsplit(request.url).scheme.startswith(("http", "ws")) and (
            urlsplit(request.url).hostname != "127.0.0.1"
        ):
            problems.append(f"asked for {request.url}")

    page.on("request", request)
    page.on("pageerror", lambda error: problems.append(f"threw {error}"))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(url)
    yield page
    page.close()
    assert not problems, problems


@contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[str]:
    """JupyterLab on `folder`, with settings of its own in `home`; yields its address.

    The address takes a path and `?token=`: `f"{address}/lab/tree/NAME.ipynb?token={TOKEN}"`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, setting in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting))
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"),
        *(f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={TOKEN}"),
        *("--LabApp.news_url=", "--LabApp.extension_manager=readonly"),
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(home / place) for name, place in places.items()}
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/api?token={TOKEN}", server, home / "log")
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)


def run_all(page: Page) -> None:
    """In a page that shows a notebook: Run, Run All Cells, once there is a kernel to run them."""
    page.wait_for_selector("#jp-main-statusbar >> text=/ipykernel.*Idle/", timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, f"JupyterLab ended:\n{log.read_text()}"
        try:
            with urllib.request.urlopen(url):
                return
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not answer:\n{log.read_text()}")


class ExplorerPage:
    """What a reader does with an AttentionExplorer, in the frame that shows one."""

    def __init__(self, frame: Frame):
        self.frame = frame
        self.picture = frame.locator("#picture")
        self.picture.scroll_into_view_if_needed()
        frame.wait_for_selector("#app[data-token]")

    def state(self, name: str) -> str:
        """`token`, `strongest`, `layer`, `column`, `received`, `pinned` or `hovered`."""
        return self.frame.locator("#app").get_attribute(f"data-{name}")

    def center(self, token: int) -> dict[str, float]:
        x, y, width, height = self.frame.evaluate("token => cell(token)", token)
        return {"x": x + width / 2, "y": y + height / 2}

    def point(self, token: int) -> None:
        self.picture.hover(position=self.center(token))

    def click(self, token: int) -> None:
        self.picture.click(position=self.center(token))

    def pixels(self) -> str:
        """All pixels of the picture."""
        return self.frame.evaluate("picture.toDataURL()")

    def pixel(self, token: int) -> list[int]:
        """Red, green and blue a little inside the upper left corner of a token's cell."""
        script = """token => {
          const [x, y] = cell(token).map((v) => v * devicePixelRatio);
          return [...picture.getContext("2d").getImageData(x + 6, y + 6, 1, 1).data.slice(0, 3)];
        }"""
        return self.frame.evaluate(script, token)

    def text(self, name: str) -> str:
        return self.frame.locator(f"#{name}").inner_text()
