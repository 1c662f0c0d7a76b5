"""Real size in small: flags that change memory and speed but not the result, memory known before it is spent, several
nodes, kill -9, loading without a second copy. The slow checks take some minutes: python -m pytest -m slow."""
import json
import os
import random
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
import model as M
import train_cut
import train_sft
from losses import IGNORE, cut_token_loss, detect
from model import (ATTENTION_PROJECTIONS, MLP_PROJECTIONS, Config, InputError, LLaMA, add_lora, check_memory, generate,
                   memory_estimate, set_execution)

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sft": train_sft, "cut": train_cut}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}                         # sums depend on the number of threads
linux = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A small model and 37 records for either script (the last batch of an epoch is uneven), as a function that gives
    the arguments of a run."""
    d = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    tokenizer = data.world_tokenizer()
    LLaMA(Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
          ).save_pretrained(d / "base", tokenizer, extra={"prompt_format": "short"})
    records = data.World(9).demonstrations(60, lambda a, b: None if a == b else f"It says {a}", "size")
    (d / "cut.json").write_text(json.dumps(records[:37]))
    (d / "sft.json").write_text(json.dumps([r for r in records if r["judgment"] is None][:37]))

    def arguments(name, out, *more):
        own = ["--downsample", "-1"] if name == "cut" else []
        return [*own, "--model", str(d / "base"), "--data", str(d / f"{name}.json"), "--format", "short", "--device",
                "cpu", "--steps", "10", "--batch-size", "8", "--micro-batch-size", "3", "--lr", "1e-3", "--out",
                str(out), *map(str, more)]

    arguments.base = d / "base"
    return arguments


def weights(directory):
    return LLaMA.from_pretrained(directory, torch.float64).state_dict()


def losses_of(directory):
    return [json.loads(line)["loss"] for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


def distance(a, b):
    a, b = weights(a), weights(b)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def torchrun(script, argv, *how):
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(ROOT / script), *argv]
    return subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*runs):
    ends = [run.communicate(timeout=300) for run in runs]
    for run, (_, err) in zip(runs, ends):
        assert run.returncode == 0, err[-3000:]
    return [out for out, _ in ends]


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("name,rank", [("sft", 0), ("cut", 0), ("cut", 4)])
def test_checkpointed_activations_give_the_same_bits(job, name, rank, tmp_path, monkeypatch):
    """A block computed again with another dropout mask, or not computed again at all."""
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    more = ("--lora-rank", rank, "--lora-dropout", 0.3)
    SCRIPTS[name].main(job(name, tmp_path / "plain", *more))
    assert not calls
    SCRIPTS[name].main(job(name, tmp_path / "again", *more, "--checkpoint-activations"))
    assert calls and same(tmp_path / "plain", tmp_path / "again")


def test_autocast_computes_in_bf16_and_keeps_fp32_weights(job, tmp_path):
    """Weights rounded to bf16, or products that stay in fp32; a key-value cache of another type than its keys."""
    for out, more in (("plain", []), ("autocast", ["--autocast"])):
        train_sft.main(job("sft", tmp_path / out, *more))
    plain, rounded = losses_of(tmp_path / "plain"), losses_of(tmp_path / "autocast")
    assert plain != rounded and plain == pytest.approx(rounded, rel=2e-2)
    model = LLaMA.from_pretrained(tmp_path / "autocast")
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    torch.manual_seed(0)
    tokens = torch.randint(1, 100, (3, 12))
    exact = model(tokens)
    set_execution(model, torch.device("cpu"), autocast=True)
    found = model(tokens)
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    cache = M.KVCache(model.config, 3, 12, "cpu", torch.float32)
    parts = []
    with torch.no_grad():
        for part in tokens.split((7, 1, 4), dim=1):                         # the same, in pieces through the cache
            cache.begin(part.shape[1])
            parts.append(model.lm_head(model.model(part, cache)))
            cache.lengths = cache.lengths + part.shape[1]
    assert (torch.cat(parts, 1) - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(len(y[0]) <= 5 for y in generate(model, tokens.tolist(), 5, 2))
    with pytest.raises(InputError, match="--autocast with --dtype bfloat16"):
        train_sft.main(job("sft", tmp_path / "no", "--autocast", "--dtype", "bfloat16"))


def test_all_flags_in_the_built_in_world(job, tmp_path):
    """Sampling, detection and evaluation of the online rounds under the flags."""
    argv = ["--model", str(job.base), "--rounds", "1", "--steps", "2", "--samples", "20", "--split", "validation",
            "--device", "cpu", "--flags", "frozen"]
    train_cut.main([*argv, "--out", str(tmp_path / "x"), "--autocast", "--checkpoint-activations"])
    assert len(losses_of(tmp_path / "x")) == 2 and (tmp_path / "x" / "results.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("name,more", [("sft", []), ("cut", ["--lora-rank", "4", "--lora-dropout", "0"]),
                                       ("cut", ["--lora-rank", "0", "--checkpoint-activations"])])
def test_compiled_blocks_train_alike(job, name, more, tmp_path, monkeypatch):
    """A compiled block that computes something else, or is compiled again for every length and layer."""
    compiled = []
    monkeypatch.setattr(M.Block, "compile", lambda self, **k: compiled.append(1) or torch.nn.Module.compile(self, **k))
    torch._dynamo.reset()
    more = [*more, "--dtype", "float64"]                # in fp32, Adam blows the rounding of tiny gradients up
    SCRIPTS[name].main(job(name, tmp_path / "plain", *more))
    SCRIPTS[name].main(job(name, tmp_path / "compiled", *more, "--compile"))
    assert len(compiled) == 2 and distance(tmp_path / "plain", tmp_path / "compiled") < 1e-9
    frames = torch._dynamo.utils.counters["frames"]
    assert 0 < frames["ok"] <= 12, torch._dynamo.utils.counters
    model, prompts = LLaMA.from_pretrained(tmp_path / "compiled"), [[1, 5, 9], [1, 7]]
    wanted = generate(model, prompts, 6, -1, temperature=0)
    set_execution(model, torch.device("cpu"), compiled=True)
    before = frames["ok"]
    assert generate(model, prompts, 6, -1, temperature=0) == wanted and frames["ok"] == before     # sampling is not


def test_compile_says_why_not(job, tmp_path, monkeypatch):
    """A traceback of the compiler's, after the model has been loaded and the first batch begun."""
    def broken(*a, **k):
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=r"--compile does not work here \(no C\+\+ compiler\): leave it out"):
        train_sft.main(job("sft", tmp_path / "out", "--compile"))


def test_zero_is_adamw_and_resumes(job, tmp_path):
    """Moments lost when a rank's share is not collected for saving, or parameters that the owner does not send on."""
    argv = job("cut", tmp_path / "zero", "--lora-rank", 0, "--dtype", "float64", "--save-every", 4, "--zero")
    two = ("--standalone", "--nproc_per_node", "2")
    printed, = finish(torchrun("train_cut.py", argv, *two))
    train_cut.main(job("cut", tmp_path / "plain", "--lora-rank", 0, "--dtype", "float64"))
    assert distance(tmp_path / "zero", tmp_path / "plain") < 1e-12
    terms = dict(reversed(x.split()) for x in printed.split("memory: ")[1].split(" = ")[0].split(" + "))
    assert float(terms["optimizer"]) < 1.3 * float(terms["gradients"])      # 2 moments, halved but for the last matrix
    saved = torch.load(tmp_path / "zero" / "resume.pt", weights_only=True)
    assert saved["state"]["step"] == 8 and len(saved["optimizer"]["state"]) == len(saved["model"])
    shutil.copytree(tmp_path / "zero", tmp_path / "whole")
    finish(torchrun("train_cut.py", [*argv, "--resume"], *two))
    assert same(tmp_path / "zero", tmp_path / "whole")
    train_cut.main([a for a in argv if a != "--zero"] + ["--resume"])       # and by one process, without the flag
    assert distance(tmp_path / "zero", tmp_path / "whole") < 1e-12
    with pytest.raises(InputError, match="--zero shares .* over ranks, and there is 1"):
        train_cut.main(job("cut", tmp_path / "alone", "--zero"))


def test_resuming_with_another_shape_is_refused(job, tmp_path):
    """The base model's directory now holds another model: its name is the same, its shapes are not."""
    shutil.copytree(job.base, tmp_path / "base")
    argv = [a if a != str(job.base) else str(tmp_path / "base")
            for a in job("sft", tmp_path / "out", "--save-every", 4)]
    train_sft.main(argv)
    config = LLaMA.from_pretrained(job.base).config
    LLaMA(Config(**{**vars(config), "intermediate_size": 52})).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"down_proj.weight was trained with shape \[32, 48\], this run has "
                                         r"\[32, 52\]: resume with the same model"):
        train_sft.main([*argv, "--resume"])


# ----------------------------------------------------------------------------------------------------------------------
# Memory


SMALL = Config(vocab_size=1000, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=8,
               num_key_value_heads=8, head_dim=8)
EVERY = MLP_PROJECTIONS + ATTENTION_PROJECTIONS


@pytest.mark.parametrize("dtype,autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False),
                                            (torch.float64, False)])
@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("rank,dropout,targets", [(0, 0, ()), (4, .05, MLP_PROJECTIONS), (4, 0., MLP_PROJECTIONS),
                                                  (4, .05, EVERY), (4, 0., EVERY)])
def test_what_a_block_keeps_is_counted_to_the_byte(dtype, heads, rank, dropout, targets, autocast):
    """A tensor that autograd keeps and the formula forgets."""
    config = Config(**{**vars(SMALL), "num_key_value_heads": heads})
    model = LLaMA(config).to(dtype)
    if rank:
        add_lora(model, rank, 16, dropout, targets)
    block, (B, T) = model.model.layers[0], (3, 100)
    x = torch.randn(B, T, 64, dtype=dtype, requires_grad=True)
    tables = M.rope_tables(torch.arange(T), 8, 1e4, dtype)                  # shared by the blocks
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *tables)}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in there:
            kept[t.untyped_storage().data_ptr()] = t                        # alive, or its address would be used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x, *tables)
    a_token, once = M.block_activations(block, dtype, autocast)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == B * T * a_token + once and y.requires_grad


def measured_peak(config, dtype, readings, wanted, rank, checkpoint, autocast):
    """Peak bytes of live tensors in two steps of two micro-batches each, from the profiler's record of allocations."""
    B, T = readings[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.device("meta"):
            model = LLaMA(config)
        model = model.to(dtype).to_empty(device="cpu")
        for p in model.parameters():
            torch.nn.init.constant_(p, .01)
        if rank:
            add_lora(model, rank, 16, .05)
        set_execution(model, torch.device("cpu"), checkpoint, False, autocast)
        optimizer = M.make_optimizer(model)
        tokens, targets = torch.randint(0, config.vocab_size, (B, T)), torch.full((B, T), IGNORE)
        targets[:, -wanted:] = tokens[:, -wanted:]
        for step in range(4):
            def token_loss(logp, _):
                if len(logp) == 1:
                    return -logp[0]
                return cut_token_loss(logp[0], logp[1], detect(logp[0], logp[1], 1.1), 1.0)

            model([tokens] * len(readings), [targets] * len(readings), token_loss)[0].backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    live = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("dtype,rank,readings,autocast", [
    (torch.float32, 0, [(2, 512)], False), (torch.float32, 0, [(2, 512)], True), (torch.bfloat16, 0, [(2, 512)], False),
    (torch.bfloat16, 16, [(2, 512)], False), (torch.bfloat16, 16, [(1, 512)] * 2, False)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(dtype, rank, readings, autocast, checkpoint):
    """A 69 M parameter model, all weights and adapters, SFT's one reading and CUT's two, in bytes of live tensors."""
    config = Config(vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
                    num_attention_heads=12, num_key_value_heads=12, head_dim=64)
    estimate = memory_estimate(config, dtype, readings, readings[0][0] * 300, lora_rank=rank, lora_dropout=.05,
                               checkpoint=checkpoint, autocast=autocast)
    peak = measured_peak(config, dtype, readings, 300, rank, checkpoint, autocast)
    print(f"estimate {sum(estimate.values()) / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB", estimate)
    assert sum(estimate.values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("shape,dtype,low,high", [
    (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
          num_key_value_heads=32), torch.bfloat16, 14e9, 24e9),
    (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
          num_key_value_heads=40), torch.bfloat16, 27e9, 40e9)])
def test_estimates_at_real_size(shape, dtype, low, high):
    """CUT's setting at 7B and 13B; nothing of that size may be made to find out."""
    config = Config(**shape, vocab_size=32000, head_dim=128)
    before = M.available_memory(torch.device("cpu"))
    one = {"lora_rank": 16, "lora_dropout": .05, "device_type": "cuda"}
    lora = memory_estimate(config, dtype, [(1, 1024)] * 2, 900, **one, checkpoint=True)
    assert low < sum(lora.values()) < high
    plain = memory_estimate(config, dtype, [(1, 1024)] * 2, 900, **one)
    assert plain["activations"] > 10 * lora["activations"]
    full = memory_estimate(config, torch.float32, [(1, 1024)] * 2, 900)
    count = full["weights"] / 4
    assert sum(full.values()) > 16 * count and full["optimizer"] == 8 * count
    shared = memory_estimate(config, torch.float32, [(1, 1024)] * 2, 900, zero_ranks=8)
    assert shared["optimizer"] == pytest.approx(count, rel=.05)
    assert M.available_memory(torch.device("cpu")) > before - 1e9


def test_what_cannot_fit_is_refused_before_it_is_allocated(job, tmp_path, monkeypatch, capsys):
    """An out-of-memory error after a twenty-minute load, which names no flag."""
    monkeypatch.setattr(M, "available_memory", lambda device: 1_000_000)
    monkeypatch.setattr(LLaMA, "from_pretrained", None)
    for name in SCRIPTS:
        with pytest.raises(InputError, match=r"takes about [\d.]+ MB, and there are 0.0 GB free on cpu.*--micro-batch"):
            SCRIPTS[name].main(job(name, tmp_path / "out", "--lora-rank", 0))
        assert "memory: " in capsys.readouterr().out
    monkeypatch.setattr(M, "available_memory", lambda device: 80e9)
    big = {"weights": 26e9, "gradients": 26e9, "optimizer": 52e9, "activations": 4e9, "working": 1e9}
    with pytest.raises(InputError, match="takes about 109.0 GB, and there are 80.0 GB free on cuda.*"
                                         "optimizer 52.0 GB: --lora-rank 16.*--zero.*weights|gradients 26.0 GB"):
        check_memory(big, torch.device("cuda"))
    check_memory({**big, "optimizer": 5e9}, torch.device("cuda"))
    assert "26.0 weights + 26.0 gradients + 5.0 optimizer + 4.0 activations + 1.0 working = 62.0 GB of 80.0 GB free " \
        "on cuda" in capsys.readouterr().out


def test_the_largest_micro_batch_is_that_of_the_data(job):
    """An estimate for other shapes than training will make: a judged reading forgotten, or good rows counted once."""
    E = data.Example
    bad, good = E("a", [1] * 5, [1] * 4, [1] * 9), E("b", [1] * 30, [1] * 2)
    assert train_cut.largest_micro_batch([bad], 3, 99) == ([(3, 12), (3, 8)], 12)
    assert train_cut.largest_micro_batch([bad, good], 3, 99) == ([(6, 31)], 24)
    assert train_cut.largest_micro_batch([], 2, 50) == ([(2, 50), (2, 50)], 100)


@pytest.mark.slow
@linux
def test_a_1b_checkpoint_loads_without_a_second_copy(tmp_path):
    """1.1 B parameters in bf16, whole, and in Meta's two shards: anonymous memory above the baseline at most 1.15 times
    the file, in half precision and one weight at a time; and the files are as they were."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import LLaMA
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024
import threading, time
base, top, done = anonymous(), [0], []
def watch():
    while not done:
        top[0] = max(top[0], anonymous())
        time.sleep(.005)
thread = threading.Thread(target=watch)
thread.start()
model = LLaMA.from_pretrained(sys.argv[2], torch.bfloat16)
with torch.no_grad():
    total = sum(p.max().item() for p in model.parameters())                             # every page is read
    model.lm_head.weight.add_(1)                                                        # and some are written
done.append(1)
thread.join()
print(top[0] - base, sum(p.numel() * 2 for p in model.parameters()))
"""
    shape = Config(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                   num_attention_heads=32, num_key_value_heads=4, head_dim=64)
    with torch.device("meta"):
        model = LLaMA(shape)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.01)
    model.save_pretrained(tmp_path / "hf")
    from test_model import save_meta
    save_meta(tmp_path / "meta", model, 2)
    del model
    try:
        for directory in ("hf", "meta"):
            files = sorted((tmp_path / directory).iterdir())
            before = [(f.stat().st_mtime_ns, f.stat().st_size) for f in files]
            out = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / directory)], env=ONE_THREAD,
                                 capture_output=True, text=True, timeout=300, check=True).stdout
            extra, size = map(int, out.split()[-2:])
            print(f"{directory}: {extra / 1e9:.2f} GB anonymous for {size / 1e9:.2f} GB")
            assert files and size > 2.19e9 and extra <= 1.15 * size
            assert [(f.stat().st_mtime_ns, f.stat().st_size) for f in files] == before
            tensors = M.read_weights(tmp_path / directory)
            assert tensors["lm_head.weight"].to("cpu", torch.float32).max() < 0.02     # what was written stayed there
    finally:
        for directory in ("hf", "meta"):
            shutil.rmtree(tmp_path / directory, ignore_errors=True)


@pytest.mark.slow
def test_the_gpu_bench_runs_without_one():
    """A bench that is first found broken on the day when there is a GPU."""
    pytest.importorskip("peft")
    command = [sys.executable, str(ROOT / "tests" / "bench_gpu.py"), "small", "--steps", "1", "--batch-size", "1",
               "--length", "16", "--checkpoint-activations"]
    env = {**ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "for want of a GPU" in out and "ours / plain: tokens/s" in out


# ----------------------------------------------------------------------------------------------------------------------
# Nodes and kills


def two_nodes(script, argv):
    """Two torchrun agents of one process each, as on two machines."""
    how = ("--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port())
    return finish(*[torchrun(script, argv, *how, "--node_rank", str(node)) for node in range(2)])


def test_two_nodes_equal_one_process(job, tmp_path):
    """Ranks counted within their node, or a tail of 5 examples that leaves a node waiting."""
    argv = ("--lora-rank", 4, "--lora-dropout", 0, "--dtype", "float64")
    first, second = two_nodes("train_cut.py", job("cut", tmp_path / "two", *argv, "--checkpoint-activations"))
    train_cut.main(job("cut", tmp_path / "one", *argv))
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-12
    assert losses_of(tmp_path / "one") == pytest.approx(losses_of(tmp_path / "two"), abs=1e-10)
    assert "over 2 ranks; an epoch's last batch has 5" in first and not second.strip()      # only rank 0 speaks


@pytest.mark.slow
def test_two_nodes_sample_and_evaluate_like_one_process(job, tmp_path):
    """Online rounds on two nodes: 21 instructions, of which one rank has 11 and the other 10, and a batch of 5."""
    argv = ["--model", str(job.base), "--rounds", "2", "--steps", "4", "--samples", "21", "--batch-size", "8",
            "--replay", "3", "--split", "validation", "--device", "cpu", "--dtype", "float64"]
    two_nodes("train_cut.py", [*argv, "--out", str(tmp_path / "two")])
    train_cut.main([*argv, "--out", str(tmp_path / "one")])
    a, b = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("one", "two"))
    for x, y in zip(a["rounds"], b["rounds"]):
        assert {k: v for k, v in x.items() if k != "seconds"} == \
            pytest.approx({k: v for k, v in y.items() if k != "seconds"}, abs=1e-9)
    assert a["sft"] == b["sft"] and distance(tmp_path / "one", tmp_path / "two") < 1e-10


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_kill_9_at_any_moment(job, tmp_path):
    """Twenty kills of one run that saves after every step, each second one at a random moment, the others as soon as a
    save has begun: it must go on each time and end at the weights of an undisturbed run, bit for bit."""
    def argv(out, *more):
        plain = job("cut", tmp_path / out, "--lora-rank", 0, "--save-every", 1, *more)
        return [sys.executable, str(ROOT / "train_cut.py"), *[a if a != "10" else "400" for a in plain]]

    subprocess.run(argv("whole"), env=ONE_THREAD, check=True, capture_output=True, timeout=300)
    rng, folder, kills, reached, torn = random.Random(0), tmp_path / "killed", 0, [], 0
    while kills < 20:
        resume = ["--resume"] if (folder / "resume.pt").is_file() else []
        run = subprocess.Popen(argv("killed", *resume), env=ONE_THREAD, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
        log, seen = folder / "metrics.jsonl", len(reached) and reached[-1]
        while run.poll() is None and not (log.is_file() and log.read_text().count("\n") > seen + 2):
            time.sleep(0.01)                                                # until it is under way
        assert run.poll() is None, run.stderr.read().decode()[-2000:]
        time.sleep(rng.random() * 0.2)
        while kills % 2 and run.poll() is None and not list(folder.glob("resume.pt.tmp-*")):
            pass
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
        kills += 1
        torn += bool(list(folder.glob("resume.pt.tmp-*")))
        if (folder / "resume.pt").is_file():
            reached.append(torch.load(folder / "resume.pt", weights_only=True)["state"]["step"])
        assert reached[-1] < 400, "the run was over before the twentieth kill"
    print(f"20 kills, {torn} of them in the middle of a save, after steps {reached}")
    subprocess.run(argv("killed", "--resume"), env=ONE_THREAD, check=True, capture_output=True, timeout=300)
    assert not list(folder.glob("*.tmp-*")), "half files stay behind"
    assert torn > 3 and reached == sorted(reached) and same(tmp_path / "whole", folder)
    assert losses_of(tmp_path / "whole") == losses_of(folder)
