"""The README's figures: what context costs, what a router has learned, what residual scales look like.

python tests/bench_figures.py costs
python tests/bench_figures.py router --checkpoint out
python tests/bench_figures.py scales --checkpoint out-deep
"""

import argparse
import keyword
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample
from data.dataset import in_range
from train import refuse_other_tokens
from zaya import OneLineParser, PRESETS, Zaya, find_checkpoint, pyplot, stop_in_one_line, token_costs

plt = pyplot()


def costs(args):
    """KV cache and operations a token against context, for ZAYA1-8B and the same model with multi-head attention."""
    contexts = 1024 * 2 ** np.arange(8)
    rows = {"CCA": PRESETS["zaya1-8b"], "multi-head attention": replace(PRESETS["zaya1-8b"], attention="mha")}
    figure, (memory, work) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    print(f"{'context':>8}" + "".join(f"{name + ', GB':>26}{'GFLOP a token':>15}" for name in rows))
    found = {name: [token_costs(config, int(context)) for context in contexts] for name, config in rows.items()}
    for i, context in enumerate(contexts):
        line = "".join(f"{context * t[i][3] / 1e9:26.3f}{t[i][2] / 1e9:15.2f}" for t in found.values())
        print(f"{context:8,}{line}")
    for name, entries in found.items():
        memory.loglog(contexts, [c * kv / 1e9 for c, (*_, kv) in zip(contexts, entries)], "o-", label=name)
        work.loglog(contexts, [flops / 1e9 for _, _, flops, _ in entries], "o-", label=name)
    memory.set(ylabel="GB of KV cache a text, bf16", title="memory")
    work.set(ylabel="GFLOP of a forward pass a token", title="work")
    work.set_yticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    for axis in (memory, work):
        axis.set(xlabel="tokens of context")
        axis.set_xticks(contexts, [f"{c // 1024}K" for c in contexts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("ZAYA1-8B: what a context costs")
    save(figure, args.out / "costs.png")


def kind(text):
    """What a piece of Python source is."""
    word = text.strip()
    if not word:
        return "line break" if "\n" in text else "blanks"
    if word in keyword.kwlist:
        return "keyword"
    if word[0].isdigit():
        return "number"
    if any(c.isalpha() for c in word):
        return "word, at its start" if text[0].isspace() or text[0] == "_" else "word, going on"
    return "bracket" if set(word) & set("()[]{}") else "quote, #" if set(word) & set("'\"#`") else "operator, comma"


def router(args):
    """Which kinds of token each expert gets, on the text that a run of the default data is validated on."""
    writer = sample.Writer(args.checkpoint, sample.SampleConfig(device="cpu"))
    model, tokenizer = writer.model, writer.tokenizer
    if not model.routers:
        raise ValueError(f"the model of {args.checkpoint} is dense: it has no router")
    refuse_other_tokens(ROOT / "data" / "stdlib", find_checkpoint(args.checkpoint))
    ids = np.fromfile(ROOT / "data" / "stdlib" / "val.bin", "<u2")[: args.tokens].tolist()
    chosen, _ = sample.choices(model, ids)
    pieces = [tokenizer.decode([token]) for token in ids]
    kinds = [kind(piece) for piece in pieces]
    names = sorted(set(kinds), key=kinds.count, reverse=True)
    experts = model.config.num_experts
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(1.5 + 5 * len(chosen), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for layer, (axis, choice) in enumerate(zip(axes[0], chosen)):
        table = np.zeros((len(names), experts))
        for name, expert in zip(kinds, choice.tolist()):
            if expert < experts:
                table[names.index(name), expert] += 1
        image = axis.imshow(table / table.sum(axis=0).clip(1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(xlabel="expert", title=f"layer {layer}", xticks=range(0, experts, max(1, experts // 16)))
        print(f"layer {layer}: an expert's most frequent tokens, in {len(ids):,} of the validation text")
        for expert in range(experts):
            own = [piece for piece, number in zip(pieces, choice.tolist()) if number == expert]
            often = sorted(set(own), key=own.count, reverse=True)[:10]
            print(f"{expert:4} {len(own) / len(ids):6.1%}  " + " ".join(repr(piece) for piece in often))
    axes[0, 0].set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes[0].tolist(), label="share of an expert's tokens")
    figure.suptitle("what the router has learned")
    save(figure, args.out / "router.png")


def scales(args):
    """The learned scales of every merge, from the first layer to the last."""
    model = Zaya.from_pretrained(args.checkpoint)
    if not model.config.residual_scaling:
        raise ValueError(f"the model of {args.checkpoint} has no residual scaling")
    merges = [getattr(layer, f"post_{part}_residual_scale") for layer in model.layers for part in ("attention", "mlp")]
    depth = np.arange(len(merges)) / 2
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharex=True)
    for axis, kind_of, neutral in zip(axes, ("scale", "bias"), (1, 0)):
        for name, label in (("residual", "of the stream"), ("hidden_states", "of what is added")):
            values = torch.stack([getattr(merge, f"{name}_{kind_of}").detach() for merge in merges]).numpy()
            low, middle, high = np.percentile(values, (10, 50, 90), axis=1)
            axis.plot(depth, middle, "o-", markersize=4, label=f"{label}: median, 10th to 90th percentile")
            axis.fill_between(depth, low, high, alpha=0.2)
            print(f"{name}_{kind_of}: " + " ".join(f"{value:.3f}" for value in middle))
        axis.axhline(neutral, color="gray", linewidth=0.8, linestyle=":")
        axis.set(xlabel="layer (half: after its experts)", title=f"residual scaling: {kind_of}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save(figure, args.out / "scales.png")


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"picture: {path}")


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("costs", "router", "scales"), help="which picture")
    parser.add_argument("--checkpoint", default="out", help="a run directory or a checkpoint (default: out)")
    parser.add_argument(
        "--tokens",
        type=in_range(int, 1, 2**31),
        default=40_000,
        help="of the text that `router` looks at (default: 40000)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "assets", help="folder for the picture (default: assets)")
    args = parser.parse_args()
    globals()[args.figure](args)


if __name__ == "__main__":
    with stop_in_one_line():
        main()
