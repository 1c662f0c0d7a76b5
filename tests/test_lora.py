"""LoRA against PEFT, its files, and training with it."""
import json
from pathlib import Path

import pytest
import torch

import data
import train_cut
import train_sft
from model import (ATTENTION_PROJECTIONS, MLP_PROJECTIONS, Config, InputError, LLaMA, add_lora, load_adapter,
                   lora_disabled, lora_layers, merge_lora, save_adapter)

SMALL = Config(vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=8, initializer_range=0.2)


def adapted(dropout=0.0, targets=MLP_PROJECTIONS, seed=0):
    """A small LLaMA with adapters that are not zero."""
    torch.manual_seed(seed)
    model = LLaMA(SMALL)
    add_lora(model, 4, 8, dropout, targets)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


@pytest.mark.parametrize("layers,D,ffn,heads,millions", [(32, 4096, 11008, 32, 23.2), (40, 5120, 13824, 40, 36.4)])
def test_trainable_counts_of_llama_2(layers, D, ffn, heads, millions):
    """Adapters on other matrices than CUT's, or a base that is not frozen."""
    with torch.device("meta"):
        model = LLaMA(Config(vocab_size=32000, hidden_size=D, intermediate_size=ffn, num_hidden_layers=layers,
                             num_attention_heads=heads, num_key_value_heads=heads, head_dim=128))
        count = add_lora(model)
    assert round(count / 1e6, 1) == millions
    assert {name.rsplit(".", 3)[-3] for name, p in model.named_parameters() if p.requires_grad} == set(MLP_PROJECTIONS)


def test_a_fresh_or_disabled_adapter_is_the_base_model():
    """A reference model that has moved: KL penalties and DPO would be measured from the wrong place."""
    torch.manual_seed(0)
    base, tokens = LLaMA(SMALL), torch.randint(0, 64, (2, 9))
    logits = base(tokens)
    model = LLaMA(SMALL)
    model.load_state_dict(base.state_dict())
    add_lora(model, 4, 8, 0.0)
    assert torch.equal(model(tokens), logits)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    assert not torch.allclose(model(tokens), logits)
    with lora_disabled(model):
        assert torch.equal(model(tokens), logits)
    assert not torch.allclose(model(tokens), logits)


def test_only_adapters_get_gradients_through_the_fused_head():
    """A frozen head still costs a (V, D) gradient, or the adapters get none."""
    model, tokens = adapted(), torch.randint(0, 64, (2, 9))
    loss, _ = model(tokens, tokens.roll(-1, 1), lambda logp, s: -logp[0])
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ("lora_" in name), name


@pytest.mark.parametrize("targets", [MLP_PROJECTIONS, MLP_PROJECTIONS + ATTENTION_PROJECTIONS])
def test_merged_equals_unmerged(targets):
    """The scale forgotten or applied twice when the adapter is folded in."""
    model, tokens = adapted(targets=targets), torch.randint(0, 64, (2, 9))
    model.eval()
    logits = model(tokens)
    merge_lora(model)
    assert not lora_layers(model) and set(model.state_dict()) == set(LLaMA(SMALL).state_dict())
    torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=0)


def test_parity_with_peft(tmp_path):
    """An adapter that PEFT opens but computes differently, or the reverse."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, tokens = adapted(targets=MLP_PROJECTIONS + ("q_proj",)), torch.randint(0, 64, (2, 9))
    model.eval()
    save_adapter(model, tmp_path / "ours", tmp_path / "base")
    with lora_disabled(model):
        plain = LLaMA(SMALL)
        plain.load_state_dict({k.replace(".base", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
        plain.save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    again = LLaMA.from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again.eval()(tokens), model(tokens), atol=1e-6, rtol=0)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, merge_lora(model)(tokens), atol=1e-4, rtol=0)


def test_a_half_precision_base_keeps_fp32_adapters():
    """Adapters in bf16 lose updates smaller than 1/256 of a weight."""
    model = LLaMA(SMALL).to(torch.bfloat16)
    add_lora(model, 4, 8, 0.0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    loss, logp = model(torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (2, 9)), lambda logp, s: -logp[0])
    loss.backward()
    assert logp.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_refusals(tmp_path):
    """A target that matches nothing trains nothing; an adapter of another kind or shape is another model."""
    with pytest.raises(InputError, match="'w1' matches no layer: there are .*gate_proj.*lm_head"):
        add_lora(LLaMA(SMALL), targets=("gate_proj", "w1"))
    save_adapter(adapted(), tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(InputError, match=r"shape \[4, 24\], the model \[3, 24\]"):
        load_adapter(LLaMA(SMALL), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(InputError, match="use_dora is True"):
        load_adapter(LLaMA(SMALL), tmp_path)
    with pytest.raises(InputError, match="no adapter here"):
        load_adapter(LLaMA(SMALL), tmp_path / "nowhere")


@pytest.fixture
def run(tmp_path):
    """A base model, a judged file, and the flags of a short run of train_cut.py with adapters and dropout."""
    torch.manual_seed(0)
    tokenizer = data.world_tokenizer()
    LLaMA(Config(**{**vars(SMALL), "vocab_size": tokenizer.vocab_size})).save_pretrained(tmp_path / "base", tokenizer)
    records = data.World(9).demonstrations(12, lambda a, b: None if a == b else f"It says {a}", "lora")
    (tmp_path / "judged.json").write_text(json.dumps(records))

    def flags(out, *more):
        return ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "judged.json"), "--format", "short",
                "--device", "cpu", "--steps", "6", "--lr", "1e-2", "--save-every", "2", "--out", str(tmp_path / out),
                *more]
    return flags


def test_training_with_adapters_resumes_bitwise_and_saves_both_forms(run, tmp_path, monkeypatch):
    """Dropout that a resumed run draws anew; a base that has moved; an adapter and a merged model that disagree."""
    train_cut.main(run("whole", "--lora-rank", "4", "--downsample", "-1"))
    save, calls = train_cut.save_resume, []

    def save_and_die(*args):
        save(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_cut, "save_resume", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_cut.main(run("parts", "--lora-rank", "4", "--downsample", "-1"))
    monkeypatch.undo()
    with pytest.raises(InputError, match="--lora-rank was 4, is 5"):
        train_cut.main(run("parts", "--lora-rank", "5", "--downsample", "-1", "--resume"))
    train_cut.main(run("parts", "--lora-rank", "4", "--downsample", "-1", "--resume"))
    a, b = (LLaMA.from_pretrained(tmp_path / d).state_dict() for d in ("whole", "parts"))
    base = LLaMA.from_pretrained(tmp_path / "base").state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    moved = {k.rsplit(".", 2)[-2] for k in a if not torch.equal(a[k], base[k])}
    assert moved == set(MLP_PROJECTIONS)
    model = LLaMA.from_pretrained(tmp_path / "base")
    load_adapter(model, tmp_path / "whole" / "adapter")
    merged = merge_lora(model).state_dict()
    assert all(torch.allclose(merged[k], a[k], atol=1e-6) for k in a)


def test_sft_with_adapters(run, tmp_path):
    """The same flags in train_sft.py."""
    train_sft.main(run("sft", "--lora-rank", "2", "--lora-attention"))
    config = json.loads(Path(tmp_path, "sft", "adapter", "adapter_config.json").read_text())
    assert set(config["target_modules"]) == set(MLP_PROJECTIONS + ATTENTION_PROJECTIONS)
