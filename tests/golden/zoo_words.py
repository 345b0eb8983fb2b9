# The oracle libraries are absent from the environment that checks the types, or carry no types themselves.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""The kinds of the zoo whose tokenizer has words, pieces of words, or Metaspace in tokenizer.json. See make_zoo.py.

Each function builds the folder of one kind; its docstring names public repositories that look so.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from zoo_pieces import BERT_MAP, DROP, TEXTS, Box, corpus, kind, model_of


def bert_tokens() -> list[str]:
    """Return a vocabulary as BERT's: single characters, pieces, words, marks of punctuation."""
    characters = sorted({c for lang in ("zh", "ja") for s in TEXTS[lang]["sentences"] for c in s if not c.isspace()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["hello", "name", "my", "is", "the", "old", "man", "happy", "today", "am", "don", "said", "houses", "HELLO"]
    pieces = [f"##{c}" for c in letters] + ["##ing", "##ed", "##s", "##天", "##气"]
    marks = [*".,!?'\"-:;()[]/", "é", "ü", "n't", "'s", "'re", "do", "not"]
    specials = ["[PAD]", *(f"[unused{i}]" for i in range(1, 6)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*specials, *characters, *letters, *pieces, *words, *marks]))


@kind("zh", special="[CLS]今天天气[SEP][MASK]", occur=(8, 6))
def bert_vocab(box: Box) -> None:
    """uer/gpt2-chinese-cluecorpussmall, -poem, -lyric: vocab.txt under BertTokenizer, no end of a text"""
    tokens = bert_tokens()
    box.put("vocab.txt", "\n".join(tokens) + "\n")
    box.put("special_tokens_map.json", BERT_MAP)
    box.put("tokenizer_config.json", {**BERT_MAP, "do_lower_case": False, "model_max_length": 1024,
                                      "strip_accents": None, "tokenize_chinese_chars": True,
                                      "tokenizer_class": "BertTokenizer"})  # fmt: skip
    model_of(box, len(tokens), tokenizer_class="BertTokenizer", bos_token_id=DROP, eos_token_id=DROP, output_past=True)


@kind("zh", special="[CLS]今天[SEP]", occur=(8,))
def bert_class_in_config_only(box: Box) -> None:
    """ckiplab/gpt2-base-chinese, kykim/gpt3-kor-small_based_on_gpt2: vocab.txt, the class only in config.json"""
    tokens = bert_tokens()
    box.put("vocab.txt", "\n".join(tokens) + "\n")
    model_of(box, len(tokens), tokenizer_class="BertTokenizerFast", bos_token_id=7, eos_token_id=8, pad_token_id=0)


@kind("zh", special="[CLS]Hello 今天[SEP]", occur=(8,))
def bert_lower_case(box: Box) -> None:
    """IDEA-CCNL/Yuyuan-GPT2, vocab.txt under BertTokenizer in lower case, with other names of special tokens"""
    tokens = bert_tokens()
    box.put("vocab.txt", "\n".join(tokens) + "\n")
    box.put("tokenizer_config.json", {**BERT_MAP, "bos_token": "[CLS]", "eos_token": "[SEP]", "do_lower_case": True,
                                      "tokenizer_class": "BertTokenizer"})  # fmt: skip
    model_of(box, len(tokens), bos_token_id=7, eos_token_id=8, pad_token_id=0)


def wordpiece(lower: bool) -> Tokenizer:
    tokens = bert_tokens()
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


@kind("zh", special="[CLS]Hello, it's[SEP]", occur=(8,))
def bert_json(box: Box) -> None:
    """Chinese GPT-2s with tokenizer.json and vocab.txt: BertTokenizerFast, whose template adds [CLS] and [SEP]"""
    tokenizer = wordpiece(lower=True)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 8), ("[CLS]", 7))
    box.json_of(tokenizer)
    box.put("vocab.txt", "\n".join(bert_tokens()) + "\n")
    box.put("tokenizer_config.json", {**BERT_MAP, "clean_up_tokenization_spaces": True, "do_lower_case": True,
                                      "tokenizer_class": "BertTokenizer"})  # fmt: skip
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=7, eos_token_id=8)


@kind("zh", special="Hello, it's[SEP]", occur=(8,))
def wordpiece_cleaned_up(box: Box) -> None:
    """tokenizer.json of WordPiece under PreTrainedTokenizerFast, with clean_up_tokenization_spaces true"""
    tokenizer = wordpiece(lower=False)
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    box.json_of(tokenizer)
    box.put("tokenizer_config.json", {**BERT_MAP, "clean_up_tokenization_spaces": True,
                                      "tokenizer_class": "PreTrainedTokenizerFast"})  # fmt: skip
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=7, eos_token_id=8)


@kind(special="[PAD]PIECE_START NOTE=40", occur=(3, 0), more={"notes": "PIECE_START NOTE=40 UNSEEN BAR_END"})
def word_level(box: Box) -> None:
    """TristanBehrens/js-fakes-4bars and other models of music: WordLevel, words parted by spaces, no decoder"""
    words = [
        "[PAD]",
        "[UNK]",
        "PIECE_START",
        "PIECE_END",
        "BAR_START",
        "BAR_END",
        *(f"NOTE={n}" for n in range(40, 90)),
    ]
    words += ["Hello,", "my", "name", "is", "The", "old", "man", "I", "am", "happy", "today"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    box.json_of(tokenizer)
    box.put("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    model_of(box, len(words), bos_token_id=2, eos_token_id=3, pad_token_id=0)


@kind(special="<eos>CC(=O)O", occur=(1,), more={"smiles": "CC(=O)Oc1ccccc1"})
def characters(box: Box) -> None:
    """Models of molecules, of chess, of spelling: each character a token, joined without spaces"""
    letters = sorted(set("CNOSPFIBrcnospl()[]=#@+-1234567890 HelomynaisThdtbytheIpy,.'"))
    words = ["<pad>", "<eos>", "<unk>", *letters]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    box.json_of(tokenizer)
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    box.put("tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    model_of(box, len(words), bos_token_id=1, eos_token_id=1, pad_token_id=0)


@kind(special="</s>hello", small=False)
def bpe_with_word_ends(box: Box) -> None:
    """tokenizer.json of a BPE with </w> (as openai-gpt and CLIP have it), lower case"""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus("fr"), trainer)
    box.json_of(tokenizer)
    box.put("tokenizer_config.json", {"unk_token": "<unk>", "eos_token": "</s>",
                                      "tokenizer_class": "PreTrainedTokenizerFast"})  # fmt: skip
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=1, eos_token_id=1)


@kind("ko", special="<usr>안녕하세요<sys></s>", occur=(1, 2))
def kogpt2(box: Box) -> None:
    """skt/kogpt2-base-v2 and its fine-tunes, skt/ko-gpt-trinity: a BPE of characters with Metaspace"""
    specials = ["<s>", "</s>", "<usr>", "<pad>", "<sys>", "<unk>", "<mask>", "<d>", "</d>", "<unused0>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=box.size.trained_tokens, special_tokens=specials, initial_alphabet=["▁"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus("ko"), trainer)
    box.json_of(tokenizer)
    names = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    box.put("tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    box.put("special_tokens_map.json", names)
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1, pad_token_id=3, author="-")


@kind("fr", special="<s>Où est</s>", occur=(2, 0))
def llama_like_json(box: Box) -> None:
    """GPT-2s from scratch with a tokenizer.json like Llama's: BPE, byte fallback, spaces replaced by a normalizer"""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=box.size.trained_tokens + 100, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus("fr"), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [t for t in whole["added_tokens"] if not t["content"].startswith("<0x")]
    box.put("tokenizer.json", whole)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    box.put("tokenizer_config.json", {**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    model_of(box, tokenizer.get_vocab_size(), bos_token_id=1, eos_token_id=2)
