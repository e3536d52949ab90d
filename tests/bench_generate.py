"""Text at batch 1, greedy, float32 on a CPU: tokens/s of zaya.py beside transformers' generate() on the same weights.

python tests/bench_generate.py [--rounds 5]
"""

import argparse
import statistics
from dataclasses import replace

import torch
from bench_transformers import CONFIG, both_models, seconds

PROMPT, NEW = 16, 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="texts of each (default: 5)")
    rounds = parser.parse_args().rounds
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


if __name__ == "__main__":
    main()
