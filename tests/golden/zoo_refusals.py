# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The kinds of the zoo that are not served. See make_zoo.py.

Each function builds the folder of one kind; its docstring names public repositories that look so.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

import torch
from zoo_pieces import Box, in_type, kind
from zoo_weights import fine_tune, nanogpt


@kind(refused=("PEFT adapter of openai-community/gpt2", "merge_and_unload"))
def adapter(box: Box) -> None:
    """PEFT adapters (LoRA): adapter_model.safetensors and nothing of the base model"""
    box.put("adapter_config.json", {
        "base_model_name_or_path": "openai-community/gpt2", "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8,
        "lora_alpha": 16, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "none",
    })  # fmt: skip
    lora = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(8, box.size.n_embd)}
    box.safetensors(lora, "adapter_model.safetensors")
    box.gpt2_json()


@kind(refused=("GPT2ForSequenceClassification",))
def classifier(box: Box) -> None:
    """Classifiers on a GPT-2: mnoukhov/gpt2-imdb-sentiment-classifier, reward models"""
    weights = fine_tune(box, architectures=["GPT2ForSequenceClassification"], num_labels=2)
    box.safetensors(weights | {"score.weight": torch.ones(2, box.size.n_embd)})


@kind(refused=("bitsandbytes",))
def bitsandbytes_8bit(box: Box) -> None:
    """Models saved with load_in_8bit: int8 weights and SCB scales"""
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    weights = fine_tune(box, quantization_config=quantization)
    for name in [name for name in weights if ".c_" in name and name.endswith("weight")]:
        tensor = weights[name].t().contiguous()
        scales = tensor.abs().amax(1)
        weights[name] = (tensor / scales[:, None] * 127).round().to(torch.int8)
        weights[name.replace("weight", "SCB")] = scales
    box.safetensors(weights)


@kind(refused=("bitsandbytes",))
def bitsandbytes_4bit(box: Box) -> None:
    """Models saved with load_in_4bit: packed nf4 bytes and quant states"""
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    weights = fine_tune(box, quantization_config=quantization)
    for name in [name for name in weights if ".c_" in name and name.endswith("weight")]:
        weights[name + ".absmax"] = torch.ones(1)
        weights[name + ".quant_map"] = torch.ones(16)
        weights[name + ".quant_state.bitsandbytes__nf4"] = torch.zeros(20, dtype=torch.uint8)
        weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    box.safetensors(weights)


@kind(refused=("gptq",))
def gptq(box: Box) -> None:
    """Models quantised by GPTQ: qweight, qzeros, scales"""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    weights = fine_tune(box, quantization_config=quantization)
    for name in [name for name in weights if ".c_" in name and name.endswith("weight")]:
        stem = name.removesuffix("weight")
        del weights[name]
        weights |= {stem + "qweight": torch.zeros(4, 24, dtype=torch.int32), stem + "scales": torch.ones(1, 24)}
    box.safetensors(weights)


def pointer(data: bytes) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 548105171\n".encode()


@kind(refused=("model.safetensors", "Git LFS", "git lfs pull"))
def lfs_pointer(box: Box) -> None:
    """Clones without Git LFS: model.safetensors is a pointer of three lines"""
    fine_tune(box)
    box.put("model.safetensors", pointer(b"weights"))


@kind(refused=("pytorch_model.bin", "Git LFS", "git lfs pull"))
def lfs_pointer_torch(box: Box) -> None:
    """The same for pytorch_model.bin"""
    fine_tune(box)
    box.put("pytorch_model.bin", pointer(b"weights"))


@kind(refused=("tokenizer.json", "Git LFS", "git lfs pull"), small=False)
def lfs_pointer_tokenizer(box: Box) -> None:
    """The same for tokenizer.json"""
    box.safetensors(fine_tune(box))
    box.put("tokenizer.json", pointer(b"tokenizer"))


def cut(box: Box, name: str) -> None:
    data = (box.folder / name).read_bytes()
    box.put(name, data[: len(data) * 2 // 3])


@kind(refused=("model.safetensors",))
def cut_safetensors(box: Box) -> None:
    """Downloads that broke off: model.safetensors is too short"""
    box.safetensors(fine_tune(box))
    cut(box, "model.safetensors")


@kind(refused=("pytorch_model.bin",))
def cut_torch(box: Box) -> None:
    """Downloads that broke off: pytorch_model.bin is too short"""
    box.bin(fine_tune(box))
    cut(box, "pytorch_model.bin")


@kind(refused=("pytorch_model.bin",), small=False)
def cut_old_torch(box: Box) -> None:
    """The same in torch's old format"""
    box.bin(fine_tune(box), legacy=True)
    cut(box, "pytorch_model.bin")


@kind(refused=("model-00002-of-00002.safetensors",))
def missing_shard(box: Box) -> None:
    """Downloads that broke off: a shard that the index names is not there"""
    weights = fine_tune(box)
    names = sorted(weights)
    where = {name: f"model-{1 + n % 2:05d}-of-00002.safetensors" for n, name in enumerate(names)}
    box.safetensors({name: weights[name] for name in names[::2]}, "model-00001-of-00002.safetensors")
    box.put("model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": where})


@kind(refused=("flax_model.msgpack",))
def flax_only(box: Box) -> None:
    """flax-community repositories with flax_model.msgpack only"""
    fine_tune(box)
    box.put("flax_model.msgpack", b"\x82\xa6params\x80")


@kind(refused=("tf_model.h5",))
def tensorflow_only(box: Box) -> None:
    """Keras fine-tunes with tf_model.h5 only"""
    fine_tune(box)
    box.put("tf_model.h5", b"\x89HDF\r\n\x1a\n" + bytes(64))


@kind(refused=("gguf",), small=False)
def gguf_only(box: Box) -> None:
    """Repositories with a GGUF file only"""
    fine_tune(box)
    box.put("gpt2.Q8_0.gguf", b"GGUF\x03\x00\x00\x00" + bytes(64))


@kind(refused=("model.onnx",), small=False)
def onnx_only(box: Box) -> None:
    """Repositories with an ONNX export only"""
    fine_tune(box)
    box.put("onnx/model.onnx", b"\x08\x07")


@kind(refused=("checkpoint-1500",))
def checkpoints_in_folders(box: Box) -> None:
    """Trainer's output folder: checkpoints in sub-folders, nothing at the root"""
    fine_tune(box)
    whole = (box.folder / "config.json").read_bytes()
    for step in (500, 1500):
        box.put(f"checkpoint-{step}/config.json", whole)
        box.safetensors({"transformer.ln_f.bias": torch.zeros(4)}, f"checkpoint-{step}/model.safetensors")
        box.put(f"checkpoint-{step}/training_args.bin", b"never read")
    (box.folder / "config.json").unlink()
    (box.folder / "tokenizer.json").unlink()


@kind(refused=("gpt_bigcode",))
def gpt_bigcode(box: Box) -> None:
    """bigcode/gpt_bigcode-santacoder and others: another architecture by its model_type"""
    box.safetensors(fine_tune(box, model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"], multi_query=True))


@kind(refused=("multiquery",))
def custom_code(box: Box) -> None:
    """bigcode/santacoder: model_type gpt2 with code of its own, and one head of keys for all"""
    weights = fine_tune(
        box, architectures=["GPT2LMHeadCustomModel"], attention_head_type="multiquery",
        auto_map={"AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel"},
    )  # fmt: skip
    for name in [name for name in weights if ".attn.c_attn." in name]:
        tensor = weights.pop(name)
        weights[name.replace("c_attn", "q_attn")] = tensor[..., : box.size.n_embd]
        weights[name.replace("c_attn", "kv_attn")] = tensor[..., box.size.n_embd : box.size.n_embd + 8]
    box.safetensors(weights)


@kind(refused=("tokenizer",))
def no_tokenizer(box: Box) -> None:
    """karpathy/gpt2_1558M_final4_hf and pushes without a tokenizer"""
    box.write_config()
    box.safetensors(in_type(torch.bfloat16, box.weights()), keep=True)


@kind(refused=("pytorch_model.bin",))
def hostile_pickle(box: Box) -> None:
    """A pickle that calls os.system when it is loaded"""
    fine_tune(box)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), b"cposix\nsystem\n(S'echo never'\ntR.")
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
    box.put("pytorch_model.bin", out.getvalue())


@kind(refused=("h.1.mlp.c_fc.weight",), small=False)
def missing_tensor(box: Box) -> None:
    """Files that lack a tensor"""
    weights = fine_tune(box)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    box.safetensors(weights)


@kind(refused=("wte.weight",), small=False)
def table_of_another_size(box: Box) -> None:
    """config.json and weights of two models: vocab_size differs from the table"""
    weights = fine_tune(box)
    box.write_config(vocab_size=box.size.eot + 3)
    box.safetensors(weights)


@kind(refused=("model_19072.pt",), small=False)
def other_torch_name(box: Box) -> None:
    """Files of own training loops under other names (build-nanogpt's log/model_19072.pt)"""
    box.bin(fine_tune(box), "model_19072.pt")


@kind(refused=("model.fp16.safetensors",), small=False)
def variant_only(box: Box) -> None:
    """Repositories with a variant only: model.fp16.safetensors"""
    box.safetensors(fine_tune(box), "model.fp16.safetensors")


@kind(refused=("tokenizer",))
def nanogpt_without_tokenizer(box: Box) -> None:
    """nanoGPT's out folder: ckpt.pt and nothing else"""
    nanogpt(box, bias=True)
    (box.folder / "tokenizer.json").unlink()


@kind(refused=("GPT2ForTokenClassification",), small=False)
def token_classifier(box: Box) -> None:
    """Taggers on a GPT-2"""
    weights = fine_tune(box, architectures=["GPT2ForTokenClassification"], num_labels=2)
    more = {"classifier.weight": torch.ones(2, box.size.n_embd), "classifier.bias": torch.ones(2)}
    box.safetensors(weights | more)


@kind(refused=("gpt_neo",), small=False)
def gpt_neo(box: Box) -> None:
    """Models of another type: gpt_neo"""
    box.safetensors(fine_tune(box, model_type="gpt_neo", architectures=["GPTNeoForCausalLM"]))


@kind(refused=("model.safetensors",), small=False)
def empty_file(box: Box) -> None:
    """Downloads that did not begin: model.safetensors has no bytes"""
    fine_tune(box)
    box.put("model.safetensors", b"")


@kind(refused=("config.json",), small=False)
def no_config(box: Box) -> None:
    """Weights without config.json"""
    box.safetensors(fine_tune(box))
    (box.folder / "config.json").unlink()
