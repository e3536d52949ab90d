"""Kill -9 one or all of two ranks at random moments, half of them inside a save; go on with --resume; compare the end
with an undisturbed run's, bit for bit.

python tests/bench_kill.py [--kills 30]
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from conftest import ENVIRONMENT, ROOT, RUN, SHAPE, flags
from tqdm import tqdm

from data.dataset import in_range
from data.tokenizer import sha256
from zaya import OneLineParser, stop_in_one_line

START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
PLAN = SHAPE | RUN | dict(steps=300, save_every=3, eval_every=50, data="stdlib")


def start(out, *more):
    """train.py on two ranks, in the background."""
    words = map(str, [*START, *flags(**PLAN, out=out), *more])
    return subprocess.Popen([*words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ranks_of(launcher):
    """The process ids of what torchrun started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def is_saving(out, since):
    """Whether a save is going on that began after a time: one in which a rank was killed leaves its files behind."""
    for partial in out.glob(".*.partial"):
        with suppress(FileNotFoundError):  # it has just ended
            if partial.stat().st_mtime > since:
                return True
    return False


def kill(launcher, out, random):
    """Kill one rank or both, in a save or anywhere -> whether it was in a save; None if the run had ended before."""
    since = time.time()
    while not ranks_of(launcher) and launcher.poll() is None:  # torchrun has yet to start them
        time.sleep(0.01)
    time.sleep(random.uniform(0, 6))
    if random.random() < 0.5:
        while not is_saving(out, since) and launcher.poll() is None:
            time.sleep(0.001)
    saving, victims = is_saving(out, since), ranks_of(launcher)
    if not victims:
        return None
    for pid in victims if random.random() < 0.5 else [random.choice(victims)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return saving


def end_of(out):
    """What a finished run has learned: the hashes of its last checkpoint's tensors."""
    last = out / f"step-{PLAN['steps']:07d}"
    return [sha256(last / name) for name in ("model.safetensors", "trainer.safetensors")] if last.exists() else None


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=in_range(int, 1, 10_000), default=30, help="how many times (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    args = parser.parse_args()
    dice, kills, saves, runs, same = random.Random(args.seed), 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, unit="kill") as bar:
        undisturbed = Path(folder, "undisturbed")
        start(undisturbed).communicate()
        while kills < args.kills:
            out, runs = Path(folder, f"run-{runs}"), runs + 1
            launcher = start(out)
            while kills < args.kills:  # until it ends by itself, or has been killed often enough
                while not (out / "log.jsonl").exists() and launcher.poll() is None:
                    time.sleep(0.05)
                saving = kill(launcher, out, dice)
                launcher.communicate()
                if saving is None:
                    break
                kills, saves = kills + 1, saves + saving
                bar.update()
                launcher = start(out, "--resume")
            else:
                launcher.communicate()
            same += end_of(out) is not None and end_of(out) == end_of(undisturbed)
    print(f"{kills} kills, {saves} of them in a save, in {runs} runs: {same} ended with the undisturbed run's tensors")
    sys.exit(same != runs)


if __name__ == "__main__":
    with stop_in_one_line():
        main()
