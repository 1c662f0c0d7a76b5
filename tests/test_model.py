"""model.py against transformers (random tiny models), its checkpoints on disk, and sampling against a naive loop."""
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import losses  # noqa: E402
import model as M  # noqa: E402
from model import Config, LLaMA, RewardModel, choose, generate  # noqa: E402

torch.set_num_threads(1)
V = 61
SMALL = dict(vocab_size=V, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=2048, rms_norm_eps=1e-5)
OLD = {**SMALL, "num_key_value_heads": 6, "head_dim": 4}                    # what an old config.json can express
TINY = {**SMALL, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 6}


@pytest.fixture(scope="module")
def hf():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def randomize(network, seed=0, std=.3):
    """Every weight random, norms too, so that no two tensors can be swapped unseen."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * std + (p.dim() == 1))
    return network.eval()


def hf_model(hf, kind="LlamaForCausalLM", theta=500.0, seed=0, **changes):
    shape = {**SMALL, **changes}
    rope = {"rope_type": "default", "rope_theta": theta}
    return randomize(getattr(hf, kind)(hf.LlamaConfig(**shape, rope_parameters=rope)), seed)


def ours(dtype=torch.float64, seed=0, std=.3, **changes):
    return randomize(LLaMA(Config(**{**SMALL, "rope_theta": 500.0, **changes})), seed, std).to(dtype)


def draw_ids(*shape, seed=0):
    return torch.randint(1, V, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert sorted(a) == sorted(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------------------
# Parity with transformers

SHAPES = [  # theta, changes: query heads, key/value heads and head dimension all differ, and H * hd differs from D
    (500.0, {}), (123456.0, dict(num_attention_heads=4, num_key_value_heads=1, head_dim=6, rms_norm_eps=1e-2)),
    (50.0, dict(num_attention_heads=3, num_key_value_heads=3, head_dim=16, tie_word_embeddings=True)),
    (2e6, dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4, head_dim=2, tie_word_embeddings=True))]


@pytest.mark.parametrize("theta, changes", SHAPES)
def test_logits_are_transformers_both_ways(hf, tmp_path, theta, changes):
    """Another rotary order or base, head layout, norm or tying than the checkpoint's: a different function."""
    theirs, tokens = hf_model(hf, theta=theta, **changes), draw_ids(3, 40)
    theirs.save_pretrained(tmp_path / "hf")
    mine = LLaMA.from_pretrained(tmp_path / "hf")
    tied = changes.get("tie_word_embeddings", False)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) == tied
    with torch.no_grad():
        want = theirs(tokens).logits
        assert want.std() > .1
        close(mine(tokens), want)
        fresh = ours(torch.float32, seed=5, rope_theta=theta, **changes)
        fresh.save_pretrained(tmp_path / "ours", shard_bytes=8000 if tied else 2**30)
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        assert type(again).__name__ == "LlamaForCausalLM" and again.dtype == torch.float32
        close(again(tokens).logits, fresh(tokens))
        assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_bf16_checkpoint_keeps_its_dtype(hf, tmp_path):
    """torch_dtype that does not say what the file holds, or weights that pass through another dtype."""
    mine = ours(torch.bfloat16)
    mine.save_pretrained(tmp_path)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert theirs.dtype == torch.bfloat16
    same_weights(mine, theirs)
    same_weights(mine, LLaMA.from_pretrained(tmp_path, dtype=torch.bfloat16))


def hf_greedy(theirs, prompt, count, eos=None):
    out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                          max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0)
    return out[0, len(prompt):].tolist()


def test_greedy_generation_is_transformers(hf, tmp_path):
    """A cache, a position or an end of text handled otherwise than by transformers."""
    theirs = hf_model(hf)
    theirs.save_pretrained(tmp_path)
    mine = LLaMA.from_pretrained(tmp_path)
    for seed, length in enumerate((1, 7, 30)):
        prompt = draw_ids(length, seed=seed).tolist()
        want = hf_greedy(theirs, prompt, 20)
        assert generate(mine, [prompt], 20, -1, temperature=0)[0][0] == want
        eos = want[5]
        assert generate(mine, [prompt], 20, eos, temperature=0)[0][0] == hf_greedy(theirs, prompt, 20, eos)


def test_positions_past_1024(hf, tmp_path):
    """A table of positions, a mask or a cache that ends at 1,024, or angles that lose precision out there."""
    theirs = hf_model(hf, **TINY)
    theirs.save_pretrained(tmp_path)
    mine, tokens = LLaMA.from_pretrained(tmp_path), draw_ids(1, 1100)
    with torch.no_grad():
        close(mine(tokens), theirs(tokens).logits)
    prompt = tokens[0].tolist()
    assert generate(mine, [prompt], 8, -1, temperature=0)[0][0] == hf_greedy(theirs, prompt, 8)


def test_reward_model_is_transformers(hf, tmp_path):
    """A reward read at another position, or a head under another name."""
    theirs = hf_model(hf, "LlamaForSequenceClassification", num_labels=1, pad_token_id=0)
    theirs.save_pretrained(tmp_path / "hf")
    mine = RewardModel.from_pretrained(tmp_path / "hf")
    tokens, lengths = draw_ids(3, 12), torch.tensor([12, 5, 1])
    tokens[torch.arange(12) >= lengths.unsqueeze(1)] = 0
    with torch.no_grad():
        want = mine(tokens, lengths)
        close(theirs(tokens).logits.squeeze(-1), want)
        mine.save_pretrained(tmp_path / "ours")
        again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        assert again.config.num_labels == 1
        for row, n, r in zip(tokens, lengths, want):
            close(again(row[None, :n]).logits[0, 0], r)


# ----------------------------------------------------------------------------------------------------------------------
# config.json


def edit_config(directory, changes=(), remove=()):
    path = Path(directory) / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps({**raw, **dict(changes)}))


NEW_KEYS = ("num_key_value_heads", "head_dim", "rope_parameters", "rope_theta", "dtype", "attention_bias", "mlp_bias",
            "pretraining_tp", "transformers_version")


@pytest.mark.parametrize("theta", [None, 777.0])
def test_old_config(hf, tmp_path, capsys, theta):
    """Files of 2023, without the newer keys: rope_theta ignored at the top level, or defaults taken without a word."""
    theirs, tokens = hf_model(hf, theta=theta or 10000.0, **OLD), draw_ids(2, 50)
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, {"torch_dtype": "float16", **({"rope_theta": theta} if theta else {})}, NEW_KEYS)
    capsys.readouterr()
    mine = LLaMA.from_pretrained(tmp_path)
    printed = capsys.readouterr().out
    assert "num_key_value_heads = 6" in printed and "head_dim = 4" in printed and "config.json" in printed
    assert ("rope_theta = 10000.0" in printed) == (theta is None)
    assert "rms_norm_eps" not in printed and "hidden_size" not in printed
    with torch.no_grad():
        close(mine(tokens), theirs(tokens).logits)


def test_every_absent_key_takes_the_llama_default(tmp_path, capsys):
    """A default that is ours and not LLaMA's, or one that is taken silently."""
    must = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **{k: OLD[k] for k in must}}))
    config, _ = M.read_config(tmp_path)
    want = dict(num_key_value_heads=6, head_dim=4, max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6,
                initializer_range=.02, tie_word_embeddings=False)
    assert config == Config(**{k: OLD[k] for k in must}, **want)
    printed = capsys.readouterr().out
    assert all(f"{k} = {v}" in printed for k, v in want.items())


def test_new_config(hf, tmp_path, capsys):
    """Nested rope_parameters that lose against the default or a stale top-level value; noise if all is there."""
    hf_model(hf, theta=777.0).save_pretrained(tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    capsys.readouterr()
    assert M.read_config(tmp_path)[0] == Config(**SMALL, rope_theta=777.0)
    assert capsys.readouterr().out == ""
    edit_config(tmp_path, {"rope_theta": 1.0})
    assert M.read_config(tmp_path)[0].rope_theta == 777.0


def test_own_config_round_trip(tmp_path, capsys):
    """A shape that comes back changed, or our own file thought incomplete."""
    mine = ours(rope_theta=321.0, initializer_range=.5, tie_word_embeddings=True)
    mine.save_pretrained(tmp_path, extra={"note": 1})
    config, raw = M.read_config(tmp_path)
    assert config == mine.config and raw["note"] == 1 and capsys.readouterr().out == ""


REFUSED = [
    ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope_scaling.rope_type", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": .5}}),
    ("hidden_act", {"hidden_act": "gelu"}), ("attention_bias", {"attention_bias": True}),
    ("mlp_bias", {"mlp_bias": True}), ("model_type", {"model_type": "mistral"}),
    ("num_key_value_heads", {"num_key_value_heads": 4}), ("head_dim", {"head_dim": 3})]


@pytest.mark.parametrize("key, change", REFUSED)
def test_config_that_is_another_function_is_refused(tmp_path, key, change):
    """A checkpoint that loads and computes something else than it was trained for."""
    ours().save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=f"config.json.*{key}"):
        LLaMA.from_pretrained(tmp_path)


def test_config_that_is_not_one_is_refused(tmp_path):
    """A traceback from deep inside where one sentence naming the file would do."""
    with pytest.raises(ValueError, match="neither config.json .* nor params.json"):
        LLaMA.from_pretrained(tmp_path)
    ours().save_pretrained(tmp_path)
    for key in ("hidden_size", "vocab_size", "num_attention_heads", "model_type"):
        text = (tmp_path / "config.json").read_text()
        edit_config(tmp_path, remove=[key])
        with pytest.raises(ValueError, match=f"config.json.*{key}"):
            LLaMA.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
    (tmp_path / "config.json").write_text("{'single': quotes}")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        LLaMA.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Weights on disk


def some_tensors():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(3, 4, generator=g)
    return {"f32": f, "bf16": f.bfloat16(), "f16": f.half(), "f64": f.double(), "i64": torch.arange(5), "é": f + 1,
            "scalar": torch.tensor(1.5), "transposed": torch.randn(4, 6, generator=g).T,
            "slice": torch.randn(8, generator=g)[::2], "bool": torch.tensor([True, False, True]),
            "u8": torch.arange(7, dtype=torch.uint8), "i32": torch.arange(3, dtype=torch.int32)}


def test_safetensors_both_ways(tmp_path):
    """Offsets, shapes, dtypes or memory order other than the format's."""
    package = pytest.importorskip("safetensors.torch")
    tensors = some_tensors()
    M.write_safetensors(tmp_path / "ours", tensors)
    package.save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    read = [package.load_file(tmp_path / "ours"), M.read_safetensors(tmp_path / "theirs"),
            M.read_safetensors(tmp_path / "ours")]
    assert int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little") % 8 == 0
    for got in read:
        assert set(got) == set(tensors)
        for k, t in tensors.items():
            assert got[k].dtype == t.dtype and torch.equal(got[k], t), k
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]  # no temporary file stays


def test_read_tensors_are_private(tmp_path):
    """Training a loaded model in place that writes into the checkpoint file it is mapped from."""
    a = ours(torch.float32)
    a.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    b = LLaMA.from_pretrained(tmp_path)
    with torch.no_grad():
        [p.add_(1) for p in b.parameters()]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    same_weights(a, LLaMA.from_pretrained(tmp_path))


@pytest.mark.parametrize("shard_bytes", [1, 8000, 20000, 10**9])
@pytest.mark.parametrize("tied", [False, True])
def test_shards(hf, tmp_path, shard_bytes, tied):
    """A tensor lost or doubled between shards, or an index that others cannot read."""
    mine = ours(torch.float32, tie_word_embeddings=tied)
    mine.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    largest = max(p.numel() * 4 for p in mine.parameters())
    assert len(files) == 1 or all(f.stat().st_size <= max(shard_bytes, largest) + 2000 for f in files)
    again = LLaMA.from_pretrained(tmp_path)
    same_weights(mine, again)
    assert all(p.requires_grad for p in again.parameters())
    if shard_bytes == 8000:
        same_weights(mine, hf.AutoModelForCausalLM.from_pretrained(tmp_path))
        hf.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "hf", max_shard_size="8KB")
        assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
        same_weights(mine, LLaMA.from_pretrained(tmp_path / "hf"))


def as_bin(directory, parts=1, change=lambda state: None):
    """Rewrites a directory's weights as pytorch_model.bin, whole or in parts with an index."""
    d, state = Path(directory), M.read_weights(directory)
    state = {k: v.clone() for k, v in state.items()}
    change(state)
    for f in d.glob("*.safetensors*"):
        f.unlink()
    if parts == 1:
        torch.save(state, d / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin" for i in range(parts)]
    where = {k: names[i % parts] for i, k in enumerate(state)}
    for name in names:
        torch.save({k: v for k, v in state.items() if where[k] == name}, d / name)
    (d / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_pytorch_bin(tmp_path, parts, tied):
    """Older checkpoints, with their inv_freq buffers, that no longer load."""
    mine = ours(torch.float32, tie_word_embeddings=tied)
    mine.save_pretrained(tmp_path)
    as_bin(tmp_path, parts, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    same_weights(mine, LLaMA.from_pretrained(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Meta's layout


META = {**SMALL, "head_dim": 4}                                             # Meta's heads are D / H wide


def meta_state(network):
    """A network's weights as Meta's checkpoints have them: their names, q and k with rotary pairs side by side."""
    c, state = network.config, network.state_dict()

    def pairs(weight, heads):                                               # rows (half, j) -> (j, half) of each head
        return weight.view(heads, 2, c.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

    out = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"],
           "output.weight": state["lm_head.weight"], "rope.freqs": torch.ones(c.head_dim // 2)}
    for i in range(c.num_hidden_layers):
        one = {k.removeprefix(f"model.layers.{i}."): v for k, v in state.items() if f"layers.{i}." in k}
        out.update({f"layers.{i}.{k}.weight": v for k, v in {
            "attention.wq": pairs(one["self_attn.q_proj.weight"], c.num_attention_heads),
            "attention.wk": pairs(one["self_attn.k_proj.weight"], c.num_key_value_heads),
            "attention.wv": one["self_attn.v_proj.weight"], "attention.wo": one["self_attn.o_proj.weight"],
            "feed_forward.w1": one["mlp.gate_proj.weight"], "feed_forward.w2": one["mlp.down_proj.weight"],
            "feed_forward.w3": one["mlp.up_proj.weight"], "attention_norm": one["input_layernorm.weight"],
            "ffn_norm": one["post_attention_layernorm.weight"]}.items()})
    return out


def save_meta(directory, network, shards, vocabulary=-1, split_vocabulary=False):
    """Writes a network as Meta does, in model-parallel shards."""
    c = network.config
    directory.mkdir(parents=True, exist_ok=True)
    columns = ("wo.", "w2.") if split_vocabulary else ("wo.", "w2.", "tok_embeddings.")
    for n in range(shards):
        part = {k: v if "norm" in k or "rope" in k else v.chunk(shards, int(any(x in k for x in columns)))[n].clone()
                for k, v in meta_state(network).items()}
        torch.save(part, directory / f"consolidated.{n:02d}.pth")
    (directory / "params.json").write_text(json.dumps({
        "dim": c.hidden_size, "multiple_of": 4, "n_heads": c.num_attention_heads, "n_layers": c.num_hidden_layers,
        "n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps, "vocab_size": vocabulary,
        "rope_theta": c.rope_theta}))


def meta_forward(c, w, tokens):
    """Meta's network on Meta's weights, as published: rotary positions as products of complex numbers, explicit masks
    and repeated key/value heads. It shares no line with model.py."""
    T = tokens.shape[1]
    angles = torch.outer(torch.arange(T).double(), 1 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).double()
                                                                      / c.head_dim))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]            # (T, 1, hd/2)
    x = w["tok_embeddings.weight"][tokens]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def rotary(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)

    for i in range(c.num_hidden_layers):
        h = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (torch.stack([h[b] @ w[f"layers.{i}.attention.{n}.weight"].T for b in range(len(h))])
                   .unflatten(-1, (-1, c.head_dim)) for n in ("wq", "wk", "wv"))
        q, k = rotary(q), rotary(k)
        k, v = (y.repeat_interleave(c.num_attention_heads // c.num_key_value_heads, 2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / c.head_dim ** .5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("bhqk,bkhd->bqhd", scores, v).flatten(-2) @ w[f"layers.{i}.attention.wo.weight"].T
        h = norm(x, f"layers.{i}.ffn_norm")
        gate = h @ w[f"layers.{i}.feed_forward.w1.weight"].T
        up = h @ w[f"layers.{i}.feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


def test_every_layout_gives_the_same_logits(tmp_path):
    """Shards joined along the wrong dimension, q and k in Meta's rotary order, a width that is guessed."""
    mine, tokens = ours(vocab_size=62, **{k: v for k, v in META.items() if k != "vocab_size"}), draw_ids(2, 40)
    wanted = meta_forward(mine.config, meta_state(mine), tokens)
    close(mine(tokens), wanted, 1e-5)                                       # our angles are fp32
    for name, shard_bytes in (("whole", 2**30), ("sharded", 8000)):
        mine.save_pretrained(tmp_path / name, shard_bytes=shard_bytes)
        mine.save_pretrained(tmp_path / f"bin-{name}")
        as_bin(tmp_path / f"bin-{name}", 1 if name == "whole" else 3)
    save_meta(tmp_path / "meta-1", mine, 1)
    save_meta(tmp_path / "meta-2", mine, 2)
    save_meta(tmp_path / "meta-vocabulary", mine, 2, vocabulary=62, split_vocabulary=True)     # LLaMA 3's way
    assert len(list(tmp_path.glob("sharded/*.safetensors"))) > 2
    for directory in sorted(tmp_path.iterdir()):
        again = LLaMA.from_pretrained(directory, torch.float64)
        same_weights(mine, again)
        assert torch.equal(again(tokens), mine(tokens))
        assert again.config.rms_norm_eps == 1e-5 and again.config.rope_theta == 500.0


def test_metas_tokenizer_lies_beside_or_above(tmp_path):
    """Meta's download puts tokenizer.model beside the model's directory; another model's must not be taken so."""
    tokenizer = data.world_tokenizer()
    mine = ours(torch.float32, **{**META, "vocab_size": tokenizer.vocab_size})
    save_meta(tmp_path / "small", mine, 2)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.serialized)
    assert data.Tokenizer.from_pretrained(tmp_path / "small").vocab_size == tokenizer.vocab_size
    mine.save_pretrained(tmp_path / "hf")
    with pytest.raises(M.InputError, match="no sentencepiece tokenizer here"):
        data.Tokenizer.from_pretrained(tmp_path / "hf")
    (tmp_path / "small" / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(M.InputError, match="small/tokenizer.model: not a sentencepiece model"):
        data.Tokenizer.from_pretrained(tmp_path / "small")


def test_metas_files_that_do_not_fit_are_refused(tmp_path):
    """A missing shard that leaves half a model, scaled rotary positions ignored, a weight from elsewhere."""
    mine = ours(torch.float32, **META)

    def refused(match):
        with pytest.raises(M.InputError, match=match):
            LLaMA.from_pretrained(tmp_path)
        save_meta(tmp_path, mine, 2, vocabulary=V - 1)

    save_meta(tmp_path, mine, 2)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "aside")
    refused("consolidated.01.pth beside params.json, expected consolidated.00.pth")
    refused(r"embed_tokens.weight has shape \[61, 24\], its config says \[60, 24\]")
    for change, match in (({"use_scaled_rope": True}, "use_scaled_rope is True"), ({"n_heads": 7}, "n_heads|has shape"),
                          ({"dim": None}, "not a LLaMA's parameters"), ({"norm_eps": ...}, "'norm_eps' is missing")):
        raw = {**json.loads((tmp_path / "params.json").read_text()), "vocab_size": -1, **change}
        (tmp_path / "params.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
        refused(match)
    part = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    torch.save({**part, "layers.0.attention.bq.weight": part["norm.weight"]}, tmp_path / "consolidated.00.pth")
    refused("layers.0.attention.bq.weight is no weight of a LLaMA")
    torch.save({k: v for k, v in part.items() if k != "output.weight"}, tmp_path / "consolidated.01.pth")
    refused("output.weight is in some shards only")


# ----------------------------------------------------------------------------------------------------------------------
# Refusals, and files written whole


class Code:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_is_refused(tmp_path):
    """A checkpoint that runs a stranger's code when it is opened."""
    ours().save_pretrained(tmp_path)
    as_bin(tmp_path, 1, lambda s: s.update(evil=Code(tmp_path / "ran")))
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        LLaMA.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """A model that starts with random weights where the file had none, or from half a download."""
    mine = ours(torch.float32)
    mine.save_pretrained(tmp_path)
    path, state = tmp_path / "model.safetensors", mine.state_dict()
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")

    def refused(match):
        with pytest.raises(ValueError, match=match):
            LLaMA.from_pretrained(tmp_path)

    for size in (len(whole) - 1, len(whole) // 2, 8 + header, 8 + header // 2, 5):
        path.write_bytes(whole[:size])
        refused("model.safetensors")
    path.write_bytes(b"\xff" * 64)
    refused("model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    M.write_safetensors(path, {k: v for k, v in state.items() if k != name})
    refused(name)
    M.write_safetensors(path, {**state, name: state[name].T})
    refused(f"{name} has shape")
    M.write_safetensors(path, {**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(60)})
    refused("q_proj.bias")
    path.unlink()
    refused("model.safetensors")
    mine.save_pretrained(tmp_path, shard_bytes=8000)
    next(tmp_path.glob("model-00002-*")).unlink()
    refused("model-00002")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A crash in the middle of a save that destroys the previous checkpoint."""
    M.write_json(tmp_path / "a", {"old": 1})
    with pytest.raises(TypeError):
        M.write_json(tmp_path / "a", {"new": object()})
    with pytest.raises(RuntimeError), M.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads((tmp_path / "a").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Training's forward pass


def test_right_padding_changes_nothing():
    """Padding that reaches the real tokens through attention or positions."""
    mine, tokens = ours(), draw_ids(1, 9)
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    other = torch.cat([tokens, draw_ids(1, 5, seed=1)], dim=1)
    both = torch.cat([padded, other, draw_ids(1, 14, seed=2)])
    with torch.no_grad():
        want = mine(tokens)
        for row in mine(both)[:2]:
            close(row[:9], want[0], 1e-12)
        targets = torch.full((3, 14), losses.IGNORE)
        targets[:2, 3:8] = tokens[:, 4:9]
        logp = losses.plain_logp(want[0, 3:8], tokens[0, 4:9])
        close(mine(both, targets).view(2, 5), logp.expand(2, 5), 1e-12)


def test_targets_give_the_logp_of_the_logits():
    """Targets taken in another order, or shifted by one, than the logits' own."""
    mine, tokens = ours(), draw_ids(3, 11)
    targets = draw_ids(3, 11, seed=1)
    targets[torch.rand(3, 11, generator=torch.Generator().manual_seed(2)) < .5] = losses.IGNORE
    keep = targets != losses.IGNORE
    want = losses.plain_logp(mine(tokens)[keep], targets[keep])
    got = mine(tokens, targets)
    close(got, want, 1e-12)
    grads = [torch.autograd.grad(x.square().sum(), list(mine.parameters())) for x in (got, want)]
    [close(a, b, 1e-9) for a, b in zip(*grads)]


def rows_of(prompts, answers, width):
    """Right-padded tokens and targets (B, width): the targets are the answers, each at the token before it."""
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)
    targets = torch.full_like(tokens, losses.IGNORE)
    for row, (p, a) in enumerate(zip(prompts, answers)):
        tokens[row, :len(p + a)] = torch.tensor(p + a)
        targets[row, len(p) - 1:len(p + a) - 1] = torch.tensor(a)
    return tokens, targets


@pytest.mark.parametrize("padding", [0, 5])
def test_cut_in_one_forward_is_cut_of_single_sequences(padding):
    """Passes mixed up, or tokens paired by position: the loss must not see padding or the judged prompt's length."""
    mine = ours(std=.15)
    plain, judgment = [[1, 5], [1, 6, 7]], [[8, 9, 10, 11], [12]]
    answers = [[20, 21, 22, 2], [23, 2]]
    judged = [p + j for p, j in zip(plain, judgment)]
    tokens, targets = zip(rows_of(judged, answers, 10 + padding), rows_of(plain, answers, 6))
    weight = torch.tensor([1 / 8] * 4 + [1 / 4] * 2, dtype=torch.float64)   # mean over tokens, then over 2 examples

    def token_loss(lp, s):
        return weight[s] * losses.cut_token_loss(lp[0], lp[1], losses.detect(lp[0], lp[1], 1.1), .5, 1.0)
    loss, logp = mine(list(tokens), list(targets), token_loss)
    alone = [torch.cat([losses.plain_logp(mine(torch.tensor([p + a]))[0, len(p) - 1:-1], torch.tensor(a))
                        for p, a in zip(prompts, answers)]) for prompts in (judged, plain)]
    close(logp, torch.stack(alone).detach(), 1e-11)
    close(mine(list(tokens), list(targets)), torch.stack(alone), 1e-11)
    assert 0 < losses.detect(*alone, 1.1).sum() < 6
    want = losses.cut_loss(*alone, torch.tensor([4, 2]), alpha=.5, gamma=1.0)
    close(loss, want, 1e-11)
    grads = [torch.autograd.grad(x, list(mine.parameters())) for x in (loss, want)]
    [close(a, b, 1e-10) for a, b in zip(*grads)]
    one, lp = mine(tokens[1], targets[1], lambda lp, s: -lp[0])             # a tensor in place of a list: one pass
    assert lp.shape == (1, 6)
    close(one, -alone[1].sum(), 1e-11)


def test_reward_reads_the_last_real_token(tmp_path):
    """A reward read at the padding, or off by one; a backbone copied in place of shared; a save that loses the head."""
    policy = ours(torch.float32)
    reward = RewardModel.sharing(policy)
    shared = {name: p.data_ptr() for name, p in reward.model.named_parameters()}
    assert shared == {name: p.data_ptr() for name, p in policy.model.named_parameters()}
    randomize(reward, 3)
    tokens, lengths = draw_ids(3, 10), torch.tensor([10, 4, 1])
    with torch.no_grad():
        want = torch.stack([reward.score(reward.model(row[None, :n]))[0, -1, 0] for row, n in zip(tokens, lengths)])
        close(reward(tokens, lengths), want, 1e-5)
        longer = torch.cat([tokens, torch.zeros(3, 6, dtype=torch.long)], dim=1)
        longer[1, 4:] = 7
        close(reward(longer, lengths), want, 1e-5)
        reward.save_pretrained(tmp_path, shard_bytes=8000)
        again = RewardModel.from_pretrained(tmp_path)
        same_weights(reward, again)
        close(again(tokens, lengths), reward(tokens, lengths), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def naive(model, prompt, max_new, eos, row, seed=0, temperature=1.0, top_k=0, top_p=1.0):
    """The definition: the whole sequence through the network for every token."""
    uniform, ids = np.random.default_rng([seed, row]).random(max_new), []
    for u in uniform:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[:, -1]
        ids.append(choose(logits, torch.tensor([u]), temperature, top_k, top_p).item())
        if ids[-1] == eos:
            break
    return ids


EOS = 7
PROMPTS = [draw_ids(n, seed=n).tolist() for n in (5, 1, 17, 2, 9, 5, 30, 3, 12, 1, 6)]
SETTINGS = [dict(temperature=0), dict(), dict(top_k=9, top_p=.8), dict(temperature=1.7, top_p=.95)]


@pytest.fixture(scope="module")
def talker():
    """A model that is unsure enough to end after a few tokens or after many."""
    return ours(seed=4, std=.12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_generate_is_the_naive_loop(talker, setting):
    """Wrong cache, position, padding or row when a ragged batch shrinks: a sample that depends on its neighbours."""
    want = [naive(talker, p, 24, EOS, i, seed=3, **setting) for i, p in enumerate(PROMPTS)]
    got = generate(talker, PROMPTS, 24, EOS, seed=3, **setting)
    assert [g for g, in got] == want
    if setting == {}:
        assert len({len(w) for w in want}) > 3                              # rows did leave at different times
    for w in want:
        assert len(w) <= 24 and EOS not in w[:-1] and (len(w) == 24 or w[-1] == EOS)
    for i in (0, 2, 9):
        assert generate(talker, [PROMPTS[i]], 24, EOS, seed=3, rows=[i], **setting) == [[want[i]]]
    half = [8, 0, 6]
    some = generate(talker, [PROMPTS[i] for i in half], 24, EOS, seed=3, rows=half, **setting)
    assert some == [[want[i]] for i in half]


def test_samples_depend_on_their_row_only(talker):
    """n samples that are copies of each other, or that change with the batch size or the other prompts."""
    finished = []
    want = generate(talker, PROMPTS, 12, EOS, n=3, seed=1, progress=finished.append)
    assert sum(finished) == 3 * len(PROMPTS)
    assert all(len({tuple(s) for s in samples}) > 1 for samples in want)
    assert any(len({tuple(s) for s in samples}) == 3 for samples in want)
    for size in (1, 2, 7, 9, 10**6):
        assert generate(talker, PROMPTS, 12, EOS, n=3, seed=1, batch_size=size) == want
    for i in (1, 6):
        assert generate(talker, [PROMPTS[i]], 12, EOS, n=3, seed=1, rows=[i]) == [want[i]]
        for j in range(3):
            assert generate(talker, [PROMPTS[i]], 12, EOS, seed=1, rows=[3 * i + j]) == [[want[i][j]]]
    assert generate(talker, PROMPTS, 12, EOS, n=3, seed=2) != want


def test_generate_stops(talker):
    """An end token left out or followed by more, a length not kept, or a training mode lost."""
    free = generate(talker, [PROMPTS[0]], 20, -1, seed=5)[0][0]
    assert len(free) == 20
    eos = free[6]
    first = free.index(eos)
    assert generate(talker, [PROMPTS[0]], 20, eos, seed=5)[0][0] == free[:first + 1]
    for count in (0, 1, 2, first, first + 1):                               # a prefix; eos as the very last token too
        assert generate(talker, [PROMPTS[0]], count, eos, seed=5)[0][0] == free[:min(count, first + 1)]
    assert generate(talker, [], 5, EOS) == []
    with pytest.raises(ValueError, match="prompt 4 is empty"):
        generate(talker, [[1], []], 5, EOS, rows=[3, 4])
    for mode in (True, False):
        talker.train(mode)
        generate(talker, [[1]], 1, EOS)
        assert talker.training == mode


def frequencies(p, temperature=1.0, count=20000, **kwargs):
    """How often choose() picks each token over an even grid of uniform numbers."""
    logits = torch.tensor(p, dtype=torch.float64).log()
    grid = (torch.arange(count, dtype=torch.float64) + .5) / count
    picks = choose(logits.expand(count, -1), grid, temperature, **kwargs)
    return np.bincount(picks.numpy(), minlength=len(p)) / count


def test_choose_follows_the_softmax():
    """A CDF that is shifted, sorted but not unsorted, not renormalised, or tempered the wrong way round."""
    p = np.array([.05, .3, .02, .4, .13, .1])
    for temperature in (1.0, .5, 2.0):
        q = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        for kwargs in ({}, {"top_k": 6}, {"top_k": 99}, {"top_p": 1 - 1e-12}):
            np.testing.assert_allclose(frequencies(p, temperature, **kwargs), q, atol=1.1e-4)
    for temperature in (0, 1.0):
        np.testing.assert_array_equal(frequencies(p, temperature, top_k=1), [0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("kwargs, kept", [
    (dict(top_p=1e-9), [3]), (dict(top_p=.49), [3]), (dict(top_p=.51), [3, 1]), (dict(top_p=.74), [3, 1]),
    (dict(top_p=.76), [3, 1, 0]), (dict(top_p=.99), [3, 1, 0, 2]), (dict(top_k=2), [3, 1]), (dict(top_k=3), [3, 1, 0]),
    (dict(top_p=.5), [3]),                                                  # reached exactly
    (dict(top_k=2, top_p=.66), [3]), (dict(top_k=2, top_p=.67), [3, 1])])   # of the two, 3 has 2/3 of the mass
def test_truncation_keeps_the_smallest_set(kwargs, kept):
    """Nucleus sampling that keeps one token too many or too few, or measures against mass that top_k took away."""
    p = np.array([.125, .25, .125 - 1e-3, .5, 1e-3])
    q = np.zeros(5)
    q[kept] = p[kept] / p[kept].sum()
    np.testing.assert_allclose(frequencies(p, **kwargs), q, atol=1.1e-4)


def test_choose_never_returns_the_impossible():
    """A token of probability 0 at either end of the unit interval, where a CDF is flat."""
    inf = float("-inf")
    rows = [[inf, 1., inf, .5, inf], [inf, inf, 3., inf, inf], [-2000., 0., -2000., 0., -2000.], [0.] * 5,
            [-40., 0., 30., 1., -40.], [inf, 0.1, 0.2, 0.3, 0.7]]
    ends = [0.0, 5e-324, 1e-300, .5, 1 - 1e-12, 1 - 1e-16]
    for row in rows:
        logits, u = torch.tensor(row).expand(len(ends), -1), torch.tensor(ends, dtype=torch.float64)
        alive = torch.softmax(logits[0].double(), 0) > 0
        for kwargs in ({}, {"top_k": 4}, {"top_k": 1}, {"top_p": .6}, {"top_k": 3, "top_p": .9}):
            for temperature in (1.0, .7):
                assert alive[choose(logits, u, temperature, **kwargs)].all(), (row, kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# The training loop's helpers


@pytest.mark.parametrize("warmup, steps", [(10, 100), (1, 50), (0, 20)])
def test_lr_schedule(warmup, steps):
    """A first step that is wasted at 0, a peak that is never reached, or a schedule that ends too early or too late."""
    lr = [M.lr_at(i, 3e-4, warmup, steps, floor=.1) for i in range(steps)]
    assert lr[0] == pytest.approx(3e-4 / max(1, warmup)) and lr[0] > 0
    assert lr[max(0, warmup - 1)] == pytest.approx(3e-4) == pytest.approx(max(lr))
    assert lr[-1] == pytest.approx(3e-5) == pytest.approx(min(lr[warmup:]))
    assert all(a < b for a, b in zip(lr[:warmup], lr[1:warmup]))
    assert all(a > b for a, b in zip(lr[warmup:], lr[warmup + 1:]))
    middle = (warmup + steps - 1) / 2
    if middle == int(middle):
        assert lr[int(middle)] == pytest.approx(.55 * 3e-4)


def test_resume_is_exact(tmp_path):
    """A run that forgets its weights, its optimizer or its step when it goes on from disk."""
    def step(network, optimizer, i):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
        optimizer.zero_grad()
        (-network(draw_ids(2, 6, seed=i), draw_ids(2, 6, seed=i + 1)).mean()).backward()
        optimizer.step()
    a = ours(torch.float32)
    opt = M.make_optimizer(a, weight_decay=.1)
    assert [g["weight_decay"] for g in opt.param_groups] == [.1, 0.0]
    assert all(p.dim() == 1 for p in opt.param_groups[1]["params"])
    step(a, opt, 0)
    M.save_resume(tmp_path / "run" / "resume.pt", a, opt, {"step": 1, "run": {"lr": 0.1}}, rank=0)
    step(a, opt, 1)
    b = ours(torch.float32, seed=9)
    opt_b = M.make_optimizer(b, weight_decay=.1)
    with pytest.raises(ValueError, match="--lr was 0.1, is 0.2"):
        M.load_resume(tmp_path / "run" / "resume.pt", b, opt_b, {"lr": 0.2, "device": "cpu"})
    assert M.load_resume(tmp_path / "run" / "resume.pt", b, opt_b, {"lr": 0.1})["step"] == 1
    step(b, opt_b, 1)
    same_weights(a, b)
