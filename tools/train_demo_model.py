#!/usr/bin/env python3
# torch and transformers are not in the environment that the checks run in.
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,no-untyped-call,untyped-decorator"
"""Train the model that ships with fastgpt2 (`demo`) from public-domain text.

    python -m venv train && train/bin/pip install torch transformers tokenizers safetensors
    train/bin/python tools/train_demo_model.py --corpus DIR --out OUT
    train/bin/python tools/train_demo_model.py --corpus DIR --out OUT --resume --dropout 0 --play-lines 10000 \
        --batch 4 --steps 1800 --learning-rate 1.2e-3

DIR holds `sherlock-holmes.txt` (The Adventures of Sherlock Holmes, Project Gutenberg no. 1661) and
`shakespeare.txt` ("tiny Shakespeare", 40,000 lines of the plays). Both are in the public domain.

The first run teaches the model English. The second, without dropout, on the stories and the first quarter of the plays,
teaches it to write: a model of this size that does not nearly know its texts by heart falls into loops when it decodes
greedily.

Only this script needs torch and transformers; fastgpt2 itself needs neither. The architecture is that of GPT-2 (Radford
et al. 2019), the tokenizer a byte-level BPE of its own. The last 5% of each text are held out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.05
N_POSITIONS = 512


def read_documents(corpus: Path, play_lines: int) -> list[str]:
    """Return the twelve stories, each a document, and the first `play_lines` of the plays as one; no front matter."""
    stories = (corpus / "sherlock-holmes.txt").read_text("utf-8")
    parts = re.split(r"^(?:ADVENTURE +)?[IVX]+\. +[A-Z' -]+[A-Z]$", stories, flags=re.MULTILINE)
    plays = "".join((corpus / "shakespeare.txt").read_text("utf-8").splitlines(keepends=True)[:play_lines])
    documents = [re.sub(r"\n{3,}", "\n\n", part).strip() for part in [*parts[1:], plays]]
    # A chapter that begins with its number alone ("I.") would teach the model to begin so too.
    return [re.sub(r"^I\.\s+", "", document) for document in documents if len(document) > 5000]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of this many tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids to train on and those held out. An end-of-text token stands before and after a document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    train, held_out = [end], [end]
    for document in documents:
        cut = int(len(document) * (1 - HELD_OUT))
        cut = document.rfind("\n\n", 0, cut)
        # Training sees the end of each document, so that the model learns where texts end.
        tail = document[cut:]
        middle = tail.rfind("\n\n", 0, len(tail) - 200)
        train += [*tokenizer.encode(document[:cut] + tail[middle:]).ids, end]
        held_out += [*tokenizer.encode(tail[:middle]).ids, end]
    return torch.tensor(train), torch.tensor(held_out)


@torch.no_grad()
def measure_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> float:
    """Return the mean negative log-likelihood of a token, in nats, over consecutive windows of n_positions."""
    model.eval()
    losses = [
        model(window[None], labels=window[None]).loss.item()
        for window in ids.split(N_POSITIONS)
        if len(window) > N_POSITIONS // 2
    ]
    model.train()
    return sum(losses) / len(losses)


def train(model: GPT2LMHeadModel, train_ids: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace) -> None:
    """Train for `options.steps` steps of AdamW, at a rate that rises for a while and then falls as a cosine."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    warm_up = max(1, options.steps // 30)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.monotonic()
    for step in range(options.steps):
        progress = max(0, step - warm_up) / max(1, options.steps - warm_up)
        rate = options.learning_rate * min((step + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(train_ids) - N_POSITIONS, (options.batch,), generator=generator)
        batch = torch.stack([train_ids[s : s + N_POSITIONS] for s in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step == options.steps - 1:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{options.steps} loss {loss.item():.3f} held-out {measure_loss(model, held_out):.3f}"
                f" {seconds:.0f} s, {(step + 1) * options.batch * N_POSITIONS / seconds:.0f} tokens/s",
                flush=True,
            )
            if step % 500 == 499:
                write_checkpoint(model, options.out)


def write_checkpoint(model: GPT2LMHeadModel, out: Path) -> None:
    """Write float16 weights under the bare names of the public `gpt2` file, the head tied to wte."""
    weights = {
        name.removeprefix("transformer."): tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    c = model.config
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": c.activation_function,
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "n_positions": c.n_positions,
        "n_embd": c.n_embd,
        "n_head": c.n_head,
        "n_layer": c.n_layer,
        "vocab_size": c.vocab_size,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_id,
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_checkpoint(model: GPT2LMHeadModel, out: Path) -> None:
    """Load the weights that `write_checkpoint` wrote."""
    stored = {f"transformer.{name}": tensor.float() for name, tensor in load_file(out / "model.safetensors").items()}
    model.load_state_dict(stored, strict=False)  # the head is tied to wte, and not stored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the folder with the two texts")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the model")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--n-layer", type=int, default=5)
    parser.add_argument("--n-head", type=int, default=7)
    parser.add_argument("--n-embd", type=int, default=224)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--resume", action="store_true", help="go on from the weights in --out, with a new schedule of the rate"
    )
    parser.add_argument(
        "--play-lines",
        type=int,
        default=40_000,
        help="the number of lines of the plays to train on (default: %(default)d)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=8,
        help=f"the number of windows of {N_POSITIONS} tokens in a step (default: %(default)d)",
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1661)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    if options.resume:
        tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(read_documents(options.corpus, sys.maxsize), options.vocab_size)
        tokenizer.save(str(options.out / "tokenizer.json"), pretty=False)
    documents = read_documents(options.corpus, options.play_lines)
    train_ids, held_out = encode_documents(tokenizer, documents)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = GPT2Config(
        vocab_size=options.vocab_size,
        n_positions=N_POSITIONS,
        n_embd=options.n_embd,
        n_layer=options.n_layer,
        n_head=options.n_head,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=0.0,  # with it, attention leaves its fused kernel and a step takes twice as long
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config)
    if options.resume:
        load_checkpoint(model, options.out)
        options.seed += 1
    model.train()
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(documents)} documents, {len(train_ids)} training tokens, {len(held_out)} held out, {count} parameters")
    train(model, train_ids, held_out, options)
    write_checkpoint(model, options.out)
    model.eval()
    for prompt in ("Sherlock Holmes", "My name is", "To be, or not to be", "It was a cold morning"):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        text = tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=end)[0].tolist())
        print(f"--- {text}")


if __name__ == "__main__":
    main()
