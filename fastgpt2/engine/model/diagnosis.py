"""A diagnosis of what cannot be served: one sentence that says what it is, and what to do.

A folder or a repository of the hub may hold much else than the weights of a causal GPT-2: an adapter, a classifier,
quantised weights, the weights in another library's form, a download that was cut off. Nothing is opened here but small
JSON files, within bounds, and the first bytes of others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt2.engine.model.config import (
    ADAPTER_FILE,
    CONFIG_FILE,
    NANOGPT_FILE,
    SINGLE_FILE,
    TOKENIZER_SETS,
    TORCH_FILE,
    UNQUANTISED,
    WEIGHT_FILES,
    config_problem,
    printable,
    read_small_json,
)
from fastgpt2.engine.model.lfs_pointer import explain_pointer, is_pointer
from fastgpt2.errors import CheckpointError

_WEIGHTS = tuple(name for _, *names in WEIGHT_FILES for name in names if name)

# A folder with more files than this is no model's.
_MAX_FILES = 10_000
_MOST_NAMED = 4
_MOST_QUOTED = 80

# Adapters that are put before the prompt; they change no weight.
_PROMPT_ADAPTERS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"})

# Tensors that only quantised checkpoints have, by the last parts of their names.
_QUANTISED = (
    ("bitsandbytes, 8 bits", re.compile(r".*\.(?:SCB|weight_format)", re.DOTALL)),
    ("bitsandbytes, 4 bits", re.compile(r".*\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\..+)", re.DOTALL)),
    ("GPTQ or AWQ", re.compile(r".*\.(?:qweight|qzeros|g_idx)", re.DOTALL)),
    ("compressed-tensors", re.compile(r".*\.weight_(?:packed|shape|zero_point)", re.DOTALL)),
    ("FP8", re.compile(r".*\.weight_scale(?:_inv)?", re.DOTALL)),
    ("HQQ", re.compile(r".*\.W_q", re.DOTALL)),
    ("Quanto", re.compile(r".*\.weight\._(?:data|scale)", re.DOTALL)),
)

# Tensors of an adapter that is not merged into the weights.
_UNMERGED = re.compile(
    r".*\b(?:lora_\w+|base_layer|modules_to_save|original_module|ia3_l|hada_w\d_a|lokr_w\d)\b.*", re.DOTALL
)

# Weights in another form: the end of a file's name, and what such a file is. `_conversion` says what to do.
_OTHER_FORMS = (
    (".gguf", "the weights for llama.cpp"),
    (".ggml", "the weights for llama.cpp"),
    ("flax_model.msgpack", "the weights for Flax"),
    ("flax_model.msgpack.index.json", "the weights for Flax"),
    ("tf_model.h5", "the weights for TensorFlow"),
    ("tf_model.h5.index.json", "the weights for TensorFlow"),
    (".index", "a checkpoint of TensorFlow"),
    (".onnx", "the network for ONNX"),
    ("openvino_model.bin", "the network for OpenVINO"),
    (".tflite", "the network for TensorFlow Lite"),
    ("rust_model.ot", "the weights for Rust"),
    (".mlmodel", "the network for Core ML"),
)

# Python code that converts a file of these to safetensors, by the same ends, and the packages that it needs.
_CONVERSIONS = {
    ".gguf": (
        "torch transformers gguf",
        "from transformers import AutoModelForCausalLM as M; m = M.from_pretrained({model}, gguf_file={file}); "
        'm.hf_quantizer = None; del m.config.quantization_config; m.save_pretrained("converted")',
    ),
    "flax_model.msgpack": (
        'torch "transformers<5" flax',
        "from transformers import GPT2Config as C, GPT2LMHeadModel as M; from transformers.modeling_flax_pytorch_utils "
        "import load_flax_checkpoint_in_pytorch_model as load; load(M(C.from_pretrained({model})), {path})"
        '.save_pretrained("converted")',
    ),
    "tf_model.h5": (
        'torch "transformers<5" tensorflow tf-keras',
        "from transformers import GPT2Config as C, GPT2LMHeadModel as M; from transformers.modeling_tf_pytorch_utils "
        "import load_tf2_checkpoint_in_pytorch_model as load; load(M(C.from_pretrained({model})), {path}, "
        'allow_missing_keys=True).save_pretrained("converted")',
    ),
}

# What a download leaves while it runs.
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download")

# What training leaves beside the weights, or what holds only a part of a model.
_NOT_WEIGHTS = re.compile(
    r"training_args\.bin|optimizer\..*|scheduler\..*|scaler\..*|rng_state.*|random_states.*|adapter_model\..*"
    r"|.*(?:value_head|v_head).*|openvino_.*"
)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(?P<end>safetensors|bin)")

# Reads a small JSON file of what is diagnosed; {} if it is not there or is no JSON object.
ReadJson = Callable[[str], Mapping[str, Any]]


def explain_adapter(folder: Path) -> str:
    """Return one sentence about a folder that holds a PEFT adapter, alone or beside a model.

    Beside a model too: transformers would put the adapter on the base model that the adapter names.
    """
    sentence = _adapter(str(folder), read_small_json(folder / ADAPTER_FILE), _listdir(folder))
    return printable(f"{folder}: {sentence}")


def refuse_stored_names(files: Mapping[str, Path]) -> None:
    """Raise CheckpointError if the names of stored tensors, with their files, are those of other than plain weights."""
    for name, file in files.items():
        for kind, pattern in _QUANTISED:
            if pattern.fullmatch(name):
                raise CheckpointError(
                    f"{file}: the weights are quantised ({kind}): there is a tensor {_quote(name)}. {UNQUANTISED}"
                )
        if _UNMERGED.fullmatch(name):
            raise CheckpointError(
                f"{file}: tensor {_quote(name)} is of a PEFT adapter that is not merged into the weights. Merge it "
                "where it was trained: model.merge_and_unload().save_pretrained(...), and name the folder it makes"
            )


def explain_folder(path: Path) -> str:
    """Return one sentence that says why there is no model at a path to load, and what to do."""
    if path.exists() and not path.is_dir():
        kind = "file" if path.is_file() else "pipe or device"
        return f"{path}: is a {kind}; name the folder that holds it, with {CONFIG_FILE} and a tokenizer"
    if not path.is_dir():
        return f"{path}: no such folder"
    names = _listdir(path)
    for name in (CONFIG_FILE, *sorted(name for name in names if "/" not in name)):
        if is_pointer(path / name):
            return explain_pointer(path / name)
    return explain_names(str(path), names, lambda name: read_small_json(path / name))


def explain_names(model: str, names: Iterable[str], read_json: ReadJson) -> str:
    """Return the same for a list of files.

    Args:
        model: the folder or the hub's repository.
        names: paths relative to it, with slashes.
        read_json: reads one of them.
    """
    listing = _Listing(model, frozenset(names), read_json)
    for explain in _EXPLANATIONS:
        sentence = explain(listing)
        if sentence:
            return printable(f"{model}: {sentence}")
    raise AssertionError("the last explanation fits everything")


def _adapter(model: str, fields: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the sentence for a PEFT adapter, with the fields of its `adapter_config.json`."""
    base = _text(fields.get("base_model_name_or_path")) or _text(fields.get("model_name"))
    kind, task = _text(fields.get("peft_type")), _text(fields.get("task_type"))
    what = f"is a PEFT adapter of {base or 'a model that it does not name'}, and no model itself"
    if task and task != "CAUSAL_LM":
        return f"{what}; it is for the task {task}, which writes no text. Name a causal GPT-2"
    if kind in _PROMPT_ADAPTERS:
        return f"{what}; it changes the prompt and no weights ({kind}), so that it cannot be merged. Name a whole model"
    code = (
        "from peft import AutoPeftModelForCausalLM as M; "
        f'M.from_pretrained({json.dumps(model)}).merge_and_unload().save_pretrained("merged")'
    )
    tokenizer = _tokenizer_option(model, names) or (f" with --tokenizer {shlex.quote(base)}" if base else "")
    left_over = f". If {ADAPTER_FILE} is left over from before a merge, remove it" if _has_weights(names) else ""
    return (
        f"{what}. Merge the two (pip install torch transformers peft) by {python_command(code)}, and name the folder "
        f"merged{tokenizer}{left_over}"
    )


def _conversion(listing: _Listing, name: str, end: str) -> str:
    """Return what to do with a file of another form."""
    if end not in _CONVERSIONS:
        return "Name the model that it was made from, as safetensors or pytorch_model.bin"
    packages, code = _CONVERSIONS[end]
    model = json.dumps(listing.model)
    path = f"__import__({json.dumps('huggingface_hub')}).hf_hub_download({model}, {json.dumps(name)})"
    if Path(listing.model).is_dir():
        path = json.dumps(str(Path(listing.model) / name))
    command = python_command(code.format(model=model, file=json.dumps(name), path=path))
    return (
        f"Convert it (pip install {packages}) by {command}, and name the folder converted"
        f"{_tokenizer_option(listing.model, listing.names)}"
    )


def _tokenizer_option(model: str, names: Iterable[str]) -> str:
    """Return how to give the tokenizer of a model to what was made of the model; "" if there is none."""
    return f" with --tokenizer {shlex.quote(model)}" if _has_tokenizer(names) else ""


def _has_tokenizer(names: Iterable[str]) -> bool:
    there = frozenset(names)
    return any(there.issuperset(files) for files in TOKENIZER_SETS)


def _has_weights(names: Iterable[str]) -> bool:
    return any(name in _WEIGHTS for name in names)


def _text(value: object) -> str:
    """Return a text of a JSON file as a message shows it; "" if it is none."""
    return value[:_MOST_QUOTED] if isinstance(value, str) else ""


def python_command(code: str) -> str:
    """Return the command that runs some Python code, quoted for a shell: names of files may be a stranger's."""
    return f"`python -c {shlex.quote(code)}`"


def _listdir(folder: Path) -> list[str]:
    """Return the files of a folder and of the folders directly in it, at most about `_MAX_FILES`."""
    names: list[str] = []
    folders = [folder]
    for place in folders:
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            for entry in itertools.islice(entries, _MAX_FILES - len(names)):
                if not entry.is_dir():
                    names.append(Path(entry.path).relative_to(folder).as_posix())
                elif place == folder:
                    folders.append(Path(entry.path))
        if place == folder:
            # What huggingface_hub has not finished to download into a folder lies there.
            folders.append(folder / ".cache" / "huggingface" / "download")
    return names


def _quote(value: object) -> str:
    """Return a value as a message shows it: of bounded length."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _MOST_QUOTED else text[: _MOST_QUOTED - 3] + "..."


def _list(names: list[str]) -> str:
    """Return some of the names, and how many there are beside them."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(name[:_MOST_QUOTED] for name in names[:_MOST_NAMED]) + more


@dataclass(frozen=True, slots=True)
class _Listing:
    model: str
    names: frozenset[str]
    read_json: ReadJson

    @property
    def top(self) -> list[str]:
        """Return the names that are not in a folder below, sorted."""
        return sorted(name for name in self.names if "/" not in name)

    @property
    def weights(self) -> str | None:
        """Return the first file of weights that can be read; None if there is none."""
        return next((name for name in _WEIGHTS if name in self.names), None)

    def has_config(self) -> bool:
        return CONFIG_FILE in self.names


def _explain_empty(listing: _Listing) -> str | None:
    return None if listing.names else "is empty; name a folder or a repository that holds a model"


def _explain_adapter(listing: _Listing) -> str | None:
    if ADAPTER_FILE not in listing.names:
        return None
    return _adapter(listing.model, listing.read_json(ADAPTER_FILE), listing.names)


def _explain_config(listing: _Listing) -> str | None:
    fields = listing.read_json(CONFIG_FILE) if listing.has_config() else {}
    problem = config_problem(fields) if fields else None
    return f"{CONFIG_FILE}: {problem}" if problem else None


def _explain_shards(listing: _Listing) -> str | None:
    """Explain shards that an index lists and that are not there, or the other way round."""
    for index in (name for name in _WEIGHTS if name.endswith(".index.json") and name in listing.names):
        weight_map = listing.read_json(index).get("weight_map")
        listed = (
            {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()
        )
        missing = sorted(listed - listing.names)
        if missing:
            return f"the download is not complete: {_list(missing)} of {index} is missing; fetch it again"
    shards = [name for name in listing.top if _SHARD.fullmatch(name)]
    if shards and listing.weights is None:
        match = _SHARD.fullmatch(shards[0])
        assert match
        return (
            f"holds {len(shards)} of {int(match['count'])} shards, and no {match['stem']}.{match['end']}.index.json, "
            "which says what is in them; fetch it again from where they came"
        )
    return None


def _explain_unfinished(listing: _Listing) -> str | None:
    unfinished = sorted(name for name in listing.names if name.endswith(_UNFINISHED))
    if not unfinished or (listing.has_config() and listing.weights):
        return None
    return f"the download is not complete: there is {_list(unfinished)}; run it again"


def _explain_missing_config(listing: _Listing) -> str | None:
    if listing.weights is None or listing.has_config() or listing.weights == NANOGPT_FILE:
        return None
    return (
        f"holds {listing.weights} but no {CONFIG_FILE}; fetch it from where the weights came, or copy it from the "
        "model that they were trained from"
    )


def _explain_missing_tokenizer(listing: _Listing) -> str | None:
    if listing.weights is None or _has_tokenizer(listing.names):
        return None
    return f"holds {listing.weights} but no tokenizer that can be read; name another model's by --tokenizer"


def _explain_other_form(listing: _Listing) -> str | None:
    for end, what in _OTHER_FORMS:
        name = next((name for name in sorted(listing.names) if name.lower().endswith(end)), None)
        if name is not None:
            return f"holds {name}, {what}, and no {SINGLE_FILE}. {_conversion(listing, name, end)}"
    return None


def _explain_other_name(listing: _Listing) -> str | None:
    """Explain weights under another name than those that are looked for."""
    ends = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
    for name in sorted(
        listing.top, key=lambda name: (next((i for i, end in enumerate(ends) if name.endswith(end)), 9), name)
    ):
        if not name.endswith(ends) or name in _WEIGHTS or _NOT_WEIGHTS.fullmatch(name) or _SHARD.fullmatch(name):
            continue
        wanted = SINGLE_FILE if name.endswith(".safetensors") else TORCH_FILE
        return f"holds {name} but no {wanted}; if these are the model's weights, rename the file to {wanted}"
    return None


def _explain_sub_folder(listing: _Listing) -> str | None:
    for name in sorted(listing.names):
        folder, slash, last = name.rpartition("/")
        if slash and last == CONFIG_FILE and any(f"{folder}/{weights}" in listing.names for weights in _WEIGHTS):
            inside = [name.removeprefix(f"{folder}/") for name in listing.names if name.startswith(f"{folder}/")]
            option = "" if _has_tokenizer(inside) else _tokenizer_option(listing.model, listing.names)
            below = f"{listing.model.rstrip('/')}/{folder}"
            return f"is no model itself, but holds one in the folder {folder}; name {below}{option}"
    return None


def _explain_lack(listing: _Listing) -> str:
    lacking = [
        *([] if listing.has_config() else [f"no {CONFIG_FILE}"]),
        *([] if listing.weights else [f"no weights ({SINGLE_FILE} or {TORCH_FILE})"]),
        *([] if _has_tokenizer(listing.names) else ["no tokenizer"]),
    ]
    there = [name for name in listing.top if not _NOT_WEIGHTS.fullmatch(name)] or listing.top
    lack = " and ".join(lacking) or "not all that a model needs"
    return f"holds {lack}, but {_list(there) or 'folders only'}; name the folder or the repository of a whole model"


_EXPLANATIONS: tuple[Callable[[_Listing], str | None], ...] = (
    _explain_empty,
    _explain_adapter,
    _explain_config,
    _explain_shards,
    _explain_unfinished,
    _explain_missing_config,
    _explain_missing_tokenizer,
    _explain_other_form,
    _explain_other_name,
    _explain_sub_folder,
    _explain_lack,
)
