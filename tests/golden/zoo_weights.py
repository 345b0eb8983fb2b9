# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The kinds of the zoo that differ in weights, config.json and generation_config.json. See make_zoo.py.

Each function builds the folder of one kind; its docstring names public repositories that look so.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from zoo_pieces import DROP, FULL, Box, Tensors, bare, in_type, kind, prefixed, token_entry

CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
# Fields of generation that config.json had until transformers 4.26, at the values that change nothing.
OLD_FIELDS: dict[str, Any] = {
    "bad_words_ids": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "eos_token_ids": 0, "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
    "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_labels": 2,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_past": True,
    "pruned_heads": {}, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "torchscript": False,
    "use_bfloat16": False, "xla_device": None,
}  # fmt: skip


def generation(box: Box, **fields: Any) -> None:
    box.put("generation_config.json", {"transformers_version": "4.44.0", **fields})


def fine_tune(box: Box, **changes: Any) -> Tensors:
    """Write what a plain fine-tune of GPT-2 has, but for its weights, which are returned."""
    box.write_config(**changes)
    box.gpt2_json()
    return box.weights()


# ---------------------------------------------------------------------------------------------- weights


@kind(occur=("eot",))
def openai_gpt2(box: Box) -> None:
    """openai-community/gpt2, -medium, -large, -xl: bare names, float masks, all files of a tokenizer"""
    box.write_config(torch_dtype=DROP, transformers_version=DROP, n_inner=DROP, use_cache=DROP)
    box.safetensors(bare(box.weights() | box.masks(torch.float32)))
    box.gpt2_json()
    box.gpt2_vocab_merges()
    box.put("tokenizer_config.json", {"model_max_length": box.size.n_positions})
    generation(box, _from_model_config=True, bos_token_id=box.size.eot, eos_token_id=box.size.eot)


@kind(special="Hello, you?<|endoftext|>", occur=("eot",))
def dialogpt_half_with_head(box: Box) -> None:
    """microsoft/DialoGPT-small and its fine-tunes: float16, masks in float16, the head stored beside the table"""
    box.write_config(torch_dtype=DROP, transformers_version=DROP, n_inner=DROP)
    weights = in_type(torch.float16, box.weights() | box.masks(torch.float16))
    box.safetensors(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, keep=True)
    box.gpt2_vocab_merges()
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    box.put("tokenizer_config.json", {"model_max_length": 1024, "chat_template": template})
    generation(box, max_length=1000, bos_token_id=box.size.eot, eos_token_id=box.size.eot)


@kind(special="Hello, you?<|endoftext|>")
def dialogpt_old_torch_format(box: Box) -> None:
    """microsoft/DialoGPT-medium, -large and hundreds of bots: pytorch_model.bin in torch's old format, tied tensors"""
    box.write_config(torch_dtype=DROP, transformers_version=DROP, n_inner=DROP)
    weights = in_type(torch.float16, box.weights() | box.masks(torch.uint8))
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # the same storage, as torch.save finds it
    box.bin(weights, legacy=True)
    box.gpt2_vocab_merges()
    box.put("tokenizer_config.json", {"model_max_length": 1024})


@kind()
def torch_zip_tied(box: Box) -> None:
    """Trainer outputs before safetensors: pytorch_model.bin of model.state_dict(), with its metadata, head and table
    in one storage, masks of bool"""
    weights = fine_tune(box) | box.masks(torch.bool)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    states = OrderedDict(weights)
    states._metadata = OrderedDict({"": {"version": 1}, "transformer": {"version": 1}})  # type: ignore[attr-defined]
    box.bin(states)


@kind()
def torch_parameters(box: Box) -> None:
    """Files of own training loops: a plain dict of nn.Parameter, bfloat16, stored from a GPU"""
    weights = in_type(torch.bfloat16, fine_tune(box))
    tagged = torch.serialization.location_tag
    torch.serialization.location_tag = lambda _: "cuda:0"
    try:
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in weights.items()}
        torch.save(parameters, box.folder / "pytorch_model.bin")
    finally:
        torch.serialization.location_tag = tagged


@kind()
def torch_views_of_one_storage(box: Box) -> None:
    """DeepSpeed and FSDP exports: all tensors are views of one flat storage, and some are transposed"""
    weights = fine_tune(box)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views, begin = {}, 0
    for name, tensor in weights.items():
        views[name] = flat[begin : begin + tensor.numel()].view(tensor.shape)
        begin += tensor.numel()
    for name in [name for name in views if name.endswith("c_attn.weight")]:
        views[name] = views[name].t().contiguous().t()
    box.bin(views)


@kind(occur=("eot",))
def cerebras_torch_shards(box: Box) -> None:
    """cerebras/Cerebras-GPT-2.7B and larger: shards of .bin with bare names, gelu, n_inner, twice the positions"""
    box.write_config(
        activation_function="gelu", architectures=["GPT2Model"], n_ctx=DROP, n_inner=3 * box.size.n_embd,
        n_positions=2 * box.size.n_positions, scale_attn_weights=True,
    )  # fmt: skip
    weights = bare(box.weights())
    where: dict[str, str] = {}
    names = sorted(weights)
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{n:05d}-of-00002.bin"
        box.bin({name: weights[name] for name in part}, file)
        where |= dict.fromkeys(part, file)
    box.put("pytorch_model.bin.index.json", {"metadata": {"total_size": 1}, "weight_map": where})
    box.gpt2_json()


@kind()
def mistral_crfm(box: Box) -> None:
    """stanford-crfm/alias-gpt2-small-x21 and its siblings: float16, uint8 masks, scores scaled by layer and upcast"""
    box.write_config(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, transformers_version="4.12.5")
    box.bin(in_type(torch.float16, box.weights()) | box.masks(torch.uint8))
    box.gpt2_vocab_merges()


@kind(small=False)
def bfloat16_file(box: Box) -> None:
    """Fine-tunes saved in bfloat16"""
    box.safetensors(in_type(torch.bfloat16, fine_tune(box, dtype="bfloat16", torch_dtype=DROP)), keep=True)


@kind()
def float64_file(box: Box) -> None:
    """Models trained in double precision (small research models, models made by numpy)"""
    box.safetensors(in_type(torch.float64, fine_tune(box, torch_dtype="float64")), keep=True)


@kind(small=False)
def float64_torch(box: Box) -> None:
    """The same as pytorch_model.bin"""
    box.bin(in_type(torch.float64, fine_tune(box, torch_dtype="float64")))


@kind()
def mixed_types(box: Box) -> None:
    """Files of which some tensors are float32 and others bfloat16 or float16"""
    types = (torch.float32, torch.bfloat16, torch.float16)
    weights = {name: t.to(types[n % 3]) for n, (name, t) in enumerate(sorted(fine_tune(box).items()))}
    box.safetensors(weights, keep=True)


@kind()
def compiled_prefix(box: Box) -> None:
    """Checkpoints of torch.compile(model).state_dict(): every name begins with _orig_mod."""
    weights = fine_tune(box)
    box.twin().safetensors(weights)
    box.safetensors(prefixed("_orig_mod.", weights))


@kind()
def parallel_prefix(box: Box) -> None:
    """Checkpoints of DataParallel and DistributedDataParallel: every name begins with module."""
    weights = fine_tune(box)
    box.twin().bin(weights)
    box.bin(prefixed("module.", weights | {"lm_head.weight": weights["transformer.wte.weight"]}))


@kind(small=False)
def both_prefixes(box: Box) -> None:
    """Checkpoints of torch.compile around DistributedDataParallel: module._orig_mod."""
    weights = fine_tune(box)
    box.twin().bin(weights)
    box.bin(prefixed("module._orig_mod.", weights))


@kind()
def peft_prefix(box: Box) -> None:
    """Merged PEFT models saved with their wrapper: every name begins with base_model.model."""
    weights = fine_tune(box)
    box.twin().safetensors(weights)
    box.safetensors(prefixed("base_model.model.", weights))


@kind(occur=("eot",))
def untied_head(box: Box) -> None:
    """Models with tie_word_embeddings false and a head of their own"""
    box.safetensors(fine_tune(box, tie_word_embeddings=False))


@kind()
def head_differs_from_table(box: Box) -> None:
    """Fine-tunes whose stored head differs from the table although config.json says nothing of it"""
    weights = fine_tune(box)
    head = torch.randn(weights["transformer.wte.weight"].shape, generator=torch.Generator().manual_seed(box.seed + 99))
    box.safetensors(weights | {"lm_head.weight": (0.6 * head).half().float()})


@kind(small=False)
def head_differs_torch(box: Box) -> None:
    """The same as pytorch_model.bin"""
    weights = fine_tune(box)
    head = torch.randn(weights["transformer.wte.weight"].shape, generator=torch.Generator().manual_seed(box.seed + 99))
    box.bin(weights | {"lm_head.weight": (0.6 * head).half().float()})


@kind()
def head_without_table(box: Box) -> None:
    """Files of safetensors.torch.save_model: lm_head.weight, and no wte.weight"""
    weights = fine_tune(box)
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    box.safetensors(weights, metadata={"transformer.wte.weight": "lm_head.weight"})


@kind(notes=("lm_head.bias",))
def head_bias(box: Box) -> None:
    """Models with lm_head.bias, of exports from other code; transformers does not use it"""
    bias = torch.randn(box.size.eot + 1, generator=torch.Generator().manual_seed(5))
    box.safetensors(fine_tune(box) | {"lm_head.bias": bias})


@kind(notes=("multiple_choice_head",))
def double_heads(box: Box) -> None:
    """GPT2DoubleHeadsModel: a head for multiple choice beside the one for text (transfer-learning-conv-ai-like)"""
    weights = fine_tune(box, architectures=["GPT2DoubleHeadsModel"])
    head = {"multiple_choice_head.summary.weight": torch.zeros(1, box.size.n_embd)}
    box.safetensors(weights | head | {"multiple_choice_head.summary.bias": torch.zeros(1)})


@kind(notes=("v_head",))
def value_head(box: Box) -> None:
    """lvwerra/gpt2-imdb-pos-v2 and other models of TRL's PPO: v_head.summary.*"""
    weights = fine_tune(box, architectures=["GPT2HeadWithValueModel"])
    weights |= {"v_head.summary.weight": torch.ones(1, box.size.n_embd), "v_head.summary.bias": torch.ones(1)}
    box.bin(weights)


@kind(notes=("score.weight",))
def score_on_a_causal_model(box: Box) -> None:
    """Reward models saved over a language model: score.weight under architectures GPT2LMHeadModel"""
    box.safetensors(fine_tune(box) | {"score.weight": torch.ones(1, box.size.n_embd)})


@kind()
def masks_not_in_the_index(box: Box) -> None:
    """Shards whose index does not list the masks, as conversions of old repositories write them"""
    weights = fine_tune(box)
    where: dict[str, str] = {}
    names = sorted(weights)
    masks = list(box.masks(torch.uint8).items())
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        box.safetensors({name: weights[name] for name in part} | dict(masks[n - 1 :: 2]), file)
        where |= dict.fromkeys(part, file)
    box.put("model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": where})


@kind(small=False)
def safetensors_beside_torch(box: Box) -> None:
    """Repositories with both files, of which the .bin is older: model.safetensors counts"""
    weights = fine_tune(box)
    box.safetensors(weights)
    box.bin({name: tensor * 0.5 for name, tensor in weights.items()})
    box.put("training_args.bin", b"never read")
    box.put("tf_model.h5", b"never read")


@kind()
def cross_attention(box: Box) -> None:
    """Decoders of encoder-decoder models (image captioning): cross attention, to which nothing is given"""
    box.safetensors(fine_tune(box, add_cross_attention=True, is_decoder=True))


@kind()
def no_metadata(box: Box) -> None:
    """safetensors files without metadata, written by other tools than transformers"""
    box.safetensors(fine_tune(box), metadata=None)


@kind(small=False)
def stray_tensors(box: Box) -> None:
    """Files with tensors that no GPT-2 has (EMA copies, counters)"""
    stray = {"step": torch.tensor(7), "ema.decay": torch.ones(3), "transformer.rotary.inv_freq": torch.ones(4)}
    box.safetensors(fine_tune(box) | stray)


@kind(small=False)
def more_layers_than_config(box: Box) -> None:
    """Files with more layers than config.json says, of which transformers uses the first"""
    box.write_config(n_layer=box.size.n_layer + 1)
    weights = box.weights()
    box.write_config()
    box.gpt2_json()
    box.safetensors(weights)


@kind(small=False)
def index_lists_too_much(box: Box) -> None:
    """An index that lists masks which no shard holds any more"""
    weights = fine_tune(box)
    names, where = sorted(weights), dict.fromkeys(box.masks(torch.uint8), "model-00001-of-00002.safetensors")
    for n, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        box.safetensors({name: weights[name] for name in part}, file)
        where |= dict.fromkeys(part, file)
    box.put("model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": where})


@kind(small=False)
def metadata_of_mlx(box: Box) -> None:
    """safetensors files whose metadata name another framework"""
    box.safetensors(fine_tune(box), metadata="mlx")


@kind(small=False)
def crossed_prefixes(box: Box) -> None:
    """The base model's names with a prefix of torch.compile: _orig_mod.h.0..."""
    weights = fine_tune(box)
    box.twin().safetensors(weights)
    box.safetensors(prefixed("_orig_mod.", bare(weights)))


@kind(small=False)
def head_of_half_precision(box: Box) -> None:
    """A stored head that is the table, rounded"""
    weights = fine_tune(box)
    box.safetensors(weights | {"lm_head.weight": weights["transformer.wte.weight"].bfloat16()}, keep=True)


# ---------------------------------------------------------------------------------------------- nanoGPT


def nanogpt(box: Box, *, bias: bool, prefix: str = "", legacy: bool = False) -> None:
    """Write nanoGPT's ckpt.pt, and a twin that transformers reads."""
    size = box.size
    # nanoGPT computes the exact GELU, also of GPT-2's own weights.
    box.write_config(vocab_size=size.eot + 48, n_ctx=DROP, activation_function="gelu")
    weights = box.weights()
    if not bias:
        weights = {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in weights.items()}
    twin = box.twin()
    twin.safetensors(weights)
    twin.gpt2_json()
    (box.folder / "config.json").unlink()
    own = {n: t.t().contiguous() if ".c_" in n and n.endswith("weight") else t for n, t in weights.items()}
    own = {n: t for n, t in own.items() if bias or not n.endswith("bias")}
    own["lm_head.weight"] = own["transformer.wte.weight"]
    arguments = {
        "n_layer": size.n_layer, "n_head": size.n_head, "n_embd": size.n_embd, "block_size": size.n_positions,
        "bias": bias, "vocab_size": size.eot + 48, "dropout": 0.0,
    }  # fmt: skip
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4, 4)}}
    optimizer = {"state": state, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "fused": True, "params": [0]}]}
    whole = {
        "model": OrderedDict(prefixed(prefix, own)), "optimizer": optimizer, "model_args": arguments, "iter_num": 2000,
        "best_val_loss": torch.tensor(3.2), "config": {"dataset": "openwebtext", "compile": True, "device": "cuda"},
    }  # fmt: skip
    torch.save(whole, box.folder / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    box.gpt2_json()


@kind()
def nanogpt_with_bias(box: Box) -> None:
    """nanoGPT's ckpt.pt with the tokenizer's file beside it"""
    nanogpt(box, bias=True)


@kind()
def nanogpt_compiled_without_bias(box: Box) -> None:
    """nanoGPT's ckpt.pt of a compiled model without biases"""
    nanogpt(box, bias=False, prefix="_orig_mod.")


# ---------------------------------------------------------------------------------------------- config.json


@kind(small=False)
def positions_by_n_ctx(box: Box) -> None:
    """Old config.json with n_ctx and no n_positions"""
    box.safetensors(fine_tune(box, n_positions=DROP, n_ctx=1024))


@kind()
def positions_512(box: Box) -> None:
    """Models of few positions, whose n_ctx says something else"""
    box.safetensors(fine_tune(box, n_positions=box.size.n_positions - 6, n_ctx=box.size.n_positions))


@kind()
def relu_and_inner(box: Box) -> None:
    """Models from scratch with relu, an odd n_inner and another epsilon"""
    box.safetensors(
        fine_tune(box, activation_function="relu", n_inner=box.size.n_embd + 5, layer_norm_epsilon=1e-6, n_ctx=DROP)
    )


@kind(small=False)
def exact_gelu(box: Box) -> None:
    """codeparrot/codeparrot: gelu, scores scaled by layer and upcast, vocab of its own"""
    box.write_config(
        activation_function="gelu", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True, n_inner=DROP
    )
    box.safetensors()
    box.gpt2_json()


@kind(small=False)
def other_names_of_fields(box: Box) -> None:
    """config.json with hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings"""
    size = box.size
    weights = fine_tune(box)
    fields = {k: v for k, v in box.config.items() if k not in ("n_embd", "n_layer", "n_head", "n_positions", "n_ctx")}
    fields |= {"hidden_size": size.n_embd, "num_hidden_layers": size.n_layer, "num_attention_heads": size.n_head}
    box.put("config.json", fields | {"max_position_embeddings": size.n_positions})
    box.safetensors(weights)


@kind(occur=("eot",))
def no_end_of_text(box: Box) -> None:
    """config.json with eos_token_id null: nothing ends a text"""
    box.safetensors(fine_tune(box, bos_token_id=None, eos_token_id=None))


@kind(occur=("eot", 7))
def end_ids_in_config(box: Box) -> None:
    """config.json with a list of end-of-text ids"""
    box.safetensors(fine_tune(box, eos_token_id=[box.size.eot, 7]))


@kind()
def end_id_outside_the_vocabulary(box: Box) -> None:
    """Models from scratch with a vocabulary of their own that kept GPT-2's 50256 as the end of a text"""
    box.write_config(vocab_size=box.size.trained_tokens, bos_token_id=50256 + 1, eos_token_id=50256 + 1)
    box.json_of(box.byte_level("es", ["<s>", "</s>"]))
    box.safetensors()


@kind()
def old_fields_of_generation(box: Box) -> None:
    """LorenzoDeMattei/GePpeTto, antoinelouis/belgpt2: config.json of 2020 with every field of generation"""
    box.safetensors(fine_tune(box, torch_dtype=DROP, transformers_version=DROP, **OLD_FIELDS))


@kind(notes=("do_sample",))
def old_fields_that_change_the_text(box: Box) -> None:
    """config.json of 2020 to 2022 with a repetition penalty, sampling and beams"""
    old = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": True, "top_p": 0.9, "min_length": 3}
    box.safetensors(fine_tune(box, **(OLD_FIELDS | old)))


@kind(small=False)
def padded_table(box: Box) -> None:
    """Models with a table filled up to a multiple of 64: some ids have no token, and are generated"""
    box.write_config(vocab_size=box.size.eot + 48)
    box.gpt2_json()
    box.safetensors()


@kind(occur=("eot+20", "eot+3"))
def ids_without_tokens(box: Box) -> None:
    """The same, where such ids come up in the text"""
    box.write_config(vocab_size=box.size.eot + 48)
    box.gpt2_json()
    box.safetensors()


@kind(notes=("[PAD]",), special="Hello")
def token_without_a_row(box: Box) -> None:
    """Fine-tunes that added [PAD] to the tokenizer and did not resize the table"""
    box.write_config()
    box.safetensors()
    box.gpt2_json(token_entry(box.size.eot + 1, "[PAD]"))
    box.put("special_tokens_map.json", {"pad_token": "[PAD]"})
    box.put("tokenizer_config.json", {"pad_token": "[PAD]", "tokenizer_class": "GPT2Tokenizer"})


# ---------------------------------------------------------------------------------------------- generation_config.json


@kind(special=CHATML, occur=("eot+2", "eot"))
def end_ids_in_generation_config(box: Box) -> None:
    """Chat fine-tunes whose generation_config.json has other end-of-text ids than config.json"""
    eot = box.size.eot
    box.write_config(vocab_size=eot + 3)
    box.safetensors()
    box.gpt2_json(token_entry(eot + 1, "<|im_start|>"), token_entry(eot + 2, "<|im_end|>"))
    box.put("tokenizer_config.json", {"eos_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"})
    generation(box, bos_token_id=eot + 1, eos_token_id=[eot + 2, eot], pad_token_id=eot + 2)


@kind(occur=("eot",))
def no_end_in_generation_config(box: Box) -> None:
    """generation_config.json without an end of text, where config.json has one"""
    box.safetensors(fine_tune(box))
    generation(box, bos_token_id=box.size.eot, max_length=30)


@kind(notes=("do_sample",))
def repetition_penalty(box: Box) -> None:
    """nicholasKluge/Aira-2-124M and others: a repetition penalty in generation_config.json, and sampling"""
    box.safetensors(fine_tune(box))
    generation(
        box, bos_token_id=box.size.eot, eos_token_id=box.size.eot, do_sample=True, max_new_tokens=512,
        renormalize_logits=True, repetition_penalty=1.2, temperature=0.3, top_k=30, top_p=0.3,
    )  # fmt: skip


@kind(notes=("num_beams",))
def beams(box: Box) -> None:
    """Fine-tunes that search beams: num_beams and early_stopping in generation_config.json"""
    box.safetensors(fine_tune(box))
    generation(box, bos_token_id=box.size.eot, eos_token_id=box.size.eot, num_beams=4, early_stopping=True)


@kind(notes=("begin_suppress_tokens", "forced_eos_token_id"))
def rules_for_tokens(box: Box) -> None:
    """generation_config.json with n-grams not to repeat, a least length, suppressed and forced tokens, bad words"""
    box.safetensors(fine_tune(box))
    generation(
        box, bos_token_id=box.size.eot, eos_token_id=box.size.eot, no_repeat_ngram_size=2, min_length=5, max_length=40,
        suppress_tokens=[11, 13], begin_suppress_tokens=[220], forced_eos_token_id=box.size.eot, bad_words_ids=[[12]],
    )  # fmt: skip


@kind(small=False)
def sampling_only(box: Box) -> None:
    """generation_config.json with settings that only sampling uses"""
    box.safetensors(fine_tune(box))
    generation(box, eos_token_id=box.size.eot, do_sample=True, temperature=0.7, top_k=40, top_p=0.9, typical_p=0.9)


assert FULL.n_positions == 1024  # positions_by_n_ctx relies on transformers' default
