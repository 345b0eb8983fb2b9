# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The kinds of the zoo whose tokenizer is a model of sentencepiece, or needs a program of its own. See make_zoo.py.

Each function builds the folder of one kind; its docstring names public repositories that look so.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from zoo_pieces import END_OF_TEXT, HERE, S_MAP, Box, corpus, kind, model_of
from zoo_words import bert_tokens, llama_like_json


def sentencepiece_model(box: Box, lang: str, vocab_size: int, **options: Any) -> bytes:
    """Train a sentencepiece model on a language and return its file."""
    out = io.BytesIO()
    rules = {} if "normalization_rule_name" in options else box.size.rules
    # The name of the file of rules becomes a part of the model.
    with contextlib.chdir(HERE):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus(lang)), model_writer=out, vocab_size=vocab_size, hard_vocab_limit=False,
            num_threads=1, minloglevel=2, character_coverage=1.0, **rules, **options,
        )  # fmt: skip
    return out.getvalue()


def pieces(model: bytes) -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


@kind("pl", special="<s>Cóż</s>", occur=(2,))
def unigram_json(box: Box) -> None:
    """sdadas/polish-gpt2-small-like: a Unigram in tokenizer.json, with Metaspace"""
    # The tokenizers library trains another Unigram each time.
    model = sentencepiece_model(box, "pl", box.size.trained_tokens, unk_id=0, bos_id=1, eos_id=2, pad_id=3)
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = [(trained.id_to_piece(i), round(trained.get_score(i), 6)) for i in range(trained.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    box.json_of(tokenizer)
    box.put("tokenizer_config.json", {**S_MAP, "tokenizer_class": "PreTrainedTokenizerFast"})
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=1, eos_token_id=2, pad_token_id=3)


RINNA: dict[str, Any] = {
    "pad_id": -1,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "user_defined_symbols": "[PAD],[CLS],[SEP],[MASK]",
}
RINNA_MAP = {**S_MAP, "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


@kind("ja", special="<s>今日は[MASK]</s>", occur=(2, 5))
def rinna(box: Box) -> None:
    """rinna/japanese-gpt2-small, -medium, -xsmall: spiece.model under T5Tokenizer, in lower case, no dummy prefix"""
    model = sentencepiece_model(box, "ja", box.size.trained_tokens, add_dummy_prefix=False, **RINNA)
    box.put("spiece.model", model)
    box.put("special_tokens_map.json", RINNA_MAP)
    box.put("tokenizer_config.json", {**RINNA_MAP, "additional_special_tokens": [], "do_lower_case": True,
                                      "extra_ids": 0, "tokenizer_class": "T5Tokenizer"})  # fmt: skip
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


@kind("ja", special="<s>今日は</s>", occur=(2, 9))
def rinna_1b(box: Box) -> None:
    """rinna/japanese-gpt-1b: spiece.model with byte fallback under T5Tokenizer"""
    tokens = box.size.trained_tokens + 200
    model = sentencepiece_model(box, "ja", tokens, add_dummy_prefix=False, byte_fallback=True, **RINNA)
    box.put("spiece.model", model)
    box.put("tokenizer_config.json", {**RINNA_MAP, "extra_ids": 0, "sp_model_kwargs": {}, "do_lower_case": False,
                                      "additional_special_tokens": [], "tokenizer_class": "T5Tokenizer"})  # fmt: skip
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


@kind("ja", special="<s>今日は</s>", occur=(1,))
def t5_class_in_config_only(box: Box) -> None:
    """abeja/gpt2-large-japanese: spiece.model, and tokenizer_class T5Tokenizer in config.json only"""
    model = sentencepiece_model(box, "ja", box.size.trained_tokens, pad_id=0, eos_id=1, unk_id=2, bos_id=3)
    box.put("spiece.model", model)
    model_of(box, pieces(model) + 100, bos_token_id=3, eos_token_id=1, pad_token_id=0, tokenizer_class="T5Tokenizer")


@kind("ja", special="<s>今日は[SEP]</s>", occur=(2,))
def albert_class(box: Box) -> None:
    """colorfulscoop/gpt2-small-ja: spiece.model under AlbertTokenizer, accents and case kept"""
    model = sentencepiece_model(box, "ja", box.size.trained_tokens, **RINNA)
    box.put("spiece.model", model)
    box.put("tokenizer_config.json", {**RINNA_MAP, "do_lower_case": False, "keep_accents": True, "remove_space": True,
                                      "tokenizer_class": "AlbertTokenizer"})  # fmt: skip
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2, pad_token_id=3)


@kind("ja", special="<s>今日は</s>", occur=(2,))
def reformer_class(box: Box) -> None:
    """nlp-waseda/gpt2-small-japanese: spiece.model under ReformerTokenizer"""
    model = sentencepiece_model(box, "ja", box.size.trained_tokens, unk_id=0, bos_id=1, eos_id=2, pad_id=3)
    box.put("spiece.model", model)
    box.put("tokenizer_config.json", {**S_MAP, "tokenizer_class": "ReformerTokenizer", "additional_special_tokens": []})
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


def class_over_spiece(box: Box, name: str, file: str, lang: str = "pl", **config: Any) -> None:
    """Write a sentencepiece model under a tokenizer's class, as it would have been trained for it."""
    model = sentencepiece_model(box, lang, box.size.trained_tokens, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
                                user_defined_symbols="[CLS],[SEP],[MASK]")  # fmt: skip
    box.put(file, model)
    box.put("tokenizer_config.json", {"tokenizer_class": name, **config})
    model_of(box, pieces(model) + 8, bos_token_id=1, eos_token_id=2)


@kind("pl", special="<s>Cóż</s>", small=False)
def deberta_class(box: Box) -> None:
    """spm.model under DebertaV2Tokenizer"""
    class_over_spiece(box, "DebertaV2Tokenizer", "spm.model", bos_token="[CLS]", eos_token="[SEP]")


@kind("pl", special="<s>Cóż</s>", small=False)
def camembert_class(box: Box) -> None:
    """sentencepiece.bpe.model under CamembertTokenizer"""
    class_over_spiece(box, "CamembertTokenizer", "sentencepiece.bpe.model")


@kind("pl", special="<s>Cóż</s>", small=False)
def xlm_roberta_class(box: Box) -> None:
    """sentencepiece.bpe.model under XLMRobertaTokenizer"""
    class_over_spiece(box, "XLMRobertaTokenizer", "sentencepiece.bpe.model")


@kind("zh", special="<s>今天</s>", small=False)
def xlnet_class(box: Box) -> None:
    """spiece.model under XLNetTokenizer (TsinghuaAI/CPM-Generate in a way that works)"""
    class_over_spiece(box, "XLNetTokenizer", "spiece.model", "zh")


@kind("pl", special="<s>Cóż</s>", small=False)
def big_bird_class(box: Box) -> None:
    """spiece.model under BigBirdTokenizer"""
    class_over_spiece(box, "BigBirdTokenizer", "spiece.model")


@kind("pl", special="<s>Cóż</s>", refused=("BertGenerationTokenizer",), small=False)
def bert_generation_class(box: Box) -> None:
    """spiece.model under BertGenerationTokenizer, which transformers runs by the sentencepiece package"""
    class_over_spiece(box, "BertGenerationTokenizer", "spiece.model")


@kind("pl", special="<s>Cóż</s>", occur=(2,))
def fast_class_over_spiece(box: Box) -> None:
    """tokenizer.model under PreTrainedTokenizerFast, and no tokenizer.json"""
    model = sentencepiece_model(box, "pl", box.size.trained_tokens, model_type="bpe", unk_id=0, bos_id=1, eos_id=2)
    box.put("tokenizer.model", model)
    box.put("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


@kind("fr", special="<s>Où est</s>", occur=(2, 40))
def llama_class(box: Box) -> None:
    """GPT-2s from scratch with Llama's tokenizer.model: BPE, byte fallback, LlamaTokenizer, which adds <s>"""
    tokens = box.size.trained_tokens + 200
    model = sentencepiece_model(box, "fr", tokens, model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2)
    box.put("tokenizer.model", model)
    box.put("tokenizer_config.json", {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
                                      "clean_up_tokenization_spaces": False, "eos_token": "</s>", "legacy": True,
                                      "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"})  # fmt: skip
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


@kind("fr", special="<s>Où est</s>", small=False)
def llama_class_over_json(box: Box) -> None:
    """The same with a tokenizer.json under LlamaTokenizerFast, legacy false"""
    llama_like_json(box)
    box.put("tokenizer_config.json", {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>",
                                      "eos_token": "</s>", "legacy": False, "unk_token": "<unk>",
                                      "tokenizer_class": "LlamaTokenizerFast"})  # fmt: skip


GPT_SW3: dict[str, Any] = {
    "model_type": "bpe", "byte_fallback": True, "pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3,
    "pad_piece": "<pad>", "eos_piece": END_OF_TEXT, "add_dummy_prefix": True, "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity", "user_defined_symbols": ["<|javascript|>", "<|python|>", "  ", "    "],
    "split_digits": True,
}  # fmt: skip


@kind("sv", special="<|endoftext|><s>User: Hej<s>Bot:", occur=(3, 2, 30))
def gpt_sw3(box: Box) -> None:
    """AI-Sweden-Models/gpt-sw3-126m ... 40b: spiece.model (BPE, byte fallback) under GPTSw3Tokenizer, gelu"""
    model = sentencepiece_model(box, "sv", box.size.trained_tokens + 200, **GPT_SW3)
    box.put("spiece.model", model)
    names = {"bos_token": "<s>", "eos_token": END_OF_TEXT, "pad_token": "<pad>", "unk_token": "<unk>"}
    box.put("tokenizer_config.json", {**names, "do_lower_case": False, "keep_accents": False, "remove_space": False,
                                      "sp_model_kwargs": {}, "special_tokens_map_file": None,
                                      "name_or_path": "AI-Sweden-Models/gpt-sw3-126m",
                                      "tokenizer_class": "GPTSw3Tokenizer"})  # fmt: skip
    box.put("special_tokens_map.json", names)
    model_of(box, pieces(model) + 5, activation_function="gelu", bos_token_id=2, eos_token_id=3, pad_token_id=0,
             normalize_attention_scores=True, tokenizer_class="GPTSw3Tokenizer")  # fmt: skip


@kind("pl", special="<s>Cóż</s>", small=False)
def spiece_beside_json(box: Box) -> None:
    """tokenizer.json and spiece.model side by side under T5Tokenizer (saved by a fast class)"""
    unigram_json(box)
    box.put("spiece.model", sentencepiece_model(box, "de", 300))
    box.put("tokenizer_config.json", {**S_MAP, "extra_ids": 0, "tokenizer_class": "T5TokenizerFast"})


@kind("zh", refused=("CpmTokenizer",))
def cpm(box: Box) -> None:
    """TsinghuaAI/CPM-Generate: CpmTokenizer, which needs jieba"""
    class_over_spiece(box, "CpmTokenizer", "spiece.model", "zh")


@kind("ja", refused=("BertJapaneseTokenizer",))
def bert_japanese(box: Box) -> None:
    """Japanese GPT-2s under BertJapaneseTokenizer, which needs MeCab"""
    tokens = bert_tokens()
    box.put("vocab.txt", "\n".join(tokens) + "\n")
    box.put("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab",
                                      "subword_tokenizer_type": "character"})  # fmt: skip
    model_of(box, len(tokens), bos_token_id=7, eos_token_id=8)


@kind("vi", refused=("PhobertTokenizer",), small=False)
def phobert(box: Box) -> None:
    """Vietnamese GPT-2s under PhobertTokenizer: vocab.txt and bpe.codes"""
    box.put("vocab.txt", "\n".join(f"{w} 1" for w in ("Ông", "lão", "đếm@@", "thuyền")) + "\n")
    box.put("bpe.codes", "l ã 3\nlã o 2\n")
    box.put("tokenizer_config.json", {"tokenizer_class": "PhobertTokenizer"})
    model_of(box, 16, bos_token_id=0, eos_token_id=2)


@kind(refused=("ByT5Tokenizer",), small=False)
def byt5(box: Box) -> None:
    """GPT-2s on bytes under ByT5Tokenizer, which has no files"""
    box.put("tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0})
    model_of(box, 259, bos_token_id=1, eos_token_id=1)


@kind("de", special="<s>Über</s>", small=False)
def case_folding(box: Box) -> None:
    """spiece.model that folds case (nmt_nfkc_cf), with spaces as suffixes left alone, under T5Tokenizer"""
    model = sentencepiece_model(box, "de", box.size.trained_tokens, normalization_rule_name="nmt_nfkc_cf", **RINNA)
    box.put("spiece.model", model)
    box.put("tokenizer_config.json", {**RINNA_MAP, "extra_ids": 0, "tokenizer_class": "T5Tokenizer"})
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)


@kind("fr", special="<s>Où  est</s>", small=False)
def llama_class_unigram(box: Box) -> None:
    """tokenizer.model of a unigram under LlamaTokenizer, spaces kept"""
    options = {"byte_fallback": True, "remove_extra_whitespaces": False, "unk_id": 0, "bos_id": 1, "eos_id": 2}
    model = sentencepiece_model(box, "fr", box.size.trained_tokens + 200, **options)
    box.put("tokenizer.model", model)
    box.put("tokenizer_config.json", {**S_MAP, "tokenizer_class": "LlamaTokenizer", "legacy": False})
    model_of(box, pieces(model) + 4, bos_token_id=1, eos_token_id=2)


@kind("sv", special="<|endoftext|><s>User: Hej<s>Bot:", small=False)
def gpt_sw3_bare(box: Box) -> None:
    """gpt-sw3 with nothing but spiece.model and the class in config.json"""
    gpt_sw3(box)
    (box.folder / "tokenizer_config.json").unlink()
    (box.folder / "special_tokens_map.json").unlink()


@kind("pl", small=False)
def class_of_gpt2_over_spiece(box: Box) -> None:
    """tokenizer.model alone, and no class: transformers finds nothing for GPT2Tokenizer in it"""
    model = sentencepiece_model(box, "pl", box.size.trained_tokens, model_type="bpe", unk_id=0, bos_id=1, eos_id=2)
    box.put("tokenizer.model", model)
    model_of(box, pieces(model), bos_token_id=1, eos_token_id=2)
