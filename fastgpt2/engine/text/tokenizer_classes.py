"""The names of transformers' classes of tokenizers: which are pipelines here, and which are refused.

A class builds its own normalizer, pre-tokenizer and decoder, whatever `tokenizer.json` says of them. The vocabulary and
some settings it takes from the files.
"""

from __future__ import annotations

from fastgpt2.engine.text.tokenizer_base import TokenizerClass

# The classes that a folder has whose files name none, by the kind of its model. Source: `TOKENIZER_MAPPING_NAMES` of
# transformers, for models whose tokenizer a GPT-2 may borrow.
USUAL_CLASSES = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "gptj": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer",
    "codegen": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "gpt-sw3": "GPTSw3Tokenizer",
    "openai-gpt": "OpenAIGPTTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "bart": "RobertaTokenizer",
    "t5": "T5Tokenizer",
    "mt5": "T5Tokenizer",
    "albert": "AlbertTokenizer",
    "xlnet": "XLNetTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "barthez": "BarthezTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
}

# Classes of transformers that this package does not have: those that are pipelines of the tokenizers library too, and
# those that are code. A name that transformers does not know either stands for a tokenizer.json that is taken as it is,
# as there.
# fmt: off
OTHER_PIPELINES = frozenset({
    "CLIPTokenizer", "CodeLlamaTokenizer", "DPRContextEncoderTokenizer", "DPRQuestionEncoderTokenizer",
    "DPRReaderTokenizer", "EsmcTokenizer", "LasrTokenizer", "LayoutLMv2Tokenizer", "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer", "LukeTokenizer", "MLukeTokenizer", "MarkupLMTokenizer", "NougatTokenizer",
    "ParakeetTokenizer", "SeamlessM4TTokenizer", "Tipsv2Tokenizer", "UdopTokenizer", "WhisperTokenizer",
})
CODE_CLASSES = frozenset({
    "BartphoTokenizer", "BertGenerationTokenizer", "BertJapaneseTokenizer", "BertTokenizerLegacy",
    "BertweetTokenizer", "BioGptTokenizer", "BlenderbotSmallTokenizer", "ByT5Tokenizer", "CTRLTokenizer",
    "CanineTokenizer", "ClvpTokenizer", "CpmAntTokenizer", "CpmTokenizer", "DiaTokenizer", "EsmTokenizer",
    "FSMTTokenizer", "FastSpeech2ConformerTokenizer", "FlaubertTokenizer", "GPTNeoXJapaneseTokenizer",
    "M2M100Tokenizer", "MarianTokenizer", "MgpstrTokenizer", "MyT5Tokenizer", "PLBartTokenizer",
    "PerceiverTokenizer", "PhobertTokenizer", "ProphetNetTokenizer", "RoCBertTokenizer", "RoFormerTokenizer",
    "SiglipTokenizer", "Speech2TextTokenizer", "SpeechT5Tokenizer", "TapasTokenizer", "VitsTokenizer",
    "Wav2Vec2CTCTokenizer", "Wav2Vec2PhonemeCTCTokenizer", "XLMTokenizer",
})
# fmt: on
NEEDS = {"BertJapaneseTokenizer": " (mostly with MeCab)", "CpmTokenizer": " (with jieba)"}


def find_class(name: str) -> type[TokenizerClass] | None:
    """Return the class of a name, or None if there is none here.

    The classes whose text is bytes are looked at first: GPT-2's own is among them, and starts without the others.
    """
    from fastgpt2.engine.text import byte_level_classes

    if name in byte_level_classes.CLASSES:
        return byte_level_classes.CLASSES[name]
    from fastgpt2.engine.text import sentencepiece_classes, translator_classes, word_classes

    others = {**word_classes.CLASSES, **sentencepiece_classes.CLASSES, **translator_classes.CLASSES}
    return others.get(name)
