"""A model hub on this machine: what huggingface_hub asks for when it downloads, and nothing else.

Files of a revision (small ones at once, weights by a redirect to a storage of another origin), listings, tokens, and
the error codes that the client turns into its exceptions. Every request is recorded. Two hooks stand in for the rest
of the world: they run while an answer is under way, and can wait, change the hub, refuse, or break the connection off.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

WAIT_SECONDS = 60.0
LARGE_FILES = (".safetensors", ".bin")
STORAGE = "/storage/"

# The one folder within a repository that files are asked for in.
FOLDER = "additional_chat_templates"


class BreakOff(Exception):
    """Raised by a hook: the connection is closed with what was sent so far."""


class Refuse(Exception):
    """Raised by `on_request`: this is answered instead of what was asked for."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


@dataclass(frozen=True)
class Request:
    """One request. `file` is the name within the repository, where it is for a file; header names in lower case."""

    method: str
    path: str
    file: str
    headers: Mapping[str, str]


@dataclass
class Repository:
    """Commits by hash, branches and tags by name; `gated` wants a token that the hub knows."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    gated: bool = False


Hook = Callable[[Request], None]


class FakeHub:
    """Use as a context manager. `url` is what HF_ENDPOINT has to be.

    Args:
        host: the address to bind to; for containers, their network's gateway.

    Attributes:
        tokens: the access tokens that the hub knows.
        on_request: called before a request is answered.
        halfway: called when half of a file's body was sent.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()
        self.on_request: Hook | None = None
        self.halfway: Hook | None = None
        self.requests: list[Request] = []
        self._changed = threading.Condition()
        # The storage has a port of its own, hence another origin, as the content network of a hub has.
        self._servers = [_Server(self, host), _Server(self, host)]
        self.url, self.storage_url = (server.url for server in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Refuse connections from here on. May be called again."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def commit(self, repo_id: str, files: Mapping[str, bytes], reference: str = "main", gated: bool = False) -> str:
        """Make `files` what `reference` of a repository holds. Returns the commit's hash."""
        repository = self.repositories.setdefault(repo_id, Repository())
        repository.gated = gated
        digest = hashlib.sha1(repo_id.encode() + reference.encode())
        for name, content in sorted(files.items()):
            digest.update(name.encode() + content)
        commit = digest.hexdigest()
        repository.commits[commit] = dict(files)
        repository.references[reference] = commit
        return commit

    def record(self, request: Request) -> None:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()

    def count(self, method: str, file: str) -> int:
        return sum(request.method == method and request.file == file for request in self.requests)

    def files_asked_for(self) -> set[str]:
        return {request.file for request in self.requests if request.file}

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the requests recorded so far meet `condition`; to be called in a hook."""
        with self._changed:
            if not self._changed.wait_for(condition, WAIT_SECONDS):
                raise AssertionError("the requests waited for did not come")

    def content_of(self, digest: str) -> tuple[str, bytes]:
        """The file of that SHA-256: its name and bytes."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for name, content in files.items():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return name, content
        raise KeyError(digest)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.hub = hub
        self.url = f"http://{host}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed is part of the tests
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _split(path: str) -> tuple[str, str, str]:
    """Return repository, revision and file of `owner/name/resolve/revision/file`. Revisions may have slashes too."""
    repo_id, _, rest = path.partition("/resolve/")
    revision, _, name = rest.rpartition("/")
    before, _, folder = revision.rpartition("/")
    return (repo_id, before, f"{folder}/{name}") if folder == FOLDER else (repo_id, revision, name)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """The base class prints every request."""

    def _handle(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        file = _split(path)[2]
        if path.startswith(STORAGE):
            file = hub.content_of(path.removeprefix(STORAGE))[0]
        self.request_seen = Request(
            self.command, path, file, {name.lower(): value for name, value in self.headers.items()}
        )
        hub.record(self.request_seen)
        try:
            if hub.on_request is not None:
                hub.on_request(self.request_seen)
            if path.startswith(STORAGE):
                name, content = hub.content_of(path.removeprefix(STORAGE))
                self._send(200, {"Content-Disposition": f'inline; filename="{name}";'}, content)
            elif path.startswith("/api/models/"):
                self._answer_listing(path.removeprefix("/api/models/"))
            else:
                self._answer_file(path.removeprefix("/"))
        except Refuse as refusal:
            self._send_error(refusal.status, "", str(refusal), refusal.headers)
        except BreakOff:
            self.close_connection = True

    def _answer_file(self, path: str) -> None:
        """`owner/name/resolve/revision/file`."""
        repo_id, revision, name = _split(path)
        found = self._files_of(repo_id, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            self._send_error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = files[name]
        if not name.endswith(LARGE_FILES):
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._send(200, {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}, content)
            return
        digest = hashlib.sha256(content).hexdigest()
        self._send(
            302,
            {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "Location": self.server.hub.storage_url + STORAGE + digest,
            },
        )

    def _answer_listing(self, path: str) -> None:
        """`owner/name/tree/revision`."""
        repo_id, _, revision = path.partition("/tree/")
        found = self._files_of(repo_id, revision)
        if found is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(found[1].items())
            ]
            self._send(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _files_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files, or None after an error was sent. Without a token a hub won't tell private from missing."""
        hub = self.server.hub
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = hub.repositories.get(repo_id)
        if token and token not in hub.tokens:
            self._send_error(401, "", "Invalid credentials in Authorization header")
        elif repository is None:
            self._send_error(404 if token else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and not token:
            self._send_error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        else:
            commit = repository.references.get(revision, revision)
            if commit in repository.commits:
                return commit, repository.commits[commit]
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _send_error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        self._send(status, {**codes, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2])
        if self.server.hub.halfway is not None and self.request_seen.file and body:
            self.server.hub.halfway(self.request_seen)
        self.wfile.write(body[len(body) // 2 :])
