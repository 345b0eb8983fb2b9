"""The way from a model's name to a local folder: a folder, the cache of the Hugging Face hub, or a download into it.

A revision that is cached whole is used as it is, without a question to the hub. huggingface_hub takes long to import,
and is imported only to download.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.config import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, TOKENIZER_FILES, read_index
from fastgpt2.engine.model.diagnosis import explain_folder, explain_names, read_small_json
from fastgpt2.errors import ModelError, ModelNotFound

log = logging.getLogger("fastgpt2.engine")
DEMO_MODEL = "demo"
DEMO_FOLDER = Path(__file__).parent.parent.parent / "models" / DEMO_MODEL
DEFAULT_REVISION = "main"

# "owner/name" or a bare name. Source: `validate_repo_id` in huggingface_hub.
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_NAME}/)?{_NAME}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Roughly what git allows. It becomes the path of a file below `refs`, which huggingface_hub writes unchecked.
_REVISION = re.compile(r"(?![./])(?!.*(?:\.\.|//|/\.))[^\x00-\x20\x7f~^:?*\[\\]{1,200}")

# What huggingface_hub takes for "yes" in an environment variable, in lower case.
_TRUE = {"1", "on", "yes", "true"}

# Returns the local path of a file of a repository; None if the file is not there.
Fetch = Callable[[str], Path | None]


def find_model(model: str, revision: str | None = None) -> Path:
    """Return the folder that holds a model, downloading it first if needed.

    The cache is huggingface_hub's own, shared with transformers: `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`,
    `HF_ENDPOINT` and `HF_TOKEN` mean what they mean there.

    Args:
        model: `demo` (shipped with this package), the path of a folder, or a Hugging Face hub id such as `gpt2`.
        revision: a branch, tag or commit of the hub's repository; None for `main`.

    Raises:
        ModelNotFound: there is no such folder or repository, no access, no network, or nothing in the cache while
            offline; the message says what to do.
        CheckpointError: the index of a model in shards is malformed, or leads out of its folder.
    """
    if model == DEMO_MODEL:
        return DEMO_FOLDER
    folder = _find_folder(model)
    if folder is not None:
        return folder
    if not _REPO_ID.fullmatch(model):
        raise ModelNotFound(f"{model}: no such folder, nor a hub id (`name` or `owner/name`)")
    revision = revision or DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise ModelNotFound(f"{model}: {revision!r} is no name of a branch, tag or commit")
    return _find_in_cache(model, revision) or _download(model, revision)


def _find_folder(model: str) -> Path | None:
    """Return the folder of that path; None if nothing is there."""
    try:
        path = Path(model).expanduser()
        if (path / CONFIG_FILE).is_file():
            return path
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError) as reason:  # too long, no right to look, `~nobody`
        raise ModelNotFound(f"{model}: cannot be looked up ({reason})") from None
    if is_file or is_folder:
        raise ModelNotFound(explain_folder(path))
    return None


def hub_cache_folder() -> Path:
    """Return huggingface_hub's cache. Source: huggingface_hub/constants.py."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(os.path.expandvars(explicit)).expanduser()
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache_home}/huggingface"
    try:
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    except RuntimeError:  # a user without an entry among the machine's users, and no HOME
        raise ModelNotFound("there is no home folder for the cache of models; set HF_HOME to a folder") from None


def _resolved_cache() -> Path:
    """Return the cache without links, so that a model has one path. huggingface_hub's newer versions resolve it too."""
    return hub_cache_folder().resolve()


def _find_in_cache(repo_id: str, revision: str) -> Path | None:
    """Return the snapshot folder of a revision, if all that a model needs is in it."""
    repo = _resolved_cache() / ("models--" + repo_id.replace("/", "--"))
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (repo / "refs" / revision).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    snapshot = repo / "snapshots" / commit

    def look_up(name: str) -> Path | None:
        path = snapshot / name
        return path if path.is_file() else None

    return snapshot if _collect(look_up) else None


def _collect(fetch: Fetch) -> Path | None:
    """Fetch the files that a model needs, and no others. Returns its `config.json`; None if something is missing.

    Raises:
        CheckpointError: the index names something else than files beside it; none of these is fetched then.
    """
    config = fetch(CONFIG_FILE)
    if config is None or not any(all(fetch(name) for name in names) for names in TOKENIZER_FILES):
        return None
    if fetch(SINGLE_FILE):
        return config
    index = fetch(INDEX_FILE)
    if index is None:
        return None
    return config if all(fetch(name) for name in sorted(set(read_index(index).values()))) else None


def _download(repo_id: str, revision: str) -> Path:
    """Download what a model needs, and return its snapshot folder. Raises as `find_model`."""
    offline = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    if os.environ.get(offline, "").lower() in _TRUE:
        raise ModelNotFound(
            f"{repo_id}: revision {revision} is not in the cache {hub_cache_folder()} and {offline} is set; unset it "
            f"once to download, copy the cache here, name a folder, or use the model that comes along: {DEMO_MODEL}"
        )
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    log.info("downloading %s, revision %s, into %s", repo_id, revision, hub_cache_folder())
    try:
        _check_access(repo_id, revision)
        config = _collect(_make_fetch(repo_id, revision))
    except GatedRepoError:
        raise ModelNotFound(
            f"{repo_id}: access is restricted; ask for it on the hub, then set HF_TOKEN to a token of yours"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"{repo_id}: no such folder here and no such repository on the hub; check the name, or set HF_TOKEN if it "
            "is private"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{repo_id}: has no revision {revision!r}") from None
    except HfHubHTTPError as reason:
        status = reason.response.status_code
        if status == 401:  # a token was sent: without one, this status has a meaning of its own, handled before
            message = "the hub refuses the access token; correct or unset HF_TOKEN, or log in again"
        else:
            answer = f"{status} ({_first_line(reason.server_message or reason)})"
            message = f"the hub answers with status {answer}; try again later, and check HF_ENDPOINT"
        raise ModelNotFound(f"{repo_id}: {message}") from reason
    except ModelError:
        raise
    except Exception as reason:  # network, disk and protocol errors, of many libraries' types
        raise ModelNotFound(_failure(repo_id, reason)) from reason
    if config is None:
        raise ModelNotFound(_incompleteness(repo_id, revision))
    return config.parent


def _check_access(repo_id: str, revision: str) -> None:
    """Ask the hub for one small thing, once, and raise what stands between here and the hub.

    A download would find that out too, but only after half a minute of retries if connections are refused, and after
    six minutes if nothing answers.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    # An HTTP error is an answer. The download knows what to make of it, and which are worth a second try.
    with suppress(HfHubHTTPError):
        get_hf_file_metadata(hf_hub_url(repo_id, CONFIG_FILE, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _make_fetch(repo_id: str, revision: str) -> Fetch:
    """Return a function that downloads files into the cache: all of the commit of the first that comes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    commit = revision

    def fetch(name: str) -> Path | None:
        nonlocal commit
        try:
            path = Path(hf_hub_download(repo_id, name, revision=commit, cache_dir=_resolved_cache()))
        except LocalEntryNotFoundError as reason:  # an EntryNotFoundError too, though no answer came
            raise reason.__cause__ or reason from None
        except EntryNotFoundError:
            return None
        commit = path.parent.name  # snapshots/<commit>/<name>
        return path

    return fetch


def _failure(repo_id: str, reason: Exception) -> str:
    if isinstance(reason, OSError) and reason.errno is not None and reason.filename:
        return f"{repo_id}: download failed: {reason.filename}: {reason.strerror}"
    return (
        f"{repo_id}: not in the cache {hub_cache_folder()}, and the download failed "
        f"({type(reason).__name__}: {_first_line(reason)}); check the network, HF_ENDPOINT and that cache, name a "
        f"folder, or use the model that comes along: {DEMO_MODEL}"
    )


def _first_line(reason: object) -> str:
    return (str(reason).strip() or "no details").splitlines()[0]


def _incompleteness(repo_id: str, revision: str) -> str:
    """Return the message for a repository that lacks something, after asking the hub what it has."""
    from huggingface_hub import list_repo_files

    fetch = _make_fetch(repo_id, revision)

    def read_json(name: str) -> Mapping[str, Any]:
        path = fetch(name)
        return read_small_json(path) if path else {}

    with suppress(Exception):
        return explain_names(repo_id, list_repo_files(repo_id, revision=revision), read_json)
    return (
        f"{repo_id}: revision {revision} is no complete model: it needs {CONFIG_FILE}, {SINGLE_FILE} (or {INDEX_FILE} "
        "and its shards), and tokenizer.json (or vocab.json and merges.txt)"
    )
