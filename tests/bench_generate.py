"""Text at batch 1, greedy, float32 on a CPU: tokens/s of zaya.py beside transformers' generate() on the same weights.

python tests/bench_generate.py [--rounds 5]
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import ZayaForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from zaya import Zaya, ZayaConfig  # noqa: E402

CONFIG = ZayaConfig(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    moe_intermediate_size=256, num_experts=16, router_hidden_size=64, vocab_size=4096, initializer_range=0.1,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
PROMPT, NEW = 16, 100


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="texts of each (default: 5)")
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    ours = Zaya(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = ZayaForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(1, CONFIG.vocab_size, (1, PROMPT))
    ways = {
        "transformers": lambda: theirs.generate(prompt, max_new_tokens=NEW, do_sample=False),
        "zaya.py": lambda: ours.generate(prompt, NEW, temperature=0),
    }
    texts = [way() for way in ways.values()]
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {PROMPT} + {NEW} tokens")
    for name, times in seconds.items():
        print(f"{name:13}{NEW / statistics.median(times):8.1f} tokens/s")
    ratio = statistics.median(b / a for a, b in zip(seconds["zaya.py"], seconds["transformers"]))
    print(f"{'ratio':13}{ratio:8.2f}, the same text: {texts[0].equal(texts[1])}")


if __name__ == "__main__":
    main()
