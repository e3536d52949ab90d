"""What the tests share: a tiny dataset, a tiny model, two ways to run a command, and two cores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: kernels run on the CPU, if asked to
# One thread, before torch and numpy start theirs: sums in one order, and no waiting for another core, which with small
# tensors takes longer than the work.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's background jobs ignore Ctrl-C, those of nohup a closed terminal, too: what is started here shall not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data.text.prepare
import train
from zaya import load_safetensors, read_json, stop_in_one_line, triton_kernels, use_kernels

REPORTS = os.environ.pop("NANOZAYA_REPORTS", None)  # in a pytest that TestsBeside started: where to write them
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"COLUMNS": "80", "PYTHONUNBUFFERED": "1"}

SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    moe_intermediate_size=16, num_experts=4, router_hidden_size=8, block_size=16, initializer_range=0.02,
)  # fmt: skip
RUN = dict(
    batch_size=4, steps=6, warmup=2, eval_every=3, eval_batches=2, save_every=2, lr=0.01, device="cpu", dtype="float32"
)


def flags(**values):
    """--name value ... of a dictionary; True is the bare flag."""
    return [
        word
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def command(script, *args, **options):
    """Run a script of the repository as a user would, on one core -> CompletedProcess with text output."""
    words = [sys.executable, ROOT / script, *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, **{"env": ENVIRONMENT, "timeout": 120} | options)


def rewrite(file, **changes):
    """Change what a JSON file says, or make one."""
    file.write_text(json.dumps((read_json(file) if file.exists() else {}) | changes))


def log_of(out):
    """The objects of a run's log. Strict: the words NaN and Infinity are no JSON."""

    def refuse(word):
        raise ValueError(f"{word} in {out}/log.jsonl")

    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]


def what_was_learned(out):
    """{step: loss} of a run's log, and all tensors of its newest checkpoint, weights and optimizer."""
    newest = max(out.glob("step-*"))
    tensors = load_safetensors(newest / "model.safetensors") | load_safetensors(newest / "trainer.safetensors")
    return {entry["step"]: entry["loss"] for entry in log_of(out)}, tensors


def assert_same_run(out, other):
    """Equal to the last bit."""
    (losses, tensors), (expected_losses, expected) = what_was_learned(out), what_was_learned(other)
    assert losses == expected_losses and tensors.keys() == expected.keys()
    assert [name for name in tensors if not tensors[name].equal(expected[name])] == []


@pytest.fixture(scope="session", autouse=True)
def interpreter_without_idle_work():
    """Two things take half of the interpreter's time and change no result: it patches Triton's language anew for every
    function that a kernel calls, and computes whether a sum of integers overflows, but never looks."""
    if triton_kernels is None or not triton_kernels.INTERPRETED:
        yield
        return
    from triton.language import sum
    from triton.runtime import interpreter

    scopes = [interpreter._patch_lang(function.fn) for function in (triton_kernels.dot, sum)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield
    for scope in reversed(scopes):
        scope.restore()


@pytest.fixture(autouse=True)
def kernels_as_ever():
    """What a test or its model chose is not the next test's."""
    yield
    use_kernels("auto")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A dataset of bytes: 257 ids, about 8,000 tokens to train on and 2,000 to validate on."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i} – and so on;\n" for i in range(300)), encoding="utf-8")
    data.text.prepare.main([str(text), "--tokenizer", "bytes", "--val_fraction", "0.2", "--out", str(folder / "tiny")])
    return folder / "tiny"


@pytest.fixture(scope="session")
def tiny(tiny_data):
    """The flags of a run of six steps that takes a tenth of a second."""
    return {"data": tiny_data} | SHAPE | RUN


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run that nothing disturbed: six steps, a checkpoint every two, all of them kept; and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = command("train.py", *flags(**tiny, keep=9, out=out))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, stdout=done.stdout, stderr=done.stderr)


@pytest.fixture
def pictures():
    """For a test that looks at the pictures of what it calls: else a run draws none, which saves half a second."""


@pytest.fixture
def call(monkeypatch, capsys, request):
    """call(train or sample, flags...) is the command without a new process -> its status, stdout and stderr lines. What
    would take longer than such a small run is left out: pictures, most of the sample, a large product's rate."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(train, "plot", lambda out: None)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 10)
    monkeypatch.setattr(train, "rates", lambda device, dtype: (None, 1e11))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def run(module, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, args)])
        status = 0
        try:
            with stop_in_one_line():
                module.main()
        except SystemExit as end:
            status = end.code
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, stdout=captured.out, stderr=captured.err, lines=captured.err.splitlines())

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Two cores: a second pytest runs these files while the first runs the others, which take as long. On Ice Lake 390 s in
# place of 575 (as pytest-xdist would, which is one package more).

BESIDE = ("test_readme.py", "test_sample.py", "test_train.py")


class TestsBeside:
    """Tests that a second pytest runs meanwhile. This one shows its reports where it would have run them itself."""

    def __init__(self, config, tests):
        self.config, self.tests, self.folder = config, set(tests), TemporaryDirectory()
        reports, self.said = (Path(self.folder.name, name) for name in ("reports", "said"))
        reports.touch()
        self.reports = reports.open()
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--tb={config.option.tbstyle}", *tests]
        with self.said.open("w") as said:
            self.pytest = subprocess.Popen(
                words, cwd=config.rootpath, env=os.environ | {"NANOZAYA_REPORTS": str(reports)},
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def next_report(self):
        """Waits for it."""
        line = ""
        while not line.endswith("\n"):
            ended = self.pytest.poll() is not None
            line += self.reports.readline()
            if ended and not line.endswith("\n"):
                raise RuntimeError(f"the tests beside these ended too early:\n{self.said.read_text()}")
            time.sleep(0 if line else 0.02)  # seconds
        return self.config.hook.pytest_report_from_serializable(config=self.config, data=json.loads(line))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if item.nodeid not in self.tests:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        when = None
        while when != "teardown":
            report = self.next_report()
            item.ihook.pytest_runtest_logreport(report=report)
            when = report.when
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self.tests.remove(item.nodeid)
        return True

    def pytest_sessionfinish(self):
        if self.tests:  # after Ctrl-C, or the first failure of `pytest -x`
            self.pytest.send_signal(signal.SIGINT)
        self.pytest.wait()
        self.reports.close()
        self.folder.cleanup()


class WrittenReports:
    """For TestsBeside, in the second pytest."""

    def __init__(self, config):
        self.config, self.file = config, open(REPORTS, "a")

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.file, flush=True)


def pytest_collection_finish(session):
    tests = [item.nodeid for item in session.items if item.path.name in BESIDE]
    option = session.config.option
    if REPORTS:
        session.config.pluginmanager.register(WrittenReports(session.config))
    elif 0 < len(tests) < len(session.items) and not (
        option.collectonly or option.usepdb or option.capture == "no" or "PYTEST_XDIST_WORKER" in os.environ
    ):
        session.config.pluginmanager.register(TestsBeside(session.config, tests))
