# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The kinds of the zoo that differ in a byte-level tokenizer. See make_zoo.py.

Each function builds the folder of one kind; its docstring names public repositories that look so.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from zoo_pieces import DROP, END_OF_TEXT, EOT_MAP, S_MAP, Box, Json, corpus, kind, model_of, token_entry

ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def added(content: str, **flags: bool) -> Json:
    """Return an added token as tokenizer_config.json has it since transformers 4.34."""
    common = {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {**common, "special": True, **flags}


def old_added(content: str) -> Json:
    """Return an added token as tokenizer_config.json had it before."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags}


@kind("ru", special="<s>Старик</s><pad>", occur=(2, 5))
def rugpt3(box: Box) -> None:
    """ai-forever/rugpt3small/medium/large_based_on_gpt2: vocab.json and merges.txt, table larger than the tokenizer"""
    tokenizer = box.byte_level("ru", ["<pad>", "<s>", "</s>", "<unk>", "<mask>", END_OF_TEXT])
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size() + 7, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    box.put("special_tokens_map.json", {**S_MAP, "mask_token": "<mask>"})
    config = {**S_MAP, "mask_token": "<mask>", "add_prefix_space": False, "errors": "replace", "padding_side": "left"}
    box.put("tokenizer_config.json", {**config, "tokenizer_class": "GPT2Tokenizer", "truncation_side": "left"})


@kind("fr", special="<s>Où est</s>", occur=(2, 0))
def special_tokens_map_only(box: Box) -> None:
    """asi/gpt-fr-cased-small: vocab.json, merges.txt, and special_tokens_map.json alone names the special tokens"""
    tokenizer = box.byte_level("fr", ["<s>", "<pad>", "</s>", "<unk>"])
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2, pad_token_id=1, architectures=DROP)
    box.put("special_tokens_map.json", S_MAP)


@kind("it", special="<s>Perché</s><|endoftext|>", occur=(0,))
def transformers_2_config(box: Box) -> None:
    """GroNLP/gpt2-small-italian, datificate/gpt2-small-spanish: tokenizer_config.json of transformers 2 and 3"""
    tokenizer = box.byte_level("it", [END_OF_TEXT])
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    box.put("special_tokens_map.json", EOT_MAP)
    box.put("tokenizer_config.json", {"max_len": 1024, "special_tokens_map_file": None, "full_tokenizer_file": None})


@kind("id", special="<s>Orang</s><|endoftext|>", occur=(0,))
def empty_tokenizer_config(box: Box) -> None:
    """cahya/gpt2-small-indonesian-522M, flax-community/gpt2-small-indonesian: tokenizer.json, no class is named"""
    tokenizer = box.byte_level("id", [END_OF_TEXT, "<s>", "<pad>", "</s>"])
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)
    box.put("tokenizer_config.json", {})


@kind("ar", special="<s>جلس</s><|endoftext|>")
def aragpt2(box: Box) -> None:
    """aubmindlab/aragpt2-base, -medium: tokenizer.json beside vocab.json and merges.txt, other classes of names"""
    tokenizer = box.byte_level("ar", ["<s>", "<pad>", "</s>", "<unk>", "<mask>", END_OF_TEXT])
    box.json_of(tokenizer)
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=5, eos_token_id=5)
    box.put("special_tokens_map.json", EOT_MAP)
    box.put("tokenizer_config.json", {**EOT_MAP, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"})


@kind("protein", special="<|endoftext|>MKT<|endoftext|>", occur=(0,))
def protgpt2(box: Box) -> None:
    """nferruz/ProtGPT2: a byte-level BPE of proteins, with line breaks in its texts"""
    tokenizer = box.byte_level("protein", [END_OF_TEXT])
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)
    box.put("special_tokens_map.json", EOT_MAP)
    box.put("tokenizer_config.json", {**EOT_MAP, "name_or_path": "gpt2", "tokenizer_class": "GPT2Tokenizer"})


@kind("python", special="<s>def<EOL>  <NUM_LIT><pad></s>", occur=("eot+4", "eot+1"))
def codegpt(box: Box) -> None:
    """microsoft/CodeGPT-small-py-adaptedGPT2: added_tokens.json with special and other tokens, table resized"""
    eot = box.size.eot
    box.gpt2_vocab_merges()
    box.put("added_tokens.json", {"<s>": eot + 1, "</s>": eot + 2, "<pad>": eot + 3, "<EOL>": eot + 4,
                                  "<NUM_LIT>": eot + 5, "<unk>": eot + 6})  # fmt: skip
    box.put("special_tokens_map.json", {**S_MAP, "additional_special_tokens": ["<NUM_LIT>"]})
    box.put("tokenizer_config.json", {"do_lower_case": False, "max_len": 1024})
    model_of(box, eot + 7, bos_token_id=eot + 1, eos_token_id=eot + 2)


@kind(special="<|startoftext|><|User|> Hi<|pad|>", occur=("eot+3", "eot"))
def added_tokens_without_json(box: Box) -> None:
    """pranavpsv/gpt2-genre-story-generator, Ar4ikov's prompt generators: vocab.json, merges.txt, added_tokens.json"""
    eot = box.size.eot
    box.gpt2_vocab_merges()
    box.put("added_tokens.json", {"<|startoftext|>": eot + 1, "<|pad|>": eot + 2, "<|User|>": eot + 3})
    box.put("special_tokens_map.json", {
        "additional_special_tokens": ["<|User|>"], "bos_token": old_added("<|startoftext|>"),
        "eos_token": old_added(END_OF_TEXT), "pad_token": "<|pad|>", "unk_token": old_added(END_OF_TEXT),
    })  # fmt: skip
    box.put("tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": old_added("<|startoftext|>"),
        "eos_token": old_added(END_OF_TEXT), "errors": "replace", "pad_token": "<|pad|>",
        "tokenizer_class": "GPT2Tokenizer", "unk_token": old_added(END_OF_TEXT),
    })  # fmt: skip
    model_of(box, eot + 4)


@kind(special="<s>### Say</s><pad>", occur=("eot+2", "eot+3"))
def added_tokens_in_json(box: Box) -> None:
    """vicgalle/gpt2-alpaca: added tokens in tokenizer.json, table resized, files that contradict each other"""
    eot = box.size.eot
    box.gpt2_json(token_entry(eot + 1, "<pad>"), token_entry(eot + 2, "</s>"), token_entry(eot + 3, "<s>"))
    box.gpt2_vocab_merges()
    box.put("added_tokens.json", {"<pad>": eot + 1, "</s>": eot + 2, "<s>": eot + 3})
    box.put("special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    box.put("tokenizer_config.json", {**EOT_MAP, "model_max_length": 512, "tokenizer_class": "GPT2Tokenizer"})
    model_of(box, eot + 4)


@kind(special="Hello[PAD][PAD]", occur=("eot+1",))
def pad_outside_json(box: Box) -> None:
    """[PAD] in special_tokens_map.json and added_tokens.json, not in tokenizer.json; table resized"""
    box.gpt2_json()
    box.put("special_tokens_map.json", {**EOT_MAP, "pad_token": "[PAD]"})
    box.put("added_tokens.json", {"[PAD]": box.size.eot + 1})
    box.put("tokenizer_config.json", {**EOT_MAP, "pad_token": "[PAD]", "tokenizer_class": "GPT2Tokenizer"})
    model_of(box, box.size.eot + 2)


@kind(special="a  <name>  b <TAG> c<sep>x", occur=("eot+1", "eot+2", "eot+3"))
def added_tokens_decoder(box: Box) -> None:
    """Fine-tunes saved by transformers 4.34 and later: added_tokens_decoder with tokens that are stripped or plain"""
    eot = box.size.eot
    box.gpt2_vocab_merges()
    box.put("tokenizer_config.json", {
        **EOT_MAP, "add_prefix_space": False, "clean_up_tokenization_spaces": True, "tokenizer_class": "GPT2Tokenizer",
        "added_tokens_decoder": {
            str(eot): added(END_OF_TEXT, normalized=True),
            str(eot + 1): added("<name>", special=False, lstrip=True, rstrip=True),
            str(eot + 2): added("<TAG>", special=False, normalized=True),
            str(eot + 3): added("<sep>", lstrip=True),
        },
        "additional_special_tokens": ["<sep>"],
    })  # fmt: skip
    model_of(box, eot + 4)


@kind(special="<|im_start|>user<|im_end|>", occur=("eot+1", "eot+2"))
def transformers_5_config(box: Box) -> None:
    """Models saved by transformers 5: extra_special_tokens, backend, class TokenizersBackend"""
    eot = box.size.eot
    box.gpt2_json(token_entry(eot + 1, "<|im_start|>"), token_entry(eot + 2, "<|im_end|>", special=False))
    box.put("tokenizer_config.json", {
        "add_prefix_space": False, "backend": "tokenizers", "bos_token": END_OF_TEXT, "eos_token": "<|im_end|>",
        "errors": "replace", "extra_special_tokens": ["<|im_start|>"], "is_local": False, "model_max_length": 1024,
        "pad_token": None, "tokenizer_class": "TokenizersBackend", "unk_token": END_OF_TEXT,
    })  # fmt: skip
    model_of(box, eot + 3, dtype="float32", torch_dtype=DROP, eos_token_id=eot + 2)


@kind(special="<|image|>Hi", small=False)
def extra_special_tokens_by_name(box: Box) -> None:
    """tokenizer_config.json with extra_special_tokens as a dictionary (transformers 4.47 to 4.57)"""
    eot = box.size.eot
    box.gpt2_json(token_entry(eot + 1, "<|image|>"))
    box.put("tokenizer_config.json", {**EOT_MAP, "extra_special_tokens": {"image_token": "<|image|>"},
                                      "image_token": "<|image|>", "tokenizer_class": "GPT2Tokenizer"})  # fmt: skip
    model_of(box, eot + 2)


@kind()
def add_bos(box: Box) -> None:
    """Fine-tunes with add_bos_token true in tokenizer_config.json, of vocab.json and merges.txt"""
    box.gpt2_vocab_merges()
    token = old_added(END_OF_TEXT)
    config = {"add_bos_token": True, "add_prefix_space": False, "bos_token": token, "eos_token": token}
    box.put("tokenizer_config.json", {**config, "tokenizer_class": "GPT2Tokenizer", "unk_token": token})
    model_of(box, box.size.eot + 1)


@kind()
def add_bos_and_eos(box: Box) -> None:
    """The same with add_eos_token too, and a tokenizer.json that adds nothing"""
    box.gpt2_json()
    config = {**EOT_MAP, "add_bos_token": True, "add_eos_token": True, "tokenizer_class": "GPT2TokenizerFast"}
    box.put("tokenizer_config.json", config)
    model_of(box, box.size.eot + 1)


@kind("pt", special="<s>A criança</s>", occur=(2,))
def template_adds_bos(box: Box) -> None:
    """GPT-2s from scratch whose tokenizer.json adds <s> by a template, and normalizes"""
    tokenizer = box.byte_level("pt", ROBERTA)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2, pad_token_id=1)
    box.put("tokenizer_config.json", {**S_MAP, "mask_token": "<mask>", "tokenizer_class": "PreTrainedTokenizerFast"})


@kind("pt", special="<s>A criança</s>")
def template_under_the_class_of_gpt2(box: Box) -> None:
    """The same under tokenizer_class GPT2Tokenizer, with which transformers 5 rebuilds parts of the tokenizer"""
    tokenizer = box.byte_level("pt", ROBERTA)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2, pad_token_id=1)
    box.put("tokenizer_config.json", {**S_MAP, "tokenizer_class": "GPT2TokenizerFast"})


@kind("es", special="<s>El niño</s>")
def roberta_class(box: Box) -> None:
    """PlanTL-GOB-ES/gpt2-base-bne-like: vocab.json and merges.txt under RobertaTokenizer, which adds <s> and </s>"""
    tokenizer = box.byte_level("es", ROBERTA)
    box.vocab_merges_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2)
    box.put("tokenizer_config.json", {**S_MAP, "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>",
                                      "add_prefix_space": False, "tokenizer_class": "RobertaTokenizer"})  # fmt: skip


@kind("es")
def prefix_space_in_json(box: Box) -> None:
    """ByteLevelBPETokenizer(add_prefix_space=True) saved as tokenizer.json, no tokenizer_config.json"""
    tokenizer = box.byte_level("es", [END_OF_TEXT], add_prefix_space=True)
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)


@kind("es")
def prefix_space_fast_class(box: Box) -> None:
    """The same under tokenizer_class PreTrainedTokenizerFast"""
    tokenizer = box.byte_level("es", [END_OF_TEXT], add_prefix_space=True)
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)
    box.put("tokenizer_config.json", {**EOT_MAP, "tokenizer_class": "PreTrainedTokenizerFast"})


@kind()
def prefix_space_in_config(box: Box) -> None:
    """tokenizer_config.json with add_prefix_space true, of vocab.json and merges.txt"""
    box.gpt2_vocab_merges()
    box.put("tokenizer_config.json", {**EOT_MAP, "add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"})
    model_of(box, box.size.eot + 1)


@kind("tr")
def digits_and_nfkc(box: Box) -> None:
    """GPT-2s from scratch with digits apart and NFKC in tokenizer.json (PreTrainedTokenizerFast)"""
    tokenizer = box.byte_level("tr", ["<s>", "</s>", "<pad>"])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": True}
    box.put("tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


@kind("tr", small=False)
def llama_3_pattern(box: Box) -> None:
    """GPT-2s with a tokenizer.json like Llama 3's: a pattern of its own, ignore_merges"""
    tokenizer = box.byte_level("tr", ["<|begin_of_text|>", "<|end_of_text|>"])
    pattern = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", 0)]
    )
    whole = json.loads(tokenizer.to_str())
    whole["model"]["ignore_merges"] = True
    box.put("tokenizer.json", whole)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    box.put("tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


@kind(special="<|endoftext|>Hi<tool>")
def split_special_tokens(box: Box) -> None:
    """tokenizer_config.json with split_special_tokens true: names of special tokens in a prompt are text"""
    box.gpt2_json(token_entry(box.size.eot + 1, "<tool>"))
    config = {**EOT_MAP, "split_special_tokens": True, "tokenizer_class": "GPT2Tokenizer"}
    box.put("tokenizer_config.json", config)
    model_of(box, box.size.eot + 2)


@kind(small=False)
def truncation_and_padding_in_json(box: Box) -> None:
    """tokenizer.json saved after training, with truncation to 8 tokens and padding in it"""
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
               "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    box.gpt2_json(truncation=truncation, padding=padding)
    box.put("tokenizer_config.json", {**EOT_MAP, "tokenizer_class": "GPT2Tokenizer"})
    model_of(box, box.size.eot + 1)


@kind(special="[CLS]Hi[SEP]")
def other_class_over_byte_level(box: Box) -> None:
    """GPTNeoXTokenizerFast, Qwen2Tokenizer and others named over a byte-level tokenizer.json"""
    box.gpt2_json(token_entry(box.size.eot + 1, "<|padding|>"))
    config = {**EOT_MAP, "add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    box.put("tokenizer_config.json", config)
    model_of(box, box.size.eot + 2)


@kind(refused=("vocab.json", "merges.txt"), small=False)
def vocab_without_merges(box: Box) -> None:
    """Uploads that forgot merges.txt"""
    box.put("vocab.json", box.gpt2_vocab)
    model_of(box, box.size.eot + 1)


@kind(small=False)
def merges_without_header(box: Box) -> None:
    """merges.txt without the line of its version, and with Windows line ends"""
    box.put("vocab.json", box.gpt2_vocab)
    box.put("merges.txt", "\r\n".join(box.gpt2_merges) + "\r\n")
    model_of(box, box.size.eot + 1)


# ---------------------------------------------------------------------------------------------- odd vocabularies


@kind("vi", special="<unk>lão</s>", occur=(2,))
def bytes_missing(box: Box) -> None:
    """Trained without the alphabet of all bytes (readerbench/RoGPT2-like): bytes that are not there become <unk>"""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(corpus("vi"), trainer)
    box.json_of(tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    box.put("tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=2)


@kind("vi", special="<unk>lão</s>", small=False)
def bytes_missing_without_json(box: Box) -> None:
    """The same as vocab.json and merges.txt, where they are left out"""
    bytes_missing(box)
    whole = json.loads((box.folder / "tokenizer.json").read_text("utf-8"))
    box.vocab_merges_of(Tokenizer.from_str(json.dumps(whole)))
    (box.folder / "tokenizer.json").unlink()
    (box.folder / "tokenizer_config.json").unlink()
    box.put("special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@kind("ko", special="한국 café two words日本", occur=("eot+1", "eot+2", "eot+3", "eot+4"))
def added_words(box: Box) -> None:
    """Vocabularies with words added by tokenizer.add_tokens: other scripts, accents, spaces inside"""
    eot = box.size.eot
    words = ["한국", "café", "two words", "日本 "]
    box.gpt2_json(*(token_entry(eot + n, w, special=False, normalized=True) for n, w in enumerate(words, 1)))
    box.put("tokenizer_config.json", {**EOT_MAP, "tokenizer_class": "GPT2Tokenizer"})
    model_of(box, eot + 5)


@kind("ko", special="한국", occur=("eot+1", "eot+2"), small=False)
def raw_characters_in_the_vocabulary(box: Box) -> None:
    """Byte-level vocabularies extended by hand: tokens of characters that stand for no byte"""
    eot = box.size.eot
    vocab = {**box.gpt2_vocab, "한국": eot + 1, "▁né": eot + 2}
    box.put("vocab.json", vocab)
    box.put("merges.txt", "\n".join(["#version: 0.2", *box.gpt2_merges]) + "\n")
    model_of(box, eot + 3)


@kind(special="<a><b>x", occur=("eot+3", "eot+7"), small=False)
def gap_in_added_tokens(box: Box) -> None:
    """added_tokens.json whose ids leave some out"""
    eot = box.size.eot
    box.gpt2_vocab_merges()
    box.put("added_tokens.json", {"<a>": eot + 3, "<b>": eot + 7})
    model_of(box, eot + 9)


@kind("es", small=False)
def lower_case_in_json(box: Box) -> None:
    """Byte-level tokenizer.json with Lowercase and StripAccents, no class is named"""
    tokenizer = box.byte_level("es", [END_OF_TEXT])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    box.json_of(tokenizer)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0)


def gpt2_files_under(box: Box, name: str, **config: object) -> None:
    box.gpt2_vocab_merges()
    box.put("tokenizer_config.json", {**EOT_MAP, "tokenizer_class": name, **config})
    model_of(box, box.size.eot + 9)


@kind(small=False)
def codegen_class(box: Box) -> None:
    """vocab.json and merges.txt under CodeGenTokenizer"""
    gpt2_files_under(box, "CodeGenTokenizer")


@kind(small=False)
def qwen_class(box: Box) -> None:
    """vocab.json and merges.txt under Qwen2Tokenizer"""
    gpt2_files_under(box, "Qwen2Tokenizer")


@kind(small=False)
def bart_class(box: Box) -> None:
    """vocab.json and merges.txt under BartTokenizer"""
    gpt2_files_under(box, "BartTokenizer", cls_token=END_OF_TEXT, sep_token=END_OF_TEXT, pad_token="<pad>")


@kind(small=False)
def unknown_class(box: Box) -> None:
    """tokenizer.json under a class that transformers does not have"""
    box.gpt2_json()
    box.put("tokenizer_config.json", {**EOT_MAP, "tokenizer_class": "MyOwnTokenizer"})
    model_of(box, box.size.eot + 1)


@kind(refused=("MyOwnTokenizer",), small=False)
def unknown_class_without_json(box: Box) -> None:
    """vocab.json and merges.txt under a class that transformers does not have"""
    gpt2_files_under(box, "MyOwnTokenizer")
