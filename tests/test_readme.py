"""What the README promises: its commands exist, its flags are known, its table is what `python zaya.py` prints."""

import json
import re
import shlex
from functools import cache

import bench_ablations as ablations
import pytest
from conftest import ENVIRONMENT, ROOT, command

from zaya import PRESETS, training_flops

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lines of code blocks, with lines that end in a backslash joined.
CODE = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
SCRIPTS = r"(?:train|sample|zaya|kernels|data/\w+/prepare|tests/\w+)\.py"
COMMANDS = sorted({match[0] for match in re.finditer(rf"{SCRIPTS}\b[^\n&|#]*", CODE)})


BENCHMARKS = {  # flags, and what the last line is like
    "bench_generate.py": ("--preset nano --contexts 16,32 --new 4", r"^MHA's cache.* [\d,.]+ +[\d,.]+$"),
    "bench_train.py": ("--preset nano --micro_batch_size 2 --tokens 768 --steps 1", r"^dense twin .* tokens/s"),
}


def test_the_two_commands_are_there():
    assert re.search(r"^pip install torch==2\.13\.0 -r requirements\.txt && python train\.py$", CODE, re.MULTILINE)
    assert re.search(r"^pip install torch==2\.13\.0 triton==\S+ -r requirements-dev.txt && pytest$", CODE, re.MULTILINE)


def test_five_packages_are_enough():
    packages = re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert packages == ["torch", "numpy", "tiktoken", "tqdm", "matplotlib"]


@cache
def help_of(script):
    done = command(script, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_scripts_and_flags_exist(line):
    script, *words = shlex.split(line)
    if script == "kernels.py":
        pytest.importorskip("triton")
    known = help_of(script)
    for flag in [word for word in words if word.startswith("--")]:
        assert re.search(rf"{flag}\b", known), f"{script} has no {flag}"


def test_files_that_are_named_exist():
    names = set(re.findall(r"`([\w/]+\.(?:py|txt|png|md))`", README)) - {"loss.png", "experts.png"}  # a run's pictures
    pictures = set(re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))
    assert names and [name for name in names | pictures if not (ROOT / name).exists()] == []


def test_the_table_of_costs_is_what_the_command_prints():
    printed = command("zaya.py").stdout
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|$", README, re.MULTILINE)
    rows = [row for row in rows if row[0] in PRESETS]
    assert len(rows) == len(PRESETS)
    for name, *numbers in rows:
        line = re.search(rf"^{re.escape(name)} +(.*)$", printed, re.MULTILINE)[1].split()
        assert line[:4] == numbers, name
        flops = 1e6 * training_flops(PRESETS[name], int(numbers[1].replace(",", "")), 4096)
        assert line[4] == f"{flops / (0.35 * 1307e12) / 3600 * 2:.6f}", name  # dollars, at 2 an hour


def test_the_project_speaks_of_itself_alone():
    files = [
        path
        for pattern in ("*.py", "*.md", "*.txt", "data/**/*.py", "tests/*.py", ".ci/run")
        for path in ROOT.glob(pattern)
    ]
    assert len(files) > 15
    machine = re.compile(r"/(?:root|home|work|tmp)/\w")  # a path of somebody's machine
    assert [path.name for path in files if machine.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmarks_for_a_gpu_run_on_a_cpu(script):
    """Small: that they run at all."""
    pytest.importorskip("transformers")
    words, last = BENCHMARKS[script]
    done = command(f"tests/{script}", *words.split(), env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and re.search(last, done.stdout, re.MULTILINE), done.stderr


def test_the_tables_of_ablations_are_what_their_logs_say():
    """As the command under which each stands prints them, from the logs that are kept."""
    logs = ROOT / "assets" / "ablations"
    times = json.loads((logs / "times.json").read_text())
    tables = re.findall(r"^python tests/bench_ablations\.py (\w+)$", CODE, re.MULTILINE)
    assert set(tables) == set(ablations.TABLES)
    for table in tables:
        runs, flags = ablations.plan(table, logs, 3, times)
        beneath = README.partition(f"python tests/bench_ablations.py {table}\n")[2].partition("```sh")[0]
        assert all(ablations.finished(run, flags[run]) for run in flags), table
        for line in ablations.lines(ablations.trials_of(runs), times):
            assert line in beneath, (table, line)


def test_an_ablation_stopped_in_its_first_text_does_not_begin_the_second(tmp_path, monkeypatch):
    """train.py ends well at Ctrl-C; the other text from step 0 on would be taken for the finished run."""
    started = []

    def stopped(out, flags):
        started.append(flags)
        out.mkdir(exist_ok=True)
        (out / "log.jsonl").write_text('{"step": 3}\n')

    monkeypatch.setattr(ablations, "start", stopped)
    ablations.train_run(tmp_path / "run", ablations.RUN, switch=True)
    assert len(started) == 1
