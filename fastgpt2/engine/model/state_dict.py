"""The state dict of a checkpoint: which stored tensor is which of the model's, and which are left out.

Checkpoints of one model differ in their names. Exports of the whole language model put `transformer.` before every
name, those of the bare transformer do not. `torch.compile`, data parallelism, PEFT and TRL each put a name of their own
before that. nanoGPT stores the weights of its linear layers transposed.

Which table the output uses is decided by the tensors first and by `tie_word_embeddings` second, as transformers 5
decides it:

    stored                      tied (or not said)        untied
    wte alone                   wte for both              refused: lm_head is missing
    lm_head alone               lm_head for both          refused: wte is missing
    both, the same numbers      one table for both        one table for both
    both, other numbers         each its own              each its own

transformers would fill a missing tensor with random numbers, so what is missing is refused here. There is one
exception: a bias that no layer has is zero, as it is in transformers. Tensors that a GPT-2 does not have are left out,
as transformers leaves them out; a note names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from fastgpt2.engine.kernels.panels import Array
from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import GPT2Config
from fastgpt2.engine.model.weights import HEAD, TABLE, expected_shapes
from fastgpt2.errors import CheckpointError
from fastgpt2.plurals import counted

# What may stand at the beginning of a name, in any number and order: wrappers of a model, and the model's own parts.
_PREFIXES = frozenset({"transformer", "model", "base_model", "pretrained_model"})

# What wrappers may put anywhere into a name: `torch.compile`, data parallelism, FSDP, checkpointed activations,
# DeepSpeed.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})

# Causal masks that older exports carry; the attention here needs none.
_MASK = re.compile(r"(?:.*\.)?(?:attn|crossattention)\.(?:bias|masked_bias)", re.DOTALL)

# A name of the model's, after as short a prefix as possible.
_NAME = re.compile(r"(?:(?P<prefix>.+?)\.)??(?P<name>(?:wte|wpe|ln_f)\.\w+|h\.\d+\..+|lm_head\..+)", re.DOTALL)
_LAYER = re.compile(r"h\.\d+\.")

# The names under which transformers finds a tensor.
_OF_TRANSFORMERS = re.compile(r"(?:transformer\.)*(?:wte|wpe|ln_f|h|lm_head)\..*", re.DOTALL)

# In a message: names, and the characters of one.
_MOST_NAMED = 4
_MOST_QUOTED = 80

# Two tables are compared as many numbers at a time.
_CHUNK_NUMBERS = 1 << 20


@dataclass(frozen=True, slots=True)
class StateDict:
    """The tensors of a model in a checkpoint, by the model's names.

    Attributes:
        names: the model's name -> the stored name, or None for a bias that is zero. There is an `lm_head.weight` only
            if the output has a table of its own.
        transposed: linear layers are stored as [N, K], as torch's own, and not as [K, N], as GPT-2's.
        notes: sentences for people about what was left out or filled in.
    """

    checkpoint: Checkpoint
    names: dict[str, str | None]
    transposed: bool
    notes: tuple[str, ...]

    def rows(self, name: str, where: slice) -> Array:
        """Return some rows of a vector or a table; `where` ends within it."""
        stored = self.names[name]
        if stored is None:
            return np.zeros(where.stop - where.start, np.float32)
        return self.checkpoint.float32(stored, where)

    def columns(self, weight: str, where: slice) -> Array:  # [K, ..]
        """Return some columns of a linear layer's weight, or of the transpose of a token table."""
        stored = self.names[weight]
        assert stored is not None  # only biases can be
        if self.transposed or not weight.startswith("h."):
            return self.checkpoint.float32(stored, where).T
        return self.checkpoint.float32(stored, (slice(None), where))


def match_names(checkpoint: Checkpoint, config: GPT2Config) -> StateDict:
    """Find the tensors that the model uses.

    Raises:
        CheckpointError: a tensor is missing, misshapen or stored twice, or the weights are quantised or not merged; the
            message names file and tensor.
    """
    found, others, notes = _choose_model(checkpoint)
    transposed = checkpoint.format == "nanogpt"
    shapes = expected_shapes(config)
    if others or found.keys() - shapes:
        from fastgpt2.engine.model.diagnosis import refuse_stored_names

        refuse_stored_names({name: info.file for name, info in checkpoint.tensors.items()})
    names: dict[str, str | None] = {}
    beyond: list[str] = []
    for name, stored in found.items():
        if name in shapes:
            names[name] = _choose_stored(checkpoint, name, stored)
            _check_shape(checkpoint, config, name, names[name], _stored_shape(name, shapes[name], transposed))
        else:
            (beyond if name.startswith("h.") and _LAYER.sub("h.0.", name) in shapes else others).extend(stored)
    _settle_tables(checkpoint, config, names)
    zeros = _absent_biases(names, shapes)
    missing = [name for name in shapes if name not in names and name not in zeros and name != HEAD]
    if missing:
        raise CheckpointError(_missing(checkpoint, missing, others))
    if zeros and not transposed:
        kinds = sorted({_kind(name) for name in zeros})
        notes += (f"{_files(checkpoint)}: holds no {_listed(kinds)}; zeros are used, as in transformers",)
    return StateDict(
        checkpoint,
        {name: None if name in zeros else names[name] for name in shapes if name in names or name in zeros},
        transposed,
        (*notes, *_notes_on(checkpoint, others, beyond)),
    )


def _choose_model(checkpoint: Checkpoint) -> tuple[dict[str, list[str]], list[str], tuple[str, ...]]:
    """Find the model among the stored tensors.

    Returns:
        The stored names by the model's name, the stored names that are of nothing known, and notes. Masks are in
        neither.
    """
    by_prefix: dict[str, dict[str, list[str]]] = {}
    others: list[str] = []
    for stored in checkpoint.tensors:
        if _MASK.fullmatch(stored):
            continue
        match = _NAME.fullmatch(".".join(part for part in stored.split(".") if part not in _WRAPPERS))
        if match is None:
            others.append(stored)
            continue
        parts = (match["prefix"] or "").split(".")
        prefix = ".".join(part for part in parts if part not in _PREFIXES)
        by_prefix.setdefault(prefix, {}).setdefault(match["name"], []).append(stored)
    models = [prefix for prefix, names in by_prefix.items() if any(not name.startswith("lm_head.") for name in names)]
    if not models:
        raise CheckpointError(
            f"{_files(checkpoint)}: holds no tensor of a GPT-2 but {_listed([*checkpoint.tensors]) or 'nothing'}; name "
            "a GPT-2, or the folder with its weights"
        )
    chosen = "" if "" in models else models[0]
    if len(models) > 1 and chosen:
        several = _listed([f"{prefix}." for prefix in models])
        raise CheckpointError(
            f"{_files(checkpoint)}: holds several models, whose names begin with {several}; save one of them alone"
        )
    found = by_prefix.pop(chosen)
    if HEAD not in found and HEAD in by_prefix.get("", {}):
        found[HEAD] = by_prefix[""].pop(HEAD)
    others.extend(stored for names in by_prefix.values() for stored_names in names.values() for stored in stored_names)
    notes = (f"{_files(checkpoint)}: the model is taken from the tensors that begin with {chosen!r}",) if chosen else ()
    return found, others, notes


def _choose_stored(checkpoint: Checkpoint, name: str, stored: list[str]) -> str:
    """Return the stored tensor of this name: the one that transformers would find, or any if they are the same."""
    best = [one for one in stored if _OF_TRANSFORMERS.fullmatch(one)] or stored
    for other in best[1:]:
        if not _is_same(checkpoint, best[0], other):
            raise CheckpointError(
                f"{checkpoint.tensors[other].file}: tensor {name!r} is stored twice with different numbers, as "
                f"{best[0]!r} and {other!r}; save the model without one of them"
            )
    return best[0]


def _is_same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Tell whether two tensors hold the same numbers; the first that differ end the comparison."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if first.shape != second.shape:
        return False
    if first == second:
        return True  # as in torch's files, where two names can share their numbers
    if not first.shape:
        return bool(checkpoint.float32(one) == checkpoint.float32(other))
    step = max(1, _CHUNK_NUMBERS // max(1, int(np.prod(first.shape[1:]))))
    return all(
        np.array_equal(checkpoint.float32(one, slice(at, at + step)), checkpoint.float32(other, slice(at, at + step)))
        for at in range(0, first.shape[0], step)
    )


def _stored_shape(name: str, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return shape[::-1] if transposed and name.startswith("h.") else shape


def _check_shape(
    checkpoint: Checkpoint, config: GPT2Config, name: str, stored: str | None, expected: tuple[int, ...]
) -> None:
    assert stored is not None
    info = checkpoint.tensors[stored]
    if info.shape == expected:
        return
    fields = {TABLE: "vocab_size", HEAD: "vocab_size", "wpe.weight": "n_positions"}
    if name in fields and len(info.shape) == 2 and info.shape[1] == config.n_embd:
        raise CheckpointError(
            f"{info.file}: tensor {stored!r} has {counted(info.shape[0], 'row')}; config.json says {fields[name]} "
            f"{expected[0]}. If the file is right, set {fields[name]} to {info.shape[0]} in config.json"
        )
    raise CheckpointError(
        f"{info.file}: tensor {stored!r} has the shape {list(info.shape)}; config.json implies {list(expected)}. They "
        "are not of one model: fetch both files again from one place"
    )


def _settle_tables(checkpoint: Checkpoint, config: GPT2Config, names: dict[str, str | None]) -> None:
    """Leave an output table among the names only if it is one of its own, and a token table in any case."""
    table, head = names.get(TABLE), names.get(HEAD)
    if (table is None) == (head is None):
        if table is not None and head is not None and _is_same(checkpoint, table, head):
            del names[HEAD]
        return
    if config.tie_word_embeddings:
        names.pop(HEAD, None)
        names[TABLE] = table or head
        return
    there, absent = (TABLE, HEAD) if head is None else (HEAD, TABLE)
    raise CheckpointError(
        f"{_files(checkpoint)}: tensor {absent!r} is missing, and config.json says tie_word_embeddings false. If "
        f"{there!r} is to serve for both, set tie_word_embeddings to true in config.json"
    )


def _absent_biases(names: Iterable[str], shapes: Iterable[str]) -> set[str]:
    """Return the biases of those kinds of which not one is there."""
    there = {_kind(name) for name in names}
    return {name for name in shapes if name.endswith(".bias") and _kind(name) not in there}


def _kind(name: str) -> str:
    """Return a name without the number of its layer."""
    return _LAYER.sub("h.*.", name)


def _missing(checkpoint: Checkpoint, missing: list[str], others: list[str]) -> str:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    text = f"{_files(checkpoint)}: tensor {missing[0]!r} is missing{more}"
    if others:
        return f"{text}, and there are {_listed(others)}, which a GPT-2 does not have: this is another architecture"
    return f"{text}; fetch the file again, or correct n_layer in config.json"


def _notes_on(checkpoint: Checkpoint, others: list[str], beyond: list[str]) -> Iterator[str]:
    reasons = ((others, "a GPT-2 has no such tensors"), (beyond, "config.json has a smaller n_layer"))
    for names, reason in reasons:
        if names:
            yield f"{_files(checkpoint)}: left out, as transformers does: {_listed(sorted(names))}; {reason}"


def _listed(names: list[str]) -> str:
    """Return some of the names, and how many there are beside them."""
    texts = [repr(name if len(name) <= _MOST_QUOTED else name[:_MOST_QUOTED] + "...") for name in names[:_MOST_NAMED]]
    return ", ".join(texts) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")


def _files(checkpoint: Checkpoint) -> str:
    """Return the checkpoint's files for a message: the only one, or how many there are in which folder."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    if len(files) == 1:
        return str(files[0])
    return f"{files[0].parent} ({len(files)} files)" if files else "the checkpoint"
