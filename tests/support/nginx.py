"""A real nginx in front of endpoints."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.running import wait_until

# One process in the foreground, which writes into its own folder only.
_FRAME = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {servers}
}}
"""


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(bound.getsockname()[1]) for bound in sockets]


def require_nginx() -> str:
    """Return nginx's path; skips the test where there is none, and fails it in continuous integration."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if path is None:
        reason = "no nginx on PATH to put in front of an endpoint: apt-get install nginx-light"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@contextmanager
def running_nginx(folder: Path, servers: str, port: int) -> Iterator[None]:
    """Run nginx with these `server` blocks, one of which listens on the port."""
    path = require_nginx()
    file = folder / "nginx.conf"
    file.write_text(_FRAME.format(folder=folder, servers=servers))
    process = subprocess.Popen([path, "-p", str(folder), "-c", str(file)], stderr=subprocess.PIPE)

    def listens() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, "nginx to listen")
        yield
    finally:
        process.terminate()
        process.communicate()
