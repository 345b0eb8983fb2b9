"""`config.json` is read in full, and refused by the name of a field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt2.engine.model.config import MAX_CONFIG_BYTES, GPT2Config, read_config
from fastgpt2.errors import ConfigError

# What the public `gpt2` repository holds, from transformers' test fixtures of it.
PUBLIC_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip


def read(tmp_path: Path, **changes: Any) -> GPT2Config:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", **changes}))
    return read_config(tmp_path)


def test_the_public_gpt2(tmp_path: Path) -> None:
    config = read(tmp_path, **PUBLIC_GPT2)
    assert config == GPT2Config()
    assert (config.head_dim, config.n_inner) == (64, 3072)
    assert config.attention_scale(5) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd"), [(6, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)]
)
def test_all_sizes_from_distilgpt2_to_xl(tmp_path: Path, n_layer: int, n_head: int, n_embd: int) -> None:
    config = read(tmp_path, **{**PUBLIC_GPT2, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd})
    assert (config.n_layer, config.head_dim, config.n_inner) == (n_layer, 64, 4 * n_embd)


def test_scales_of_attention(tmp_path: Path) -> None:
    by_layer = read(tmp_path, n_embd=32, n_head=2, vocab_size=9, scale_attn_by_inverse_layer_idx=True)
    assert [by_layer.attention_scale(i) for i in (0, 1, 3)] == [1 / 4, 1 / 8, 1 / 16]
    unscaled = read(tmp_path, n_embd=32, n_head=2, vocab_size=9, scale_attn_weights=False)
    assert unscaled.attention_scale(3) == 1.0


def test_n_ctx_stands_in_for_n_positions(tmp_path: Path) -> None:
    assert read(tmp_path, n_ctx=77).n_positions == 77


def test_the_names_that_transformers_takes_for_the_same(tmp_path: Path) -> None:
    config = read(
        tmp_path, hidden_size=48, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=99, vocab_size=9
    )
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (48, 4, 3, 99)
    with pytest.raises(ConfigError, match=r"config\.json: n_head is 2, but num_attention_heads is 4"):
        read(tmp_path, n_embd=48, n_head=2, num_attention_heads=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("n_embd", "768"),
        ("n_embd", 0),
        ("n_embd", 1e9),
        ("n_head", -1),
        ("n_head", 7),
        ("n_layer", True),
        ("n_layer", 2**40),
        ("n_positions", None),
        ("n_inner", "big"),
        ("vocab_size", [1]),
        ("activation_function", "gelu_newer"),
        ("activation_function", ["gelu"]),
        ("layer_norm_epsilon", "tiny"),
        ("layer_norm_epsilon", 2),
        ("scale_attn_weights", "no"),
        ("scale_attn_by_inverse_layer_idx", 1),
        ("tie_word_embeddings", None),
        ("is_encoder_decoder", True),
        ("quantization_config", {"bits": 4}),
        ("attention_head_type", "multiquery"),
        ("architectures", ["GPT2ForSequenceClassification"]),
    ],
)
def test_a_bad_field_is_named_with_its_file(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{field}"):
        read(tmp_path, **{field: value})


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: not (valid JSON|a JSON object)"):
        read_config(tmp_path)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(ConfigError, match="at most"):
        read_config(tmp_path)
