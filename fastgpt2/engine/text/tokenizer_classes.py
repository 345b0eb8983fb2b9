"""The classes of tokenizers that transformers has, by name: those that GPT-2 repositories use are pipelines here.

A class builds its own normalizer, pre-tokenizer and decoder, whatever `tokenizer.json` says of them. The vocabulary and
some settings it takes from the files.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastgpt2.engine.text.byte_level_classes import (
    BlenderbotClass,
    ByteLevelClass,
    CohereClass,
    DebertaClass,
    GPTNeoXClass,
    Qwen2Class,
    Qwen3_5Class,
    RobertaClass,
)
from fastgpt2.engine.text.sentencepiece_classes import (
    AlbertClass,
    BarthezClass,
    BigBirdClass,
    CamembertClass,
    DebertaV2Class,
    FNetClass,
    GemmaClass,
    GPTSw3Class,
    LlamaClass,
    PegasusClass,
    ReformerClass,
    RemBertClass,
    Siglip2Class,
    T5Class,
    VideoPrismClass,
    XGLMClass,
    XLMRobertaClass,
    XLNetClass,
)
from fastgpt2.engine.text.tokenizer_base import TokenizerClass
from fastgpt2.engine.text.translator_classes import MBart50Class, MBartClass, NllbClass
from fastgpt2.engine.text.word_classes import (
    BertClass,
    ConvBertClass,
    FunnelClass,
    HerbertClass,
    MPNetClass,
    OpenAIGPTClass,
    SplinterClass,
)

CLASSES: Mapping[str, type[TokenizerClass]] = {
    "GPT2Tokenizer": ByteLevelClass,
    "CodeGenTokenizer": ByteLevelClass,
    "GPTNeoXTokenizer": GPTNeoXClass,
    "Qwen2Tokenizer": Qwen2Class,
    "BlenderbotTokenizer": BlenderbotClass,
    **dict.fromkeys(
        ("RobertaTokenizer", "BartTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer"), RobertaClass
    ),
    "OpenAIGPTTokenizer": OpenAIGPTClass,
    "HerbertTokenizer": HerbertClass,
    **dict.fromkeys(
        (
            "BertTokenizer",
            "DistilBertTokenizer",
            "ElectraTokenizer",
            "LayoutLMTokenizer",
            "LxmertTokenizer",
            "MobileBertTokenizer",
            "SqueezeBertTokenizer",
        ),
        BertClass,
    ),
    "LlamaTokenizer": LlamaClass,
    "T5Tokenizer": T5Class,
    "AlbertTokenizer": AlbertClass,
    "XLNetTokenizer": XLNetClass,
    "XLMRobertaTokenizer": XLMRobertaClass,
    "CamembertTokenizer": CamembertClass,
    "BarthezTokenizer": BarthezClass,
    "DebertaV2Tokenizer": DebertaV2Class,
    "GPTSw3Tokenizer": GPTSw3Class,
    "ReformerTokenizer": ReformerClass,
    "BigBirdTokenizer": BigBirdClass,
    "PegasusTokenizer": PegasusClass,
    "MBartTokenizer": MBartClass,
    "MBart50Tokenizer": MBart50Class,
    "NllbTokenizer": NllbClass,
    "XGLMTokenizer": XGLMClass,
    "RemBertTokenizer": RemBertClass,
    "FNetTokenizer": FNetClass,
    "GemmaTokenizer": GemmaClass,
    "Siglip2Tokenizer": Siglip2Class,
    "VideoPrismTokenizer": VideoPrismClass,
    "CohereTokenizer": CohereClass,
    "Qwen3_5Tokenizer": Qwen3_5Class,
    "DebertaTokenizer": DebertaClass,
    "FunnelTokenizer": FunnelClass,
    "MPNetTokenizer": MPNetClass,
    "SplinterTokenizer": SplinterClass,
    "ConvBertTokenizer": ConvBertClass,
}

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
