"""The way from a model's name to a local folder: a folder, the cache of the Hugging Face hub, or a download into it.

A revision that is cached whole is used as it is, without a question to the hub. The client leaves a mark in the cache
for each file that a revision does not have. So what is neither there nor marked has not been asked for: older releases
passed over some files. huggingface_hub takes long to import, and is imported only to download.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.config import (
    ADAPTER_FILE,
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    CONFIG_FILE,
    INDEX_FILE,
    NANOGPT_FILE,
    SINGLE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_EXTRAS,
    TOKENIZER_FILE,
    TOKENIZER_SETS,
    TORCH_FILE,
    TORCH_INDEX_FILE,
    WEIGHT_FILES,
    read_config,
    read_index,
    read_small_json,
)
from fastgpt2.engine.model.files import read_file
from fastgpt2.engine.model.generation_config import GENERATION_CONFIG_FILE
from fastgpt2.errors import ConfigError, ModelError, ModelNotFound, TokenizerError

log = logging.getLogger("fastgpt2.engine")
DEMO_MODEL = "demo"
DEMO_FOLDER = Path(__file__).parent.parent.parent / "models" / DEMO_MODEL
DEFAULT_REVISION = "main"

# Classes of tokenizers that take their vocabulary of sentencepiece's file, and of tokenizer.json only what remains.
_READ_PIECES_TOO = ("GPTSw3Tokenizer", "GPTSw3TokenizerFast")
PIECES_FILE = "spiece.model"

# Of a folder of chat templates, the one that is taken where there are tools.
TOOLS_TEMPLATE_FILE = "tool_use.jinja"

# Files that every repository has and no program asks for by name: where one of them is in the cache, someone has
# downloaded all of the revision.
_OF_WHOLE_DOWNLOADS = (".gitattributes", "README.md")

# GPT-2's own vocabulary, and the next number that divides by 64 and more, to which some tables are filled up.
_GPT2_VOCABULARIES = range(50257, 50305)

# "owner/name" or a bare name. Source: `validate_repo_id` in huggingface_hub.
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$))(?:{_NAME}/)?{_NAME}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A reference in the cache is such a number.
_MAX_REFERENCE_BYTES = 1024

_TOKENIZER_FILES_IN_WORDS = ", or ".join(" and ".join(names) for names in TOKENIZER_SETS)

# Roughly what git allows. It becomes the path of a file below `refs`, which huggingface_hub writes unchecked.
_REVISION = re.compile(r"(?![./])(?!.*(?:\.\.|//|/\.))[^\x00-\x20\x7f~^:?*\[\\]{1,200}")

# What huggingface_hub takes for "yes" in an environment variable, in lower case.
_TRUE = {"1", "on", "yes", "true"}

# Returns the local path of a file of a repository; None if the file is not there.
Fetch = Callable[[str], Path | None]

# Fetches what is wanted of a repository, and returns its folder; None if something is missing.
Collect = Callable[[Fetch], Path | None]


def find_folders(model: str, revision: str | None = None, tokenizer: str | None = None) -> tuple[Path, Path]:
    """Return the folder of a model and that of its tokenizer, downloading both first if needed.

    Args:
        model, revision: as for `find_model`.
        tokenizer: as for `find_tokenizer`; None for the one that comes with the model.

    Raises:
        ModelError: as `find_model` and `find_tokenizer`.
    """
    if tokenizer is None:
        folder = find_model(model, revision)
        return folder, folder
    # The small one first: a wrong name ends it all at once.
    tokenizer_folder = find_tokenizer(tokenizer)
    return find_model(model, revision, with_tokenizer=False), tokenizer_folder


def find_model(model: str, revision: str | None = None, with_tokenizer: bool = True) -> Path:
    """Return the folder that holds a model, downloading it first if needed.

    The cache is huggingface_hub's own, shared with transformers: `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE`,
    `HF_ENDPOINT` and `HF_TOKEN` mean what they mean there.

    Args:
        model: `demo` (shipped with this package), the path of a folder, or a Hugging Face hub id such as `gpt2`.
        revision: a branch, tag or commit of the hub's repository; None for `main`.
        with_tokenizer: the folder must hold the model's tokenizer too.

    Raises:
        ModelNotFound: there is no such folder or repository, no access, no network, or nothing in the cache while
            offline; the message says what to do.
        TokenizerError: there is no tokenizer.
        ConfigError: what would be downloaded is no GPT-2.
        CheckpointError: the index of a model in shards is malformed, or leads out of its folder.
    """
    if model == DEMO_MODEL:
        return DEMO_FOLDER
    folder = _existing_folder(model)
    if folder is None:
        return _find_on_hub(model, revision, partial(_collect_model, with_tokenizer=with_tokenizer))
    if not (folder / CONFIG_FILE).exists() and not (folder / NANOGPT_FILE).exists():
        raise _not_a_model(folder)
    _refuse_adapter(folder)
    if with_tokenizer and not _has_tokenizer(folder):
        raise TokenizerError(_tokenizer_needed(model, folder))
    return folder


def find_tokenizer(tokenizer: str) -> Path:
    """Return the folder that holds a tokenizer, downloading its files first if needed, and nothing else.

    Args:
        tokenizer: `demo`, the path of a folder, or a hub id, of whose repository the revision `main` is taken.

    Raises:
        ModelNotFound: as `find_model`.
        TokenizerError: the folder or the repository holds no tokenizer.
    """
    if tokenizer == DEMO_MODEL:
        return DEMO_FOLDER
    folder = _existing_folder(tokenizer)
    if folder is None:
        return _find_on_hub(tokenizer, None, _collect_tokenizer)
    if not _has_tokenizer(folder):
        raise TokenizerError(f"{tokenizer}: holds no tokenizer, which is {_TOKENIZER_FILES_IN_WORDS}")
    return folder


def _existing_folder(name: str) -> Path | None:
    """Return the folder of that path; None if nothing is there."""
    try:
        path = Path(name).expanduser()
        is_there, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as reason:  # too long, no right to look, `~nobody`
        raise ModelNotFound(f"{name}: cannot be looked up ({reason})") from None
    if is_there and not is_folder:
        raise _not_a_model(path)
    return path if is_folder else None


def _has_tokenizer(folder: Path) -> bool:
    return any(all((folder / name).exists() for name in names) for names in TOKENIZER_SETS)


def _not_a_model(path: Path) -> ModelNotFound:
    """Return the error for a folder without a model, or for a file."""
    from fastgpt2.engine.model.diagnosis import explain_folder

    return ModelNotFound(explain_folder(path))


def _refuse_adapter(folder: Path) -> None:
    """Raise ConfigError if a folder holds a PEFT adapter, alone or beside a model."""
    if (folder / ADAPTER_FILE).exists():
        from fastgpt2.engine.model.diagnosis import explain_adapter

        raise ConfigError(explain_adapter(folder))


def _look_up(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.exists() else None


def _tokenizer_needed(model: str, folder: Path) -> str:
    """Return the message for a model without a tokenizer; raise ConfigError if the folder holds no GPT-2."""
    known = any((folder / name).exists() for name in (CONFIG_FILE, NANOGPT_FILE))
    vocab_size = read_config(folder).vocab_size if known else None
    needed = f"{model}: holds no tokenizer, which is {_TOKENIZER_FILES_IN_WORDS}"
    if vocab_size is None or vocab_size in _GPT2_VOCABULARIES:
        return f"{needed}; if the model was trained with GPT-2's own, add --tokenizer gpt2"
    return (
        f"{needed}; name the folder or the repository of the one that the model was trained with, which has about "
        f"{vocab_size} tokens, by --tokenizer"
    )


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


class _Snapshot:
    """The folder of a revision in huggingface_hub's cache.

    Attributes:
        unasked: the names that were looked up and are neither there nor known to be missing from the revision.
    """

    def __init__(self, repo: Path, commit: str) -> None:
        self.commit, self.folder = commit, repo / "snapshots" / commit
        self.unasked: set[str] = set()
        # Source: `_get_metadata_or_catch_error` in huggingface_hub/file_download.py.
        self._missing = repo / ".no_exist" / commit
        self._is_whole = any((self.folder / name).is_file() for name in _OF_WHOLE_DOWNLOADS)

    def look_up(self, name: str) -> Path | None:
        found = _look_up(self.folder, name)
        if found is None and not self._is_whole and not (self._missing / name).is_file():
            self.unasked.add(name)
        return found


def _find_on_hub(repo_id: str, revision: str | None, collect: Collect) -> Path:
    """Return the folder of a revision in the cache, with all that is collected of it. Raises as `find_model`."""
    if not _REPO_ID.fullmatch(repo_id):
        raise ModelNotFound(f"{repo_id}: no such folder, nor a hub id (`name` or `owner/name`)")
    revision = revision or DEFAULT_REVISION
    if not _REVISION.fullmatch(revision):
        raise ModelNotFound(f"{repo_id}: {revision!r} is no name of a branch, tag or commit")
    snapshot = _open_snapshot(repo_id, revision)
    if snapshot is None or not collect(snapshot.look_up):
        return _download(repo_id, revision, collect)
    if snapshot.unasked:
        _complete(repo_id, snapshot, collect)
    return snapshot.folder


def _open_snapshot(repo_id: str, revision: str) -> _Snapshot | None:
    """Return the folder of a revision in the cache, whatever is in it; None if there is none."""
    repo = _resolved_cache() / ("models--" + repo_id.replace("/", "--"))
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = read_file(repo / "refs" / revision, _MAX_REFERENCE_BYTES, ModelNotFound).decode().strip()
        except (ModelNotFound, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):
            return None
    return _Snapshot(repo, commit)


def _collect_model(fetch: Fetch, with_tokenizer: bool) -> Path | None:
    """Fetch the files that a model needs, and no others: the small ones first.

    Raises:
        ConfigError: the model is no GPT-2; nothing but its configuration is fetched then.
        CheckpointError: an index names something else than files beside it; none of these is fetched then.
    """
    config = fetch(CONFIG_FILE)
    if config is not None:
        read_config(config.parent)
        fetch(ADAPTER_FILE)
        _refuse_adapter(config.parent)
    if with_tokenizer and not _collect_tokenizer(fetch):
        return None
    if config is None:
        checkpoint = fetch(NANOGPT_FILE)
        return checkpoint.parent if checkpoint is not None else None
    fetch(GENERATION_CONFIG_FILE)
    return config.parent if _collect_weights(fetch) else None


def _collect_tokenizer(fetch: Fetch) -> Path | None:
    """Fetch the files of a tokenizer, and the configuration, which may say of which class the tokenizer is.

    Without a `tokenizer.json` the class decides which of the others are read, so that all of them are fetched.
    """
    settings = {name: fetch(name) for name in (CONFIG_FILE, *TOKENIZER_EXTRAS)}
    # Of the templates that stand in a folder beside the first, one alone is ever taken.
    if fetch(CHAT_TEMPLATE_FILE) is not None:
        fetch(f"{CHAT_TEMPLATE_FOLDER}/{TOOLS_TEMPLATE_FILE}")
    whole = fetch(TOKENIZER_FILE)
    if whole is not None:
        naming = filter(None, (settings[name] for name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE)))
        if any(read_small_json(path).get("tokenizer_class") in _READ_PIECES_TOO for path in naming):
            fetch(PIECES_FILE)
        return whole.parent
    paths = [[fetch(name) for name in names] for names in TOKENIZER_SETS]
    return next((first.parent for first, *others in paths if first is not None and all(others)), None)


def _collect_weights(fetch: Fetch) -> bool:
    """Fetch the weights in the first form in which they are there, and tell whether they are complete."""
    for _, single, index in WEIGHT_FILES:
        if fetch(single):
            return True
        found = fetch(index) if index else None
        if found is not None:
            return all(fetch(name) for name in sorted(set(read_index(found).values())))
    return False


def _complete(repo_id: str, snapshot: _Snapshot, collect: Collect) -> None:
    """Ask the hub for what an older release did not ask for. Without an answer, the snapshot does as it is."""
    names = ", ".join(sorted(snapshot.unasked))
    offline = _offline_variable()
    if offline is not None:
        log.warning("%s: used as it is in the cache, though %s may be missing; %s is set", repo_id, names, offline)
        return
    log.info("asking the hub whether %s has %s, which an older release left out", repo_id, names)
    try:
        _check_access(repo_id, snapshot.commit)
        download = _make_fetch(repo_id, snapshot.commit)
        collect(lambda name: snapshot.look_up(name) or (download(name) if name in snapshot.unasked else None))
    except ModelError:
        raise
    except Exception as reason:  # network, disk and protocol errors, of many libraries' types
        why = f"{type(reason).__name__}: {_first_line(reason)}"
        log.warning("%s: used as it is in the cache, though %s may be missing (%s)", repo_id, names, why)


def _offline_variable() -> str | None:
    """Return the environment variable that forbids to ask the hub; None if neither does."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").lower() in _TRUE:
            return name
    return None


def _download(repo_id: str, revision: str, collect: Collect) -> Path:
    """Download what is to be collected, and return its snapshot folder. Raises as `find_model`."""
    offline = _offline_variable()
    if offline is not None:
        raise ModelNotFound(
            f"{repo_id}: revision {revision} is not in the cache {hub_cache_folder()} and {offline} is set; unset it "
            f"once to download, copy the cache here, name a folder, or use the model that comes along: {DEMO_MODEL}"
        )
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    log.info("downloading %s, revision %s, into %s", repo_id, revision, hub_cache_folder())
    try:
        _check_access(repo_id, revision)
        folder = collect(_make_fetch(repo_id, revision))
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
    if folder is None:
        raise _incompleteness(repo_id, revision, collect)
    if _look_up(folder, TORCH_FILE) or _look_up(folder, TORCH_INDEX_FILE):
        log.info(
            "%s: its weights are %s, as there are no safetensors. Where a pull request of the repository has some, "
            "--revision refs/pr/N takes them, with N the number of the pull request",
            repo_id,
            TORCH_FILE,
        )
    return folder


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
        commit = path.parents[name.count("/")].name  # snapshots/<commit>/<name>
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


def _incompleteness(repo_id: str, revision: str, collect: Collect) -> ModelError:
    """Return the error for a repository that lacks something, after asking the hub what it has."""
    from huggingface_hub import list_repo_files

    from fastgpt2.engine.model.diagnosis import explain_names

    if collect is _collect_tokenizer:
        return TokenizerError(f"{repo_id}: holds no tokenizer, which is {_TOKENIZER_FILES_IN_WORDS}")
    fetch = _make_fetch(repo_id, revision)

    def read_json(name: str) -> Mapping[str, Any]:
        path = fetch(name)
        return read_small_json(path) if path else {}

    with suppress(Exception):
        names = set(list_repo_files(repo_id, revision=revision))
        has_tokenizer = any(names.issuperset(one) for one in TOKENIZER_SETS)
        if not has_tokenizer and any(names.intersection(files) for _, *files in WEIGHT_FILES):
            snapshot = _open_snapshot(repo_id, revision)
            return TokenizerError(_tokenizer_needed(repo_id, snapshot.folder if snapshot else Path()))
        return ModelNotFound(explain_names(repo_id, names, read_json))
    return ModelNotFound(
        f"{repo_id}: revision {revision} is no complete model: it needs {CONFIG_FILE}, {SINGLE_FILE} (or {INDEX_FILE} "
        f"and its shards, or the same as pytorch_model.bin), and a tokenizer, which is {_TOKENIZER_FILES_IN_WORDS}"
    )
