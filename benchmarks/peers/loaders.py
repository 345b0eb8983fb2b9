# The peers' packages are in environments of their own, not in the one that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call"
"""Each peer, loaded as its own documentation does it: with its defaults, and all the threads that it may have.

A loader gets a folder or a file, the job (see `run.py`) and what is asked of this peer, such as the numbers of its
weights. It returns the peer's version, when its packages were imported, and a function that generates greedily from
prompts of equal length, exactly as many tokens as it is told to. No peer remembers a prompt from one call to the next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

Ids = list[list[int]]
# From prompts of equal length and a number of tokens: what follows each prompt.
Generate = Callable[[Ids, int], Ids]
Loaded = tuple[str, float, Generate]
Job = dict[str, Any]

# Our guesses that were verified, and that came true.
drafts: dict[str, int] = {}


def fastgpt2(folder: str, job: Job, kind: str) -> Loaded:
    """Load our engine: "", or weights ("int8"), or drafts ("drafts-int8")."""
    import fastgpt2
    import fastgpt2.engine.decoding.decoder
    import fastgpt2.engine.kernels.choice
    from fastgpt2.engine.decoding.records import GenerationRequest

    imported = perf_counter()
    option, _, value = kind.rpartition("-")
    changed: dict[str, Any] = {"drafts": "off"} | ({option or "weights": value} if kind else {})
    engine = fastgpt2.Engine.load(
        folder, threads=job["threads"], max_batch=most_at_once(job), prefix_memory=0, **changed
    )
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


def transformers(folder: str, job: Job, _kind: str) -> Loaded:
    """Load transformers' model, in float32."""
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


def ctranslate2(folder: str, job: Job, kind: str) -> Loaded:
    """Load CTranslate2's generator, to compute in "float32" or "int8"."""
    import ctranslate2

    imported = perf_counter()
    model = ctranslate2.Generator(
        folder, device="cpu", compute_type=kind, inter_threads=1, intra_threads=job["threads"]
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


def openvino(folder: str, job: Job, kind: str) -> Loaded:
    """Load OpenVINO GenAI's pipeline, to compute in "float32"; "bfloat16" and "int8" are left to its defaults.

    By default it computes in bfloat16 where the CPU does, and multiplies int8 weights by activations in int8.
    """
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    imported = perf_counter()
    precision = {"INFERENCE_PRECISION_HINT": "f32"} if kind == "float32" else {}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = max(len(job["long"]), most_at_once(job) * len(job["prompts"][0]))
    pipeline = openvino_genai.LLMPipeline(
        folder, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=job["threads"], **precision
    )

    def generate(prompts: Ids, tokens: int) -> Ids:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        return [list(found) for found in pipeline.generate(inputs, config).tokens]

    return f"OpenVINO GenAI {version('openvino-genai')}", imported, generate


def llama_cpp(file: str, job: Job, _kind: str) -> Loaded:
    """Load llama.cpp's library with a GGUF file; the numbers of its weights are the file's.

    llama-cpp-python's class `Llama` decodes one sequence, so these are the calls of llama.cpp itself.
    """
    import llama_cpp
    import numpy as np

    imported = perf_counter()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    most = most_at_once(job)
    longest = max(len(job["long"]) + 1, len(job["prompts"][0]) + job["tokens"])
    settings = llama_cpp.llama_context_default_params()
    settings.n_seq_max = most
    settings.n_ctx = most * -(-longest // 256) * 256  # llama.cpp's own multiple, for each sequence
    settings.n_batch = max(settings.n_batch, len(job["long"]), most * len(job["prompts"][0]))
    settings.n_threads = settings.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
    memory = llama_cpp.llama_get_memory(context)

    def decode(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Take tokens, each with its place, its sequence and whether the next is asked for; return those next."""
        batch.n_tokens = len(rows)
        for i, (token, place, sequence, last) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, last
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode ended with status {status}")
        logits = llama_cpp.llama_get_logits(context)
        asked = sum(last for *_, last in rows)
        return np.ctypeslib.as_array(logits, (asked, size)).argmax(-1).tolist()

    def generate(prompts: Ids, tokens: int) -> Ids:
        llama_cpp.llama_memory_clear(memory, False)
        length = len(prompts[0])
        rows = [(t, i, s, i == length - 1) for s, ids in enumerate(prompts) for i, t in enumerate(ids)]
        found = [decode(rows)]
        for place in range(length, length + tokens - 1):
            found.append(decode([(token, place, s, True) for s, token in enumerate(found[-1])]))
        return [list(of_one) for of_one in zip(*found, strict=True)]

    return f"llama.cpp in llama-cpp-python {llama_cpp.__version__}", imported, generate


def most_at_once(job: Job) -> int:
    """Return how many sequences the job decodes together at most."""
    return max(1, *job["batches"])


LOADERS: dict[str, Callable[[str, Job, str], Loaded]] = {
    "fastgpt2": fastgpt2,
    "transformers": transformers,
    "ctranslate2": ctranslate2,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
}
