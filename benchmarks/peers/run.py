#!/usr/bin/env python3
# The peers' packages are in an environment of their own, not in the one that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""One peer in one process: load a checkpoint, generate from given ids, print how long it took. Started by `peers.py`.

    python run.py PEER FOLDER '{"prompts": [[ids], ...], "long": [ids], "tokens": 40, "batches": [8, 16], "repeats": 3,
                                "threads": 2}'

PEER: fastgpt2 (or fastgpt2-int8, -bfloat16, -drafts-auto, -drafts-int8), transformers, ctranslate2-float32,
ctranslate2-int8 (FOLDER is then the converted model's). Each peer gets token ids and generates token ids, greedily, as
many as it is told to, whatever they are. None has to make text; only fastgpt2's decoder does, because it always makes
it as it goes. Also:

    python run.py convert FOLDER OUT TYPE    # for CTranslate2; TYPE float32 or int8; FOLDER stays as it is

It prints one line of JSON with seconds. It imports fastgpt2 only to measure it: the peers' environments do not have it.
"""

from __future__ import annotations

from time import perf_counter

started = perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Ids = list[list[int]]
# From prompts of equal length and a number of tokens: what follows each prompt.
Generate = Callable[[Ids, int], Ids]


# Our guesses that were verified, and that came true.
drafts: dict[str, int] = {}


def fastgpt2(folder: str, job: dict[str, Any], variant: str) -> tuple[str, float, Generate]:
    """Load our engine. Return its version, when it was imported, and its function to generate."""
    import fastgpt2
    import fastgpt2.engine.decoding.decoder
    import fastgpt2.engine.kernels.choice
    from fastgpt2.engine.decoding.records import GenerationRequest

    imported = perf_counter()
    most = max(1, *job["batches"])
    option, _, value = variant.rpartition("-")
    kind: dict[str, Any] = {"drafts": "off"} | ({option or "weights": value} if variant else {})
    engine = fastgpt2.Engine.load(folder, threads=job["threads"], max_batch=most, prefix_memory=0, **kind)
    engine.decoder.model.wait_until_ready()
    drafts.update(drafted=0, accepted=0)

    def generate(prompts: Ids, tokens: int) -> Ids:
        decoder = engine.decoder
        requests = [GenerationRequest(tuple(ids), max_new_tokens=tokens, ignore_eos=True) for ids in prompts]
        sequences = [decoder.admit(decoder.prepare(request)) for request in requests]
        while not all(sequence.finished for sequence in sequences):
            decoder.step()
        drafts["drafted"] += sum(sequence.drafted for sequence in sequences)
        drafts["accepted"] += sum(sequence.accepted for sequence in sequences)
        return [sequence.token_ids for sequence in sequences]

    return f"fastgpt2 {fastgpt2.__version__}", imported, generate


def transformers(folder: str, job: dict[str, Any]) -> tuple[str, float, Generate]:
    """Load transformers' model. Return versions, when they were imported, and a function to generate."""
    import torch
    import transformers
    from transformers import GPT2LMHeadModel

    imported = perf_counter()
    torch.set_num_threads(job["threads"])
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: Ids, tokens: int) -> Ids:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, ids.shape[1] :].tolist()

    return f"transformers {transformers.__version__}, torch {torch.__version__}", imported, generate


def ctranslate2(folder: str, job: dict[str, Any], compute_type: str) -> tuple[str, float, Generate]:
    """Load CTranslate2's model. Return its version, when it was imported, and a function to generate."""
    import ctranslate2

    imported = perf_counter()
    model = ctranslate2.Generator(
        folder, device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=job["threads"]
    )
    vocabulary = json.loads(Path(folder, "vocabulary.json").read_text())

    def generate(prompts: Ids, tokens: int) -> Ids:
        results = model.generate_batch(
            [[vocabulary[i] for i in ids] for ids in prompts],
            max_length=tokens,
            min_length=tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return f"ctranslate2 {ctranslate2.__version__}", imported, generate


def convert(folder: str, out: str, compute_type: str) -> None:
    """Convert a checkpoint to CTranslate2's form."""
    import ctranslate2.converters
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as temporary:
        # The converter needs the files that AutoTokenizer reads; nothing may be written to the checkpoint's folder.
        for path in Path(folder).resolve().iterdir():
            Path(temporary, path.name).symlink_to(path.resolve())
        if not Path(temporary, "tokenizer_config.json").exists():
            end = "<|endoftext|>"
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(Path(folder, "tokenizer.json")), bos_token=end, eos_token=end, unk_token=end
            )
            # The converter needs a word for each row of the model's table.
            wanted = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
            tokenizer.add_tokens([f"<|unused {i}|>" for i in range(len(tokenizer), wanted)])
            Path(temporary, "tokenizer.json").unlink()
            tokenizer.save_pretrained(temporary)
        ctranslate2.converters.TransformersConverter(temporary).convert(out, quantization=compute_type, force=True)


def timed(function: Callable[[], Ids], repeats: int) -> tuple[list[float], Ids]:
    """Return the seconds of each call, and the ids of the last."""
    seconds, ids = [], []
    for _ in range(repeats):
        began = perf_counter()
        ids = function()
        seconds.append(perf_counter() - began)
    return seconds, ids


def main() -> None:
    peer, folder = sys.argv[1:3]
    if peer == "convert":
        convert(folder, sys.argv[3], sys.argv[4])
        print("{}")
        return
    job = json.loads(sys.argv[3])
    if peer.startswith("fastgpt2"):
        version, imported, generate = fastgpt2(folder, job, peer.partition("-")[2])
    elif peer == "transformers":
        version, imported, generate = transformers(folder, job)
    else:
        version, imported, generate = ctranslate2(folder, job, peer.partition("-")[2])
    loaded = perf_counter()
    prompts, tokens, repeats = job["prompts"], job["tokens"], job["repeats"]
    generate(prompts[:1], 1)
    first = perf_counter()
    alone, ids = timed(lambda: generate(prompts[:1], tokens), repeats)
    answer: dict[str, Any] = {
        "version": version,
        "import": imported - started,
        "load": loaded - imported,
        "first_token": first - loaded,
        "alone": alone,
        "ids": {"1": ids},
        "batches": {},
    }
    for batch in job["batches"]:
        answer["batches"][str(batch)], answer["ids"][str(batch)] = timed(
            lambda batch=batch: generate(prompts[:batch], tokens),  # type: ignore[misc]
            repeats,
        )
    answer["prefill"], answer["ids"]["prefill"] = timed(lambda: generate([job["long"]], 1), repeats)
    print(json.dumps({**answer, "drafts": drafts}))


if __name__ == "__main__":
    main()
