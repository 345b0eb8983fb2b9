# ruff: noqa: RUF001
# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call,untyped-decorator"
"""Make `tokenizers/`: small tokenizers of each kind that GPT-2 repositories have, and what transformers makes of them.

    python -m venv oracle && oracle/bin/pip install torch transformers tokenizers sentencepiece
    oracle/bin/python tests/golden/make_tokenizers.py

A folder has the files that a repository of its kind has, weights aside. `answers.json` has some texts and, for each
folder, what `AutoTokenizer` answers. The vocabularies are trained on a few sentences, on one thread, so that the same
versions make the same files.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent / "tokenizers"
END = "<|endoftext|>"

SENTENCES = (
    "The old man sat by the sea and looked at the ships.",
    "What will come of it? he said to himself.",
    "Der alte Mann saß am Meer und sah über die Häuser.",
    "Où est passé l'été? À la forêt, peut-être.",
    "Старик сидел у моря и смотрел на корабли.",
    "今日はとても良い天気ですね。明日も晴れるでしょう。",
    "今天天气很好，我们去公园吧。",
    "안녕하세요. 노인은 바닷가에 앉아 있었다.",
)

TEXTS = (
    "",
    " ",
    "\n",
    "Hello, my name is",
    " leading and trailing ",
    "two  spaces,   three\tand a tab\n\nand lines\r\n",
    "Der alte Mann saß über den Häusern",
    "e\u0301te\u0301 decomposed, été composed, ÉTÉ in capitals",
    "Старик сидел у моря",
    "今日はとても良い天気ですね。",
    "今天天气很好，我们去 公园",
    "안녕하세요",
    "I am happy 😀🎉👍🏽 today",
    "zero\u200bwidth \u00a0 no-break \u3000 wide",
    "half ½, ligature ﬁ, ＷＩＤＥ",
    "digits 12345 and 3.14",
    "don't, we'll, ``quoted'' .",
    f"{END}Once upon{END} a time",
    "<s>He</s> <pad> <unk><mask>",
    "[CLS]he[SEP] [PAD] [UNK] [MASK]",
    "<|user|> hi <|bot|>hi<|bot|>",
    "<extra_id_0> and ▁under",
    "he newword he newwords",
    "<0x0A> <usr>x<sys>",
)


def byte_level(specials: tuple[str, ...] = (END,), **parts: Any) -> Tokenizer:
    """Return a byte-level BPE with some merges; `parts` are parts of the pipeline."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def pieces(**settings: Any) -> bytes:
    """Return a model of sentencepiece. Its normalization is a small one, since a usual one has 240 KB."""
    out = io.BytesIO()
    rules = HERE / "rules.tsv"
    rules.write_text("\n".join(f"{ord(a):X}\t{' '.join(f'{ord(c):X}' for c in b)}" for a, b in RULES.items()))
    defaults = {
        "model_type": "unigram",
        "vocab_size": 260,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        "normalization_rule_tsv": rules.name,
    }
    # The name of the file of rules becomes a part of the model.
    with contextlib.chdir(HERE):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 3), model_writer=out, **{**defaults, **settings}
        )
    rules.unlink()
    return out.getvalue()


RULES = {
    "ﬁ": "fi",
    "Ｗ": "W",
    "Ｉ": "I",
    "Ｄ": "D",
    "Ｅ": "E",
    "½": "1/2",
    "\u3000": " ",
    "\u00a0": " ",
    "\n": " ",
    "\t": " ",
}


def two_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return vocab.json and merges.txt of a BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    return {"vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n"}


def store(name: str, files: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Write a folder; `config` is its tokenizer_config.json."""
    folder = HERE / name
    folder.mkdir()
    files = {"config.json": {"model_type": "gpt2"}, **files}
    if config is not None:
        files["tokenizer_config.json"] = config
    for file, content in files.items():
        if isinstance(content, Tokenizer):
            content = json.loads(content.to_str())
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / file).write_text(text, "utf-8")


def flagged(content: str, **flags: Any) -> dict[str, Any]:
    """Return a token as tokenizer_config.json has it."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def typed(content: str, **flags: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", **flagged(content, **flags)}


def byte_level_kinds() -> None:
    gpt2, other = byte_level(), byte_level(("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    size = gpt2.get_vocab_size()
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    store("gpt2-json", {"tokenizer.json": gpt2})
    store("gpt2-two-files", two_files(gpt2))
    store("gpt2-no-end-of-text", two_files(other))
    store(
        "gpt2-framed",
        two_files(other),
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    store(
        "gpt2-old-files",
        {
            **two_files(gpt2),
            "added_tokens.json": {"<|user|>": size + 1, "<pad>": size, "newword": size + 2},
            "special_tokens_map.json": {
                "bos_token": flagged(END, normalized=True),
                "eos_token": END,
                "pad_token": "<pad>",
                "additional_special_tokens": ["<|user|>", "<|bot|>"],
            },
        },
        {"unk_token": typed(END), "errors": "replace", "tokenizer_class": "GPT2Tokenizer"},
    )
    declared = {
        "0": flagged(END, special=True),
        str(size): flagged("<|user|>", special=True, rstrip=True),
        str(size + 1): flagged("<|bot|>", special=True, lstrip=True),
        str(size + 2): flagged("newword", special=False, single_word=True, normalized=True),
    }
    store("gpt2-declared", {"tokenizer.json": gpt2}, {"added_tokens_decoder": declared, "pad_token": "<|user|>"})
    store(
        "gpt2-five",
        {"tokenizer.json": gpt2},
        {"extra_special_tokens": ["<|user|>", "<|bot|>"], "backend": "tokenizers"},
    )
    spaced = byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    store("gpt2-prefix-in-json-only", {"tokenizer.json": spaced})
    store("gpt2-prefix-in-config", {"tokenizer.json": gpt2}, {"add_prefix_space": True})
    digits = byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        normalizer=normalizers.NFC(),
    )
    store("fast-digits", {"tokenizer.json": digits}, fast)
    store("gpt2-digits", {"tokenizer.json": digits}, {**fast, "tokenizer_class": "GPT2TokenizerFast"})
    store("cohere", two_files(gpt2), {"tokenizer_class": "CohereTokenizer", "eos_token": typed(END, lstrip=True)})
    store("deberta", two_files(other), {"tokenizer_class": "DebertaTokenizer", "cls_token": "<s>", "sep_token": "</s>"})
    store("qwen-3.5", {"tokenizer.json": gpt2}, {"tokenizer_class": "Qwen3_5Tokenizer"})
    store("roberta", two_files(other), {"tokenizer_class": "RobertaTokenizer"})
    store("gpt-neox", {"tokenizer.json": gpt2}, {"tokenizer_class": "GPTNeoXTokenizerFast"})
    store("own-class", {"tokenizer.json": other}, {"tokenizer_class": "OwnTokenizer", "eos_token": "</s>"})


def other_json_kinds() -> None:
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<usr>", "<sys>"]
    korean = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    korean.normalizer, korean.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    korean.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    korean.train_from_iterator(SENTENCES, trainer)
    store("metaspace", {"tokenizer.json": korean}, fast)
    store("metaspace-no-class", {"tokenizer.json": korean})

    # The trainer of the tokenizers library makes another vocabulary each time.
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces(control_symbols="<pad>,<usr>,<sys>"))
    scores = [(processor.id_to_piece(index), processor.get_score(index)) for index in range(len(processor))]
    unigram = Tokenizer(models.Unigram(scores, unk_id=0))
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.add_special_tokens(specials)
    store("unigram", {"tokenizer.json": unigram}, fast)
    store("unigram-no-class", {"tokenizer.json": unigram})
    store("xglm", {"tokenizer.json": unigram}, {"tokenizer_class": "XGLMTokenizer"})
    store("unigram-t5", {"tokenizer.json": unigram}, {"tokenizer_class": "T5TokenizerFast", "extra_ids": 2})

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    llama = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False),
    )
    stored = json.loads(llama.to_str())
    stored["added_tokens"] = stored["added_tokens"][:3]
    store("byte-fallback", {"tokenizer.json": stored}, {**fast, "clean_up_tokenization_spaces": True})
    store("llama-json", {"tokenizer.json": stored}, {**fast, "tokenizer_class": "LlamaTokenizer"})

    words = ["<unk>", "<pad>", "<s>", "</s>", "he", "Hello", ",", "name", "3", ".", "14", "12345"]
    word_level = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    store("word-level", {"tokenizer.json": word_level}, fast)
    characters = ["<unk>", "<pad>", *sorted(set("Hello, my name is 0123456789()[]=#"))]
    by_character = Tokenizer(models.WordLevel({c: index for index, c in enumerate(characters)}, unk_token="<unk>"))
    by_character.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    by_character.decoder = decoders.Fuse()
    by_character.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    store("characters", {"tokenizer.json": by_character}, {"tokenizer_class": "PreTrainedTokenizerFast"})


def bert_kinds() -> None:
    letters = sorted(
        {character for text in (*SENTENCES, "bcfgjkqvxyz0123456789'") for character in text.lower()} - {" "}
    )
    parts = [f"##{letter}" for letter in letters if ord(letter) < 0x500]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *parts, "hello", "name", "##ing", "today", "Der"]
    text = "\n".join(tokens) + "\n"
    marked = text.replace("[UNK]", "<unk>").replace("[CLS]", "<cls>").replace("[SEP]", "<sep>")
    store("funnel", {"vocab.txt": marked}, {"tokenizer_class": "FunnelTokenizer", "clean_text": False})
    store("mpnet", {"vocab.txt": text.replace("[SEP]", "</s>")}, {"tokenizer_class": "MPNetTokenizer"})
    store("splinter", {"vocab.txt": text}, {"tokenizer_class": "SplinterTokenizer", "do_lower_case": False})
    store("bert", {"vocab.txt": text}, {"tokenizer_class": "BertTokenizer"})
    parts_of = {
        part: f"[{part[:-6].upper()}]" for part in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    }
    store(
        "bert-cased",
        {
            "vocab.txt": text,
            "special_tokens_map.json": parts_of,
            "config.json": {"model_type": "gpt2", "tokenizer_class": "BertTokenizer"},
        },
        {
            **parts_of,
            "do_lower_case": False,
            "tokenize_chinese_chars": False,
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|bot|>",
        },
    )
    word_piece = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    word_piece.normalizer, word_piece.decoder = normalizers.BertNormalizer(lowercase=False), decoders.WordPiece()
    word_piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    word_piece.add_special_tokens(tokens[:5])
    store("bert-json", {"tokenizer.json": word_piece}, {"tokenizer_class": "BertTokenizerFast"})
    store("convbert", {"tokenizer.json": word_piece}, {"tokenizer_class": "ConvBertTokenizer", "bos_token": "[CLS]"})
    store("word-piece", {"tokenizer.json": word_piece}, {"tokenizer_class": "PreTrainedTokenizerFast", **parts_of})


def sentencepiece_kinds() -> None:
    rinna = pieces(pad_id=3, unk_id=0, bos_id=1, eos_id=2, pad_piece="[PAD]", control_symbols="[CLS],[SEP],[MASK]")
    parts = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]", "bos_token": "<s>", "cls_token": "[CLS]"}
    store(
        "t5",
        {"spiece.model": rinna},
        {
            **parts,
            "extra_ids": 0,
            "additional_special_tokens": [],
            "do_lower_case": True,
            "tokenizer_class": "T5Tokenizer",
        },
    )
    store("t5-sentinels", {"spiece.model": rinna}, {"tokenizer_class": "T5Tokenizer"})
    small = pieces(unk_id=0, bos_id=1, eos_id=2, pad_id=3, user_defined_symbols="[CLS],[SEP],[MASK]")
    albert = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True, "remove_space": True}
    store("albert", {"spiece.model": small}, {**albert, **parts, "pad_token": "<pad>", "sep_token": "[SEP]"})
    store("xlnet", {"spiece.model": small}, {"tokenizer_class": "XLNetTokenizer"})
    store("xlm-roberta", {"sentencepiece.bpe.model": small}, {"tokenizer_class": "XLMRobertaTokenizer"})
    store("camembert", {"sentencepiece.bpe.model": small}, {"tokenizer_class": "CamembertTokenizer"})
    store("deberta-v2", {"spm.model": small}, {"tokenizer_class": "DebertaV2Tokenizer", "split_by_punct": True})
    bpe = pieces(
        model_type="bpe", vocab_size=520, byte_fallback=True, remove_extra_whitespaces=False, character_coverage=0.98
    )
    store("llama", {"tokenizer.model": bpe}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    store(
        "pieces-bpe",
        {"tokenizer.model": bpe},
        {**fast, "added_tokens_decoder": {"1": flagged("<|user|>", special=True)}},
    )
    store("pieces-unigram", {"tokenizer.model": rinna}, {**fast, "bos_token": "<s>", "add_bos_token": True})
    users = pieces(model_type="bpe", user_defined_symbols="<usr>,new,he", add_dummy_prefix=False)
    store("pieces-of-users", {"tokenizer.model": users}, {**fast, "legacy": False})
    nordic = pieces(
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        eos_piece=END,
        user_defined_symbols="<usr>",
    )
    store("gpt-sw3", {"spiece.model": nordic}, {"tokenizer_class": "GPTSw3Tokenizer"})
    further_sentencepiece_kinds(small, bpe)


def further_sentencepiece_kinds(small: bytes, bpe: bytes) -> None:
    """Make the kinds of classes that few repositories name; `small` is a unigram, `bpe` has a byte fallback."""
    words = pieces(model_type="bpe", vocab_size=220, control_symbols="<usr>", unk_id=0, bos_id=1, eos_id=2, pad_id=3)
    store("reformer", {"spiece.model": words}, {"tokenizer_class": "ReformerTokenizer", "bos_token": "<s>"})
    store("nllb", {"sentencepiece.bpe.model": words}, {"tokenizer_class": "NllbTokenizer", "src_lang": "<usr>"})
    store("big-bird", {"spiece.model": small}, {"tokenizer_class": "BigBirdTokenizer"})
    store("rembert", {"sentencepiece.model": small}, {"tokenizer_class": "RemBertTokenizer", "keep_accents": False})
    store("fnet", {"spiece.model": small}, {"tokenizer_class": "FNetTokenizer"})
    store("videoprism", {"spiece.model": small}, {"tokenizer_class": "VideoPrismTokenizer", "extra_ids": 3})
    store("mbart", {"sentencepiece.bpe.model": small}, {"tokenizer_class": "MBartTokenizer", "src_lang": "de_DE"})
    store("mbart-50", {"sentencepiece.bpe.model": small}, {"tokenizer_class": "MBart50Tokenizer"})
    pegasus = pieces(vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=3)
    store("pegasus", {"spiece.model": pegasus}, {"tokenizer_class": "PegasusTokenizer", "offset": 5})
    store("gemma", {"tokenizer.model": bpe}, {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True})
    store("siglip2", {"tokenizer.model": bpe}, {"tokenizer_class": "Siglip2Tokenizer"})


def answer(folder: Path) -> dict[str, Any]:
    """Return what transformers makes of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "ids": ids,
        "decoded": [tokenizer.decode(one, skip_special_tokens=True) for one in ids],
    }


def main() -> None:
    transformers_logging.set_verbosity_error()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    byte_level_kinds()
    other_json_kinds()
    bert_kinds()
    sentencepiece_kinds()
    answers = {folder.name: answer(folder) for folder in sorted(HERE.iterdir())}
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in answers.items()]
    texts = json.dumps(TEXTS, ensure_ascii=False)
    (HERE / "answers.json").write_text('{"texts": ' + texts + ',\n"kinds": {\n' + ",\n".join(lines) + "\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
