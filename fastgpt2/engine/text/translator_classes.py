"""The classes of translators' tokenizers: models of sentencepiece, and codes of languages that stand beside a text.

Source of each: the class of the same name in `models/*/tokenization_*.py` of transformers 5; of the order of its
tokens, the converter of that name in convert_slow_tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.text.sentencepiece_classes import ReformerClass, XLMRobertaClass, single_spaces
from fastgpt2.engine.text.special_tokens import added_token
from fastgpt2.engine.text.tokenizer_base import FAIRSEQ, Pieces, TokenizerClass, parts, surround
from fastgpt2.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

# Source: `FAIRSEQ_LANGUAGE_CODES` in the modules of MBART-50 and NLLB. The first 25 are those of MBART.
_MBART50_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP "
    "nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN "
    "mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)

_NLLB_LANGUAGES = (
    "ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab ars_Arab "
    "ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl "
    "bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn "
    "cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn "
    "est_Latn eus_Latn ewe_Latn fao_Latn pes_Arab fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn "
    "gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn "
    "ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab "
    "kas_Deva kat_Geor knc_Arab knc_Latn kaz_Cyrl kbp_Latn kea_Latn khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn "
    "kon_Latn kor_Hang kmr_Latn lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn "
    "lua_Latn lug_Latn luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn mkd_Cyrl plt_Latn mlt_Latn "
    "mni_Beng khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn nus_Latn "
    "nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab quy_Latn "
    "ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn "
    "sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn "
    "szl_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi taq_Latn taq_Tfng tpi_Latn tsn_Latn "
    "tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn "
    "vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zul_Latn"
)


def language_of(kind: TokenizerClass, backend: tokenizers.Tokenizer, usual: str) -> tuple[str, int]:
    """Return the code, and its id, of the language that the files name as that of the source, or else the usual one."""
    code = kind.options.values.get("src_lang")
    code = usual if code is None else code
    if not isinstance(code, str):
        raise TokenizerError("tokenizer_config.json: src_lang must be the code of a language")
    index = backend.token_to_id(code)
    return (code, index) if index is not None else kind.special.pair(backend, "unk_token")


class MBartClass(XLMRobertaClass):
    mask_strips = True
    prefixes_always = True

    def languages(self) -> list[str]:
        """Return the codes that are special tokens."""
        return _MBART50_LANGUAGES.split()[:25]

    def arrange(self, pieces: Pieces) -> Pieces:
        *first, mask = super().arrange(pieces)
        return [*first, *((code, 0.0) for code in self.languages()), mask]

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return [*self.languages(), *(token for token in listed or [] if str(token) not in self.languages())]

    def normalizers(self) -> list[Any]:
        return []

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        surround(backend, [], [self.special.pair(backend, "eos_token"), language_of(self, backend, "en_XX")])


class MBart50Class(MBartClass):
    defaults = parts(FAIRSEQ, bos=None)
    by_words = False

    def languages(self) -> list[str]:
        return _MBART50_LANGUAGES.split()

    def arrange(self, pieces: Pieces) -> Pieces:
        return [(self.stated("cls_token"), 0.0), *super().arrange(pieces)[1:]]

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return [*(listed or []), *self.languages()]

    def build(self) -> tokenizers.Tokenizer:
        pieces = self.vocabulary.pieces
        if not {text for text, _ in pieces}.intersection(self.languages()):
            self.vocabulary.tokens = self.arrange(pieces)
        return super().build()

    def normalizers(self) -> list[Any]:
        return [*self.vocabulary.normalizers(), single_spaces()]

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        language = language_of(self, backend, "en_XX")
        if language[0] not in self.languages():
            raise TokenizerError(f"tokenizer_config.json: src_lang must be one of {', '.join(self.languages())}")
        surround(backend, [language], [self.special.pair(backend, "eos_token")])


class NllbClass(ReformerClass):
    files = ("sentencepiece.bpe.model",)
    defaults = FAIRSEQ

    def arrange_ids(self, ids: dict[str, int]) -> dict[str, int]:
        first = [self.stated(f"{part}_token") for part in ("bos", "pad", "eos", "unk")]
        return {text: index for index, text in enumerate(dict.fromkeys([*first, *ids]))}

    def additional(self, listed: list[Any] | None) -> list[Any] | None:
        return _NLLB_LANGUAGES.split() if listed is None else listed

    def build(self) -> tokenizers.Tokenizer:
        mask = self.special.named["mask_token"]
        if isinstance(mask, str):
            self.special.named["mask_token"] = added_token(mask, lstrip=True, normalized=True, special=True)
        return super().build()

    def finish(self, backend: tokenizers.Tokenizer) -> None:
        eos, language = self.special.pair(backend, "eos_token"), language_of(self, backend, "eng_Latn")
        if self.options.flag("legacy_behaviour", False):
            surround(backend, [], [eos, language])
        else:
            surround(backend, [language], [eos])


CLASSES: Mapping[str, type[TokenizerClass]] = {
    "MBartTokenizer": MBartClass,
    "MBart50Tokenizer": MBart50Class,
    "NllbTokenizer": NllbClass,
}
