"""Speed of text, greedy, with random weights.

python tests/bench_generate.py                      a CPU: tokens/s beside transformers' generate() on the same weights
python tests/bench_generate.py --preset zaya1-8b    a GPU, bf16: tokens/s, GB/s, first token, and what context costs
"""

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from bench_transformers import CONFIG, both_models, seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
from data.dataset import in_range
from zaya import PRESETS, OneLineParser, Zaya, stop_in_one_line

PROMPT, NEW = 16, 100


def beside_transformers(rounds):
    """Batch 1, float32: both write the same text from the same weights, by turns."""
    config = replace(CONFIG, initializer_range=0.1)  # so that the text does not repeat itself
    ours, theirs = both_models(config)
    theirs.eval()
    prompt = torch.randint(1, config.vocab_size, (1, PROMPT))
    ways = {
        "transformers": lambda: theirs.generate(prompt, max_new_tokens=NEW, do_sample=False),
        "zaya.py": lambda: ours.generate(prompt, NEW, temperature=0),
    }
    texts = [way() for way in ways.values()]
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {PROMPT} + {NEW} tokens")
    for name, taken in times.items():
        print(f"{name:13}{NEW / statistics.median(taken):8.1f} tokens/s")
    ratio = statistics.median(b / a for a, b in zip(times["zaya.py"], times["transformers"]))
    print(f"{'ratio':13}{ratio:8.2f}, the same text: {texts[0].equal(texts[1])}")


def random_weights(config, device, dtype):
    """A fresh model of that shape, made where it lies (in fp32 first)."""
    with torch.device(device):
        return Zaya(config).cast(dtype)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def write(model, batch, prompt, new):
    """Greedy texts after random prompts -> tokens/s in all, and bytes read a second."""
    device = model.head.device.type
    flags = sample.SampleConfig(num_samples=batch, device=device, dtype=str(model.head.dtype).split(".")[1])
    tokens = torch.randint(model.config.vocab_size, (batch, prompt), device=device)
    wait(device)
    speed = sample.Speed(model, flags, prompt)
    texts = [tokens]
    for count, token in enumerate(model.next_tokens(tokens, new, temperature=0), start=1):
        texts.append(token[:, None])
        if count in (1, 2, new):  # the times that count
            wait(device)
        speed.tick(batch)
    busy = share_of_experts(model, torch.cat(texts, dim=1)[:, prompt:])
    return speed.tokens_per_s, speed.bytes_a_step(busy) * speed.steps_per_s


def share_of_experts(model, texts):
    """The share of a layer's experts that some text of texts (B, T) goes to at a step, mean of the steps and layers."""
    chosen = torch.stack([sample.choices(model, text)[0] for text in texts.tolist()])  # (B, L, T)
    one_hot = torch.nn.functional.one_hot(chosen, model.config.num_experts + 1)
    return one_hot[..., :-1].amax(dim=0).float().mean().item()


def seconds_to_first_token(model, prompt):
    """After a random prompt of that many tokens."""
    tokens = torch.randint(model.config.vocab_size, (1, prompt), device=model.head.device)

    def read():
        next(model.next_tokens(tokens, 1, temperature=0))
        wait(tokens.device.type)

    read()
    return statistics.median(seconds(read) for _ in range(5))


def after_context(model, batch, context, new):
    """tokens/s after that many tokens of context, whose keys and values are random: nobody waits for their prefill."""
    device = model.head.device.type
    cache = model.new_cache(batch, context + new + 8)
    for layer in cache.layers:
        layer.k.normal_()
        layer.v.normal_()
    cache.advance(context)
    with torch.inference_mode():
        step = model.decoder(cache, lambda hidden: model.logits(hidden).argmax(dim=-1))
        token = step(torch.zeros(batch, dtype=torch.int64, device=device))
        wait(device)

        def decode():
            nonlocal token
            for _ in range(new):
                token = step(token)
            wait(device)

        return batch * new / seconds(decode)


def speeds(preset, device, contexts, new):
    """Print the table of one preset."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = replace(PRESETS[preset], max_position_embeddings=2 * max(contexts))
    model, top = random_weights(config, device, dtype), sample.read_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{preset}, {str(dtype)[6:]}, {name}, torch {torch.__version__}; reads {top / 1e9:,.0f} GB/s\n")
    for batch in (1, 16):
        write(model, batch, 16, 8)  # compiles
        rate, read = write(model, batch, 16, new)
        print(f"batch {batch:2}: {rate:9,.1f} tokens/s in all, {read / 1e9:,.0f} GB/s, {read / top:.0%} of bandwidth")
    prompt = min(4096, max(contexts))
    print(f"first token after {prompt:,} of prompt: {1e3 * seconds_to_first_token(model, prompt):,.1f} ms\n")
    print(f"{'tokens/s after a context of':30}" + "".join(f"{context:>10,}" for context in contexts))
    del model
    for label, changes in (("CCA", {}), ("MHA's cache, 8 times as large", {"attention": "mha"})):
        model = random_weights(replace(config, **changes), device, dtype)
        model.shortcuts = device == "cuda"  # a CPU's is for CCA alone
        rates = [after_context(model, 1, context, new // 4) for context in contexts]
        print(f"{label:30}" + "".join(f"{rate:10,.1f}" for rate in rates))
        more = [1e3 / rate - 1e3 / rates[0] for rate in rates]  # MHA's step differs in more than its cache
        print(f"{'  ms a token more':30}" + "".join(f"{ms:10,.2f}" for ms in more), flush=True)
        del model


count = in_range(int, 1, 2**31)


def counts(text):
    return [count(word) for word in text.split(",")]


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contexts = "1024,8192,32768,131072"
    parser.add_argument("--rounds", type=count, default=5, help="texts of each beside transformers (default: 5)")
    parser.add_argument("--preset", choices=PRESETS, help="measure this shape alone, on a GPU if there is one")
    parser.add_argument("--contexts", type=counts, default=contexts, help=f"with --preset (default: {contexts})")
    parser.add_argument(
        "--new", type=in_range(int, 4, 2**31), default=256, help="tokens to write with --preset (default: 256)"
    )
    args = parser.parse_args()
    if args.preset:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        speeds(args.preset, device, args.contexts, args.new)
    else:
        beside_transformers(args.rounds)


if __name__ == "__main__":
    with stop_in_one_line():
        main()
