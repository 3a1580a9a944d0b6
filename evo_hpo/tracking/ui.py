"""The MLflow UI on the right store: loopback only, one worker, and links that land on the searches."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from evo_hpo.errors import TrackingError
from evo_hpo.tracking.location import artifact_root, database_path, default_uri, quiet_environment
from evo_hpo.tracking.views import link

HOST = "127.0.0.1"

_to_stdout = partial(print, flush=True)


def server_command(uri: str, port: int) -> list[str]:
    """The command that serves a store: loopback, one worker, no artifact proxy, only this port's own host names."""
    root = artifact_root(uri)
    return [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *(("--default-artifact-root", root) if root else ()),
        *("--host", HOST, "--port", str(port), "--workers", "1", "--no-serve-artifacts"),
        *("--allowed-hosts", f"{HOST}:{port},localhost:{port}"),
    ]


def launch_ui(
    folder_or_uri: str | Path | None = None,
    port: int = 5000,
    *,
    say: Callable[[str], None] = _to_stdout,
) -> None:
    """Serves the UI until interrupted, and prints a link for each comparison.

    Args:
        folder_or_uri: a comparison's folder or a tracking URI; default: :func:`evo_hpo.tracking.default_uri`.
        port: on the loopback address.
        say: shows one line to the user.

    Raises:
        TrackingError: nothing is tracked there, the port is taken or none, or the server does not start.
    """
    uri = _uri(folder_or_uri)
    if uri.startswith(("http://", "https://")):
        _say_links(uri, uri.rstrip("/"), say)
        return
    path = database_path(uri)
    if path is not None and not path.exists():
        raise TrackingError(f"{path}: nothing is tracked here yet: run a comparison, or `evo-hpo track FOLDER`")
    _refuse_taken(port)
    server = subprocess.Popen(
        server_command(uri, port),
        env={**os.environ, **quiet_environment()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    before = _ended_like_interrupted()
    try:
        _wait_until_up(server, port)
        _say_links(uri, f"http://{HOST}:{port}", say)
        say("stop with Ctrl-C")
        server.communicate()
    except KeyboardInterrupt:
        say("stopped")
    finally:
        _stop(server)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _ended_like_interrupted() -> Any:
    """Makes SIGTERM an interrupt, so that the server is not left behind; gives the handler to put back."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


def _uri(given: str | Path | None) -> str:
    if given is None:
        return default_uri()
    if "://" not in str(given) or Path(given).exists():
        return default_uri(given)
    return str(given)


def _refuse_taken(port: int) -> None:
    if not 1 <= port <= 65535:
        raise TrackingError(f"{port} is no port: give one from 1 to 65535 with --port")
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TrackingError(f"port {port} cannot be used ({error.strerror}): give another with --port") from None


def _wait_until_up(server: subprocess.Popen[bytes], port: int, limit: float = 120.0) -> None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if server.poll() is not None:
            messages = (server.stderr.read() if server.stderr else b"").decode(errors="replace").strip()
            raise TrackingError(f"the MLflow server ended at once: {messages.splitlines()[-1] if messages else '?'}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{HOST}:{port}/health", timeout=2.0):
                return
        time.sleep(0.3)
    raise TrackingError(f"the MLflow server did not answer on port {port} within {limit:g} s")


def _say_links(uri: str, address: str, say: Callable[[str], None]) -> None:
    from evo_hpo.tracking.mlflow_store import comparisons

    found = comparisons(uri)
    for experiment, name in found[:20]:
        say(f"{name}: {address}/{link(experiment)}")
    if not found:
        say(f"no comparisons yet: {address}")
    elif len(found) > 20:
        say(f"and {len(found) - 20} older ones: {address}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        try:
            server.communicate(timeout=10.0)
            return
        except subprocess.TimeoutExpired:
            continue
