"""The classes of tokenizers whose text is bytes: GPT-2's own, and those that change a step of it.

Source of each: the class of the same name in `models/*/tokenization_*.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastgpt2.engine.text.special_tokens import added_token
from fastgpt2.engine.text.tokenizer_base import (
    BERT,
    END_OF_TEXT,
    FAIRSEQ,
    TokenizerClass,
    frame,
    make_special,
    parts,
    wrap,
)

if TYPE_CHECKING:
    import tokenizers

# Source: `PRETOKENIZE_REGEX` in models/qwen2/tokenization_qwen2.py.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ByteLevelClass(TokenizerClass):
    """GPT-2's own: BPE of bytes, which stand there as printable characters."""

    defaults = parts(unk=END_OF_TEXT, bos=END_OF_TEXT, eos=END_OF_TEXT, pad=None)
    whole = True
    composes = False
    prefix_space = False

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        model = self.vocabulary.bpe(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
        backend = tokenizers.Tokenizer(model)
        if self.composes:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(self.options.flag("add_prefix_space", self.prefix_space))
        backend.decoder = decoders.ByteLevel()
        return backend


class GPTNeoXClass(ByteLevelClass):
    defaults = parts(ByteLevelClass.defaults, pad="<|padding|>")
    composes = True

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        frame(backend, self.options, self.special)


class Qwen2Class(ByteLevelClass):
    defaults = parts(unk=END_OF_TEXT, bos=None, eos=END_OF_TEXT, pad=END_OF_TEXT)
    composes = True
    words = _QWEN_WORDS

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import pre_tokenizers

        backend = super().build()
        words = pre_tokenizers.Split(tokenizers.Regex(self.words), "isolated")
        prefix_space = self.options.flag("add_prefix_space", False)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(prefix_space, use_regex=False)]
        )
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        texts = dict.fromkeys(
            str(token) for token in [*self.special.named.values(), *self.special.extra] if token is not None
        )
        backend.add_tokens([added_token(text, special=True) for text in texts])


class Qwen3_5Class(Qwen2Class):  # noqa: N801 - it is the name of the model
    files = ("tokenizer.model",)
    words = _QWEN_WORDS.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|", 1).replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        pass


class CohereClass(ByteLevelClass):
    defaults = parts(
        unk="<UNK>",
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        pad="<PAD>",
        cls="<CLS>",
        sep="<SEP>",
        mask="<MASK_TOKEN>",
    )
    composes = True

    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import pre_tokenizers

        backend = super().build()
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        make_special(backend, self.special)


class DebertaClass(ByteLevelClass):
    defaults = parts(BERT, bos="[CLS]", eos="[SEP]")

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token")


class BlenderbotClass(ByteLevelClass):
    defaults = FAIRSEQ
    prefix_space = True
    mask_strips = True


class RobertaClass(ByteLevelClass):
    defaults = FAIRSEQ

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import processors

        sep, cls = (self.special.pair(backend, name) for name in ("sep_token", "cls_token"))
        trims, prefix_space = self.options.flag("trim_offsets", True), self.options.flag("add_prefix_space", False)
        backend.post_processor = processors.RobertaProcessing(sep, cls, trims, prefix_space)


CLASSES: Mapping[str, type[TokenizerClass]] = {
    "GPT2Tokenizer": ByteLevelClass,
    "CodeGenTokenizer": ByteLevelClass,
    "GPTNeoXTokenizer": GPTNeoXClass,
    "Qwen2Tokenizer": Qwen2Class,
    "BlenderbotTokenizer": BlenderbotClass,
    "RobertaTokenizer": RobertaClass,
    "BartTokenizer": RobertaClass,
    "LEDTokenizer": RobertaClass,
    "LongformerTokenizer": RobertaClass,
    "MvpTokenizer": RobertaClass,
    "CohereTokenizer": CohereClass,
    "Qwen3_5Tokenizer": Qwen3_5Class,
    "DebertaTokenizer": DebertaClass,
}
