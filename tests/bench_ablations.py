"""What each idea buys: train small models that differ in one thing, and compare them.

python tests/bench_ablations.py cca|attention|router|switch|scaling|dense|long|experts [--seeds 3] [--jobs 2]

Every row is trained with every seed on the same tokens, its experts' width chosen so that all rows have the same
active parameters; then once more, where its step takes another time than the first row's, for as many steps as fit
that row's time. `switch` goes over to another text halfway; `long` has three times the steps. What --out already holds
is not trained again: only the table and the picture are made.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train
from data.dataset import in_range
from zaya import PRESETS, OneLineParser, Zaya, ZayaConfig, newest_first, stop_in_one_line

LATER_DATA = ROOT / "out-ablations" / "shakespeare"
BASE = dict(
    hidden_size=128, num_hidden_layers=3, head_dim=16, num_attention_heads=4, num_key_value_heads=1,
    moe_intermediate_size=128, router_hidden_size=32, num_experts=8,
)  # fmt: skip
RUN = dict(
    steps=220, batch_size=16, block_size=256, lr=0.012, warmup=20, eval_every=20, eval_batches=8, log_every=20,
    dtype="bfloat16", device="cpu",
)  # fmt: skip
ROWS = {  # flags that differ from BASE
    "zaya": {},
    # Compressed Convolutional Attention, part by part ([C] table V)
    "bare": dict(cca_without="depthwise,grouped,value_shift,qk_mean"),
    "one_convolution": dict(cca_without="grouped,value_shift,qk_mean"),
    "two_convolutions": dict(cca_without="value_shift,qk_mean"),
    "and_value_shift": dict(cca_without="qk_mean"),
    "no_convolutions": dict(cca_without="depthwise,grouped"),
    "no_value_shift": dict(cca_without="value_shift"),
    # Kinds of attention; all but mha have the same KV cache
    "gqa_narrow": dict(attention="gqa"),
    "gqa_wide": dict(attention="gqa", num_attention_heads=8),
    "mha": dict(attention="mha"),
    # Router and balancing
    "no_eda": dict(router="no_eda"),
    "linear": dict(router="linear"),
    "sign": dict(balancing="sign"),
    "unbalanced": dict(balancing="none"),
    "no_scaling": dict(residual_scaling=0),
    "dense": dict(mlp="dense"),
} | {f"{n}_experts": dict(num_experts=n) for n in (1, 4, 16, 64)}
TABLES = {
    "cca": ["zaya", "bare", "one_convolution", "two_convolutions", "and_value_shift", "no_convolutions",
            "no_value_shift"],
    "attention": ["zaya", "gqa_narrow", "gqa_wide", "mha"],
    "router": ["zaya", "no_eda", "linear", "sign", "unbalanced"],
    "switch": ["zaya", "no_eda", "linear", "sign", "unbalanced"],
    "scaling": ["zaya", "no_scaling"],
    "dense": ["zaya", "dense"],
    "long": ["zaya", "dense", "unbalanced"],
    "experts": ["zaya", *(f"{n}_experts" for n in (1, 4, 16, 64))],
}  # fmt: skip
SAME_TIME = 0.05  # relative; two timings of a step differ by 0.02
CHANGES = {  # of RUN
    "switch": dict(eval_every=10, log_every=10),
    "long": dict(steps=3 * RUN["steps"], eval_every=60, log_every=60),
}


@cache
def shape_of(row):
    """The shape of a row's model, of the active parameters of the first one."""
    flags = BASE | ROWS[row]

    def active(width):
        with torch.device("meta"):
            return Zaya(config_of(flags | {"moe_intermediate_size": width})).parameter_counts()[1]

    a_width = active(2) - active(1)
    with torch.device("meta"):
        goal = Zaya(config_of(BASE)).parameter_counts()[1]
    return flags | {"moe_intermediate_size": 1 + round((goal - active(1)) / a_width)}


def config_of(flags):
    """The ZayaConfig of a row, as train.py makes it."""
    shape = train.flags_of(ZayaConfig, flags)
    if "cca_without" in shape:
        shape["cca_without"] = shape["cca_without"].split(",")
    return train.model_config(train.TrainConfig(block_size=256), shape, PRESETS["nano"].vocab_size, None)


def one_step(row):
    """A function that trains a fresh model of a row for one step -> the seconds that it took."""
    flags, ranks = shape_of(row), train.Ranks("cpu")
    model = Zaya(config_of(flags))
    own = train.TrainConfig(**RUN | {name: v for name, v in flags.items() if name.startswith("balanc")})
    optimizer = train.Optimizer(model, own, torch.bfloat16, ranks)
    tokens = torch.randint(PRESETS["nano"].vocab_size, (RUN["batch_size"], RUN["block_size"] + 1))

    def step():
        start = time.perf_counter()
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(50, train.collect_counts(model.routers, ranks))
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def step_times(rows, rounds=25):
    """{row: time of a step as a multiple of the first row's}: the median over rounds of the two by turns."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {rows[0]: 1.0}
    for row in tqdm(rows[1:], desc="timing", disable=None):
        step, first = one_step(row), one_step(rows[0])  # both fresh: a step's time changes as its router learns
        ratios = [step() / first() for _ in range(rounds + 2)]
        times[row] = statistics.median(ratios[2:])
    torch.set_num_threads(torch_threads)
    return times


def finished(out, flags):
    """Whether --out holds that run already."""
    log = train.read_log(out)
    return bool(log) and log[-1]["step"] == flags["steps"]


def start(out, flags):
    """train.py on one core."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "train.py", "--out", os.path.relpath(out, ROOT), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{out}: {done.stderr.splitlines()[-1]}")


def train_run(out, flags, switch):
    """One run, of which the log and the flags are kept. switch: the second half of its steps is on the other text."""
    shutil.rmtree(out, ignore_errors=True)
    half = flags["steps"] // 2
    start(out, flags | ({"save_every": half, "keep": 99} if switch else {}))
    if switch and finished(out, flags):  # and not stopped by Ctrl-C: back to the middle, and on from there
        for checkpoint in newest_first(out):
            if checkpoint.name != f"step-{half:07d}":
                shutil.rmtree(checkpoint)
        start(out, {"resume": True, "data": LATER_DATA})
    for checkpoint in newest_first(out):
        shutil.rmtree(checkpoint)
    for picture in out.glob("*.png"):
        picture.unlink()


def prepare_later_data(copy):
    """Tiny Shakespeare in the tokens of data/stdlib, from a copy or the network."""
    if not (LATER_DATA / "meta.json").exists():
        file = ["--file", copy] if copy else []
        prepare = [sys.executable, ROOT / "data" / "shakespeare" / "prepare.py", *file]
        done = subprocess.run([*prepare, "--tokenizer", ROOT / "data" / "stdlib", "--out", LATER_DATA])
        if done.returncode:
            sys.exit(done.returncode)  # it has said why


def plan(table, out, seeds, times):
    """{row: ([run directories of equal tokens], [those of equal time])} and {run directory: its flags}."""
    extra = CHANGES.get(table, {})
    prefix, runs, flags = f"{table}-" if extra else "", {}, {}
    for seed in range(1, seeds + 1):
        for row in TABLES[table]:
            equal_tokens, equal_time = runs.setdefault(row, ([], []))
            run = out / f"{prefix}{row}-{seed}"
            flags[run] = RUN | shape_of(row) | extra | {"seed": seed}
            equal_tokens.append(run)
            if abs(times[row] - 1) > SAME_TIME:
                steps = round(flags[run]["steps"] / times[row] / 10) * 10
                run = out / f"{prefix}{row}.time-{seed}"
                flags[run] = RUN | shape_of(row) | extra | {"seed": seed, "steps": steps}
            equal_time.append(run)
    return runs, flags


def trials_of(runs):
    """{row: (its trials of equal tokens, those of equal time: the same, if a step takes no longer)}."""
    found = {}
    for row, (equal_tokens, equal_time) in runs.items():
        tokens = train.Trials(equal_tokens)
        timed = tokens if equal_time == equal_tokens else train.Trials(equal_time)
        found[row] = tokens, timed
    return found


def lines(trials, times):
    """The lines of a table."""
    yield "| row | active | time of a step | loss, equal tokens | loss, equal time | load entropy |"
    yield "|---|---|---|---|---|---|"
    for row, (tokens, timed) in trials.items():
        loss = tokens.at_end("val_loss", 4, spread=True)
        in_time = "same" if timed is tokens else timed.at_end("val_loss", 4, spread=True)
        entropy = tokens.at_end("val_load_entropy", 3)
        yield f"| {row} | {tokens.active:,} | {times[row]:.2f} | {loss} | {in_time} | {entropy} |"


def main():
    parser, count = OneLineParser(description=__doc__.splitlines()[0]), in_range(int, 1, 1000)
    parser.add_argument("table", choices=TABLES, help="what to vary")
    parser.add_argument("--seeds", type=count, default=3, help="runs a row (default: 3)")
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time, each on one core (default: 2)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "assets" / "ablations",
        help="folder of runs and picture (default: assets/ablations, the README's: for other seeds take another)",
    )  # fmt: skip
    parser.add_argument("--shakespeare", type=Path, help="a copy of tiny Shakespeare for `switch`, else downloaded")
    args = parser.parse_args()
    rows, file = TABLES[args.table], args.out / "times.json"
    args.out.mkdir(parents=True, exist_ok=True)
    times = json.loads(file.read_text()) if file.exists() else {}
    if set(rows) - set(times):
        times |= step_times(rows)
        file.write_text(json.dumps(times, indent=1) + "\n")
    runs, flags = plan(args.table, args.out, args.seeds, times)
    missing = {run: flags[run] for run in flags if not finished(run, flags[run])}
    if missing:
        train.open_data("stdlib", train.Ranks("cpu"))
        if args.table == "switch":
            prepare_later_data(args.shakespeare)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), unit="run", disable=None) as bar:
        for _ in pool.map(lambda item: train_run(*item, args.table == "switch"), missing.items()):
            bar.update()
    trials, picture = trials_of(runs), args.out / f"{args.table}.png"
    print("\n".join(lines(trials, times)))
    equal_tokens = [tokens for tokens, _ in trials.values()]
    for row, tokens in zip(rows, equal_tokens):  # the runs' own times are of a machine that did other things as well
        tokens.ms_a_step = times[row] * equal_tokens[0].ms_a_step
    change = RUN["steps"] // 2 * RUN["batch_size"] * RUN["block_size"] if args.table == "switch" else None
    train.draw_together(equal_tokens, picture, change)
    print(f"picture: {picture}")


if __name__ == "__main__":
    with stop_in_one_line():
        main()
