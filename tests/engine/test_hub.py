"""`find_folders` asks a hub on 127.0.0.1, each time in a process of its own: the client reads its environment once."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fake_hub import WAIT_SECONDS, BreakOff, FakeHub, Refuse, Request
from support.forks import Forks, Run

from fastgpt2.engine.model.hub import DEMO_FOLDER, find_folders, find_model
from fastgpt2.errors import ConfigError, ModelNotFound, TokenizerError

pytestmark = pytest.mark.processes

CHECKPOINTS = Path(__file__).parent.parent / "golden" / "checkpoints"
NO_SUCH_COMMIT = "0123456789abcdef" * 2 + "01234567"
PROCESSES = 4

# What takes longest to load of what huggingface_hub loads, in its newer and its older versions. Not tqdm, which looks
# at the environment then, and neither huggingface_hub itself.
NEEDED_BY_THE_CLIENT = ("httpx2", "httpx", "requests", "filelock", "yaml", "zipfile")

# Left to itself the client goes on asking for 23 seconds where connections are refused.
SOON_SECONDS = 18.0

# Prints one JSON object; anything else on standard output breaks every test here.
CALL = """
import json, logging, sys
from fastgpt2.engine.model.hub import find_folders
from fastgpt2.errors import FastGPT2Error
found = {"folder": "", "tokenizer_folder": "", "error": "", "message": ""}
logging.basicConfig(level="INFO")
try:
    folders = find_folders(sys.argv[1], sys.argv[2] or None, sys.argv[3] or None)
    found["folder"], found["tokenizer_folder"] = map(str, folders)
except FastGPT2Error as error:
    found["error"], found["message"] = type(error).__name__, str(error)
print(json.dumps({**found, "client_imported": "huggingface_hub" in sys.modules}))
"""


def checkpoint_files(name: str) -> dict[str, bytes]:
    """Return what a repository with this checkpoint would hold, a tokenizer aside."""
    return {path.name: path.read_bytes() for path in (CHECKPOINTS / name).iterdir() if path.suffix != ".npz"}


TOKENIZER = {"tokenizer.json": b'{"version": "1.0"}'}  # the search does not look inside
OLD_TOKENIZER = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}
SINGLE = {**checkpoint_files("prefixed"), **TOKENIZER}
SHARDED = {**checkpoint_files("sharded"), **TOKENIZER}
UNNEEDED = {"README.md": b"# A model", "pytorch_model.bin": b"\x80\x02", "chat_template.json": b"{}"}
# What stands beside weights and tokenizer, and has to be asked for.
EXTRAS = {
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
}
PICKLE = {**{name: SINGLE[name] for name in ("config.json", *TOKENIZER)}, "pytorch_model.bin": b"PK"}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a call: a folder, or the name and message of an error."""

    folder: Path
    tokenizer_folder: Path
    error: str
    message: str
    client_imported: bool
    stderr: str

    def files(self) -> dict[str, bytes]:
        assert not self.error, self.message
        return {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        }


def inherited() -> dict[str, str]:
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG")
    return {name: os.environ[name] for name in names if name in os.environ}


class Caller:
    """Calls `find_folders` with nothing of this process's environment but what Python needs, in an empty folder."""

    def __init__(self, forks: Forks, folder: Path, endpoint: str) -> None:
        self.forks = forks
        self.folder = folder
        self.cache = folder / "hf" / "hub"
        self.environment = {
            **inherited(),
            "HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": endpoint,
            # Else the client asks for a list that has nothing to do with models, and requests are counted here.
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        (folder / "work").mkdir()

    def python(self, code: str, *arguments: str, **environment: str) -> Run:
        return self.forks.start(code, arguments, self.folder / "work", {**self.environment, **environment})

    def start(self, model: str, revision: str = "", tokenizer: str = "", **environment: str) -> Run:
        return self.python(CALL, model, revision, tokenizer, **environment)

    def call(self, model: str, revision: str = "", tokenizer: str = "", **environment: str) -> Outcome:
        return result_of(self.start(model, revision, tokenizer, **environment))

    def put(self, repo_id: str, commit: str, files: Mapping[str, bytes], reference: str = "main") -> Path:
        """Lay a snapshot into the cache as the client would. Returns its folder."""
        repository = self.cache / ("models--" + repo_id.replace("/", "--"))
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name, content in files.items():
            (snapshot / name).write_bytes(content)
        (repository / "refs").mkdir()
        (repository / "refs" / reference).write_text(commit)
        return snapshot


def result_of(process: Run, deadline: float = WAIT_SECONDS) -> Outcome:
    try:
        stdout, stderr = process.communicate(timeout=deadline)
    except TimeoutError:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, stderr
    found = json.loads(stdout)
    folders = Path(found["folder"]), Path(found["tokenizer_folder"])
    return Outcome(*folders, found["error"], found["message"], found["client_imported"], stderr)


def weight_transfers(hub: FakeHub) -> int:
    """Count how often the weights were sent, in whole or in part."""
    return sum(request.path.startswith("/storage/") and request.method == "GET" for request in hub.requests)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(NEEDED_BY_THE_CLIENT, inherited()) as running:
        yield running


@pytest.fixture
def caller(forks: Forks, tmp_path: Path, hub: FakeHub) -> Caller:
    return Caller(forks, tmp_path, hub.url)


# What is downloaded


def test_first_call_downloads_what_is_needed_and_second_call_asks_nothing(hub: FakeHub, caller: Caller) -> None:
    hub.commit("owner/small", {**SINGLE, **UNNEEDED})

    first = caller.call("owner/small")

    assert first.files() == SINGLE
    assert first.folder.is_relative_to(caller.cache)
    assert hub.files_asked_for() == {*SINGLE, *EXTRAS}
    assert all(hub.count("GET", name) >= 1 for name in SINGLE)

    asked = len(hub.requests)
    second = caller.call("owner/small")
    assert second.folder == first.folder
    assert len(hub.requests) == asked
    assert first.client_imported
    assert not second.client_imported

    hub.stop()
    assert caller.call("owner/small").folder == first.folder


def test_sharded_model_is_its_index_and_exactly_its_shards(hub: FakeHub, caller: Caller) -> None:
    unlisted = {"model-00005-of-00004.safetensors": b"not listed by the index"}
    hub.commit("sharded", {**SHARDED, **UNNEEDED, **unlisted})

    first = caller.call("sharded")

    assert first.files() == SHARDED
    # Whether there is a single file has to be asked; there is not.
    assert hub.files_asked_for() == {*SHARDED, WEIGHTS, *EXTRAS}
    asked = len(hub.requests)
    assert caller.call("sharded").folder == first.folder
    assert len(hub.requests) == asked


def test_missing_shard_is_fetched_by_the_next_call(hub: FakeHub, caller: Caller) -> None:
    hub.commit("sharded", SHARDED)
    folder = caller.call("sharded").folder
    (folder / "model-00003-of-00004.safetensors").unlink()

    assert caller.call("sharded").files() == SHARDED


def test_old_tokenizer_files_do(hub: FakeHub, caller: Caller) -> None:
    files = {**checkpoint_files("prefixed"), **OLD_TOKENIZER}
    hub.commit("old", {**files, **UNNEEDED})

    outcome = caller.call("old")

    assert outcome.files() == files
    hub.stop()
    assert caller.call("old").folder == outcome.folder


def test_progress_goes_to_standard_error(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    # `call` reads all of standard output as JSON. The variable has bars drawn where there is no terminal.
    outcome = caller.call("small", TQDM_POSITION="-1")

    assert WEIGHTS in outcome.stderr
    assert "100%" in outcome.stderr


# Revisions


def test_branch_and_commit(hub: FakeHub, caller: Caller) -> None:
    other = {**SINGLE, "tokenizer.json": b"{}"}
    hub.commit("small", SINGLE)
    commit = hub.commit("small", other, reference="refs/pr/1")

    assert caller.call("small").files() == SINGLE
    by_branch = caller.call("small", "refs/pr/1")
    assert by_branch.files() == other
    assert by_branch.folder.name == commit
    hub.stop()
    assert caller.call("small", "refs/pr/1").folder == by_branch.folder
    assert caller.call("small", commit).folder == by_branch.folder


def test_commit_that_no_branch_names(hub: FakeHub, caller: Caller) -> None:
    commit = hub.commit("small", SINGLE)
    hub.commit("small", {**SINGLE, "tokenizer.json": b"{}"})

    first = caller.call("small", commit)

    assert first.files() == SINGLE
    hub.stop()
    assert caller.call("small", commit).folder == first.folder


@pytest.mark.parametrize("revision", ["v9", NO_SUCH_COMMIT])
def test_unknown_revision(hub: FakeHub, caller: Caller, revision: str) -> None:
    hub.commit("small", SINGLE)

    outcome = caller.call("small", revision)

    assert outcome.error == "ModelNotFound"
    assert outcome.message.startswith("small: ")
    assert f"no revision {revision!r}" in outcome.message


def test_branch_that_moves_meanwhile_does_not_mix_two_commits(hub: FakeHub, caller: Caller) -> None:
    before = hub.commit("small", SINGLE)

    def move(request: Request) -> None:
        if request.method == "GET" and request.file == "config.json":
            hub.commit("small", dict.fromkeys(SINGLE, b"{}"))

    hub.halfway = move
    outcome = caller.call("small")

    assert hub.repositories["small"].references["main"] != before
    assert outcome.folder.name == before
    assert outcome.files() == SINGLE


# Access


def test_unknown_repository(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)
    hub.tokens = {"hf_known"}

    for environment in ({}, {"HF_TOKEN": "hf_known"}):
        outcome = caller.call("owner/smal", **environment)
        assert outcome.error == "ModelNotFound"
        assert outcome.message.startswith("owner/smal: no such folder here and no such repository on the hub")
        assert "check the name" in outcome.message
        assert "HF_TOKEN" in outcome.message


def test_gated_repository_wants_a_token_and_the_storage_does_not_get_it(hub: FakeHub, caller: Caller) -> None:
    hub.commit("owner/gated", SINGLE, gated=True)
    hub.tokens = {"hf_known"}

    refused = caller.call("owner/gated")

    assert refused.error == "ModelNotFound"
    assert "access is restricted" in refused.message
    assert "HF_TOKEN" in refused.message
    assert not any("authorization" in request.headers for request in hub.requests)
    hub.requests.clear()

    assert caller.call("owner/gated", HF_TOKEN="hf_known").files() == SINGLE
    sent = {(request.path.startswith("/storage/"), request.headers.get("authorization")) for request in hub.requests}
    assert sent == {(False, "Bearer hf_known"), (True, None)}
    assert all("hf_hub/" in request.headers["user-agent"] for request in hub.requests)


def test_token_that_the_hub_does_not_know(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    outcome = caller.call("small", HF_TOKEN="hf_expired")

    assert outcome.error == "ModelNotFound"
    assert "refuses the access token" in outcome.message
    assert "HF_TOKEN" in outcome.message
    assert "hf_expired" not in outcome.message


def test_hub_that_refuses_is_quoted(hub: FakeHub, caller: Caller) -> None:
    def refuse(_: Request) -> None:
        raise Refuse(403, "Access to this resource is disabled.")

    hub.on_request = refuse
    outcome = caller.call("small")

    assert outcome.error == "ModelNotFound"
    assert "status 403 (Access to this resource is disabled.)" in outcome.message
    assert "HF_ENDPOINT" in outcome.message


# Incomplete repositories


def test_repository_of_another_form(hub: FakeHub, caller: Caller) -> None:
    """The file that is there is named, and not one that training left."""
    left = {"training_args.bin": b"x", "optimizer.pt": b"x", "flax_model.msgpack": b"x"}
    hub.commit("old", {**TOKENIZER, **left, "config.json": SINGLE["config.json"]})

    outcome = caller.call("old")

    assert outcome.error == "ModelNotFound"
    assert outcome.message.startswith("old: holds flax_model.msgpack, the weights for Flax, and no model.safetensors")
    assert not left.keys() & hub.files_asked_for()


def test_repository_of_an_adapter(hub: FakeHub, caller: Caller) -> None:
    adapter = {"adapter_model.safetensors": b"x", "adapter_config.json": b'{"base_model_name_or_path": "gpt2"}'}
    hub.commit("lora", adapter)

    outcome = caller.call("lora")

    assert outcome.error == "ModelNotFound"
    assert outcome.message.startswith("lora: is a PEFT adapter of gpt2, and no model itself. Merge the two (")


def test_model_with_an_adapter_beside_it(hub: FakeHub, caller: Caller) -> None:
    hub.commit("both", {**SINGLE, "adapter_config.json": b'{"base_model_name_or_path": "gpt2"}'})

    outcome = caller.call("both")

    assert outcome.error == "ConfigError"
    assert "is a PEFT adapter of gpt2" in outcome.message
    assert not weight_transfers(hub)


def test_model_of_sentencepiece_is_fetched_for_the_one_class_that_needs_it(hub: FakeHub, caller: Caller) -> None:
    """The class GPTSw3Tokenizer reads it whatever stands beside it; others are content with `tokenizer.json`."""
    extra = {"spiece.model": b"x", "tokenizer_config.json": b'{"tokenizer_class": "GPTSw3Tokenizer"}'}
    hub.commit("sw3", {**SINGLE, **extra})
    hub.commit("t5", {**SINGLE, **extra, "tokenizer_config.json": b'{"tokenizer_class": "T5Tokenizer"}'})

    assert caller.call("sw3").files().keys() == {*SINGLE, *extra}
    assert "spiece.model" not in caller.call("t5").files()


@pytest.mark.parametrize("missing", ["config.json", WEIGHTS])
def test_incomplete_repository(hub: FakeHub, caller: Caller, missing: str) -> None:
    hub.commit("part", {name: content for name, content in SINGLE.items() if name != missing})

    outcome = caller.call("part")

    assert outcome.error == "ModelNotFound"
    assert outcome.message.startswith("part: holds ")
    lack = {"config.json": "no config.json", WEIGHTS: "no weights (model.safetensors"}
    assert lack[missing] in outcome.message


def test_repository_that_is_no_gpt2_is_refused_before_its_weights_are_fetched(hub: FakeHub, caller: Caller) -> None:
    hub.commit("other", {**SINGLE, "config.json": b'{"model_type": "llama"}'})

    outcome = caller.call("other")

    assert outcome.error == "ConfigError"
    assert 'model_type is "llama"' in outcome.message
    assert hub.files_asked_for() == {"config.json"}


# Tokenizers


def config_with(vocab_size: int) -> bytes:
    return json.dumps({**json.loads(SINGLE["config.json"]), "vocab_size": vocab_size}).encode()


@pytest.mark.parametrize(
    ("vocab_size", "remedy"),
    [(50257, "add --tokenizer gpt2"), (50304, "add --tokenizer gpt2"), (3000, "3000 tokens, by")],
)
def test_repository_without_a_tokenizer(hub: FakeHub, caller: Caller, vocab_size: int, remedy: str) -> None:
    files = {"config.json": config_with(vocab_size), WEIGHTS: SINGLE[WEIGHTS]}
    hub.commit("bare", files)
    hub.commit("gpt2", {**SINGLE, **UNNEEDED})

    refused = caller.call("bare")

    assert refused.error == "TokenizerError"
    assert refused.message.startswith("bare: holds no tokenizer")
    assert remedy in refused.message
    assert WEIGHTS not in hub.files_asked_for()
    # The remedy. Of the other repository, nothing but the tokenizer is fetched, and its configuration.
    served = caller.call("bare", tokenizer="gpt2")
    assert served.files() == files
    assert {path.name for path in served.tokenizer_folder.iterdir()} == {"tokenizer.json", "config.json"}
    hub.stop()
    assert caller.call("bare", tokenizer="gpt2").tokenizer_folder == served.tokenizer_folder


def test_tokenizer_of_another_repository_is_taken_at_main(hub: FakeHub, caller: Caller) -> None:
    hub.commit("bare", SINGLE, reference="v1")
    hub.commit("gpt2", SINGLE)

    assert caller.call("bare", "v1", tokenizer="gpt2").files().keys() == {"config.json", WEIGHTS}


def test_tokenizer_that_is_none(hub: FakeHub, caller: Caller) -> None:
    hub.commit("bare", SINGLE)
    hub.commit("none", {"config.json": SINGLE["config.json"]})

    outcome = caller.call("bare", tokenizer="none")
    assert outcome.error == "TokenizerError"
    assert outcome.message.startswith("none: holds no tokenizer, which is tokenizer.json, or vocab.json and merges.txt")
    assert WEIGHTS not in hub.files_asked_for()

    outcome = caller.call("bare", tokenizer="missing")
    assert outcome.error == "ModelNotFound"
    assert outcome.message.startswith("missing: no such folder here")


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.txt": b"[UNK]"},
        {"spiece.model": b"x"},
        {"tokenizer.model": b"x"},
        {"vocab.json": b"{}", "merges.txt": b"", "tokenizer_config.json": b"{}", "added_tokens.json": b"{}"},
        {"tokenizer.json": b"{}", "special_tokens_map.json": b"{}"},
        # Its class reads both files.
        {
            "spiece.model": b"x",
            "tokenizer.json": b"{}",
            "tokenizer_config.json": b'{"tokenizer_class": "GPTSw3Tokenizer"}',
        },
        {"tokenizer.json": b"{}", "chat_template.jinja": b"a", "additional_chat_templates/tool_use.jinja": b"b"},
        # Which of them the class reads is not known here.
        {"spm.model": b"x", "vocab.txt": b"x", "vocab.json": b"{}", "merges.txt": b""},
    ],
    ids=lambda files: next(iter(files)),
)
def test_every_kind_of_tokenizer_is_fetched(hub: FakeHub, caller: Caller, files: dict[str, bytes]) -> None:
    whole = {**checkpoint_files("prefixed"), **files}
    hub.commit("small", {**whole, **UNNEEDED})

    first = caller.call("small")

    assert first.files() == whole
    asked = len(hub.requests)
    assert caller.call("small").folder == first.folder
    assert len(hub.requests) == asked


# Other weights than safetensors


def test_pickle_is_taken_where_there_is_nothing_else(hub: FakeHub, caller: Caller) -> None:
    hub.commit("old", {**PICKLE, "tf_model.h5": b"x"})
    hub.commit("old", SINGLE, reference="refs/pr/3")

    first = caller.call("old")

    assert first.files() == PICKLE
    assert "its weights are pytorch_model.bin" in first.stderr
    assert "--revision refs/pr/N takes them" in first.stderr
    assert caller.call("old").folder == first.folder
    # The remedy: only if it is asked for.
    converted = caller.call("old", "refs/pr/3")
    assert converted.files() == SINGLE
    assert "pytorch_model.bin" not in converted.stderr


def test_pickle_in_shards(hub: FakeHub, caller: Caller) -> None:
    shards = {f"pytorch_model-0000{n}-of-00002.bin": b"PK" for n in (1, 2)}
    index = json.dumps({"weight_map": dict(zip(("a", "b"), shards, strict=True))}).encode()
    files = {**PICKLE, "pytorch_model.bin.index.json": index, **shards}
    del files["pytorch_model.bin"]
    hub.commit("old", {**files, "pytorch_model-00003-of-00002.bin": b"not listed"})

    first = caller.call("old")

    assert first.files() == files
    hub.stop()
    assert caller.call("old").folder == first.folder


def test_checkpoint_of_nanogpt(hub: FakeHub, caller: Caller) -> None:
    hub.commit("nano", {"ckpt.pt": b"PK", "README.md": b"#"})
    hub.commit("gpt2", SINGLE)

    refused = caller.call("nano")
    assert refused.error == "TokenizerError"
    assert "add --tokenizer gpt2" in refused.message
    assert caller.call("nano", tokenizer="gpt2").files() == {"ckpt.pt": b"PK"}


# What an older release has downloaded


NEWER = {**SINGLE, "tokenizer_config.json": b'{"add_bos_token": true}', "generation_config.json": b"{}"}


def test_snapshot_of_an_older_release_is_completed_once(hub: FakeHub, caller: Caller) -> None:
    commit = hub.commit("small", NEWER)
    folder = caller.put("small", commit, SINGLE)
    hub.commit("small", {"config.json": b"{}"})  # the branch has moved since

    assert caller.call("small").files() == NEWER
    assert hub.files_asked_for() == {"config.json", *EXTRAS}
    assert not weight_transfers(hub)
    asked = len(hub.requests)
    second = caller.call("small")
    assert second.folder == folder
    assert len(hub.requests) == asked
    assert not second.client_imported


def test_snapshot_of_an_older_release_does_without_a_hub(hub: FakeHub, caller: Caller) -> None:
    folder = caller.put("small", hub.commit("small", NEWER), SINGLE)

    offline = caller.call("small", HF_HUB_OFFLINE="1")
    assert offline.folder == folder
    assert not offline.client_imported
    assert not hub.requests
    assert (
        "added_tokens.json, chat_template.jinja, generation_config.json, special_tokens_map.json, tokenizer_config.json"
        in offline.stderr
    )
    assert "HF_HUB_OFFLINE is set" in offline.stderr

    def refuse(_: Request) -> None:
        raise Refuse(403, "Access to this resource is disabled.")

    hub.on_request = refuse
    refused = caller.call("small")
    assert refused.folder == folder
    assert "used as it is in the cache" in refused.stderr

    hub.stop()
    unreachable = result_of(caller.start("small"), SOON_SECONDS)
    assert unreachable.folder == folder
    assert "used as it is in the cache" in unreachable.stderr


def test_snapshot_that_was_downloaded_whole_is_not_asked_about(hub: FakeHub, caller: Caller) -> None:
    """As by `hf download`, which leaves no marks for missing files."""
    folder = caller.put("small", hub.commit("small", SINGLE), {**SINGLE, ".gitattributes": b""})

    assert caller.call("small").folder == folder
    assert not hub.requests


# Without a hub


def test_offline_with_nothing_cached(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        outcome = caller.call("small", **{name: "1"})
        assert outcome.error == "ModelNotFound"
        for named in (f"{name} is set; unset it", str(caller.cache), "demo"):
            assert named in outcome.message
        assert not outcome.client_imported
    assert not hub.requests


def test_offline_with_all_cached(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)
    folder = caller.call("small").folder
    hub.requests.clear()

    assert caller.call("small", HF_HUB_OFFLINE="1").folder == folder
    assert not hub.requests


def test_connection_refused(caller: Caller) -> None:
    with socket.socket() as closed:  # bound, so that nobody else gets the port, and not listening
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        outcome = result_of(caller.start("small", HF_ENDPOINT=endpoint), SOON_SECONDS)

    assert outcome.error == "ModelNotFound"
    assert "Connection refused" in outcome.message
    for named in ("HF_ENDPOINT", str(caller.cache), "demo"):
        assert named in outcome.message


def test_hub_that_does_not_answer_is_asked_once(hub: FakeHub, caller: Caller) -> None:
    over = threading.Event()

    def wait(_: Request) -> None:
        over.wait(WAIT_SECONDS)

    hub.on_request = wait
    outcome = caller.call("small", HF_HUB_ETAG_TIMEOUT="1")
    over.set()

    assert outcome.error == "ModelNotFound"
    assert "HF_ENDPOINT" in outcome.message
    assert len(hub.requests) == 1


def test_busy_hub_is_asked_again(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    def refuse_once(_: Request) -> None:
        if len(hub.requests) == 1:
            raise Refuse(503, "busy")

    hub.on_request = refuse_once
    assert caller.call("small").files() == SINGLE


# The cache


def test_cache_folder_is_the_client_s_own(caller: Caller) -> None:
    environments: list[dict[str, str]] = [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "~/xdg"},
        {"HF_HOME": "/home of models"},
        {"HF_HOME": "~/models", "XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "$PLACE/models", "PLACE": "/some"},
        {"HF_HUB_CACHE": "/cache"},
        {"HF_HUB_CACHE": "~/cache", "HF_HOME": "/models"},
        {"HF_HUB_CACHE": "${PLACE}/cache/", "PLACE": "/some"},
        {"HF_HUB_CACHE": "relative"},
        {"HUGGINGFACE_HUB_CACHE": "/older"},
        {"HUGGINGFACE_HUB_CACHE": "/older", "HF_HUB_CACHE": "/cache"},
        {"HUGGINGFACE_HUB_CACHE": "/older", "HF_HOME": "/models", "XDG_CACHE_HOME": "/xdg"},
    ]
    code = """
import importlib, json, os, sys
from huggingface_hub import constants
from fastgpt2.engine.model.hub import hub_cache_folder
pairs = []
for environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    importlib.reload(constants)
    pairs.append((str(hub_cache_folder()), constants.HF_HUB_CACHE))
    for name in environment:
        del os.environ[name]
print(json.dumps(pairs))
"""
    del caller.environment["HF_HOME"]
    stdout, stderr = caller.python(code, json.dumps(environments)).communicate(timeout=WAIT_SECONDS)

    pairs = json.loads(stdout or stderr)
    assert len(pairs) == len(environments)
    for environment, (ours, theirs) in zip(environments, pairs, strict=True):
        assert Path(ours) == Path(theirs), environment
    assert pairs[0][0] == str(caller.folder / "home" / ".cache" / "huggingface" / "hub")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_model_goes_where_the_environment_says(hub: FakeHub, caller: Caller, variable: str) -> None:
    hub.commit("small", SINGLE)
    del caller.environment["HF_HOME"]
    # An empty variable is what a compose file passes on for one that is not set.
    others = dict.fromkeys({"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"} - {variable}, "")

    first = caller.call("small", **others, **{variable: "~/chosen"})

    assert first.files() == SINGLE
    assert first.folder.is_relative_to(caller.folder / "home" / "chosen")
    assert list((caller.folder / "work").iterdir()) == []
    hub.stop()
    assert caller.call("small", **others, **{variable: "~/chosen"}).folder == first.folder


def test_cache_behind_a_link_is_one_folder(hub: FakeHub, caller: Caller, tmp_path: Path) -> None:
    hub.commit("small", SINGLE)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")

    first = caller.call("small", HF_HOME=str(tmp_path / "link"))

    assert first.files() == SINGLE
    assert caller.call("small", HF_HOME=str(tmp_path / "link")).folder == first.folder


def test_cache_that_cannot_be_written(hub: FakeHub, caller: Caller, tmp_path: Path) -> None:
    hub.commit("small", SINGLE)
    (tmp_path / "file").touch()

    outcome = caller.call("small", HF_HUB_CACHE=str(tmp_path / "file" / "hub"))

    assert outcome.error == "ModelNotFound"
    assert str(tmp_path / "file") in outcome.message
    assert "Not a directory" in outcome.message


def test_processes_that_start_at_once_download_once(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    def until_all_have_asked(request: Request) -> None:
        if request.file == WEIGHTS:
            hub.wait_for(lambda: hub.count("HEAD", WEIGHTS) >= PROCESSES)

    hub.halfway = until_all_have_asked
    outcomes = [result_of(process) for process in [caller.start("small") for _ in range(PROCESSES)]]

    assert [outcome.files() for outcome in outcomes] == [SINGLE] * PROCESSES
    assert len({outcome.folder for outcome in outcomes}) == 1
    assert weight_transfers(hub) == 1


def test_connection_that_breaks_off_leaves_nothing_that_counts_as_cached(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    def break_off_once(request: Request) -> None:
        if request.file == WEIGHTS and weight_transfers(hub) == 1:
            raise BreakOff

    hub.halfway = break_off_once
    first = caller.call("small")  # newer clients try again within the call

    assert first.error in ("", "ModelNotFound")
    assert caller.call("small").files() == SINGLE
    assert weight_transfers(hub) == 2


def test_download_that_fails_leaves_nothing_that_counts_as_cached(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)

    def refuse(request: Request) -> None:
        if request.path.startswith("/storage/"):
            raise Refuse(403, "The signature has expired.")

    hub.on_request = refuse
    refused = caller.call("small")
    hub.on_request = None

    assert refused.error == "ModelNotFound"
    assert "status 403 (The signature has expired.)" in refused.message
    assert caller.call("small", HF_HUB_OFFLINE="1").error == "ModelNotFound"
    assert caller.call("small").files() == SINGLE


def test_process_killed_while_downloading_leaves_nothing_that_counts_as_cached(hub: FakeHub, caller: Caller) -> None:
    hub.commit("small", SINGLE)
    half_sent, killed = threading.Event(), threading.Event()

    def wait(request: Request) -> None:
        if request.file == WEIGHTS:
            half_sent.set()
            killed.wait(WAIT_SECONDS)

    hub.halfway = wait
    process = caller.start("small")
    assert half_sent.wait(WAIT_SECONDS)
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)
    killed.set()
    hub.halfway = None

    assert process.returncode == -signal.SIGKILL
    assert caller.call("small", HF_HUB_OFFLINE="1").error == "ModelNotFound"
    assert caller.call("small").files() == SINGLE
    assert caller.call("small", HF_HUB_OFFLINE="1").files() == SINGLE


# Names, revisions and files made to lead elsewhere


@pytest.mark.parametrize(
    "revision",
    [
        "../../../../elsewhere",
        "..",
        "main/../../x",
        "/elsewhere",
        "refs//main",
        ".hidden",
        "a b",
        "main\n",
        "x:y",
        "a\\b",
        "~",
        "r" * 300,
    ],
)
def test_revision_that_is_none_is_not_asked_for(hub: FakeHub, caller: Caller, tmp_path: Path, revision: str) -> None:
    (tmp_path / "elsewhere").write_text(NO_SUCH_COMMIT)
    revision = str(tmp_path / "elsewhere") if revision == "/elsewhere" else revision
    # A hub that knows the name, so that the client would write `refs/<revision>`.
    hub.commit("small", SINGLE, reference=revision)

    outcome = caller.call("small", revision)

    assert outcome.error == "ModelNotFound"
    assert repr(revision) in outcome.message
    assert "branch, tag or commit" in outcome.message
    assert not hub.requests
    assert not caller.cache.exists()
    assert (tmp_path / "elsewhere").read_text() == NO_SUCH_COMMIT


@pytest.mark.parametrize(
    "model",
    [
        "../../etc",
        "a/b/c",
        "/no/such/folder",
        "./none",
        "~nobody-of-that-name/x",
        "a name with spaces",
        "a--b",
        "a..b",
        "x.git",
        "-dash",
        "a/",
        "mod\u00e8le",
        "a\nb",
        "a\0b",
        "a" * 97,
        "a" * 5000,
    ],
)
def test_name_that_is_no_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # else a failure of this test would ask the real hub

    with pytest.raises(ModelNotFound, match=r"no such folder, nor a hub id|cannot be looked up") as caught:
        find_model(model)

    assert model in str(caught.value)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/x.safetensors", "sub/x.safetensors", "x.bin", 7, None])
def test_index_that_names_a_file_elsewhere(hub: FakeHub, caller: Caller, name: object) -> None:
    index = json.dumps({"weight_map": {"wte.weight": "model-00001-of-00004.safetensors", "wpe.weight": name}})
    hub.commit("sharded", {**SHARDED, "model.safetensors.index.json": index.encode()})

    online = caller.call("sharded")
    cached = caller.call("sharded", HF_HUB_OFFLINE="1")

    for outcome in (online, cached):
        assert outcome.error == "CheckpointError"
        assert repr(name) in outcome.message
        assert "model.safetensors.index.json" in outcome.message
    assert hub.files_asked_for() <= {*SHARDED, WEIGHTS, *EXTRAS}
    assert not any("-of-00004" in file for file in hub.files_asked_for())


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_index_without_shards_is_no_model(hub: FakeHub, caller: Caller, weight_map: object) -> None:
    index = json.dumps({"weight_map": weight_map})
    hub.commit("sharded", {**SHARDED, "model.safetensors.index.json": index.encode()})

    outcome = caller.call("sharded")

    assert outcome.error == "CheckpointError"
    assert "weight_map" in outcome.message


@pytest.mark.parametrize("junk", [b"", b"../../..", b"/etc", b"main", NO_SUCH_COMMIT.encode()])
def test_reference_with_junk_is_asked_for_again(hub: FakeHub, caller: Caller, junk: bytes) -> None:
    commit = hub.commit("small", SINGLE)
    reference = caller.put("small", commit, SINGLE).parent.parent / "refs" / "main"
    reference.write_bytes(junk)

    assert caller.call("small", HF_HUB_OFFLINE="1").error == "ModelNotFound"
    assert caller.call("small").files() == SINGLE
    assert reference.read_text() == commit


def test_reference_that_is_no_text(hub: FakeHub, caller: Caller) -> None:
    commit = hub.commit("small", SINGLE)
    reference = caller.put("small", commit, SINGLE).parent.parent / "refs" / "main"
    reference.write_bytes(b"\xff\xfe\x00")

    assert caller.call("small", HF_HUB_OFFLINE="1").error == "ModelNotFound"
    online = caller.call("small")
    assert online.error == "ModelNotFound"
    assert str(caller.cache) in online.message


# What is here


def test_demo_is_the_packaged_folder() -> None:
    assert find_model("demo") == DEMO_FOLDER
    assert find_model("demo", "any-revision") == DEMO_FOLDER
    assert (DEMO_FOLDER / "config.json").is_file()


def test_folder_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "my model" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_model(str(tmp_path / "my model")) == tmp_path / "my model"
    assert find_model("my model") == Path("my model")
    assert find_model("~/my model") == tmp_path / "my model"


def test_file_is_no_folder() -> None:
    path = CHECKPOINTS / "prefixed" / WEIGHTS

    with pytest.raises(ModelNotFound, match="is a file; name the folder that holds it") as caught:
        find_model(str(path))

    assert str(path) in str(caught.value)


def test_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="is empty; name a folder") as caught:
        find_model(str(tmp_path))

    assert str(tmp_path) in str(caught.value)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(config_with(50257))
    with pytest.raises(TokenizerError, match=r"holds no tokenizer, .*; if .*, add --tokenizer gpt2"):
        find_folders(str(tmp_path))
    # The remedy, as far as there is no hub.
    assert find_folders(str(tmp_path), None, "demo") == (tmp_path, DEMO_FOLDER)

    (tmp_path / "config.json").write_bytes(config_with(3000))
    with pytest.raises(TokenizerError, match="which has about 3000 tokens, by --tokenizer"):
        find_folders(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type"):
        find_folders(str(tmp_path))


def test_folder_of_a_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match=r"^\./mine: holds no tokenizer, which is tokenizer\.json, or"):
        find_folders("demo", None, "./mine")
    (tmp_path / "mine" / "vocab.txt").touch()
    assert find_folders("demo", None, "./mine") == (DEMO_FOLDER, Path("mine"))
    with pytest.raises(ModelNotFound, match=r"vocab\.txt: is a file; name the folder that holds it"):
        find_folders("demo", None, "mine/vocab.txt")
    with pytest.raises(ModelNotFound, match=r"\./none: no such folder"):
        find_folders("demo", None, "./none")
