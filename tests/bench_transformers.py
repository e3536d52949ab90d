"""One training step (forward and backward, fp32, CPU) of zaya.py against transformers' ZayaForCausalLM.

    python tests/bench_transformers.py [--rounds 15]

Same weights, one process, the two alternating, each pair on new tokens: as in training, no step's experts have the
shares of another's. Medians, and the ratio of each pair's times.
transformers runs its fastest experts on this machine, set_experts_implementation("grouped_mm").
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import in_range  # noqa: E402
from zaya import OneLineParser, Zaya, ZayaConfig, stop_in_one_line  # noqa: E402

CONFIG = ZayaConfig(
    hidden_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=32,
    moe_intermediate_size=256, num_experts=16, router_hidden_size=64, vocab_size=4096,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
BATCH, TIME = 8, 256


def both_models(config):
    """zaya.py's and transformers' model with the same random weights."""
    from transformers import ZayaForCausalLM  # here: what needs CONFIG alone runs without transformers, too
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    ours = Zaya(config)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        return ours, ZayaForCausalLM.from_pretrained(folder)


def seconds(step, *batch):
    start = time.perf_counter()
    step(*batch)
    return time.perf_counter() - start


def main():
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=in_range(int, 1, 2**31), default=15, help="timed steps of each (default: 15)")
    rounds = parser.parse_args().rounds
    ours, theirs = both_models(CONFIG)
    theirs.train().set_experts_implementation("grouped_mm")

    def our_step(inputs, targets):
        ours.zero_grad(set_to_none=True)
        loss = ours(inputs, targets)[1]
        loss.backward()
        return loss

    def their_step(inputs, targets):
        theirs.zero_grad(set_to_none=True)
        # Their labels are shifted inside; `shift_labels` takes them already shifted, as ours are.
        loss = theirs(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        return loss

    texts = torch.randint(CONFIG.vocab_size, (3 + rounds, BATCH, TIME + 1))
    warm_up, *batches = ((text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts)
    difference = (our_step(*warm_up) - their_step(*warm_up)).abs().item()
    times = [(seconds(our_step, *batch), seconds(their_step, *batch)) for batch in batches][2:]
    our_ms, their_ms = (1e3 * statistics.median(column) for column in zip(*times))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {BATCH} x {TIME} tokens, "
        f"losses differ by {difference:.1e}"
    )
    print(f"transformers {their_ms:8.1f} ms a step\nzaya.py      {our_ms:8.1f} ms a step\nratio        {ratio:8.2f}")


if __name__ == "__main__":
    with stop_in_one_line():
        main()
