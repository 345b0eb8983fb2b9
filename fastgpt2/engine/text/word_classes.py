"""The classes of tokenizers that split a text into BERT's words: those of BERT and of the first GPT.

Source of each: the class of the same name in `models/*/tokenization_*.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastgpt2.engine.model.config import WORDPIECE_FILE
from fastgpt2.engine.text.tokenizer_base import BERT, FAIRSEQ, TokenizerClass, parts, wrap

if TYPE_CHECKING:
    import tokenizers


class OpenAIGPTClass(TokenizerClass):
    """The tokenizer of the first GPT: lower case, words of BERT, and their ends marked."""

    defaults = parts(unk="<unk>")
    lowercase = True
    strip_accents: bool | None = None

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        model = self.vocabulary.bpe(end_of_word_suffix="</w>", unk_token=str(self.special.text("unk_token")))
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase, strip_accents=self.strip_accents)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix="</w>")
        return backend


class HerbertClass(OpenAIGPTClass):
    defaults = parts(unk="<unk>", sep="</s>", pad="<pad>", cls="<s>", mask="<mask>")
    lowercase = False
    strip_accents = False

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import processors

        sep, cls = (str(self.special.text(name)) for name in ("sep_token", "cls_token"))
        backend.post_processor = processors.BertProcessing((sep, 2), (cls, 0))


class BertClass(TokenizerClass):
    model = "WordPiece"
    files = (WORDPIECE_FILE,)
    defaults = BERT
    whole = True

    def build(self) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import decoders, normalizers, pre_tokenizers

        backend = tokenizers.Tokenizer(self.vocabulary.word_piece(str(self.special.text("unk_token"))))
        strips = None if self.options.values.get("strip_accents") is None else self.options.flag("strip_accents", False)
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self.options.flag("tokenize_chinese_chars", True),
            strip_accents=strips,
            lowercase=self.options.flag("do_lower_case", True),
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token", (2, 3))


class ConvBertClass(BertClass):
    inherits = True


class FunnelClass(BertClass):
    defaults = parts(FAIRSEQ, sep="<sep>", cls="<cls>")

    def build(self) -> tokenizers.Tokenizer:
        from tokenizers import decoders

        backend = super().build()
        backend.normalizer.clean_text = self.options.flag("clean_text", True)
        backend.decoder = decoders.WordPiece(prefix=str(self.options.values.get("wordpieces_prefix", "##")))
        return backend

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token")


class MPNetClass(BertClass):
    defaults = parts(FAIRSEQ, unk="[UNK]")
    mask_strips = True

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token", (0, 2))


class SplinterClass(BertClass):
    defaults = parts(BERT, question="[QUESTION]")

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        wrap(backend, self.special, "cls_token", "sep_token")


CLASSES: Mapping[str, type[TokenizerClass]] = {
    "OpenAIGPTTokenizer": OpenAIGPTClass,
    "HerbertTokenizer": HerbertClass,
    "BertTokenizer": BertClass,
    "DistilBertTokenizer": BertClass,
    "ElectraTokenizer": BertClass,
    "LayoutLMTokenizer": BertClass,
    "LxmertTokenizer": BertClass,
    "MobileBertTokenizer": BertClass,
    "SqueezeBertTokenizer": BertClass,
    "FunnelTokenizer": FunnelClass,
    "MPNetTokenizer": MPNetClass,
    "SplinterTokenizer": SplinterClass,
    "ConvBertTokenizer": ConvBertClass,
}
