"""Makes the flat files importable, keeps the slow checks out of the default run (`python -m pytest -m slow`), and has
what several test files share: a small model, what a run leaves behind, and torchrun."""
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Sums depend on the number of threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)       # a job in the background is started without it
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from model import Config, LLaMA, Run  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "shared" in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} skipped tests read published files in ../shared/data, such as "
                                    "LLaMA's tokenizer, which are no part of this repository")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A directory with a small random LLaMA and the built-in world's tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    tokenizer = data.world_tokenizer()
    config = Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
    LLaMA(config).save_pretrained(directory, tokenizer, extra={"prompt_format": "short"})
    return directory


@pytest.fixture(scope="session")
def nan_model(base, tmp_path_factory):
    """The same model with one weight that is NaN."""
    directory = tmp_path_factory.mktemp("nan")
    model = LLaMA.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(directory, data.Tokenizer.from_pretrained(base))
    return directory


def without_time(line):
    return {key: value for key, value in line.items() if not key.startswith("seconds")}


def metrics(directory):
    """The lines of metrics.jsonl, without the time."""
    return [without_time(json.loads(line)) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]


def weights(directory, kind=LLaMA):
    return kind.from_pretrained(directory, torch.float64).state_dict()


def distance(a, b, kind=LLaMA):
    """Largest difference between the weights of two directories; 0 if they are equal bit for bit."""
    a, b = weights(a, kind), weights(b, kind)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def assert_equal_runs(a, b, tolerance=0.0, kind=LLaMA, leave_out=()):
    """Equal metrics, but for the keys left out, and equal weights: bit for bit, or up to rounding."""
    for line, other in zip(metrics(a), metrics(b), strict=True):
        for key in leave_out:
            del line[key], other[key]
        assert line == pytest.approx(other, rel=100 * tolerance, abs=100 * tolerance)
    assert distance(a, b, kind) <= tolerance


def torchrun(script, argv, *how):
    """Starts a script on two processes, or as `how` says."""
    how = how or ("--standalone", "--nproc_per_node", 2)
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, how), str(ROOT / script), *argv]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*runs):
    """Waits for the runs, which have to succeed, and returns what they printed."""
    printed = [run.communicate(timeout=300) for run in runs]
    for run, (_, errors) in zip(runs, printed):
        assert run.returncode == 0, errors[-3000:]
    return [out for out, _ in printed]


class Killed(Exception):
    pass


def die():
    raise Killed


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def at_step(step, action, round=0):
    """Calls action() once, in the middle of this step of a run inside, after the backward pass."""
    update, pending = Run.update, [action]

    def act(run, *rest):
        if (run.state.get("round", 0), run.state["step"]) == (round, step) and pending:
            pending.pop()()
        return update(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "update", act)
        yield
