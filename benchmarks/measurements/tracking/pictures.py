"""Pictures of the MLflow UI on a tracked comparison, by headless Chromium.

    evo-hpo ui --port 5000 &
    python -m benchmarks.measurements.tracking.pictures http://127.0.0.1:5000 COMPARISON docs/images

Chromium is driven through its debugging pipe; nothing but the standard library and MLflow's client is needed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from evo_hpo.tracking.mlflow_store import connect
from evo_hpo.tracking.views import MODE, link

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)

QUIET = """
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
document.addEventListener("DOMContentLoaded", () => {
  const style = document.createElement("style");
  style.textContent = ".modebar-container { display: none !important; }";
  document.head.appendChild(style);
});
"""


class Browser:
    """One headless page."""

    def __init__(self, profile: str, width: int, height: int) -> None:
        to_read, self.to = os.pipe()
        self.out, from_write = os.pipe()

        def connect_pipes() -> None:
            # Chromium reads commands from descriptor 3 and writes answers to 4
            read, write = os.dup(to_read), os.dup(from_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            ["chromium", *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            pass_fds=(3, 4, to_read, from_write),
            preexec_fn=connect_pipes,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self.count = 0
        self.buffer = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.addScriptToEvaluateOnNewDocument", source=QUIET)

    session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events are skipped."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                data = os.read(self.out, 1 << 20)
                if not data:
                    raise RuntimeError("the browser ended")
                self.buffer += data
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def picture(self, url: str, path: Path, *, wait: float) -> None:
        """Opens a page, lets it settle, and saves what it shows."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        time.sleep(wait)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def pages(address: str, comparison: str) -> dict[str, str]:
    """File name -> address of each picture."""
    client = connect(address)
    found = client.get_experiment_by_name(comparison)
    if found is None:
        raise SystemExit(f"no comparison {comparison!r} at {address}")
    number = str(found.experiment_id)
    own = client.search_runs([number], "tags.kind = 'comparison'", max_results=1)
    report = f"{address}/#/experiments/{number}/runs/{own[0].info.run_id}/artifacts/{REPORT}?{MODE}" if own else address
    return {
        "ui-searches.png": f"{address}/{link(number)}",
        "ui-curves.png": f"{address}/{link(number, 'curves', charts=True)}",
        "ui-children.png": f"{address}/{link(number, 'winner')}",
        "ui-parallel.png": f"{address}/{link(number, 'levels', charts=True)}",
        "ui-report.png": report,
    }


REPORT = "report/report.html"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("comparison")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wait", type=float, default=12.0, help="seconds for a page to settle")
    parser.add_argument("--size", default="1600x1000")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(profile, width, height)
        try:
            for file, url in pages(arguments.address, arguments.comparison).items():
                browser.picture(url, arguments.folder / file, wait=arguments.wait)
                print(arguments.folder / file)
        finally:
            browser.process.kill()
            browser.process.wait()


if __name__ == "__main__":
    main()
