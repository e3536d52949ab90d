"""Write text with a checkpoint.

python sample.py --checkpoint out --prompt "import "
python sample.py --checkpoint out --prompt FILE:start.txt --num_samples 4 --temperature 0.8 --top_p 0.95 --seed 7
printf "def f(" | python sample.py --checkpoint out --prompt -
python sample.py --checkpoint out --prompt "import " --show_experts 1        each token in its expert's colour
python sample.py --compare out out-dense --prompt "import "                  two checkpoints side by side
python sample.py --checkpoint out --save_legacy out-sglang                   no text: the checkpoint as SGLang reads it
"""

import math
import os
import shutil
import sys
import textwrap
import time
import timeit
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from unicodedata import category, east_asian_width

import torch
from tqdm import tqdm

from data.tokenizer import load_tokenizer
from zaya import (
    KERNELS, ZAYA1, Zaya, as_list, choose_device, find_checkpoint, has_bf16, literal, parse_flags, positions_seen,
    pyplot, read_config, stop_in_one_line, token_costs, watts,
)  # fmt: skip


@dataclass
class SampleConfig:
    checkpoint: str = "out"  # a checkpoint, or a run directory (its newest)
    prompt: str = ""  # the text to continue, FILE:path to read it from a file, or - for standard input
    chat: bool = False  # the prompt is a question: put it in the turns that the checkpoint's chat template has
    max_new_tokens: int = 200  # tokens to write; fewer if the text ends before
    temperature: float = 0.8  # 0: always the likeliest token; 1: as the model says; above: wilder
    top_k: int | None = None  # choose among the k likeliest tokens only
    top_p: float | None = None  # choose among the fewest tokens that hold this much probability
    seed: int = 1  # the same seed, the same text
    num_samples: int = 1  # texts, all in one batch
    show_experts: int | None = None  # each token in its expert's colour in this layer (NO_COLOR=1: number); experts.png
    compare: list[str] | None = None  # two checkpoints instead of --checkpoint: same prompt and seed, side by side
    text: str | None = None  # with --compare: a file, on which both are measured in bits a byte
    gpu_hour: float = 2.0  # with --compare: price of the machine for an hour, in dollars
    save_legacy: str | None = None  # write no text: save the checkpoint there in the original code's form, for SGLang
    device: str = "auto"  # auto (a GPU, else the CPU), cpu, cuda (AMD's too) or mps (not tried yet)
    kernels: str = "auto"  # auto: the fastest, on a GPU mostly Triton's; triton: all of those; eager: PyTorch alone
    graph: bool = True  # on a GPU with its kernels: launch a token's as one graph; 0: each for itself, which is slower
    dtype: str = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16 or float16

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be 0 or more, not {self.seed}")
        if not 0 < self.gpu_hour < float("inf"):
            raise ValueError(f"--gpu_hour must be positive, not {self.gpu_hour}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype {self.dtype} is none of auto, float32, bfloat16, float16")
        if self.kernels not in KERNELS:
            raise ValueError(f"--kernels {self.kernels} is none of {', '.join(KERNELS)}")
        if self.compare is not None and len(self.compare) != 2:
            raise ValueError(f"--compare takes two checkpoints, not {len(self.compare)}")
        if self.text is not None and self.compare is None:
            raise ValueError("--text is what --compare measures its checkpoints on")
        if self.show_experts is not None and (self.compare is not None or self.num_samples > 1):
            raise ValueError("--show_experts shows one text: not with --compare, nor with --num_samples above 1")
        self.device = choose_device(self.device)
        if self.dtype == "auto":
            self.dtype = "bfloat16" if has_bf16(self.device) else "float32"


def read_prompt(prompt):
    """The text that --prompt stands for."""
    if prompt == "-" and sys.stdin is None:
        raise ValueError("--prompt -: standard input is closed")
    text = sys.stdin.read() if prompt == "-" else utf8_text(prompt[5:]) if prompt.startswith("FILE:") else prompt
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("--prompt is not UTF-8 text") from None
    return text


def utf8_text(path):
    """A file's text, line ends untouched. ValueError if it is not UTF-8."""
    try:
        return Path(path).expanduser().read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


class Writer:
    """A checkpoint and its tokenizer, ready to continue a prompt."""

    def __init__(self, path, config):
        self.config, checkpoint = config, find_checkpoint(path)
        self.model = Zaya.from_pretrained(checkpoint, config.device, getattr(torch, config.dtype), config.kernels)
        self.model.graph, self.tokenizer = config.graph, load_tokenizer(checkpoint)
        self.ends = as_list(self.model.config.eos_token_id)

    def ids(self, prompt):
        """The prompt's token ids after the model's bos token; with --chat, the turns that the template makes of it, and
        then the id that ends the answer joins self.ends. ValueError for an id that the model does not have."""
        model = self.model.config
        if self.config.chat:
            ids, end = self.tokenizer.turns(prompt)
            self.ends += [end] if end is not None else []
        else:
            ids = ([] if model.bos_token_id is None else [model.bos_token_id]) + self.tokenizer.encode(prompt)
        ids = ids or self.tokenizer.beginning()
        if len(ids) > model.max_position_embeddings:
            context = model.max_position_embeddings
            message = f"the prompt has {len(ids)} tokens; the model reads the last {context}, its context"
            print(f"sample.py: {message}", file=sys.stderr)
        self.refuse_unknown(ids, "the prompt")
        return ids

    def refuse_unknown(self, ids, what):
        """ValueError, naming what has them, for ids that the model does not have."""
        if max(ids) >= (known := self.model.config.vocab_size):
            raise ValueError(f"{what} has the token id {max(ids)}, the model knows {known}")

    def write(self, ids, show=None):
        """Continue ids num_samples times -> the texts' new ids, and a Speed. show(id) is called for each of the
        first text's."""
        config = self.config
        torch.manual_seed(config.seed)
        tokens = torch.tensor([ids] * config.num_samples, device=config.device)
        rows, open_rows = [[] for _ in range(config.num_samples)], set(range(config.num_samples))
        speed = Speed(self.model, config, len(ids))
        for column in self.model.next_tokens(
            tokens, config.max_new_tokens, config.temperature, config.top_k, config.top_p, self.ends
        ):
            column = column.tolist()
            speed.tick(len(open_rows))  # the id that ends a text took as long as any other
            open_rows -= {i for i in open_rows if column[i] in self.ends}
            for i in open_rows:
                rows[i].append(column[i])
            if show and 0 in open_rows:
                show(column[0])
            if not open_rows:
                break
        return rows, speed


class Speed:
    """How fast texts came, and how many bytes were read for them."""

    def __init__(self, model, config, prompt_tokens):
        self.model, self.config, self.prompt_tokens = model, config, prompt_tokens
        self.times, self.kept = [time.perf_counter()], []

    def tick(self, kept):
        """One more token for every text; `kept` of them belong to texts that had not ended before."""
        self.times.append(time.perf_counter())
        self.kept.append(kept)

    @property
    def tokens_per_s(self):
        """Of all texts, from the third token on: the first one is the prompt's, and before the second decoding is made
        ready. Of fewer tokens, all."""
        skip = 2 if len(self.kept) > 2 else 0
        return sum(self.kept[skip:]) / (self.times[-1] - self.times[skip])

    @property
    def steps_per_s(self):
        return (len(self.kept) - 2) / (self.times[-1] - self.times[2])

    def bytes_a_step(self, busy=None):
        """Bytes read for one step: all weights but those of idle experts, and keys and values half-way through the
        text. busy: the share of a layer's experts that a step reads; None: as if all were equally likely."""
        c, B = self.model.config, self.config.num_samples
        busy = busy or 1 - (1 - 1 / c.num_experts) ** B
        size = sum(
            p.numel() * p.element_size() * (busy if ".experts." in name else 1)
            for name, p in self.model.named_parameters()
            if c.tie_word_embeddings or "embed_tokens" not in name
        )
        past = min(self.prompt_tokens + len(self.kept) / 2, c.max_position_embeddings)
        number = self.model.head.element_size()
        return size + B * positions_seen(c, past) * 2 * c.num_key_value_heads * c.head_dim * number

    def report(self):
        """One line."""
        device, rate, power = self.config.device, self.tokens_per_s, watts(self.config.device)
        first_ms = 1e3 * (self.times[1] - self.times[0])
        line = f"{self.prompt_tokens} prompt tokens, the first new one after {first_ms:.0f} ms"
        line += f"; {sum(self.kept)} new ones at {rate:.1f} tokens/s"
        if len(self.kept) > 2:
            read, top = self.bytes_a_step() * self.steps_per_s, read_bandwidth(device)
            line += f", {read / 1e9:.3g} GB/s read, {read / top:.0%} of the {top / 1e9:.3g} GB/s to be had"
            if self.config.num_samples > 1 and self.model.routers:
                line += " (if all experts are equally busy)"
        line += f", {rate / power:.3g} tokens a joule" if power else ""
        return f"{line}; {device}, {self.config.dtype}"


def read_bandwidth(device):
    """Bytes that the device reads from memory in a second: the sum of a vector too large for any cache."""
    x, times = torch.ones(2**28 if device == "cuda" else 2**26, device=device), 8
    seconds = min(timeit.repeat(lambda: [x.sum() for _ in range(times)][-1].item(), repeat=4, number=1))  # item() waits
    return times * x.numel() * x.element_size() / seconds


class Detokenizer:
    """What continues a prompt's ids, piece by piece: whole characters only, as soon as their last byte is there. (Why
    the prompt: some tokenizers write no space before the first word of a text.)"""

    def __init__(self, tokenizer, ids=()):
        # The tokens of the last piece and of what is open, how many the first are, and how many characters are shown.
        # (To decode a long text whole for each token would take longer than the token.)
        self.tokenizer, self.ids = tokenizer, list(ids[-8:])
        self.before, self.shown = len(self.ids), len(tokenizer.decode(self.ids))

    def add(self, token):
        """What a token completes."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        piece = self.beyond(text.rstrip("\ufffd"))
        if text and text[-1] != "\ufffd":  # no character is open
            self.ids = self.ids[self.before :]
            self.before, self.shown = len(self.ids), len(self.tokenizer.decode(self.ids))
        return piece

    def rest(self):
        """At the end of the text: what never became a character."""
        return self.beyond(self.tokenizer.decode(self.ids))

    def beyond(self, text):
        piece, self.shown = text[self.shown :], max(self.shown, len(text))
        return piece


# ---------------------------------------------------------------------------------------------------------------------
# Seeing it think: which expert each token went to


@torch.no_grad()
def choices(model, ids):
    """The expert that each layer's router chooses for each token of a text -> (L, T), and its probability (L, T). The
    text is read again for that, block by block of the model's context."""
    outputs, parts = [], []
    hooks = [router.register_forward_hook(lambda module, args, out: outputs.append(out)) for router in model.routers]
    for block in torch.tensor([ids], device=model.head.device).split(model.config.max_position_embeddings, dim=1):
        model.hidden_states(block)
        parts.append([torch.stack([out[i].cpu() for out in outputs]) for i in (1, 0)])
        outputs.clear()
    for hook in hooks:
        hook.remove()
    return tuple(torch.cat(part, dim=1) for part in zip(*parts))


def in_color(text, expert):
    """text for a terminal, in the expert's colour; NO_COLOR in the environment: followed by the expert's number."""
    if os.environ.get("NO_COLOR"):
        return f"{text}[{expert}]"
    # Neighbours far apart in hue, none too dark or too bright for either background; of 6 x 6 x 6 colours, for a Mac's
    # terminal has long known no others.
    hue, value = expert * 0.618 % 1, 0.85 if expert % 2 else 0.65
    red, green, blue = (round(5 * part) for part in hsv_to_rgb(hue, 0.9, value))
    return f"\x1b[38;5;{16 + 36 * red + 6 * green + blue}m{text}\x1b[0m"


def show_experts(writer, ids, new, layer):
    """Print a text in the colours of a layer's experts, and a legend; draw experts.png."""
    model, tokenizer = writer.model, writer.tokenizer
    if len(ids + new) > (context := model.config.max_position_embeddings):
        message = f"the text is longer than the context, {context}: read in other pieces, some choices may be others"
        print(f"sample.py: {message}", file=sys.stderr)
    chosen, probability = choices(model, ids + new)
    start = len(ids)  # of what was written
    experts = model.config.num_experts
    pieces = pieces_of(tokenizer, new, ids)
    of_layer = chosen[layer, start:].tolist()
    print("".join(in_color(piece, expert) for piece, expert in zip(pieces, of_layer)))
    print(f"\nlayer {layer}: tokens of the text by expert")
    for expert in range(experts + 1):
        own = [piece for piece, choice in zip(pieces, of_layer) if choice == expert]
        if own:
            often = sorted(set(own), key=own.count, reverse=True)[:8]
            name = f"expert {expert:2}" if expert < experts else "skipped  "
            print(in_color(f"{name} {len(own):4}", expert) + "  " + " ".join(repr(piece) for piece in often))
    if not pieces:
        return
    draw_experts(pieces, chosen[:, start:], probability[:, start:], experts, layer, Path("experts.png"))
    print("picture: experts.png")


def pieces_of(tokenizer, ids, prompt=()):
    """The text that each token adds to those before it: a character belongs to the token that completes it."""
    growing = Detokenizer(tokenizer, prompt)
    pieces = [growing.add(token) for token in ids]
    return [*pieces[:-1], pieces[-1] + growing.rest()] if pieces else []


def draw_experts(pieces, chosen, probability, experts, layer, path):
    """A panel a layer (this and at most eight others), a column a token (the first 80), a row an expert; dark: sure of
    its choice."""
    plt, count, surest = pyplot(), min(80, len(pieces)), probability.max().item()
    layers = sorted({layer} | {round(i * (len(chosen) - 1) / 7) for i in range(8)})
    blues = plt.matplotlib.colors.ListedColormap(plt.get_cmap("Blues")(range(80, 256)))  # without the palest
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(4 + 0.16 * count, 1 + 1.5 * len(layers)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, layer in zip(axes[:, 0], layers):
        grid = torch.full((experts + 1, count), torch.nan)
        grid[chosen[layer, :count], torch.arange(count)] = probability[layer, :count]
        image = axis.imshow(grid[:experts].numpy(), aspect="auto", origin="lower", cmap=blues, vmin=0, vmax=surest)
        axis.set_ylabel(f"layer {layer}\nexpert")
    words = [repr(piece)[1:-1].replace(" ", "\u00b7") for piece in pieces[:count]]
    labels = [literal(word if len(word) <= 12 else f"{word[:11]}\u2026") for word in words]
    axes[-1, 0].set_xticks(range(count), labels, rotation=90, fontsize=7, family="monospace")
    axes[-1, 0].set_xlabel("token")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="the router's probability", shrink=0.8)
    figure.suptitle("which expert each token went to")
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Two checkpoints side by side


@torch.no_grad()
def bits_a_byte(writer, text):
    """How many bits each byte of a text takes if the model predicts it, block by block of its context, or of 2,048
    tokens if that is longer."""
    model, ids = writer.model, writer.tokenizer.encode(text)
    bos = model.config.bos_token_id
    given = writer.tokenizer.decode_bytes(ids[:1]) if bos is None else b""  # what nothing predicts
    ids = ids if bos is None else [bos, *ids]
    if len(ids) < 2:
        raise ValueError("--text is too short to measure anything on")
    writer.refuse_unknown(ids, "--text")
    context, nats = min(model.config.max_position_embeddings, 2048), 0.0
    for start in tqdm(range(0, len(ids) - 1, context), "read --text", unit="block", leave=False, disable=None):
        block = torch.tensor([ids[start : start + context + 1]], device=writer.config.device)
        _, loss = model(block[:, :-1], block[:, 1:])
        nats += loss.item() * (block.shape[1] - 1)
    # (The text's own bytes: a tokenizer that knows no line breaks, say, would decode fewer.)
    return nats / math.log(2) / (len(text.encode()) - len(given))


def compare(config, prompt):
    """Print what two checkpoints are, cost and write."""
    text = utf8_text(config.text) if config.text else None
    columns, facts = [], []
    both_zaya1 = all(read_config(find_checkpoint(path)).is_zaya1 for path in config.compare)
    for path in config.compare:
        writer = Writer(path, config)
        writer.model.shortcuts = both_zaya1  # or one would have them, and the other not
        ids = writer.ids(prompt)
        rows, speed = writer.write(ids)
        c, rate = writer.model.config, speed.tokens_per_s
        switches = [f"{name} {getattr(c, name)}" for name, value in ZAYA1.items() if getattr(c, name) != value]
        length = min(len(ids) + config.max_new_tokens, c.max_position_embeddings)
        total, active, flops, kv_bytes = token_costs(c, length)
        facts.append({
            "": path,
            "architecture": f"{c.attention}, {'dense' if c.mlp == 'dense' else f'{c.num_experts} experts'}",
            "unlike ZAYA1": ", ".join(switches) or "in nothing",
            "parameters": f"{total:,}",
            "active a token": f"{active:,}",
            "MFLOP a token": f"{flops / 1e6:,.1f}",
            "KV-cache bytes a token, bf16": f"{kv_bytes:,}",
            "tokens/s": f"{rate:,.1f}",
            f"$ a million tokens, ${config.gpu_hour:g}/hour": f"{1e6 / rate / 3600 * config.gpu_hour:.2f}",
        } | ({"bits a byte of --text": f"{bits_a_byte(writer, text):.4f}"} if config.text else {}))  # fmt: skip
        columns.append(["".join(pieces_of(writer.tokenizer, row, ids)) for row in rows])
        del writer, speed  # before the other model is loaded
    label = max(map(len, facts[0]))
    width = max(24, (shutil.get_terminal_size((120, 24)).columns - 3) // 2)
    for name in facts[0]:
        print(f"{name:{label}}", *(f"{fact[name]:>{max(24, *map(len, fact.values()))}}" for fact in facts), sep="  ")
    if not both_zaya1:
        print("(tokens/s: both without the short cuts of a ZAYA1's decoding, which not both could take)")
    for a, b in zip(*columns):
        names = " | ".join(f"{path[-width:]:{width}}" for path in config.compare)
        print(f"\n{names}\n{'-' * width}-+-{'-' * width}")
        start = "" if config.chat else prompt
        for left, right in zip_longest(folded(start + a, width), folded(start + b, width), fillvalue=""):
            print(f"{left:{width}} | {right}".replace("\0", ""))


def folded(text, width):
    """A text's lines, none wider than width. What would move the cursor becomes U+FFFD; a character as wide as two has
    a NUL behind it, to be left out in print."""
    text = "".join("\ufffd" if category(c) == "Cc" and c not in "\n\r\t" else c for c in text)
    text = "".join(f"{c}\0" if east_asian_width(c) in "FW" else c for c in text)
    lines = [line.expandtabs(4) for line in text.split("\n")]
    return [part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]


def save_legacy(checkpoint, folder):
    """Write a checkpoint and its tokenizer to another folder, in the form of Zyphra's original code."""
    checkpoint, folder = find_checkpoint(checkpoint), Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--save_legacy {folder} is not empty")
    tokenizer = load_tokenizer(checkpoint)
    Zaya.from_pretrained(checkpoint).save_pretrained(folder, legacy=True)
    tokenizer.save(folder)
    print(f"{folder} holds {checkpoint} in the original code's form")


def main():
    config = SampleConfig(**parse_flags(__doc__, SampleConfig))
    if config.save_legacy is not None:
        return save_legacy(config.checkpoint, config.save_legacy)
    prompt = read_prompt(config.prompt)
    if config.compare:
        return compare(config, prompt)
    writer = Writer(config.checkpoint, config)
    layers = len(writer.model.routers)
    if config.show_experts is not None and not 0 <= config.show_experts < layers:
        raise ValueError(
            f"--show_experts {config.show_experts}: no such layer of experts; "
            + (f"layers are 0 to {layers - 1}" if layers else "the model is dense")
        )
    ids, start = writer.ids(prompt), "" if config.chat else prompt
    pieces = Detokenizer(writer.tokenizer, ids)

    def show(token):
        print(pieces.add(token), end="", flush=True)

    streaming = config.num_samples == 1 and config.show_experts is None
    if config.num_samples == 1:
        print(start, end="")
    texts, speed = writer.write(ids, show if streaming else None)
    if streaming:
        print(pieces.rest())
    elif config.show_experts is not None:
        show_experts(writer, ids, texts[0], config.show_experts)
    else:
        for i, row in enumerate(texts, start=1):
            print(f"--- {i}\n{start}{''.join(pieces_of(writer.tokenizer, row, ids))}")
    if sys.stderr:
        print(speed.report(), file=sys.stderr)


if __name__ == "__main__":
    with stop_in_one_line():
        main()
