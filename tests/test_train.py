"""The three training scripts as they are launched: one process and two, stopped and resumed, good input and bad."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import evaluate
import losses
import train_cut
import train_ppo
import train_sft
from model import Config, InputError, LLaMA, RewardModel, add_lora, lora_layers

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SCRIPTS = {"sft": train_sft, "cut": train_cut, "reward": train_ppo}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random LLaMA with the built-in world's tokenizer, in a directory."""
    torch.manual_seed(0)
    d = tmp_path_factory.mktemp("model") / "base"
    tokenizer = data.world_tokenizer()
    LLaMA(Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
          ).save_pretrained(d, tokenizer, extra={"prompt_format": "short"})
    return d


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small data files for the three scripts. 37 records: the last batch of an epoch is uneven."""
    d = tmp_path_factory.mktemp("data")
    world = data.World(9)
    records = world.demonstrations(60, lambda a, b: None if a == b else f"It says {a}", "test")
    judged = [r for i, r in enumerate(records) if i % 2 or i % 3 == 0][:37]
    demos = [r for r in records if r["judgment"] is None][:37]
    pairs = [{"instruction": a["instruction"], "input": "", "output_1": a["output"], "output_2": b["output"],
              "preference": 1 + i % 2} for i, (a, b) in enumerate(zip(records[::2], records[1::2]))
             if a["output"] != b["output"]][:45]
    paths = {}
    for name, rows in (("sft", demos), ("cut", judged), ("reward", pairs)):
        paths[name] = d / f"{name}.json"
        paths[name].write_text(json.dumps(rows), encoding="utf-8")
    return paths


def arguments(name, base, files, out, *more):
    # A reward model's gradients are so small here that Adam, which divides by their size, blows rounding errors up.
    lr = "1e-4" if name == "reward" else "1e-3"
    own = {"reward": ["reward", "--held-out", "8"], "cut": ["--downsample", "-1", "--lora-rank", "0"], "sft": []}[name]
    return [*own, "--model", str(base), "--data", str(files[name]), "--format", "short", "--device",
            "cpu", "--steps", "10", "--batch-size", "8", "--micro-batch-size", "3", "--lr", lr, "--out", str(out),
            *map(str, more)]


def weights(directory, name):
    cls = RewardModel if name == "reward" else LLaMA
    return cls.from_pretrained(directory, torch.float64).state_dict()


def metrics(directory):
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def launch(processes, script, argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*command, str(ROOT / script), *argv], env=env, capture_output=True, text=True, timeout=300)


def two_equal_one(name, dtype, tolerance, base, files, tmp_path):
    script = {"sft": "train_sft.py", "cut": "train_cut.py", "reward": "train_ppo.py"}[name]
    SCRIPTS[name].main(arguments(name, base, files, tmp_path / "one", "--dtype", dtype))
    two = launch(2, script, arguments(name, base, files, tmp_path / "two", "--dtype", dtype))
    assert two.returncode == 0, two.stderr[-3000:]
    a, b = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [x["step"] for x in a] == [x["step"] for x in b] == list(range(10))
    for x, y in zip(a, b):                              # the loss line: every figure but the time
        for key in set(x) - {"seconds"}:
            assert x[key] == pytest.approx(y[key], rel=100 * tolerance, abs=100 * tolerance), key
    one, other = weights(tmp_path / "one", name), weights(tmp_path / "two", name)
    start = weights(base, name) if name != "reward" else None
    for key in one:
        assert (one[key] - other[key]).abs().max() <= tolerance, key
        assert start is None or not torch.equal(one[key], start[key]), f"{key} has not been trained"


def test_two_processes_train_cut_like_one(base, files, tmp_path):
    """Per-rank means, or a missing factor for DDP's average: both change with the number of processes."""
    two_equal_one("cut", "float64", 1e-12, base, files, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "cut", "reward"])
@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-12), ("float32", 1e-6)])
def test_two_processes_equal_one(name, dtype, tolerance, base, files, tmp_path):
    """The same for every script, in both precisions."""
    two_equal_one(name, dtype, tolerance, base, files, tmp_path)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["sft", "cut", "reward"])
def test_stopping_and_resuming_is_bitwise_not_stopping(name, base, files, tmp_path, monkeypatch):
    """Optimizer state, data position or schedule lost between two runs would change the weights."""
    script = SCRIPTS[name]
    more = ["--flags", "frozen"] if name == "cut" else []
    script.main(arguments(name, base, files, tmp_path / "whole", "--save-every", 4, *more))
    save = script.save_resume

    def save_and_die(*args):
        save(*args)
        raise Killed

    monkeypatch.setattr(script, "save_resume", save_and_die)
    with pytest.raises(Killed):
        script.main(arguments(name, base, files, tmp_path / "parts", "--save-every", 4, *more))
    monkeypatch.undo()
    script.main(arguments(name, base, files, tmp_path / "parts", "--save-every", 4, "--resume", *more))
    a, b = weights(tmp_path / "whole", name), weights(tmp_path / "parts", name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    lines = [[{k: v for k, v in x.items() if k != "seconds"} for x in metrics(tmp_path / d)]
             for d in ("whole", "parts")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_step_of_train_cut_is_the_loss_of_the_paper(base, files, gamma):
    """The scripts' micro-batches, weights and tiles must add up to losses.cut_loss over the whole batch."""
    tokenizer = data.Tokenizer.from_pretrained(base)
    model = LLaMA.from_pretrained(base, torch.float64)
    examples = data.encode(tokenizer, data.read_judged(files["cut"]), "short", 256)[:12]
    args = train_cut.parse(["--dtype", "float64", "--alpha", "0.7", "--lam", "1.05", "--gamma", str(gamma)])
    pairs, good = [e for e in examples if e.judged], [e for e in examples if not e.judged]
    assert pairs and good
    micro = [train_cut.pair_batch(part, 1 / 12, {}, args, "cpu") for part in data.split(pairs, 2)]
    micro += [train_cut.single_batch([(e, 1 / 12) for e in part], "cpu", "float64") for part in data.split(good, 2)]
    total = sum(model(tokens, targets, token_loss)[0] for tokens, targets, token_loss, _ in micro)
    total.backward()
    fused = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()

    def logp(prompt, response):
        logits = model(torch.tensor([prompt + response[:-1]]))[0, len(prompt) - 1:]
        return losses.plain_logp(logits, torch.tensor(response))

    judged, plain = (torch.cat([logp(p, e.response) for p, e in zip(prompts, pairs)])
                     for prompts in ([e.judged for e in pairs], [e.prompt for e in pairs]))
    lengths = [torch.tensor([len(e.response) for e in part]) for part in (pairs, good)]
    flagged = losses.detect(judged, plain, 1.05)
    assert flagged.any() and not flagged.all()
    wanted = losses.cut_loss(judged, plain, lengths[0], torch.cat([logp(e.prompt, e.response) for e in good]),
                             lengths[1], lam=1.05, alpha=0.7, gamma=gamma)
    wanted.backward()
    assert total.item() == pytest.approx(wanted.item(), abs=1e-12)
    for key, p in model.named_parameters():
        torch.testing.assert_close(fused[key], p.grad, rtol=0, atol=1e-12)


def test_flags_frozen_and_all(base, files, tmp_path):
    """`all` must flag every token of bad responses; `frozen` what the first model finds, at every step."""
    for flags in ("all", "frozen"):
        train_cut.main(arguments("cut", base, files, tmp_path / flags, "--flags", flags, "--lam", "1.02"))
    assert all(x["flagged"] == 1 for x in metrics(tmp_path / "all"))
    kept = {r["id"]: r["flags"] for r in data.read_json(tmp_path / "frozen" / "flags-0.jsonl")}
    tokenizer = data.Tokenizer.from_pretrained(base)
    bad = [e for e in data.encode(tokenizer, data.read_judged(files["cut"]), "short", 256) if e.judged]
    logp = evaluate.pair_logp(LLaMA.from_pretrained(base), bad, "cpu")
    assert kept == {e.id: losses.detect(*both, 1.02).tolist() for e, both in zip(bad, logp)}


def test_the_main_job_in_small(base, tmp_path, capsys):
    """The whole chain (sample, judge, detect, train, evaluate) and the fields of results.json."""
    out = tmp_path / "cut"
    train_cut.main(["--model", str(base), "--rounds", "2", "--steps", "2", "--samples", "20", "--split", "validation",
                    "--device", "cpu", "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"sft", "rounds", "seconds", "peak_memory_bytes"} and len(results["rounds"]) == 2
    for r in results["rounds"]:
        assert set(r) == {"exact_match", "errors", "win_rate", "win_rate_se", "precision", "recall", "flagged",
                          "seconds"}
        assert all(0 <= r[k] <= 1 for k in ("exact_match", "win_rate", "precision", "recall", "flagged"))
    assert "win rate vs SFT" in capsys.readouterr().out
    assert LLaMA.from_pretrained(out) and json.loads((out / "config.json").read_text())["prompt_format"] == "short"


def test_an_online_run_resumes_in_its_second_round(base, tmp_path, monkeypatch):
    """The second round's samples and flags must be those of the undisturbed run."""
    def argv(out):
        return ["--model", str(base), "--rounds", "2", "--steps", "4", "--samples", "20", "--save-every", "2",
                "--split", "validation", "--device", "cpu", "--flags", "frozen", "--out", str(tmp_path / out)]

    train_cut.main(argv("whole"))
    save, calls = train_cut.save_resume, []

    def save_and_die(*args):
        save(*args)
        calls.append(args)
        if len(calls) == 4:                                                 # steps 2, 4, end of round 1, step 2
            raise Killed

    monkeypatch.setattr(train_cut, "save_resume", save_and_die)
    with pytest.raises(Killed):
        train_cut.main(argv("parts"))
    monkeypatch.undo()
    train_cut.main([*argv("parts"), "--resume"])
    a, b = weights(tmp_path / "whole", "cut"), weights(tmp_path / "parts", "cut")
    assert all(torch.equal(a[key], b[key]) for key in a)
    results = [json.loads((tmp_path / d / "results.json").read_text())["rounds"] for d in ("whole", "parts")]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in results[0]] == \
        [{k: v for k, v in r.items() if k != "seconds"} for r in results[1]]


@pytest.mark.parametrize("name", ["sft", "cut", "reward"])
def test_a_loss_that_is_not_finite_stops_the_run(name, base, files, tmp_path):
    """A skipped NaN hides what is wrong; the message names the step and the examples."""
    model = LLaMA.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan", data.Tokenizer.from_pretrained(base))
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is nan.*\["):
        SCRIPTS[name].main(arguments(name, tmp_path / "nan", files, tmp_path / "out"))


def test_bad_input_is_one_line_before_any_model_is_loaded(base, files, tmp_path):
    """A traceback, or an error after a twenty-minute load."""
    record = {"instruction": "a", "input": "", "output": "b", "judgment": None}
    cases = {
        "not JSON": ("{", "line 1 is not JSON"),
        "no key": (json.dumps([{"instruction": "a", "input": ""}]), "record 0 has no key 'output'"),
        "empty": (json.dumps([record, {**record, "output": " "}]), "record 1: 'output' is empty"),
        "judgment": (json.dumps([{**record, "judgment": 3}]), "record 0: 'judgment' is int"),
    }
    broken = tmp_path / "no-weights"                                        # a model of which only the files exist
    broken.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (broken / name).write_bytes((base / name).read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights")
    path = tmp_path / "data.json"
    for text, message in cases.values():
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message) as error:
            train_cut.main(["--model", str(broken), "--data", str(path), "--out", str(tmp_path / "out")])
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    config = json.loads((base / "config.json").read_text())
    for change, message in (({"model_type": "mistral"}, "model_type is 'mistral'"),
                            ({"vocab_size": 5}, "belong together")):
        (broken / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            train_cut.main(["--model", str(broken), "--data", str(files["cut"]), "--out", str(tmp_path / "out")])
    run = subprocess.run([sys.executable, str(ROOT / "train_cut.py"), "--model", str(broken), "--data", str(path)],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "Traceback" not in run.stderr and len(run.stderr.strip().splitlines()) == 1


def test_ranks_must_divide_the_batch(base, files, tmp_path, monkeypatch):
    """A batch that cannot be shared evenly is refused with both numbers and a remedy."""
    monkeypatch.setattr(train_sft, "setup_distributed", lambda device: (0, 3, torch.device("cpu")))
    with pytest.raises(InputError, match="--batch-size 8 is not a multiple of the 3 ranks: use 6"):
        train_sft.main(arguments("sft", base, files, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(base, files, tmp_path):
    """An interrupted run must be usable as it is, and resumable to the weights of an undisturbed one."""
    argv = [a if a != "10" else "300" for a in arguments("sft", base, files, tmp_path / "out")]
    command = [sys.executable, str(ROOT / "train_sft.py")]
    one = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}     # sums depend on the number of threads
    run = subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, **one)
    log = tmp_path / "out" / "metrics.jsonl"
    while run.poll() is None and not (log.is_file() and log.read_text().count("\n") > 5):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert "stopped: go on with --resume" in run.communicate(timeout=60)[0] and run.returncode == 130
    assert LLaMA.from_pretrained(tmp_path / "out")
    whole = [a if a != str(tmp_path / "out") else str(tmp_path / "whole") for a in argv]
    for more in ([*argv, "--resume"], whole):
        subprocess.run([*command, *more], check=True, timeout=120, stdout=subprocess.DEVNULL, **one)
    a, b = weights(tmp_path / "whole", "sft"), weights(tmp_path / "out", "sft")
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs CUT's published files")
def test_cuts_own_file_on_a_llama(tmp_path, capsys):
    """The published counts, on a LLaMA with LLaMA's tokenizer; trains, saves and reloads."""
    torch.manual_seed(0)
    tokenizer = data.Tokenizer((SHARED / "llama" / "tokenizer.model").read_bytes())
    LLaMA(Config(vocab_size=32000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8)).save_pretrained(tmp_path / "llama", tokenizer)
    file = SHARED / "cut" / "train-alpaca-sample-iter1.json"
    train_cut.main(["--model", str(tmp_path / "llama"), "--data", str(file),
                    "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "287 negatives and 713 positives; of the negatives 47 '$ERROR$' and 17 'perfect'" in printed
    assert "training on 287 negatives and 71 positives" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["prompt_format"] == "cut"
    before, after = weights(tmp_path / "llama", "cut"), weights(tmp_path / "out", "cut")
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_finished_run_can_be_resumed(base, tmp_path, capsys):
    """A kill after the last round but before results.json must be completed, not end in a traceback."""
    argv = ["--model", str(base), "--rounds", "1", "--steps", "2", "--samples", "20", "--split", "validation",
            "--device", "cpu", "--out", str(tmp_path / "out")]
    train_cut.main(argv)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (tmp_path / "out" / "results.json").unlink()
    train_cut.main([*argv, "--resume"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rounds"] == results["rounds"]
    assert "in brackets" in capsys.readouterr().out


def test_what_must_not_be_resumed_or_written_over(base, files, tmp_path):
    """Another run's state taken up silently; the base model overwritten by what was trained from it."""
    argv = arguments("cut", base, files, tmp_path / "out", "--save-every", 4)
    with pytest.raises(InputError, match="nothing to resume"):
        train_cut.main([*argv, "--resume"])
    train_cut.main(argv)
    with pytest.raises(InputError, match="--seed was 0, is 1"):
        train_cut.main([*argv, "--resume", "--seed", "1"])
    with pytest.raises(InputError, match="is the --model"):
        train_cut.main(arguments("cut", base, files, base))


def test_the_first_ctrl_c_counts_after_an_inner_run(tmp_path, monkeypatch):
    """The SFT run that train_cut.py starts within itself must not keep the signal for itself."""
    order = []
    monkeypatch.setattr(train_cut, "StopSignal", lambda: order.append("cut"))
    monkeypatch.setattr(train_sft, "built_in", lambda *args: order.append("sft") or str(tmp_path / "none"))
    with pytest.raises(InputError):                     # no such model: found after the inner run, before the signal
        train_cut.main(["--out", str(tmp_path / "out"), "--device", "cpu"])
    assert order == ["sft"]


def test_detection_is_made_without_dropout(base, files):
    """Dropout draws different masks for the two readings, and tokens are flagged by chance."""
    model = LLaMA.from_pretrained(base)
    add_lora(model, 4, 16, 0.5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    tokenizer = data.Tokenizer.from_pretrained(base)
    bad = [e for e in data.encode(tokenizer, data.read_judged(files["cut"]), "short", 256) if e.judged]
    model.train()
    one, two = evaluate.pair_logp(model, bad, "cpu"), evaluate.pair_logp(model, bad, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and model.training


@pytest.mark.parametrize("flags", [["--batch-size", "0"], ["--lam", "0"], ["--seed", "-1"], ["--steps", "0"],
                                   ["--data", "x.json", "--recipe", "corrected"]])
def test_values_out_of_range_are_refused_by_the_parser(flags):
    """math domain error, division by zero or KeyError some minutes later."""
    with pytest.raises((SystemExit, InputError)):
        train_cut.parse(flags)
