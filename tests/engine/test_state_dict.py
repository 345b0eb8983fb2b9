"""Stored tensors are matched with the model's whatever their names are, as transformers would, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support.running import GOLDEN

from fastgpt2.engine.model.checkpoint import Checkpoint
from fastgpt2.engine.model.config import read_config
from fastgpt2.engine.model.state_dict import StateDict, match_names
from fastgpt2.engine.model.weights import expected_shapes
from fastgpt2.errors import CheckpointError

Tensors = dict[str, NDArray[Any]]

CHECKPOINTS = GOLDEN / "checkpoints"
TABLE, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a checkpoint of the test's own: 2 layers, 83 tokens, 20 numbers a token, tied, names with prefix."""
    return shutil.copytree(CHECKPOINTS / "prefixed", tmp_path / "model")


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, **config: Any) -> StateDict:
    """Store tensors as the folder's, with changes of its configuration, and match them."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **config}))
    return match_names(Checkpoint.open(folder), read_config(folder))


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def without_prefix(name: str) -> str:
    return name.removeprefix("transformer.")


def assert_same(state: StateDict, original: Tensors) -> None:
    """Check that every tensor of the model is the one that it was before the names changed."""
    for name, stored in state.names.items():
        assert stored is not None
        np.testing.assert_array_equal(state.checkpoint.float32(stored), original[f"transformer.{name}"])


@pytest.mark.parametrize(
    "rename",
    [
        without_prefix,
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{without_prefix(name)}",
        lambda name: f"_orig_mod.module.model.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"pretrained_model.base_model.model.{name}",
        lambda name: f"model.{without_prefix(name)}",
        lambda name: f"transformer.{name}",
        lambda name: name.replace("h.0.", "h.0._fsdp_wrapped_module._orig_mod."),
    ],
)  # fmt: skip
def test_prefixes_in_any_stack(folder: Path, rename: Callable[[str], str]) -> None:
    original = tensors_of(folder)
    state = store(folder, renamed(rename)(original))
    assert state.notes == ()
    assert_same(state, original)


def test_half_of_the_names_with_a_prefix(folder: Path) -> None:
    original = tensors_of(folder)
    names = sorted(original)
    state = store(folder, {name if i % 2 else without_prefix(name): original[name] for i, name in enumerate(names)})
    assert_same(state, original)


def test_a_prefix_of_the_makers_own_is_told(folder: Path) -> None:
    original = tensors_of(folder)
    state = store(folder, renamed(lambda name: f"model.gpt.{name}")(original))
    assert_same(state, original)
    assert state.notes == (
        f"{folder / 'model.safetensors'}: the model is taken from the tensors that begin with 'gpt'",
    )


def test_of_two_models_the_one_that_transformers_finds_is_taken(folder: Path) -> None:
    original = tensors_of(folder)
    others = {f"teacher.{name}": tensor + 1 for name, tensor in original.items()}
    state = store(folder, {**original, **others})
    assert_same(state, original)
    (note,) = state.notes
    assert "left out, as transformers does: 'teacher." in note
    assert f"and {len(others) - 4} more" in note
    with pytest.raises(CheckpointError, match=r"several models, whose names begin with '(student|teacher)\.', '"):
        store(folder, {**renamed(lambda name: f"student.{name}")(original), **others})


def test_a_tensor_stored_twice(folder: Path) -> None:
    original = tensors_of(folder)
    assert_same(store(folder, {**original, "wte.weight": original[TABLE].copy()}), original)
    # transformers knows one of these names only.
    assert_same(store(folder, {**original, "module.wte.weight": original[TABLE] + 1}), original)
    with pytest.raises(CheckpointError, match=r"'wte\.weight' is stored twice with different numbers, as '.*' and '"):
        store(folder, {**original, "wte.weight": original[TABLE] + 1})


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "other"])
def test_which_table_the_output_uses(folder: Path, tied: bool | None, table: bool, head: str) -> None:
    """As transformers 5.24 does it for each of these; where it would take random numbers, the file is refused."""
    original = tensors_of(folder)
    tensors = dict(original)
    if not table:
        del tensors[TABLE]
    if head != "absent":
        tensors[HEAD] = original[TABLE] + (head == "other")
    config = {} if tied is None else {"tie_word_embeddings": tied}
    if not table and (head == "absent" or tied is False):
        with pytest.raises(CheckpointError, match=r"tensor 'wte\.weight' is missing"):
            store(folder, tensors, **config)
    elif head == "absent" and tied is False:
        with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing.*set tie_word_embeddings to true"):
            store(folder, tensors, **config)
        assert "lm_head.weight" not in store(folder, tensors, tie_word_embeddings=True).names
    else:
        names = store(folder, tensors, **config).names
        assert names["wte.weight"] == (TABLE if table else HEAD)
        assert names.get("lm_head.weight") == (HEAD if table and head == "other" else None)


def test_equal_tables_of_two_types_are_one(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors[TABLE] = tensors[TABLE].astype(np.float16)
    assert "lm_head.weight" not in store(folder, {**tensors, HEAD: tensors[TABLE].astype(np.float32)}).names


def test_the_difference_may_lie_in_the_last_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.engine.model.state_dict._CHUNK_NUMBERS", 100)
    tensors = tensors_of(folder)
    tensors[HEAD] = tensors[TABLE].copy()
    assert "lm_head.weight" not in store(folder, tensors).names
    tensors[HEAD][-1, -1] += 1
    assert "lm_head.weight" in store(folder, tensors).names


def test_what_a_gpt2_does_not_have_is_left_out_with_a_note(folder: Path) -> None:
    """The tensors are those of the golden checkpoint of this name, so the text is that of transformers."""
    folder = shutil.copytree(CHECKPOINTS / "left_out", folder.parent / "left_out")
    checkpoint, config = Checkpoint.open(folder), read_config(folder)
    others, beyond = match_names(checkpoint, config).notes
    file = folder / "model.safetensors"
    assert others == (
        f"{file}: left out, as transformers does: 'lm_head.bias', 'multiple_choice_head.summary.weight', "
        "'score.weight', 'transformer.h.0.crossattention.c_attn.weight' and 3 more; a GPT-2 has no such tensors"
    )
    assert beyond.startswith(f"{file}: left out, as transformers does: 'transformer.h.2.attn.c_attn.bias', ")
    assert beyond.endswith(" and 8 more; config.json has a smaller n_layer")


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.float16, np.float32, np.float64, np.int64])
def test_masks_are_not_mentioned(folder: Path, dtype: Any) -> None:
    tensors = tensors_of(folder)
    for prefix in ("transformer.", "", "_orig_mod.gpt."):
        tensors[f"{prefix}h.1.attn.bias"] = np.ones((1, 1, 4, 4), dtype)
        tensors[f"{prefix}h.1.attn.masked_bias"] = np.ones((), dtype)
        tensors[f"{prefix}h.1.crossattention.bias"] = np.ones(3, dtype)
    assert store(folder, tensors).notes == ()


def test_absent_biases_are_zeros_if_no_layer_has_them(folder: Path) -> None:
    tensors = tensors_of(folder)
    for layer in range(2):
        del tensors[f"transformer.h.{layer}.mlp.c_fc.bias"], tensors[f"transformer.h.{layer}.ln_1.bias"]
    state = store(folder, tensors)
    assert state.names["h.1.mlp.c_fc.bias"] is None
    assert state.rows("h.1.mlp.c_fc.bias", slice(2, 7)).tolist() == [0.0] * 5
    (note,) = state.notes
    assert "holds no 'h.*.ln_1.bias', 'h.*.mlp.c_fc.bias'; zeros are used, as in transformers" in note
    tensors["transformer.h.0.ln_1.bias"] = np.ones(20, np.float32)
    with pytest.raises(CheckpointError, match=r"tensor 'h\.1\.ln_1\.bias' is missing; fetch"):
        store(folder, tensors)


def test_several_missing_tensors_are_counted(folder: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if ".h.1." not in name}
    with pytest.raises(CheckpointError, match=r"'h\.1\.ln_1\.weight' is missing \(and 11 more\).*n_layer in config"):
        store(folder, tensors)


def test_nanogpt_stores_linear_layers_transposed(folder: Path) -> None:
    original, config = tensors_of(folder), read_config(folder)
    linear = {name for name, shape in expected_shapes(config).items() if name.startswith("h.") and len(shape) == 2}
    tensors = {
        f"_orig_mod.{name}": np.ascontiguousarray(tensor.T) if without_prefix(name) in linear else tensor
        for name, tensor in original.items()
        if not name.endswith("bias")
    }
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"has the shape \[60, 20\]; config\.json implies \[20, 60\]"):
        match_names(checkpoint, config)
    checkpoint.format = "nanogpt"
    state = match_names(checkpoint, config)
    assert state.notes == ()
    assert {name for name, stored in state.names.items() if stored is None} == {
        name for name in expected_shapes(config) if name.endswith("bias")
    }
    for name in linear:
        where = slice(3, 9)
        np.testing.assert_array_equal(state.columns(name, where), original[f"transformer.{name}"][:, where])


@pytest.mark.parametrize(
    ("name", "rows", "field"),
    [(TABLE, 85, "vocab_size"), (HEAD, 80, "vocab_size"), ("transformer.wpe.weight", 40, "n_positions")],
)
def test_a_table_of_another_size_names_the_field(folder: Path, name: str, rows: int, field: str) -> None:
    tensors = tensors_of(folder)
    right = {"vocab_size": 83, "n_positions": 32}[field]
    tensors[name] = np.ones((rows, 20), np.float32)
    message = f"has {rows} rows; config.json says {field} {right}. If the file is right, set {field} to {rows}"
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        store(folder, tensors)
    if name != HEAD:  # the other table would have to change too
        assert store(folder, tensors, **{field: rows}).names[without_prefix(name)] == name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.attn.c_attn.SCB", "bitsandbytes, 8 bits"),
        ("transformer.h.0.attn.c_attn.weight_format", "bitsandbytes, 8 bits"),
        ("transformer.h.0.attn.c_attn.weight.absmax", "bitsandbytes, 4 bits"),
        ("transformer.h.0.attn.c_attn.weight.quant_state.bitsandbytes__fp4", "bitsandbytes, 4 bits"),
        ("transformer.h.0.attn.c_attn.qweight", "GPTQ or AWQ"),
        ("transformer.h.0.mlp.c_fc.qzeros", "GPTQ or AWQ"),
        ("transformer.h.0.mlp.c_fc.weight_packed", "compressed-tensors"),
        ("transformer.h.0.mlp.c_fc.weight_scale_inv", "FP8"),
    ],
)
def test_quantised_weights_are_called_so(folder: Path, name: str, kind: str) -> None:
    tensors = tensors_of(folder)
    del tensors["transformer.h.0.attn.c_attn.weight"]
    with pytest.raises(CheckpointError, match=rf"are quantised \({kind}\).*Name the model that it was made from"):
        store(folder, {**tensors, name: np.ones(4, np.uint8)})


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight",
        "base_model.model.transformer.h.0.attn.c_attn.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    ],
)
def test_an_adapter_that_is_not_merged_is_refused(folder: Path, name: str) -> None:
    tensors = renamed(lambda name: f"base_model.model.{name}")(tensors_of(folder))
    with pytest.raises(CheckpointError, match=r"PEFT adapter that is not merged.*model\.merge_and_unload\(\)"):
        store(folder, {**tensors, name: np.ones((2, 20), np.float32)})


def test_weights_of_another_architecture(folder: Path) -> None:
    tensors = tensors_of(folder)
    other = {f"model.layers.{i}.self_attn.q_proj.weight": np.ones(3, np.float32) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"no tensor of a GPT-2 but 'model\.layers.*' and 5 more; name a GPT-2"):
        store(folder, other)
    for layer in range(2):  # as in a GPT-2 with multi-query attention
        tensors[f"transformer.h.{layer}.attn.q_attn.weight"] = tensors.pop(f"transformer.h.{layer}.attn.c_attn.weight")
    with pytest.raises(CheckpointError, match=r"c_attn\.weight' is missing \(and 1 more\), and there are '.*q_attn"):
        store(folder, tensors)
