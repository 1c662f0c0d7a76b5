"""train_sft.py and train_cut.py as they are launched: on one process and two, stopped and resumed, with good input and
bad, with flags that change memory and speed but not the result."""
import contextlib
import datetime
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import evaluate
import losses
import model as model_file
import train_cut
import train_ppo
import train_sft
from conftest import (ENVIRONMENT, ROOT, Killed, assert_equal_runs, at_step, die, distance, finish, metrics,
                      press_ctrl_c, torchrun, weights, without_time)
from data import IGNORE, InputError
from model import Block, Config, LLaMA, Run, add_lora, make_optimizer, memory_estimate, on_meta, set_execution

MAIN = {"sft": train_sft.main, "cut": train_cut.main, "lora": train_cut.main, "frozen": train_cut.main}
FLAGS = {
    "sft": [],
    "cut": ["--downsample", -1, "--lora-rank", 0],
    "lora": ["--downsample", -1, "--lora-rank", 4],
    "frozen": ["--downsample", -1, "--lora-rank", 0, "--detect", "frozen", "--lam", 1.02, "--lr", 1e-2],
}


@pytest.fixture(scope="module")
def job(base, tmp_path_factory):
    """A function that returns the arguments of a short run. The data file has 33 records and a batch 8: the last batch
    of an epoch has one record, fewer than there are ranks."""
    directory = tmp_path_factory.mktemp("data")
    records = data.World(9).demonstrations(60, lambda a, b: None if a == b else f"It says {a}", "train")
    good = [r for r in records if r["judgment"] is None]
    bad = [r for r in records if r["judgment"]]
    (directory / "sft.json").write_text(json.dumps(good[:33]))
    (directory / "cut.json").write_text(json.dumps(good[:13] + bad[:20]))

    def arguments(name, out, *more):
        path = directory / ("sft.json" if name == "sft" else "cut.json")
        argv = ["--model", base, "--data", path, "--format", "short", "--device", "cpu", "--dtype", "float64",
                "--steps", 8, "--batch-size", 8, "--micro-batch-size", 3, "--lr", 1e-3, "--out", out]
        return [str(a) for a in (*argv, *FLAGS[name], *more)]               # the later of two equal flags counts

    return arguments


@pytest.fixture(scope="module")
def one_process(job, tmp_path_factory):
    """The run folders of one process that nothing disturbs, which all other ways to run are compared with."""
    directory = tmp_path_factory.mktemp("one")
    for name, main in MAIN.items():
        main(job(name, directory / name))
    return directory


def online(base, out, *more):
    """Arguments of a short online run of train_cut.py."""
    argv = ["--model", base, "--rounds", 2, "--steps", 4, "--samples", 20, "--replay", 0, "--save-every", 2,
            "--split", "validation", "--device", "cpu", "--out", out]
    return [str(a) for a in (*argv, *more)]


@pytest.fixture
def small_world(monkeypatch):
    """Short answers, since an untrained model seldom ends them, to few instructions: measuring would take longest."""
    instructions = data.World.instructions
    monkeypatch.setattr(data.World, "instructions", lambda self, split, count, *more:
                        instructions(self, split, min(count, 100), *more))
    for module in (evaluate, train_cut):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 8)


def rounds(directory):
    """The rounds in results.json, without the time."""
    return [without_time(found) for found in json.loads((directory / "results.json").read_text())["rounds"]]


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def run_jobs():
    """What each process does when torchrun starts this file: several runs, because starting takes longest."""
    if sys.argv[1] == "hang":
        model_file.PATIENCE = datetime.timedelta(seconds=3)
        model_file.setup_device("cpu")
        time.sleep(30 * model_file.rank())
        model_file.barrier()
    for name, argv, killed_at in json.loads(sys.argv[1]):
        with at_step(killed_at, die), contextlib.suppress(Killed):
            MAIN[name](argv)
    return 0


def test_two_processes_and_zero_equal_one_process(job, one_process, tmp_path):
    """A mean of each rank's own, a missing factor for DDP's average, a rank without an example that waits for ever;
    with --zero, moments that are not collected for the save, or parameters that their owner keeps to itself."""
    zero = job("cut", tmp_path / "zero", "--save-every", 4, "--zero")
    unsharded = job("cut", tmp_path / "unsharded", "--save-every", 4)
    jobs = [(name, job(name, tmp_path / name), None) for name in ("sft", "cut", "lora")]
    jobs += [("cut", zero, 6), ("cut", [*zero, "--resume"], None), ("cut", [*unsharded, "--zero"], 6)]
    finish(torchrun("tests/test_train.py", [json.dumps(jobs)]))
    train_cut.main([*unsharded, "--resume"])                    # what two processes have sharded, one goes on with
    for name in ("sft", "cut", "lora"):
        assert_equal_runs(one_process / name, tmp_path / name, 1e-12)
    for name in ("zero", "unsharded"):
        assert_equal_runs(one_process / "cut", tmp_path / name, 1e-12)


@pytest.mark.slow
def test_two_nodes_equal_one_process(base, tmp_path):
    """Ranks counted within their node; samples and flags that depend on the rank; 21 instructions, of which one rank
    has 11 and the other 10; a last batch of 5; a second node that prints."""
    argv = online(base, tmp_path / "two", "--samples", 21, "--batch-size", 8, "--replay", 3, "--dtype", "float64",
                  "--detect", "frozen", "--checkpoint-activations")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    how = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port)
    first, second = finish(*[torchrun("train_cut.py", argv, *how, "--node_rank", node) for node in range(2)])
    train_cut.main([*argv, "--out", str(tmp_path / "one")])
    for a, b in zip(rounds(tmp_path / "one"), rounds(tmp_path / "two")):
        assert a == pytest.approx(b, abs=1e-9)
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-10
    assert "win rate vs SFT" in first and not second.strip()


# ----------------------------------------------------------------------------------------------------------------------
# Flags that change memory and speed, not the result


@pytest.mark.parametrize("name, flag, value, tolerance", [
    ("sft", "--micro-batch-size", ["1"], 1e-12),
    ("cut", "--micro-batch-size", ["1"], 1e-12),
    ("cut", "--micro-batch-size", ["8"], 1e-12),
    ("sft", "--checkpoint-activations", [], 0),
    ("cut", "--checkpoint-activations", [], 0),
    ("lora", "--checkpoint-activations", [], 0)])
def test_what_saves_memory_does_not_change_the_result(job, one_process, tmp_path, monkeypatch, name, flag, value,
                                                      tolerance):
    """A mean of means, or padding that counts; a block that is recomputed otherwise, or not recomputed at all."""
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    MAIN[name](job(name, tmp_path, flag, *value))
    assert_equal_runs(one_process / name, tmp_path, tolerance)
    assert bool(calls) == (flag == "--checkpoint-activations")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("name, more", [("sft", []), ("lora", []), ("cut", ["--checkpoint-activations"])])
def test_compiled_blocks_train_alike(job, one_process, tmp_path, monkeypatch, name, more):
    """A compiled block that computes something else, or that is compiled again for every length and layer."""
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda self, **k: compiled.append(self) or compile_module(self, **k))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    MAIN[name](job(name, tmp_path, *more, "--compile"))
    assert len(compiled) == 2 and 0 < torch._dynamo.utils.counters["frames"]["ok"] <= 12
    assert_equal_runs(one_process / name, tmp_path, 1e-9)


def test_autocast_computes_in_bf16_and_keeps_fp32_weights(job, base, one_process, tmp_path, small_world):
    """Weights rounded to bf16, or matmuls that stay in fp32; sampling whose cache has another dtype than its keys."""
    train_sft.main(job("sft", tmp_path / "autocast", "--dtype", "float32", "--autocast"))
    exact, rounded = ([line["loss"] for line in metrics(d)] for d in (one_process / "sft", tmp_path / "autocast"))
    assert exact == pytest.approx(rounded, rel=2e-2) and exact != pytest.approx(rounded, rel=1e-5)
    assert any((w != w.bfloat16()).any() for w in weights(tmp_path / "autocast").values())
    train_cut.main(online(base, tmp_path / "online", "--autocast", "--checkpoint-activations", "--rounds", 1))
    assert len(rounds(tmp_path / "online")) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


@pytest.mark.parametrize("name", MAIN)
def test_a_stopped_run_resumes_bitwise(job, one_process, tmp_path, name):
    """Optimizer state, position in the data or schedule lost; frozen flags made anew; metrics twice or missing; a
    Ctrl-C that is not heard, or that leaves no usable model; a step done half, or twice."""
    argv, handler = job(name, tmp_path, "--save-every", 4), signal.getsignal(signal.SIGINT)
    with at_step(6, die), pytest.raises(Killed):
        MAIN[name](argv)
    assert len(metrics(tmp_path)) == 6, "two lines more than the save at step 4 knows"
    with at_step(6, press_ctrl_c):
        assert MAIN[name]([*argv, "--resume"]) == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert len(metrics(tmp_path)) == 7 and distance(one_process / name, tmp_path) > 0
    assert MAIN[name]([*argv, "--resume"]) == 0
    assert_equal_runs(one_process / name, tmp_path)


def test_an_online_run_resumes_in_its_second_round_and_after_its_last(base, tmp_path, small_world):
    """Samples, flags or results of the rounds lost, or made by a model that has moved on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = online(base, parts, "--detect", "frozen")
    train_cut.main([*argv, "--out", str(whole)])
    with at_step(3, die, round=1), pytest.raises(Killed):
        train_cut.main(argv)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_cut, "save_run", lambda *args: die())
        train_cut.main([*argv, "--resume"])
    assert not (parts / "results.json").exists()
    assert train_cut.main([*argv, "--resume"]) == 0
    assert_equal_runs(whole, parts)
    assert rounds(parts) == rounds(whole)
    assert metrics(whole)[4]["lr"] == pytest.approx(0.6 * metrics(whole)[0]["lr"]), "--lr-decay"


def test_what_may_be_resumed_and_what_overwritten(job, base, tmp_path):
    """A finished model or an unfinished run lost to other flags, a finished run trained again, another run's state
    taken up without a word, the --model written over."""
    out = tmp_path / "out"
    argv = job("sft", out, "--save-every", 4)

    def kill(step, *more):
        with at_step(step, die), pytest.raises(Killed):
            train_sft.main([*argv, *more])

    def refused(message, *more):
        with pytest.raises(InputError, match=message):
            train_sft.main([*argv, *more])

    train_sft.main([*argv, "--resume"])                         # nothing was saved yet: from the beginning
    assert len(metrics(out)) == 8
    refused("out is finished, there is nothing to resume", "--resume")
    refused(r"a model of another run \(--lr was 0.001, is 0.002\): give another --out, or --over", "--lr", "2e-3")
    refused(r"another run \(--model was None", "--out", str(base))
    kill(6)                                                     # equal flags: the same model once more
    refused("out holds an unfinished run: go on with --resume, or start over with --overwrite")
    refused("--lr was 0.001, is 0.002: resume with equal flags", "--resume", "--lr", "2e-3")
    train_sft.main([*argv, "--resume", "--micro-batch-size", "1", "--save-every", "2", "--checkpoint-activations"])
    assert len(metrics(out)) == 8 and not (out / "resume.pt").exists()
    kill(6)
    saved = torch.load(out / "resume.pt", weights_only=True)
    saved["model"]["lm_head.weight"] = torch.zeros(5, 32)       # the --model's directory holds another model by now
    torch.save(saved, out / "resume.pt")
    refused(r"lm_head.weight was saved with shape \[5, 32\], this model has", "--resume")
    kill(2, "--lr", "2e-3", "--overwrite")                      # a new run, killed before its first save
    assert len(metrics(out)) == 2 and not (out / "resume.pt").exists()
    train_sft.main([*argv, "--lr", "2e-3", "--overwrite", "--resume"])
    assert len(metrics(out)) == 8
    refused("is the --model, which the run would overwrite", "--overwrite", "--out", f"{base}/../{base.name}")


def test_two_runs_in_one_folder(job, tmp_path):
    """Two runs that write each other's files: the second one has to say so and stop."""
    hold = "import sys, model; model.lock(model.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=ENVIRONMENT) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another run is at work here"):
            train_sft.main(job("sft", tmp_path))
        other.stdin.close()
    assert train_sft.main(job("sft", tmp_path)) == 0


def test_a_diverging_run_leaves_its_last_save(job, tmp_path):
    """A good model, or the state to resume from, replaced by NaN, with exit code 0."""
    argv = job("sft", tmp_path, "--clip", "inf")
    train_sft.main(argv)
    good = weights(tmp_path)
    for flags in (["--lr", "1e300", "--save-every", "1"], ["--lr", "1e300", "--steps", "1", "--warmup", "0"]):
        with pytest.raises(InputError, match="the run has diverged: .* lower --lr"):
            train_sft.main([*argv, *flags, "--overwrite"])
        assert all(torch.equal(w, weights(tmp_path)[name]) for name, w in good.items())
        assert not (tmp_path / "resume.pt").exists()


def test_a_disk_that_is_full(job, tmp_path, monkeypatch):
    """A traceback out of PyTorch's zip writer in place of one line with the file and the cause."""
    def full(content, path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 3029888 vs 3029776\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: train_sft.main(job("sft", tmp_path, "--save-every", 2)))
    assert re.fullmatch(r"error: .*resume.pt: cannot be written \(.*3029776\): make room, .*", stopped.value.code)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_the_prompt_format_is_the_models(job, base):
    """A model trained in a format other than its own, in silence."""
    argv = [a for a in job("cut", "none") if a not in ("--format", "short")]
    assert train_cut.parse(argv).format == "short"              # base's config.json records it
    assert train_cut.parse([*argv, "--format", "cut"]).format == "cut"


def script(argv, **more):
    return subprocess.Popen([sys.executable, str(ROOT / "train_cut.py"), *argv], env=ENVIRONMENT, text=True, **more)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_kill_9_at_any_moment(job, tmp_path):
    """Twenty kills of one run that saves after every step, each second one in the middle of a save: it has to go
    on each time and to end at the weights of an undisturbed run, bit for bit."""
    whole, parts, random_numbers = tmp_path / "whole", tmp_path / "parts", random.Random(0)
    argv = job("cut", parts, "--save-every", 1, "--steps", 400)
    finish(script([*argv, "--out", str(whole)]))
    reached, torn_saves = [0], 0
    for kill in range(20):
        resume = ["--resume"] if kill else []
        run = script([*argv, *resume], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        log = parts / "metrics.jsonl"
        while not log.is_file() or log.read_text().count("\n") <= reached[-1] + 2:
            assert run.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        time.sleep(random_numbers.random() * 0.2)
        while kill % 2 and run.poll() is None and not list(parts.glob("resume.pt.tmp-*")):
            pass
        run.kill()
        run.communicate(timeout=60)
        torn_saves += bool(list(parts.glob("resume.pt.tmp-*")))
        reached.append(torch.load(parts / "resume.pt", weights_only=True)["state"]["step"])
    finish(script([*argv, "--resume"]))
    assert torn_saves > 3 and reached == sorted(reached) and not list(parts.glob("*.tmp-*"))
    assert_equal_runs(whole, parts)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained


def first_step(main, argv):
    """Loss and gradients of the first step of a run, in float64: {"": loss, name: gradient}."""
    found, update = {}, Run.update

    def record(run, loss, *rest):
        found.update({name: p.grad.clone() for name, p in run.model.named_parameters()})
        found[""] = torch.tensor(loss, dtype=torch.float64)
        return update(run, loss, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "update", record)
        main([*argv, "--dtype", "float64", "--steps", "1"])
    return found


def brute_force(base, records, hindsight=False, **settings):
    """losses.cut_loss of all records at once and its gradients, from full logits of one sequence at a time."""
    model = LLaMA.from_pretrained(base, torch.float64)
    examples = data.encode(data.Tokenizer.from_pretrained(base), records, "short", 256, hindsight)
    bad, good = [e for e in examples if e.judged_prompt], [e for e in examples if not e.judged_prompt]

    def logp(part, prompt):
        rows = [torch.zeros(0, dtype=torch.float64)]
        for e in part:
            ids, response = getattr(e, prompt), e.response
            logits = model(torch.tensor([ids + response[:-1]]))[0, len(ids) - 1:]
            rows.append(losses.plain_logp(logits, torch.tensor(response)))
        return torch.cat(rows), torch.tensor([len(e.response) for e in part], dtype=torch.long)

    judged, lengths = logp(bad, "judged_prompt")
    loss = losses.cut_loss(judged, logp(bad, "prompt")[0], lengths, *logp(good, "prompt"), **settings)
    loss.backward()
    return {"": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


PAPER = {"lam": 1.05, "alpha": 0.7}


@pytest.mark.parametrize("name, flags, settings", [
    ("cut", [], PAPER),
    ("cut", ["--gamma", 0.5], {**PAPER, "gamma": 0.5}),
    ("cut", ["--detect", "frozen"], PAPER),
    ("cut", ["--detect", "all"], {**PAPER, "lam": 1e-300}),
    ("cut", ["--recipe", "hindsight"], {"hindsight": True}),
    ("cut", ["--recipe", "expert"], {}),
    ("sft", [], {"form": "released"})])             # of good responses only: the mean over all tokens
def test_the_first_step_is_the_papers_loss(job, base, tmp_path, name, flags, settings):
    """Equations 5 to 7: micro-batches, weights and tiles that do not add up to loss and gradient of the whole batch; a
    recipe that trains on other records."""
    if name == "cut":
        flags = [*flags, "--alpha", 0.7, "--lam", 1.05]
    argv = job(name, tmp_path / "out", "--batch-size", 33, *flags)
    found = first_step(MAIN[name], argv)
    records = data.read_json(argv[3])
    if "expert" in flags:
        records = [r for r in records if r["judgment"] is None]
    torch.testing.assert_close(found, brute_force(base, records, **settings), rtol=0, atol=1e-12)
    if settings is PAPER:
        assert 0.05 < metrics(tmp_path / "out")[0]["flagged"] < 0.95, "a detector that decides nothing"


@pytest.mark.parametrize("recipe, key", [("corrected", "correction"), ("sft", "demonstration")])
def test_recipes_on_other_answers(base, tmp_path, recipe, key, small_world):
    """The sampled answer trained on in place of the right one."""
    argv = online(base, tmp_path, "--recipe", recipe, "--rounds", 1, "--batch-size", 20)
    found = first_step(train_cut.main, argv)
    records = [{**r, "output": r[key], "judgment": None} for r in data.read_json(tmp_path / "round-0.jsonl")]
    torch.testing.assert_close(found, brute_force(base, records), rtol=0, atol=1e-12)


def test_detection_is_live_frozen_or_all(job, tmp_path):
    """Frozen flags that follow the model, live ones that do not, or a token that `all` leaves out."""
    flagged = {}
    for detect in ("live", "frozen", "all"):
        train_cut.main(job("frozen", tmp_path, "--detect", detect, "--batch-size", 33, "--steps", 3, "--overwrite"))
        flagged[detect] = [line["flagged"] for line in metrics(tmp_path)]
    assert flagged["all"] == [1] * 3 and flagged["frozen"] == [flagged["live"][0]] * 3
    assert len(set(flagged["live"])) > 1


# ----------------------------------------------------------------------------------------------------------------------
# Whole jobs


def test_the_main_job_in_small(tmp_path, monkeypatch, capsys, small_world):
    """python train_cut.py: train the SFT model, then sample, judge, detect, train and measure, stopped by Ctrl-C in
    each of the two runs; the fields of results.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_sft.DEFAULTS, "steps", (None, 4))
    argv = ["--device", "cpu", "--split", "validation", "--rounds", "2", "--steps", "2", "--samples", "20"]
    with at_step(2, press_ctrl_c), pytest.raises(SystemExit) as stopped:
        train_cut.main(argv)
    assert stopped.value.code == 130
    with at_step(1, press_ctrl_c, round=1):
        assert train_cut.main(argv) == 130
    out = tmp_path / "out" / "cut-0"
    assert len(metrics(tmp_path / "out" / "sft-0-corrects")) == 4 and not (out / "results.json").exists()
    assert train_cut.main([*argv, "--resume"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"sft", "rounds", "seconds", "peak_memory_bytes"} and len(results["rounds"]) == 2
    for found in results["rounds"]:
        assert set(found) == {"exact_match", "win_rate", "precision", "recall", "flagged", "errors", "win_rate_se",
                              "seconds"}
    printed = capsys.readouterr().out
    assert "win rate vs SFT" in printed and "in brackets, more than lambda" in printed
    assert LLaMA.from_pretrained(out) and json.loads((out / "config.json").read_text())["prompt_format"] == "short"


@pytest.mark.parametrize("lam, said", [(1.02, "tokens: in brackets, more than"), (1e9, "nothing is flagged: the")])
def test_what_is_flagged_in_data_of_ones_own(job, tmp_path, capsys, lam, said):
    """Flags that nobody sees with --data: a model that cannot read the judgments trains on bad responses in silence."""
    train_cut.main(job("cut", tmp_path, "--lam", lam))
    before, after = (data.read_json(tmp_path / f"flags-{name}.jsonl") for name in ("0", "after"))
    assert said in capsys.readouterr().out
    assert [r["id"] for r in before] == [r["id"] for r in after] and len(before) == 20
    for r, trained in zip(before, after):
        assert "".join(r["tokens"]) == r["output"] + "</s>" and r["instruction"] and r["judgment"]
        assert [x > math.log(lam) for x in r["log_ratio"]] == r["flags"] and r["log_ratio"] != trained["log_ratio"]


def test_offline_rounds_are_sampled_from_the_first_model(base, tmp_path, small_world):
    """Responses of a later round from a model that has been trained."""
    second = {}
    for name, more in (("offline", ["--offline"]), ("online", []), ("untrained", ["--lr", 0])):
        train_cut.main(online(base, tmp_path / name, "--steps", 1, *more))
        second[name] = data.read_json(tmp_path / name / "round-1.jsonl")
    assert second["offline"] == second["untrained"] != second["online"]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("name", ["sft", "cut"])
def test_a_loss_that_is_not_finite_stops_the_run(job, nan_model, tmp_path, name):
    """A NaN that is skipped or trained on; the message names the step and the examples."""
    with pytest.raises(InputError, match=r"diverged: step 0 has loss nan .* its examples \['[\w-]+', "):
        MAIN[name](job(name, tmp_path / "out", "--model", nan_model))


def test_bad_data_is_one_line_before_the_model_is_read(base, tmp_path):
    """A traceback, or an error after a load of twenty minutes: here there are no weights to load."""
    broken, path = shutil.copytree(base, tmp_path / "model"), tmp_path / "judged.json"
    (broken / "model.safetensors").unlink()
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b", "judgment": 3}]))
    argv = ["--model", str(broken), "--data", str(path), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: train_cut.main(argv))
    assert re.fullmatch(f"error: {path}: record 0: 'judgment' is int.*", stopped.value.code), "which Python prints"


def test_ctrl_c_outside_of_a_loop_is_one_line(job, tmp_path, monkeypatch, capsys):
    """A traceback while data is read or answers are sampled, or advice that does not work."""
    monkeypatch.setattr(sys, "argv", ["train_cut.py", "--lam", "1.2"])
    monkeypatch.setattr(train_cut, "load_data", lambda args: press_ctrl_c())
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: train_cut.main(job("cut", tmp_path)), "--resume")
    assert stopped.value.code == 130
    assert capsys.readouterr().out.endswith("is kept, go on with python train_cut.py --lam 1.2 --resume\n")


@pytest.mark.slow
def test_a_rank_that_hangs(monkeypatch):
    """The others wait for ever, or end in a traceback that does not say why. Here their patience is 3 seconds."""
    run = torchrun("tests/test_train.py", ["hang"])
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "error: rank 0 has waited too long for another one" in errors
    assert "Traceback" not in errors.split("error: rank 0")[0]


@pytest.mark.parametrize("flags", [
    "--batch-size 0", "--lam 0", "--seed -1", "--steps 0", "--alpha -1", "--warmup 2", "--detect no",
    "--data x.json --recipe corrected", "--data x.json --replay 3", "--dtype float16", "--downsample nan",
    "--seed 18446744073709551616"])
def test_values_out_of_range_are_refused_by_the_parser(flags):
    """A math domain error, a division by zero or a KeyError some minutes later."""
    with pytest.raises((SystemExit, InputError)):
        train_cut.parse(flags.split())


@pytest.mark.parametrize("script, flags, out", [
    (train_sft, "", "sft-0-corrects"),
    (train_sft, "--model m/7b --data x/pairs.json --recipe feedme", "sft-7b-pairs-feedme"),
    (train_cut, "", "cut-0"),
    (train_cut, "--seed 3 --judge points --offline", "cut-3-points-offline"),
    (train_cut, "--recipe corrected", "cut-0-corrected"),
    (train_cut, "--model m/13b --data x/judged.json --detect frozen", "cut-13b-judged-frozen"),
    (train_ppo, "", "ppo-0"),
    (train_ppo, "reward --noise 0.1", "reward-0-noise-0.1"),
    (train_ppo, "dpo --model m/7b --data x/pairs.jsonl", "dpo-7b-pairs")])
def test_default_folders_tell_runs_apart(script, flags, out):
    """A model that the next run with another recipe, judge, model or file writes over."""
    assert script.parse(flags.split()).out == f"out/{out}"


def test_a_model_made_with_other_flags_is_named(base, tmp_path, monkeypatch, capsys):
    """A trial run of five steps becomes the start of all later ones, without a word."""
    monkeypatch.chdir(tmp_path)
    run = vars(train_sft.parse([]))
    for flags, said in (({}, "make it again)\n"), ({"steps": 5}, "again): --steps was 5, is 2400 by default\n")):
        LLaMA.from_pretrained(base).save_pretrained("out/sft-0-corrects", extra={"run": {**run, **flags}})
        assert train_sft.built_in(0, "corrects") == "out/sft-0-corrects" and capsys.readouterr().out.endswith(said)


def test_mistyped_stages_name_the_choices(capsys):
    """`unrecognized arguments: pppo`, which does not say what would be recognized."""
    with pytest.raises(SystemExit):
        train_ppo.parse(["pppo"])
    assert "invalid choice: 'pppo' (choose from" in capsys.readouterr().err


def test_flags_that_do_not_fit_together_or_the_machine(job, tmp_path, monkeypatch):
    """The compiler's own traceback in the first step, weights in bf16 that autocast cannot help, moments shared by one
    rank, or ranks with unequal parts of every batch."""
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand much more")

    def refused(message, *more):
        with pytest.raises(InputError, match=message):
            train_sft.main(job("sft", tmp_path / "out", *more))

    monkeypatch.setattr(torch, "compile", broken)
    refused(r"--compile does not work here \(no C\+\+ compiler\): leave it out", "--compile")
    refused("--autocast with --dtype bfloat16", "--autocast", "--dtype", "bfloat16")
    refused("--zero shards the optimizer state over ranks, and there is 1", "--zero")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train_sft, "setup_device", torch.device)            # it would wait for the other two
    refused("--batch-size 8 is not a multiple of the 3 ranks: use 6", "--batch-size", 8)
    refused("--batch-size 2 is not a multiple of the 3 ranks: use 3", "--batch-size", 2)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def train_on_random_tokens(config, dtype, passes, lora_rank, checkpoint, autocast):
    """Two steps of two micro-batches each, with 1,024 tokens, 600 of them in responses."""
    model = on_meta(LLaMA, config).to(dtype).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.01)
    if lora_rank:
        add_lora(model, lora_rank)
    set_execution(model, torch.device("cpu"), checkpoint, False, autocast)
    optimizer = make_optimizer(model)
    tokens = torch.randint(0, config.vocab_size, (2 // passes, 512))
    targets = torch.full_like(tokens, IGNORE)
    targets[:, -300:] = tokens[:, -300:]

    def token_loss(logp):
        if passes == 1:
            return losses.nll_token_loss(logp)
        return losses.cut_token_loss(*logp, losses.detect(*logp, 1.1), 1.0)

    for step in range(4):
        model([tokens] * passes, [targets] * passes, token_loss)[0].backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype, lora_rank, passes, autocast", [
    (torch.float32, 0, 1, False), (torch.float32, 0, 1, True), (torch.bfloat16, 0, 1, False),
    (torch.bfloat16, 16, 1, False), (torch.bfloat16, 16, 2, False)])
def test_the_memory_estimate_is_within_15_percent(dtype, lora_rank, passes, autocast, checkpoint):
    """A model of 69 M parameters: all weights and adapters, one pass and CUT's two, against the peak of live tensors in
    the profiler's record of allocations."""
    config = Config(vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
                    num_attention_heads=12, num_key_value_heads=12, head_dim=64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_on_random_tokens(config, dtype, passes, lora_rank, checkpoint, autocast)
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    model = on_meta(LLaMA, config).to(dtype)
    if lora_rank:
        add_lora(model, lora_rank)
    estimate = memory_estimate(model, 1024, checkpoint=checkpoint, autocast=autocast)
    print(f"estimate {sum(estimate.values()) / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB", estimate)
    assert sum(estimate.values()) == pytest.approx(peak, rel=0.15)


def test_what_cannot_fit_is_refused_before_it_is_allocated(job, tmp_path, monkeypatch, capsys):
    """Out of memory after a load of twenty minutes, in a message that names no flag."""
    monkeypatch.setattr(model_file, "available_memory", lambda device: 1_000_000)
    monkeypatch.setattr(LLaMA, "from_pretrained", None)
    for name in ("sft", "cut"):
        with pytest.raises(InputError, match=r"takes about [\d.]+ MB.* 0.0 GB are free on cpu: lower --micro-batch"):
            MAIN[name](job(name, tmp_path / "out"))
        assert "memory estimate: " in capsys.readouterr().out


def test_the_largest_micro_batch_is_that_of_the_data(job, base):
    """An estimate of other shapes than training will make: a pass forgotten, or good responses counted once."""
    records, args = data.read_judged(job("cut", "")[3]), train_cut.parse([])
    for e in data.encode(data.Tokenizer.from_pretrained(base), records, "short", 256):
        batch, rows = (train_cut.judged_batch, 3) if e.judged_prompt else (train_cut.good_batch, 6)
        tokens = batch([(e, 1.0)] * rows, *[[]] * bool(e.judged_prompt), args, "cpu")[0]
        size = sum(t.numel() for t in tokens)
        assert size <= train_cut.largest_micro_batch([e], 3, 256) <= size + 6


def anonymous_memory():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_a_1b_checkpoint_loads_without_a_second_copy(tmp_path):
    """1.1 B parameters in bf16, read into anonymous memory in place of the file's own pages."""
    shape = Config(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                   num_attention_heads=32, num_key_value_heads=4, head_dim=64)
    on_meta(LLaMA, shape).to(torch.bfloat16).to_empty(device="cpu").save_pretrained(tmp_path)
    before, size = anonymous_memory(), (tmp_path / "model.safetensors").stat().st_size
    model = LLaMA.from_pretrained(tmp_path, torch.bfloat16)
    assert all(p.max() is not None for p in model.parameters())             # every page is read
    assert size > 2.19e9 and anonymous_memory() - before < 0.1 * size
    (tmp_path / "model.safetensors").unlink()


if __name__ == "__main__":
    data.run_main(run_jobs)
