# mypy: disable-error-code="import-not-found,attr-defined"
"""Makes `torch_files/`: small files that torch.save wrote, and the tensors that were saved in each.

    python tests/golden/make_torch_files.py     # in an environment with torch and numpy

Each folder holds files as a model's folder would, and `expected.npz`: the tensors by name, bfloat16 and float8 as their
bits. The script checks that torch.load reads the same. It writes the same bytes each time, but for the keys of storages
in the old format, which are addresses.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent / "torch_files"
TORCH_FILE = "pytorch_model.bin"


def folder(name: str) -> Path:
    made = ROOT / name
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def bits(tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy()
    return tensor.detach().numpy()


def expect(made: Path, tensors: dict[str, torch.Tensor]) -> None:
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(made.glob("*.bin"), reverse=True) or made.glob("*.pt"):
        value = torch.load(file, weights_only=False)
        loaded |= value.get("state_dict", value.get("model", value))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(bits(loaded[name]), bits(tensor))
    np.savez_compressed(made / "expected.npz", **{name: bits(tensor) for name, tensor in tensors.items()})


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {
        f"a.{dtype}".replace("torch.", ""): (4 * numbers(3, 5)).to(dtype)
        for dtype in (
            torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16,
            torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.float8_e4m3fn,
        )
    }  # fmt: skip
    tensors["a.scalar"] = torch.tensor(-10000.0)
    tensors["a.empty"] = torch.empty(0, 3)
    tensors["a.huge"] = torch.tensor([1e300, -1e300, 1.5], dtype=torch.float64)
    return tensors


def shared_and_strided() -> dict[str, torch.Tensor]:
    table = numbers(7, 4)
    wide = numbers(4, 12).to(torch.bfloat16)
    return {
        "transformer.wte.weight": table,
        "lm_head.weight": table,  # the same storage
        "transposed.weight": table.t(),
        "row.weight": table[2],
        "column.weight": table[:, 1],
        "every.second": table[1::2, ::3],
        "expanded.weight": numbers(1, 4).expand(6, 4),
        "bfloat16.transposed": wide.t(),
        "bfloat16.part": wide[:, 4:8],
        "one.wide": numbers(3, 1)[:, :],
        "double.transposed": numbers(2, 3).double().t(),
        "half.transposed": numbers(2, 3).half().t(),
    }


def with_attributes() -> dict[str, torch.Tensor]:
    """Tensors as some programs leave them: parameters, and parameters with attributes of their own."""
    plain = torch.nn.Parameter(numbers(2, 2))
    marked = torch.nn.Parameter(numbers(2, 2))
    marked.is_layer_norm = True
    tensor = numbers(3)
    tensor.note = "kept by _rebuild_from_type_v2"
    return {"a.plain": plain, "a.marked": marked, "a.tensor": tensor}


def state_dict(tensors: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """Return tensors as `Module.state_dict()` gives them: with `_metadata`, which is pickled as a state."""
    made = OrderedDict(tensors)
    made._metadata = OrderedDict({"": {"version": 1}})
    return made


def save_both_formats(name: str, tensors: dict[str, torch.Tensor]) -> None:
    made = folder(name)
    torch.save(state_dict(tensors), made / TORCH_FILE)
    expect(made, tensors)
    made = folder(f"{name}_old_format")
    plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in UNTYPED}
    torch.save(state_dict(plain), made / TORCH_FILE, _use_new_zipfile_serialization=False)
    expect(made, plain)


# Types without a storage class of their own, which the old format cannot load.
UNTYPED = (torch.uint16, torch.uint32, torch.float8_e4m3fn)


def shards() -> None:
    made = folder("shards")
    tensors = {f"h.{i}.weight": numbers(2, 3) for i in range(4)}
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 2, 2, dtype=torch.bool).tril() for i in range(2)}
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    first = {name: tensors[name] for name in ("h.0.weight", "h.1.weight")} | {"h.0.attn.bias": mask["h.0.attn.bias"]}
    # `h.1.weight` stands in both, with other numbers in the one that the index does not name.
    second = {name: tensors[name] for name in ("h.2.weight", "h.3.weight")} | {
        "h.1.attn.bias": mask["h.1.attn.bias"],
        "h.1.weight": numbers(2, 3),
    }
    torch.save(first, made / one)
    torch.save(second, made / two, _use_new_zipfile_serialization=False)
    weight_map = {"h.0.weight": one, "h.1.weight": one, "h.2.weight": two, "h.3.weight": two}
    index = {"metadata": {"total_size": 96}, "weight_map": weight_map}
    (made / f"{TORCH_FILE}.index.json").write_text(json.dumps(index, indent=1))
    expect(made, tensors | mask)


def nanogpt() -> None:
    """A checkpoint as nanoGPT's train.py writes one, of a compiled model."""
    made = folder("nanogpt")
    n, layers, vocab, block = 8, 2, 65, 16
    table = numbers(vocab, n)
    model: dict[str, torch.Tensor] = {"transformer.wte.weight": table, "transformer.wpe.weight": numbers(block, n)}
    for i in range(layers):
        for name, shape in (
            ("ln_1.weight", (n,)), ("attn.c_attn.weight", (3 * n, n)), ("attn.c_proj.weight", (n, n)),
            ("ln_2.weight", (n,)), ("mlp.c_fc.weight", (4 * n, n)), ("mlp.c_proj.weight", (n, 4 * n)),
        ):  # fmt: skip
            model[f"transformer.h.{i}.{name}"] = numbers(*shape)
    model |= {"transformer.ln_f.weight": numbers(n), "lm_head.weight": table}
    model = {f"_orig_mod.{name}": tensor for name, tensor in model.items()}
    parameters = [torch.nn.Parameter(tensor) for tensor in list(model.values())[:3]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model_args = {
        "n_layer": layers, "n_head": 2, "n_embd": n, "block_size": block, "bias": False, "vocab_size": vocab,
        "dropout": 0.2,
    }  # fmt: skip
    checkpoint = {
        "model": OrderedDict(model),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args,
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.88),
        "config": {"out_dir": "out", "device": "cpu", "learning_rate": 1e-3, "compile": True, "init_from": "scratch"},
    }
    torch.save(checkpoint, made / "ckpt.pt")
    expect(made, model)


def training() -> None:
    """A checkpoint as Lightning writes one: the tensors under `state_dict`, and much beside them."""
    made = folder("training")
    tensors = {"model.transformer.wte.weight": numbers(5, 4), "model.transformer.ln_f.weight": numbers(4).half()}
    checkpoint = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": OrderedDict(tensors),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(2.5), "dirpath": Path("checkpoints")}},
        "optimizer_states": [{"state": {0: {"step": 1000, "exp_avg": numbers(5, 4)}}, "param_groups": [{"lr": 0.1}]}],
        "hparams_name": "kwargs",
        "hyper_parameters": Namespace(lr=0.1, tags={"a", "b"}, sizes=(1, 2, 3), key=b"bytes", best=np.float64(2.5)),
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    torch.save(checkpoint, made / TORCH_FILE)
    expect(made, tensors)


def protocols() -> None:
    for protocol in (3, 4, 5):
        made = folder(f"protocol_{protocol}")
        tensors = {"a.weight": numbers(2, 3), "a.bias": numbers(3)}
        torch.save({"state_dict": tensors, "tags": {1, 2}, "raw": b"12"}, made / TORCH_FILE, pickle_protocol=protocol)
        expect(made, tensors)


def without_checksums() -> None:
    made = folder("no_checksums")
    tensors = {"a.weight": numbers(2, 3)}
    torch.serialization.set_crc32_options(False)
    torch.save(tensors, made / TORCH_FILE)
    torch.serialization.set_crc32_options(True)
    expect(made, tensors)


def main() -> None:
    torch.manual_seed(17)
    shutil.rmtree(ROOT, ignore_errors=True)
    save_both_formats("every_dtype", every_dtype())
    save_both_formats("shared_and_strided", shared_and_strided())
    save_both_formats("with_attributes", with_attributes())
    shards()
    nanogpt()
    training()
    protocols()
    without_checksums()


if __name__ == "__main__":
    main()
