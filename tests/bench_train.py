"""Training speed on one GPU: tokens/s and MFU of a replica, optimizer included; beside its dense twin and transformers.

    python tests/bench_train.py                        preset small (1.1B parameters), 4,096 tokens of context, bf16
    python tests/bench_train.py --preset nano --micro_batch_size 2 --tokens 1024 --steps 2      a try on a CPU

MFU: 6 x (active parameters without the embedding + the LM head) a token, plus causal attention, over the GPU's dense
bf16 peak by datasheet. transformers is timed forward and backward alone, against the same of ours on the same weights,
with as many sequences at once as it has memory for.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.dataset import in_range  # noqa: E402
from train import Optimizer, Ranks, TrainConfig, collect_counts, rates  # noqa: E402
from zaya import KERNELS, PRESETS, OneLineParser, Zaya, stop_in_one_line, training_flops  # noqa: E402


def median_seconds(function, steps, device):
    """After two calls to warm up."""
    times = []
    for i in range(steps + 2):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times += [time.perf_counter() - start] if i >= 2 else []
    return statistics.median(times)


def forward_and_backward(run, tokens, size):
    """The gradient of a batch, micro-batches of that size one after the other. run(inputs, targets) -> loss."""
    for rows in tokens.split(size):
        (run(rows[:, :-1], rows[:, 1:]) * (len(rows) / len(tokens))).backward()


def seconds_of_most(run, tokens, steps, device):
    """The time of forward and backward of as many of the rows of tokens as fit into memory, half as many at each try;
    and that number."""
    for size in (len(tokens) >> i for i in range(len(tokens).bit_length())):
        try:
            rows = tokens[:size]
            return median_seconds(lambda: forward_and_backward(run, rows, size), steps, device), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        torch.cuda.empty_cache()


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = in_range(int, 1, 2**31)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="the model (default: small)")
    parser.add_argument(
        "--tokens", type=count, default=524288, help="tokens a step, in whole sequences, one at least (default: 524288)"
    )
    parser.add_argument("--micro_batch_size", type=count, default=16, help="sequences a forward pass (default: 16)")
    parser.add_argument("--steps", type=count, default=5, help="timed steps of each (default: 5)")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="as in train.py (default: auto)")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=None, help="0 or 1 (default: 1 on a GPU)")
    flags = parser.parse_args()
    ranks = Ranks("auto")
    device = ranks.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compiled = device.type == "cuda" if flags.compile is None else flags.compile
    peak, product = rates(device, str(dtype).split(".")[1])
    config = PRESETS[flags.preset]
    context = config.max_position_embeddings
    tokens = torch.randint(config.vocab_size, (max(1, flags.tokens // context), context + 1), device=device)
    size = min(flags.micro_batch_size, len(tokens))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {dtype}, "
        f"{len(tokens)} x {context} tokens a step, {size} sequences at once, "
        f"a large product {product / 1e12:.1f} TFLOP/s"
    )
    few, ours, weights = tokens[:size], None, None

    def time_training(label, twin):
        """Print a row; of the MoE, keep the weights and the time of forward and backward alone."""
        nonlocal ours, weights
        torch.manual_seed(0)
        model = Zaya(twin, flags.kernels).to(device)
        optimizer = Optimizer(model, TrainConfig(compile=compiled), dtype, ranks)
        run = torch.compile(model, dynamic=False) if compiled else model

        def step():
            forward_and_backward(lambda x, y: run(x, y)[1], tokens, size)
            optimizer.step(0, collect_counts(model.routers, ranks))
            model.zero_grad(set_to_none=True)

        seconds = median_seconds(step, flags.steps, device)
        total, active = model.parameter_counts()
        achieved = training_flops(twin, active, context) * tokens[:, 1:].numel() / seconds
        mfu = f"MFU {achieved / peak:.1%}" if peak else "MFU unknown (no datasheet for this device)"
        print(
            f"{label:12}{total / 1e6:8.1f}M parameters, {active / 1e6:.1f}M active: {seconds:.3f} s a step, "
            f"{tokens[:, 1:].numel() / seconds:,.0f} tokens/s, {achieved / 1e12:.2f} TFLOP/s, {mfu}, "
            f"{achieved / product:.1%} of the product's rate",
            flush=True,
        )
        if label == "MoE":
            alone = partial(forward_and_backward, lambda x, y: run(x, y)[1], few, size)
            ours = median_seconds(alone, flags.steps, device)
            weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}

    time_training("MoE", config)
    time_training("dense twin", replace(config, mlp="dense"))

    from transformers import ZayaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.device("meta"):
        shell = Zaya(config)
    with tempfile.TemporaryDirectory() as folder:
        shell.save_pretrained(folder, weights)
        theirs = ZayaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
    theirs.set_experts_implementation("grouped_mm")
    runs = {"eager": theirs} | ({"compiled": torch.compile(theirs, dynamic=False)} if compiled else {})
    for label, run in runs.items():

        def loss(x, y, run=run):
            return run(x, labels=y, shift_labels=y.contiguous(), use_cache=False).loss

        try:
            seconds, size = seconds_of_most(loss, few, flags.steps, device)
        except Exception as error:  # whatever keeps torch.compile from it is theirs to say
            print(f"transformers, {label}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        theirs_a_second, ours_a_second = size * context / seconds, len(few) * context / ours
        print(
            f"transformers, {label}: forward and backward, {theirs_a_second:,.0f} tokens/s ({size} sequences at once), "
            f"ours {ours_a_second:,.0f} ({len(few)}): {ours_a_second / theirs_a_second:.2f} times as fast"
        )


if __name__ == "__main__":
    with stop_in_one_line():
        main()
