"""model.py: parity with transformers and PEFT, files on disk, sampling against a naive loop, LoRA, schedules."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import model as M
from data import InputError, atomic_write, write_json
from model import (ATTENTION_MODULES, MLP_MODULES, Config, LLaMA, RewardModel, add_lora, generate, load_adapter,
                   lora_disabled, lora_layers, merge_lora, sample_token, save_adapter)

torch.set_num_threads(1)
F64 = torch.float64
V = 61
# Query heads, key/value heads and head dimension all differ, and H * hd differs from D.
SMALL = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=2048, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@torch.no_grad()
def randomize(network, seed=0, std=.3):
    """Every weight random, norms too, so that no two tensors can be swapped unseen."""
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * std + (p.dim() == 1))
    return network.eval()


def hf_model(hf, kind="LlamaForCausalLM", theta=500.0, **changes):
    rope = {"rope_type": "default", "rope_theta": theta}
    config = hf.LlamaConfig(**{**SMALL, **changes}, rope_parameters=rope)
    return randomize(getattr(hf, kind)(config))


def ours(dtype=F64, seed=0, std=.3, **changes):
    config = Config(**{**SMALL, "rope_theta": 500.0, **changes})
    return randomize(LLaMA(config), seed, std).to(dtype)


def draw_ids(*shape, seed=0):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------------------
# Parity with transformers


@pytest.mark.parametrize("theta, changes", [
    (500.0, {}),
    (123456.0, dict(num_attention_heads=4, num_key_value_heads=1, head_dim=6, rms_norm_eps=1e-2)),
    (50.0, dict(num_attention_heads=3, num_key_value_heads=3, head_dim=16, tie_word_embeddings=True)),
    (2e6, dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=2))])
@torch.no_grad()
def test_logits_are_transformers_both_ways(hf, tmp_path, theta, changes):
    """Another rotary order or base, head layout, norm, tying or dtype than the checkpoint's; a tensor lost between
    shards."""
    tokens, tied = draw_ids(3, 40), "tie_word_embeddings" in changes
    theirs = hf_model(hf, theta=theta, **changes)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    assert len(list(tmp_path.glob("hf/*.safetensors"))) > 2
    mine = LLaMA.from_pretrained(tmp_path / "hf")
    expected = theirs(tokens).logits
    assert expected.std() > .1
    close(mine(tokens), expected)

    for dtype in (torch.bfloat16, torch.float32):
        mine = ours(dtype, seed=5, rope_theta=theta, **changes)
        mine.save_pretrained(tmp_path / "ours")
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
        for loaded in (theirs, LLaMA.from_pretrained(tmp_path / "ours", dtype)):
            same_weights(mine, loaded)
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    close(theirs(tokens).logits, mine(tokens))


def test_greedy_generation_is_transformers(hf, tmp_path):
    """A cache, a position (past 1,024 too) or an end of text handled otherwise than by transformers."""
    theirs = hf_model(hf)
    theirs.save_pretrained(tmp_path)
    mine = LLaMA.from_pretrained(tmp_path)
    for seed, length in enumerate((1, 7, 1100)):
        prompt, eos = draw_ids(1, length, seed=seed), None
        for _ in range(2):                                                 # without EOS, and with a token of the first
            ids = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
                                  eos_token_id=eos, pad_token_id=0)
            expected = ids[0, length:].tolist()
            assert generate(mine, prompt.tolist(), 20, -1 if eos is None else eos, temperature=0) == [[expected]]
            eos = expected[len(expected) // 3]


@torch.no_grad()
def test_the_reward_model_is_transformers_both_ways(hf, tmp_path):
    """A reward read at the padding or one token off, or a head under another name."""
    tokens, lengths = draw_ids(3, 12), torch.tensor([12, 5, 1])
    tokens[torch.arange(12) >= lengths.unsqueeze(1)] = 0
    theirs = hf_model(hf, "LlamaForSequenceClassification", num_labels=1, pad_token_id=0)
    theirs.save_pretrained(tmp_path / "hf")
    mine = RewardModel.from_pretrained(tmp_path / "hf")
    rewards = mine(tokens, lengths)
    close(theirs(tokens).logits.squeeze(-1), rewards)
    mine.save_pretrained(tmp_path / "ours")
    same_weights(mine, RewardModel.from_pretrained(tmp_path / "ours"))
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert theirs.config.num_labels == 1
    for row, length, reward in zip(tokens, lengths, rewards):
        close(theirs(row[None, :length]).logits[0, 0], reward)
        row[length:] = 7                                                   # padding may be any token
    close(mine(tokens, lengths), rewards)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def edit_config(directory, changes):
    """Changes keys of config.json; those that are set to ... go."""
    path = Path(directory, "config.json")
    raw = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in raw.items() if value is not ...})


@pytest.mark.parametrize("theta", [None, 777.0])
@torch.no_grad()
def test_absent_keys_take_llamas_defaults(hf, tmp_path, capsys, theta):
    """Files of 2023: a default that is not LLaMA's or is taken in silence; rope_theta ignored at the top level."""
    shape = {**SMALL, "num_key_value_heads": 6, "head_dim": 4, "rms_norm_eps": 1e-6}
    theirs, tokens = hf_model(hf, theta=theta or 10000.0, **shape), draw_ids(2, 50)
    theirs.save_pretrained(tmp_path)
    raw = {key: shape[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads")}
    write_json(tmp_path / "config.json", {"model_type": "llama", "rope_theta": theta, **raw})
    capsys.readouterr()
    close(LLaMA.from_pretrained(tmp_path)(tokens), theirs(tokens).logits)
    printed = capsys.readouterr().out
    for default in ("config.json", "num_key_value_heads = 6", "head_dim = 4", "max_position_embeddings = 2048",
                    "rms_norm_eps = 1e-06", "initializer_range = 0.02", "tie_word_embeddings = False"):
        assert default in printed
    assert ("rope_theta = 10000.0" in printed) == (theta is None)
    M.read_config(tmp_path, quiet=True)
    assert capsys.readouterr().out == ""


def test_a_complete_config_is_read_as_it_is(hf, tmp_path, capsys):
    """Nested rope_parameters that lose against a stale top-level value; our own file thought incomplete."""
    hf_model(hf, theta=777.0).save_pretrained(tmp_path / "hf")
    edit_config(tmp_path / "hf", {"rope_theta": 1.0})
    mine = ours(rope_theta=321.0, initializer_range=.5, tie_word_embeddings=True)
    mine.save_pretrained(tmp_path / "ours", extra={"note": 1})
    capsys.readouterr()
    assert M.read_config(tmp_path / "hf")[0] == Config(**SMALL, rope_theta=777.0)
    config, raw = M.read_config(tmp_path / "ours")
    assert config == mine.config and raw["note"] == 1 and capsys.readouterr().out == ""


@pytest.mark.parametrize("key, change", [
    ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}),
    ("rope_parameters.partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": .5}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("attention_bias", {"attention_bias": True}),
    ("model_type", {"model_type": "mistral"}),
    ("num_key_value_heads", {"num_key_value_heads": 4}),
    ("head_dim", {"head_dim": 3}),
    ("ZeroDivisionError", {"num_attention_heads": 0}),
    ("vocab_size", {"vocab_size": "61"}),
    ("num_hidden_layers", {"num_hidden_layers": 2**31}),
    ("num_hidden_layers", {"num_hidden_layers": True}),
    ("hidden_size", {"hidden_size": 2**40}),
    ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    ("rope_theta", {"rope_parameters": {"rope_theta": "500"}}),
    ("tie_word_embeddings", {"tie_word_embeddings": "false"}),
    ("prompt_format", {"prompt_format": "alpaka"}),
    ("reward_token", {"reward_token": 8}),
    ("hidden_size", {"hidden_size": ...})])
def test_a_config_of_another_function_is_refused(tmp_path, key, change):
    """A checkpoint that computes something else than it was trained for, or a traceback where one line would do."""
    ours().save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(InputError, match=f"config.json.*{key}"):
        LLaMA.from_pretrained(tmp_path)


def test_safetensors_both_ways(tmp_path):
    """Offsets, shapes, dtypes or memory order other than the format's."""
    package = pytest.importorskip("safetensors.torch")
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"f32": x, "bf16": x.bfloat16(), "f16": x.half(), "f64": x.double(), "é": x + 1,
               "transposed": x.T, "slice": x[::2, 1], "scalar": torch.tensor(1.5), "empty": x[:0],
               "i64": torch.arange(5), "i32": torch.arange(3, dtype=torch.int32),
               "u8": torch.arange(7, dtype=torch.uint8), "bool": torch.tensor([True, False, True])}
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    M.write_safetensors(tmp_path / "ours", tensors)
    package.save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    header = int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little")
    assert header % 8 == 0
    for read in (package.load_file(tmp_path / "ours"), M.read_safetensors(tmp_path / "ours"),
                 M.read_safetensors(tmp_path / "theirs")):
        assert set(read) == set(tensors)
        for name, t in tensors.items():
            assert read[name].dtype == t.dtype and torch.equal(read[name], t), name


@pytest.mark.parametrize("a, b, size", [([0, 8], [0, 8], 8), ([0, 8], [4, 12], 12), ([0, 8], [12, 20], 20),
                                        ([-8, 0], [0, 8], 8), ([0, 8], [8, 16], 17), ([0, 8], [8, 16], 15)])
def test_safetensors_tile_their_file(tmp_path, a, b, size):
    """Two names on the same bytes, a gap, bytes before or after the file's: the format forbids them all."""
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in (("a", a), ("b", b))}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(InputError, match="x: cannot be read"):
        M.read_safetensors(tmp_path / "x")


def test_training_never_writes_into_the_checkpoint(tmp_path):
    """Weights that are mapped from the file and trained in place, down to the disk."""
    mine = ours(torch.float32)
    mine.save_pretrained(tmp_path)
    with torch.no_grad():
        for p in LLaMA.from_pretrained(tmp_path).parameters():
            p.add_(1)
    same_weights(mine, LLaMA.from_pretrained(tmp_path))


class Code:
    """Unpickling it makes a directory in the working directory."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read_and_code_is_refused(tmp_path, monkeypatch, shards):
    """Checkpoints of 2023 with their inv_freq buffers that no longer load, or a stranger's code that runs."""
    mine = ours(torch.float32, seed=1)
    mine.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {**mine.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    names, shard_of = list(state), {}
    for i in range(shards):
        shard = "pytorch_model.bin" if shards == 1 else f"shard-{i}.bin"
        shard_of.update(dict.fromkeys(names[i::shards], shard))
        torch.save({name: state[name] for name in names[i::shards]}, tmp_path / shard)
    write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": shard_of})
    same_weights(mine, LLaMA.from_pretrained(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save({**state, "evil": Code()}, tmp_path / shard)
    with pytest.raises(InputError, match=f"{shard}: cannot be read .*plain weights"):
        LLaMA.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save(state, tmp_path / shard)
    content = bytearray((tmp_path / shard).read_bytes())
    content[content.index(state["lm_head.weight"].detach().numpy().tobytes())] ^= 1
    (tmp_path / shard).write_bytes(content)
    with pytest.raises(InputError, match=f"{shard}: cannot be read .*checksums"):
        LLaMA.from_pretrained(tmp_path)


def test_damaged_or_foreign_weights_are_refused(tmp_path):
    """A model that starts from half a download, or with random weights where the file had none."""
    mine = ours(torch.float32)
    mine.save_pretrained(tmp_path)
    path, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    state, whole = mine.state_dict(), path.read_bytes()

    def refused(match):
        with pytest.raises(InputError, match=match):
            LLaMA.from_pretrained(tmp_path)

    header = int.from_bytes(whole[:8], "little")
    for damaged in (whole[:-1], whole[:8 + header], whole[:8 + header // 2], whole[:5], b"\xff" * 64):
        path.write_bytes(damaged)
        refused("model.safetensors")

    name = "model.layers.1.mlp.up_proj.weight"
    others = {key: w for key, w in state.items() if key != name}
    M.write_safetensors(path, others)
    refused(f"{name} was saved with shape none")
    M.write_safetensors(path, {**others, name: state[name].T})
    refused(rf"{name} was saved with shape \[24, 40\], this model has \[40, 24\]")
    M.write_safetensors(path, {**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(60)})
    refused("q_proj.bias was saved with shape .60., this model has none")
    M.write_safetensors(path, {**others, name: torch.zeros(40, 24, dtype=torch.int32)})
    refused(name)                                                          # whole numbers are no weights
    RewardModel.from_backbone(mine).save_pretrained(tmp_path)
    refused(r"\(a reward model\): lm_head.weight")

    path.unlink()
    refused("neither model.safetensors nor pytorch_model.bin")
    write_json(index, {"weight_map": {**dict.fromkeys(others, "a"), name: "b"}})
    M.write_safetensors(tmp_path / "a", others)
    refused("b: no such file")
    M.write_safetensors(tmp_path / "b", {})
    refused(f"{name} is in none of the shards")
    for elsewhere in ("../b", str(tmp_path / "b")):
        write_json(index, {"weight_map": {**dict.fromkeys(others, "a"), name: elsewhere}})
        refused("index.json: cannot be read")
    (tmp_path / "config.json").write_text("{'single': quotes}")
    refused("config.json: cannot be read")
    (tmp_path / "config.json").unlink()
    refused("config.json: no such file")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A crash in the middle of a save that destroys the previous checkpoint, or leaves its half beside it."""
    write_json(tmp_path / "a", {"old": 1})
    with pytest.raises(InputError, match="a: cannot be written"), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

EOS = 7
PROMPTS = [draw_ids(n, seed=n).tolist() for n in (5, 1, 17, 2, 9, 5, 30, 3, 12, 1, 6)]
SETTINGS = [dict(temperature=0), dict(), dict(top_k=9, top_p=.8), dict(temperature=1.7, top_p=.95)]


@pytest.fixture(scope="module")
def talker():
    """A model that is unsure enough to finish after a few tokens or after many."""
    return ours(seed=4, std=.12)


@torch.no_grad()
def naive(model, prompt, count, row, seed, temperature=1.0, top_k=0, top_p=1.0):
    """The definition: the whole sequence through the network for every token."""
    ids = []
    for u in np.random.default_rng([seed, row]).random(count):
        logits = model(torch.tensor([prompt + ids]))[:, -1]
        ids.append(sample_token(logits, torch.tensor([u]), temperature, top_k, top_p).item())
        if ids[-1] == EOS:
            break
    return ids


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_generate_is_the_naive_loop(talker, setting):
    """Wrong cache, position, padding or row when a ragged batch shrinks."""
    expected = [[naive(talker, prompt, 24, row, 3, **setting)] for row, prompt in enumerate(PROMPTS)]
    assert generate(talker, PROMPTS, 24, EOS, seed=3, **setting) == expected
    if setting == {}:
        assert len({len(ids) for ids, in expected}) > 3                    # rows did leave at different times


def test_samples_depend_on_their_row_only(talker):
    """n samples that are copies of each other, or that change with the batch size or with the other prompts."""
    finished = []
    expected = generate(talker, PROMPTS, 12, EOS, n=3, seed=1, progress=finished.append)
    assert sum(finished) == 3 * len(PROMPTS)
    assert any(first != second != third != first for first, second, third in expected)
    for size in (1, 2, 7, 10**6):
        assert generate(talker, PROMPTS, 12, EOS, n=3, seed=1, batch_size=size) == expected
    some = [8, 0, 6]
    samples = generate(talker, [PROMPTS[i] for i in some], 12, EOS, n=3, seed=1, rows=some)
    assert samples == [expected[i] for i in some]
    for j in range(3):
        assert generate(talker, [PROMPTS[6]], 12, EOS, seed=1, rows=[3 * 6 + j]) == [[expected[6][j]]]
    assert generate(talker, PROMPTS, 12, EOS, n=3, seed=2) != expected


def test_generate_stops(talker):
    """EOS left out or followed by more tokens, or a length that is not kept."""
    free = generate(talker, [PROMPTS[0]], 20, -1, seed=5)[0][0]
    assert len(free) == 20
    eos = free[6]
    expected = free[:free.index(eos) + 1]
    for count in (0, 1, 2, len(expected) - 1, len(expected), 20):          # EOS as the very last token too
        assert generate(talker, [PROMPTS[0]], count, eos, seed=5) == [[expected[:count]]]
    assert generate(talker, [], 5, EOS) == []
    with pytest.raises(ValueError, match="prompt 4 is empty"):
        generate(talker, [[1], []], 5, EOS, rows=[3, 4])


def frequencies(p, temperature=1.0, count=20000, **kwargs):
    """How often sample_token picks each token over an even grid of uniform numbers."""
    logits = torch.tensor(p, dtype=F64).log()
    grid = (torch.arange(count, dtype=F64) + .5) / count
    picks = sample_token(logits.expand(count, -1), grid, temperature, **kwargs)
    return np.bincount(picks, minlength=len(p)) / count


def test_sample_token_follows_the_softmax():
    """A CDF that is shifted, sorted but not unsorted, not renormalized, or tempered the wrong way round."""
    p = np.array([.05, .3, .02, .4, .13, .1])
    for temperature in (1.0, .5, 2.0):
        expected = p ** (1 / temperature)
        expected /= expected.sum()
        for kwargs in ({}, {"top_k": 6}, {"top_k": 99}, {"top_p": 1 - 1e-12}):
            np.testing.assert_allclose(frequencies(p, temperature, **kwargs), expected, atol=1.1e-4)
    for temperature in (0, 1.0):
        np.testing.assert_array_equal(frequencies(p, temperature, top_k=1), [0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("kwargs, kept", [
    (dict(top_p=0), [3]), (dict(top_p=.49), [3]), (dict(top_p=.51), [3, 1]), (dict(top_p=.74), [3, 1]),
    (dict(top_p=.76), [3, 1, 0]), (dict(top_p=.99), [3, 1, 0, 2]), (dict(top_k=2), [3, 1]), (dict(top_k=3), [3, 1, 0]),
    (dict(top_p=.5), [3]),                                                 # reached exactly
    (dict(top_k=2, top_p=.66), [3]), (dict(top_k=2, top_p=.67), [3, 1])])  # of the two, 3 has 2/3 of the mass
def test_truncation_keeps_the_smallest_set(kwargs, kept):
    """Nucleus sampling that keeps one token too many or too few, or measures against mass that top_k took away."""
    p = np.array([.125, .25, .125 - 1e-3, .5, 1e-3])
    expected = np.zeros(5)
    expected[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(frequencies(p, **kwargs), expected, atol=1.1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 4}, {"top_k": 1}, {"top_p": .6}, {"top_k": 3, "top_p": .9}], ids=str)
def test_a_token_of_probability_0_is_never_sampled(kwargs):
    """Either end of the unit interval, where a CDF is flat."""
    inf = float("-inf")
    u = torch.tensor([0.0, 5e-324, 1e-300, .5, 1 - 1e-12, 1.0], dtype=F64)         # 1.0: rounded up to fp32 on MPS
    for row in ([inf, 1., inf, .5, inf], [inf, inf, 3., inf, inf], [-2000., 0., -2000., 0., -2000.], [0.] * 5,
                [-40., 0., 30., 1., -40.], [inf, 0.1, 0.2, 0.3, 0.7]):
        logits = torch.tensor(row).expand(len(u), -1)
        possible = torch.softmax(logits[0].double(), 0) > 0
        for temperature in (1.0, .7):
            assert possible[sample_token(logits, u, temperature, **kwargs)].all(), row


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and schedule


def adapted(modules=MLP_MODULES, dtype=torch.float32):
    """A small LLaMA with adapters that are not zero."""
    model = ours(dtype)
    torch.manual_seed(0)
    add_lora(model, 4, 8, modules)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=.1)
    return model


@torch.no_grad()
def test_a_fresh_or_disabled_adapter_is_the_base_model():
    """A reference model that has moved: KL penalties and DPO would be measured from the wrong place."""
    fresh, model, tokens = ours(torch.float32), adapted(), draw_ids(2, 9)
    logits = fresh(tokens)
    add_lora(fresh, 4, 8)
    with lora_disabled(model):
        assert torch.equal(model(tokens), logits) and torch.equal(fresh(tokens), logits)
    assert not torch.allclose(model(tokens), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_get_gradients_and_stay_in_fp32(dtype):
    """A frozen head that costs a (V, D) gradient, or adapters in bf16, which lose updates below 1/256 of a weight."""
    model = adapted(dtype=dtype)
    loss, logp = model(draw_ids(2, 9), draw_ids(2, 9, seed=1), losses.nll_token_loss)
    loss.backward()
    assert logp.dtype == torch.float32
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name
        else:
            assert p.dtype == dtype and p.grad is None, name


@torch.no_grad()
def test_adapters_are_pefts_both_ways(hf, tmp_path):
    """An adapter that PEFT opens but computes differently, or the reverse; a merge with the scale forgotten or applied
    twice, or that leaves another model than a plain one."""
    peft = pytest.importorskip("peft")
    model, tokens = adapted(MLP_MODULES + ATTENTION_MODULES), draw_ids(2, 9)
    ours(torch.float32).save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "ours", tmp_path / "base")
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    close(theirs(tokens).logits, model(tokens))
    theirs.save_pretrained(tmp_path / "theirs")
    again = LLaMA.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "theirs")
    close(again(tokens), model(tokens), 1e-6)
    merge_lora(again)
    close(again(tokens), model(tokens), 1e-5)
    assert set(again.state_dict()) == set(ours().state_dict()) and all(p.requires_grad for p in again.parameters())


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    """A module that matches nothing trains nothing; an adapter of another kind or shape is another model."""
    with pytest.raises(InputError, match="'w1' matches no layer: use gate_proj.*o_proj"):
        add_lora(ours(), modules=("gate_proj", "w1"))
    save_adapter(adapted(), tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for rank in (3, 2**40, "4", None):
        write_json(path, {**config, "r": rank})
        with pytest.raises(InputError, match="adapter_config.json.*rank"):
            load_adapter(ours(), tmp_path)


def test_only_plain_adapters_are_loaded(tmp_path):
    """An option of PEFT that makes another function of the same weights is ignored; or its defaults are refused."""
    peft = pytest.importorskip("peft")
    save_adapter(adapted(), tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    plain = {**peft.LoraConfig(task_type="CAUSAL_LM").to_dict(), **config}
    write_json(path, plain)
    load_adapter(ours(), tmp_path)
    for key, value in {"use_dora": True, "use_rslora": True, "lora_bias": True, "fan_in_fan_out": True, "bias": "all",
                       "alpha_pattern": {"up_proj": 99}, "rank_pattern": {"up_proj": 4}, "init_lora_weights": "pissa",
                       "layers_to_transform": [0], "layer_replication": [[0, 1]], "exclude_modules": ["up_proj"],
                       "peft_type": "IA3", "invented_next_year": {"x": 1}}.items():
        write_json(path, {**plain, key: value})
        with pytest.raises(InputError, match=f"{key} is .*not implemented"):
            load_adapter(ours(), tmp_path)


def test_the_head_of_a_half_precision_reward_model_is_in_fp32(tmp_path):
    """Rewards in bf16, in which close responses tie, or a head that is rounded when it is loaded."""
    reward = RewardModel.from_backbone(ours(torch.bfloat16))
    assert reward(draw_ids(1, 4), torch.tensor([4])).dtype == reward.score.weight.dtype == torch.float32
    reward.save_pretrained(tmp_path)
    same_weights(reward, RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16))


@pytest.mark.parametrize("warmup, steps", [(1, 50), (0, 21), (3, 24)])
def test_cosine_schedule(warmup, steps):
    """A first step that is wasted at 0, a peak that is never reached, or an end too early, too late or at 0."""
    lr = [M.lr_at(step, 3e-4, warmup, steps) for step in range(steps)]
    rising, falling = lr[:warmup], lr[max(0, warmup - 1):]
    assert lr[0] == pytest.approx(3e-4 / max(1, warmup))
    assert max(lr) == pytest.approx(3e-4) and lr[-1] == pytest.approx(1.5e-5)
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert lr[(warmup + steps - 1) // 2] == pytest.approx(.525 * 3e-4)      # half way down to 5 %
