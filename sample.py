"""Write text with a checkpoint.

python sample.py --checkpoint out --prompt "import "
python sample.py --checkpoint out --prompt FILE:start.txt --num_samples 4 --temperature 0.8 --top_p 0.95 --seed 7
echo "def f(" | python sample.py --checkpoint out --prompt -
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import load_tokenizer
from zaya import KERNELS, Zaya, choose_device, find_checkpoint, parse_flags, stop_in_one_line


@dataclass
class SampleConfig:
    checkpoint: str = "out"  # a checkpoint, or a run directory (its newest)
    prompt: str = ""  # the text to continue, FILE:path to read it from a file, or - for standard input
    max_new_tokens: int = 200  # tokens to write; fewer if the text ends before
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model says; above: wilder
    top_k: int | None = None  # choose among the k likeliest tokens only
    top_p: float | None = None  # choose among the fewest tokens that hold this much probability
    seed: int = 1  # the same seed, the same text
    num_samples: int = 1  # texts, all in one batch
    device: str = "auto"  # auto, cpu, cuda (AMD's too) or mps
    kernels: str = "auto"  # auto, triton (both: Triton's on a GPU) or eager (PyTorch alone)
    dtype: str = "auto"  # auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be 0 or more, not {self.seed}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype} is none of auto, float32, bfloat16, float16")
        if self.kernels not in KERNELS:
            raise ValueError(f"--kernels {self.kernels} is none of {', '.join(KERNELS)}")


def read_prompt(prompt):
    """The text that --prompt stands for."""
    if prompt == "-":
        return sys.stdin.read()
    if prompt.startswith("FILE:"):
        return Path(prompt[5:]).expanduser().read_text(encoding="utf-8")
    return prompt


class Printer:
    """Prints a growing text: whole characters only, as soon as their last byte is there."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        self.show(text[: len(text.rstrip("\ufffd"))] if text.endswith("\ufffd") else text)

    def finish(self):
        self.show(self.tokenizer.decode(self.ids))

    def show(self, text):
        sys.stdout.write(text[self.shown :])
        sys.stdout.flush()
        self.shown = max(self.shown, len(text))


def main():
    config = SampleConfig(**parse_flags(__doc__, SampleConfig))
    prompt = read_prompt(config.prompt)
    device = choose_device(config.device)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    checkpoint = find_checkpoint(config.checkpoint)
    model = Zaya.from_pretrained(checkpoint, device, getattr(torch, dtype), config.kernels)
    tokenizer = load_tokenizer(checkpoint)

    ids = tokenizer.encode(prompt)
    if model.config.bos_token_id is not None:
        ids = [model.config.bos_token_id, *ids]
    ids = ids or tokenizer.encode("\n")  # a text must begin with something
    context = model.config.max_position_embeddings
    if len(ids) > context:
        print(
            f"sample.py: the prompt has {len(ids)} tokens; the model reads the last {context}, its context",
            file=sys.stderr,
        )
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"the tokenizer gives the id {max(ids)}, the model knows {model.config.vocab_size}")

    torch.manual_seed(config.seed)
    tokens = torch.tensor([ids] * config.num_samples, device=device)
    eos = model.config.eos_token_id
    printer, new, started = Printer(tokenizer), [], time.perf_counter()
    if config.num_samples == 1:
        sys.stdout.write(prompt)
    for token in model.stream(tokens, config.max_new_tokens, config.temperature, config.top_k, config.top_p, eos):
        new.append(token.tolist())
        if config.num_samples == 1 and new[-1][0] != eos:
            printer.add(new[-1][0])
    seconds = time.perf_counter() - started
    if config.num_samples == 1:
        printer.finish()
        print()
    else:
        for i, row in enumerate(zip(*new), start=1):
            row = row[: row.index(eos)] if eos in row else row
            print(f"--- {i}\n{prompt}{tokenizer.decode(row)}")
    count = len(new) * config.num_samples
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s, {device}, {dtype}", file=sys.stderr)


if __name__ == "__main__":
    with stop_in_one_line():
        main()
