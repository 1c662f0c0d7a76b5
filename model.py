"""A LLaMA in one file: the network, sampling with a key-value cache, checkpoints, devices and processes.

Top to bottom: Config; RMSNorm, rotary positions, attention, MLP, block; LLaMA and the reward model on top of it;
LoRA; generate; checkpoints (Hugging Face's layout, and Meta's to read); devices, processes, optimizer, resuming.

Shapes, used in every comment of the repository:
  B batch, T tokens, D width, H query heads, Hkv key/value heads, hd head dimension, V vocabulary, S cache length.

Modules carry the names of Hugging Face's LLaMA, so a state_dict *is* the published layout and no table of names is
needed: model.layers.0.self_attn.q_proj.weight and so on.
"""
import contextlib
import dataclasses
import json
import math
import mmap
import os
import pickle
import signal
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from data import IGNORE, InputError, atomic_write, print0, write_json
from losses import full_vocabulary, fused_logp, fused_loss

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ----------------------------------------------------------------------------------------------------------------------
# The network


@dataclasses.dataclass
class Config:
    """The shape of a LLaMA. Defaults are the built-in world's small model; comments give LLaMA-2 7B."""
    vocab_size: int = 1024          # 32000
    hidden_size: int = 96           # 4096, D
    intermediate_size: int = 256    # 11008
    num_hidden_layers: int = 3      # 32
    num_attention_heads: int = 3    # 32, H
    num_key_value_heads: int = 3    # 32, Hkv; fewer than H is grouped-query attention
    head_dim: int = 32              # 128, hd; H * hd need not equal D
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6      # 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number from 1 up")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of numbers")


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 at least."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(positions, head_dim, theta, dtype):
    """cos and sin of the rotation angles: positions (..., T) -> two (..., 1, T, hd), broadcast over heads.

    Pair j of a head turns by position * theta^(-2j/hd); pairs are (j, j + hd/2), Hugging Face's order of numbers.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.unsqueeze(-1).float() * frequency                    # (..., T, hd/2)
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(-3)                # (..., 1, T, hd)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Applies the rotation to x (B, H, T, hd)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.Hkv, self.hd = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.hd, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.Hkv * self.hd, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.Hkv * self.hd, bias=False)
        self.o_proj = nn.Linear(self.H * self.hd, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.hd).transpose(1, 2)      # (B, H, T, hd)
        k = self.k_proj(x).view(B, T, self.Hkv, self.hd).transpose(1, 2)    # (B, Hkv, T, hd)
        v = self.v_proj(x).view(B, T, self.Hkv, self.hd).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None
        if cache is not None:
            k, v, mask = cache.update(layer, k, v)                          # (B, Hkv, S, hd), mask (B, 1, T, S)
        # Training needs no padding mask: batches are padded on the right, where causality hides the padding.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.H != self.Hkv)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.hd))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Token ids (B, T) -> final hidden states (B, T, D), after the last norm."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpoint = self.autocast = False                             # see set_execution

    def forward(self, tokens, cache=None):
        x = self.embed_tokens(tokens)                                       # (B, T, D)
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.positions
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        checkpoint = self.checkpoint and cache is None and torch.is_grad_enabled()
        with torch.autocast(x.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            for i, layer in enumerate(self.layers):
                if cache is not None:
                    x = layer.forward(x, cos, sin, cache, i)                # never compiled: the cache grows every step
                elif checkpoint:
                    x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, use_reentrant=False)
                else:
                    x = layer(x, cos, sin)
        return self.norm(x)


def init_weights(module, config):
    """Normal(0, initializer_range) everywhere; the two projections that write into the residual stream get
    1 / sqrt(2 * layers) of it, so that the stream's variance does not grow with depth. Chosen by attribute, because
    a match on name endings reaches the wrong matrices as soon as one is renamed."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=config.initializer_range)
    for block in (m for m in module.modules() if isinstance(m, Block)):
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            nn.init.normal_(linear.weight, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))


class LLaMA(nn.Module):
    """The language model. model(tokens) -> logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            init_weights(self, config)

    def forward(self, tokens, targets=None, token_loss=None, temperature=1.0, reference=None):
        """tokens (B, T) -> logits (B, T, V); with targets the head is fused with what is wanted of it.

        targets (B, T): the token that follows tokens[b, t], or IGNORE. Call N the number of the others, in row order.
        - targets alone: their log-probabilities (N,), with gradient. `temperature` divides the logits: a sampled
          response has to be scored at the temperature at which it was sampled.
        - and token_loss: losses.fused_loss of it, as (scalar loss, logp (1, N)).
        - and reference, (hidden (N, D), head weight) of a frozen model: losses.full_vocabulary, three (N,).
        Both may be lists of R such tensors, passes over the same responses after different prompts (of different
        lengths, so T differs): then token_loss sees the R log-probabilities of a token side by side, logp (R, N).
        All of it happens inside forward, so that DistributedDataParallel sees one call of one module.
        """
        if targets is None:
            return self.lm_head(self.model(tokens))
        if isinstance(tokens, torch.Tensor):
            tokens, targets = [tokens], [targets]
        wanted = [y[y != IGNORE] for y in targets]                          # R times (N,)
        if any(not torch.equal(wanted[0], w) for w in wanted):
            raise ValueError("the passes have different response tokens: they must be the same, in the same order")
        target = wanted[0]
        hidden = torch.stack([self.model(x)[y != IGNORE] for x, y in zip(tokens, targets)])     # (R, N, D)
        hidden = hidden if temperature == 1 else hidden / temperature
        if reference is not None:
            return full_vocabulary(hidden[0], self.lm_head.weight, *reference, target)
        if token_loss is None:
            logp = [fused_logp(h, self.lm_head.weight, target) for h in hidden]
            return torch.stack(logp) if len(logp) > 1 else logp[0]
        return fused_loss(hidden, self.lm_head.weight, target, token_loss)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Opens a LLaMA directory in Hugging Face's layout or Meta's. Raises InputError, naming the file, for anything
        else. A tensor that already has the dtype is not copied on a CPU: it stays mapped from the file, privately, so
        that training it copies the pages it writes and never touches the file."""
        config, _ = read_config(directory)
        with torch.device("meta"):
            model = cls(config)
        state = read_weights(directory)
        if config.tie_word_embeddings:
            state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
        return fill(model, state, directory, dtype, device)

    def save_pretrained(self, directory, tokenizer=None, shard_bytes=5 * 2**30, extra=None):
        """Writes config.json, model.safetensors (or shards and their index) and, if given, the tokenizer."""
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_checkpoint_dir(directory, self.config, state, "LlamaForCausalLM", tokenizer, shard_bytes, extra)


class RewardModel(nn.Module):
    """A LLaMA backbone with a scalar head, read at the last real token (AlpacaFarm section 4.4). Its files are
    Hugging Face's LlamaForSequenceClassification with one label. The head has no bias: in a difference it cancels."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        if self.score.weight.device.type != "meta":
            init_weights(self, config)

    @classmethod
    def sharing(cls, other):
        """A reward model on the backbone of another model: the same tensors, not a copy, which adapters on either leave
        as they are. The head is fresh, in fp32 when the backbone is in half precision (it is what is trained)."""
        with torch.device("meta"):
            reward = cls(other.config)
        reward.model.load_state_dict(other.model.state_dict(), assign=True)
        weight = other.model.norm.weight
        wide = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
        reward.score = nn.Linear(other.config.hidden_size, 1, bias=False, device=weight.device, dtype=wide)
        nn.init.normal_(reward.score.weight, std=other.config.initializer_range)
        return reward

    def forward(self, tokens, lengths):
        """tokens (B, T) padded on the right, lengths (B,) without padding -> rewards (B,)."""
        hidden = self.model(tokens)                                         # (B, T, D)
        last = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]     # (B, D)
        return self._read(last)                                             # (B,)

    def values(self, tokens, where):
        """As PPO's critic: the head at the positions where (B, T) is true -> (N,), in row order. The value at a
        position is of the state *before* the next token is chosen."""
        return self._read(self.model(tokens)[where])

    def _read(self, hidden):
        reward = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return reward.float() if reward.dtype in (torch.bfloat16, torch.float16) else reward

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        config, _ = read_config(directory)
        with torch.device("meta"):
            model = cls(config)
        model = fill(model, read_weights(directory), directory, dtype, device)
        if dtype in (torch.bfloat16, torch.float16):                        # few numbers: read in fp32, as trained
            model.score.float()
        return model

    def save_pretrained(self, directory, tokenizer=None, shard_bytes=5 * 2**30, extra=None):
        labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        save_checkpoint_dir(directory, self.config, self.state_dict(), "LlamaForSequenceClassification", tokenizer,
                            shard_bytes, {**labels, **(extra or {})})


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: train a low-rank correction of some matrices and leave the rest as it is


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A dropout(x), with W frozen. B starts at zero, so training starts from the base model;
    with `enabled` off it *is* the base model, a reference for free. A and B stay in fp32 when W is in half precision:
    their updates would be lost in its rounding."""

    def __init__(self, linear, rank, alpha, dropout):
        nn.Module.__init__(self)                                            # the weight is shared, not made again
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = linear.weight
        half = self.weight.dtype in (torch.bfloat16, torch.float16)
        kind = {"bias": False, "device": self.weight.device, "dtype": torch.float32 if half else self.weight.dtype}
        self.lora_A, self.lora_B = nn.Linear(self.in_features, rank, **kind), nn.Linear(rank, self.out_features, **kind)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout, self.alpha, self.enabled = nn.Dropout(dropout), alpha, True

    @property
    def scale(self):
        return self.alpha / self.lora_A.out_features

    def forward(self, x):
        y = F.linear(x, self.weight)                                        # (..., out)
        if not self.enabled:
            return y
        low = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype))     # (..., rank)
        return y + self.scale * F.linear(low, self.lora_B.weight.to(x.dtype))


MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")                     # what CUT adapts
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, rank=16, alpha=16, dropout=0.05, targets=MLP_PROJECTIONS):
    """Freezes the model and puts adapters on the linear layers whose names end in one of `targets`. Returns the number
    of trainable parameters: 23.2 M for LLaMA-2 7B and 36.4 M for 13B with CUT's setting, which is the default. The
    head of a reward model is small, and stays trainable."""
    model.requires_grad_(False)
    if isinstance(model, RewardModel):
        model.score.requires_grad_(True)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha, dropout))
    if missing := set(targets) - {name.rsplit(".", 1)[-1] for name in lora_layers(model)}:
        known = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise InputError(f"LoRA target {sorted(missing)[0]!r} matches no layer: there are {', '.join(known)}")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def lora_disabled(model):
    """Within it, the model is its frozen base."""
    for layer in lora_layers(model).values():
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in lora_layers(model).values():
            layer.enabled = True


def merge_lora(model):
    """Adds every adapter to its matrix and removes it: a plain model again."""
    for name in list(lora_layers(model)):
        layer = model.get_submodule(name)                                   # one at a time: the old ones can go
        with torch.no_grad():
            update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            merged = (layer.weight.to(update.dtype) + update).to(layer.weight.dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged)
        model.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], plain)
    return model.requires_grad_(True)


def save_adapter(model, directory, base):
    """Writes the adapters as PEFT does: adapter_config.json, adapter_model.safetensors."""
    layers, d = lora_layers(model), Path(directory)
    d.mkdir(parents=True, exist_ok=True)
    one = next(iter(layers.values()))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    write_safetensors(d / "adapter_model.safetensors", {f"base_model.model.{name}": p for name, p in trained.items()})
    write_json(d / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if isinstance(model, RewardModel) else "CAUSAL_LM",
        "modules_to_save": ["score"] if isinstance(model, RewardModel) else None,
        "base_model_name_or_path": str(base), "inference_mode": True,
        "r": one.lora_A.out_features, "lora_alpha": one.alpha, "lora_dropout": one.dropout.p, "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers})})


def load_adapter(model, directory):
    """Puts a saved adapter (ours or PEFT's) on a model that has none."""
    path = Path(directory, "adapter_config.json")
    if not path.is_file():
        raise InputError(f"{path}: no adapter here")
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, expected in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False)):
        if config.get(key, expected) != expected:
            raise InputError(f"{path}: {key} is {config[key]!r}; only {expected!r} is implemented")
    add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], tuple(config["target_modules"]))
    saved = read_safetensors(Path(directory, "adapter_model.safetensors"))
    wanted = {f"base_model.model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    if wrong := sorted(set(saved) ^ set(wanted)):
        raise InputError(f"{directory}: {wrong[0]} is only in the {'file' if wrong[0] in saved else 'model'}")
    with torch.no_grad():
        for name, p in wanted.items():
            if p.shape != saved[name].shape:
                raise InputError(f"{directory}: {name} has shape {list(saved[name].shape)}, the model {list(p.shape)}")
            p.copy_(saved[name])


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


class KVCache:
    """Keys and values of every layer, rows of unequal length. Row b holds real tokens at 0 .. lengths[b] - 1; what lies
    beyond is padding that the mask hides and that the next tokens overwrite, so there is no padding side to get wrong.
    """

    def __init__(self, config, rows, size, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.end = 0                                    # the longest row, counted here to spare a device sync a step
        self.positions = None

    def begin(self, count):
        """Announces `count` new tokens a row; their positions (B, T) follow each row's own length."""
        self.positions = self.lengths.unsqueeze(1) + torch.arange(count, device=self.lengths.device)
        self.end += count
        # Key s is visible to a token at position p if s <= p: causality among the new tokens, and no padding. (B,1,T,S)
        self.mask = (torch.arange(self.end, device=self.lengths.device) <= self.positions.unsqueeze(-1)).unsqueeze(1)

    def update(self, layer, k, v):
        """Stores k, v (B, Hkv, T, hd) at the announced positions; returns all keys and values so far, and the mask."""
        rows = torch.arange(len(k), device=k.device).unsqueeze(1)           # (B, 1), broadcast against positions (B, T)
        self.k[layer][rows, :, self.positions] = k.transpose(1, 2)          # (B, T, Hkv, hd)
        self.v[layer][rows, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)         # bf16 under --autocast
        return self.k[layer][:, :, :self.end], self.v[layer][:, :, :self.end], self.mask

    def select(self, rows):
        """Keeps the given rows (an index may repeat, which is how n samples share one prefill)."""
        self.k = self.k[:, rows]                                            # one after the other: each is a copy
        self.v, self.lengths = self.v[:, rows], self.lengths[rows]


def sample_token(logits, uniform, temperature, top_k=0, top_p=1.0):
    """Draws one token a row by inverse CDF: logits (B, V), uniform (B,) in [0, 1) -> ids (B,).

    The draw is a function of (logits, one number), so a row's sample cannot depend on its neighbours. Truncation as
    usual: the top_k likeliest tokens, and of those the smallest set whose mass reaches top_p (always one at least).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # in fp32 the CDF's tail is rounding noise
    p, order = torch.softmax(logits.to(wide) / temperature, dim=-1), None   # (B, V)
    if top_k or top_p < 1:
        p, order = p.sort(dim=-1, descending=True)
        if top_k:
            p[:, top_k:] = 0
        before = p.cumsum(dim=-1) - p                                       # mass of the likelier tokens
        p = p * ((before < top_p * p.sum(dim=-1, keepdim=True)) | (before == 0))
    cdf = p.cumsum(dim=-1)                                                  # (B, V), last column the mass that is left
    pick = torch.searchsorted(cdf, uniform.unsqueeze(1).to(wide) * cdf[:, -1:], right=True)     # first with cdf > u
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(dim=-1, keepdim=True)        # the last token with p > 0
    pick = torch.minimum(pick, last)                                        # where rounding ran past the end
    return (pick if order is None else order.gather(1, pick)).squeeze(1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, *, n=1, temperature=1.0, top_k=0, top_p=1.0, seed=0, rows=None,
             batch_size=512, progress=None):
    """Samples n continuations of every prompt: lists of ids -> for each prompt, a list of n lists of new ids.

    A continuation ends with eos, or after max_new_tokens without it. Randomness is one uniform number for each
    (seed, row, position), row = n * rows[i] + sample, where rows (default 0, 1, 2, ...) numbers the prompts: give each
    rank's prompts their global numbers and the samples do not depend on how many ranks there are, on the batch size or
    on the other prompts. progress, if given, is called with the number of continuations just finished.
    """
    rows = range(len(prompts)) if rows is None else rows
    if empty := [i for i, p in zip(rows, prompts) if not p]:
        raise ValueError(f"prompt {empty[0]} is empty: a prompt has at least its BOS token")
    samples = [[None] * n for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths share a prefill
    per_batch = max(1, batch_size // n)
    was_training = model.training
    model.eval()
    for start in range(0, len(by_length), per_batch):
        batch = by_length[start:start + per_batch]
        uniform = np.stack([np.random.default_rng([seed, n * rows[i] + j]).random(max_new_tokens)
                            for i in batch for j in range(n)])              # (B * n, max_new_tokens)
        done = _generate_batch(model, [prompts[i] for i in batch], max_new_tokens, eos, n, temperature, top_k, top_p,
                               uniform, progress)
        for k, ids in enumerate(done):
            samples[batch[k // n]][k % n] = ids
    model.train(was_training)
    return samples


def _generate_batch(model, prompts, max_new_tokens, eos, n, temperature, top_k, top_p, uniform, progress):
    weight = model.lm_head.weight
    device = weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for i, p in enumerate(prompts):
        tokens[i, :len(p)] = torch.tensor(p)
    cache = KVCache(model.config, len(prompts), tokens.shape[1] + max_new_tokens, device, weight.dtype)

    # Prefill: all prompts at once, padded on the right; the last real position of each row predicts its first token.
    cache.begin(tokens.shape[1])
    hidden = model.model(tokens.to(device), cache)                          # (B, T, D)
    cache.lengths = lengths.to(device)
    hidden = hidden[torch.arange(len(prompts), device=device), cache.lengths - 1]       # (B, D)
    fan = torch.arange(len(prompts), device=device).repeat_interleave(n)    # each prompt's row, n times
    if n > 1:
        cache.select(fan)
    hidden = hidden[fan]                                                    # (B * n, D)

    uniform = torch.from_numpy(uniform).to(device, torch.float32 if device.type == "mps" else torch.float64)
    out = torch.full((len(fan), max_new_tokens), eos, device=device)        # (B * n, max_new_tokens)
    alive = torch.arange(len(fan), device=device)                           # the rows still in the batch
    finished = torch.zeros(len(fan), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        next_token = sample_token(hidden @ weight.T, uniform[alive, t], temperature, top_k, top_p)    # (rows,)
        out[alive, t] = torch.where(finished, eos, next_token)
        finished = finished | (next_token == eos)
        if t + 1 == max_new_tokens:
            break
        # Finished rows leave the batch, but not at every step: leaving means copying the cache of those that stay, so
        # we wait until an eighth has ended.
        ended = int(finished.sum())
        if ended == len(finished):
            break
        if ended * 8 >= len(finished):
            stay = (~finished).nonzero().squeeze(1)
            alive, next_token, finished = alive[stay], next_token[stay], finished[stay]
            cache.select(stay)
            if progress:
                progress(ended)
        cache.begin(1)
        hidden = model.model(next_token.unsqueeze(1), cache)[:, -1]         # (rows, D)
        cache.lengths = cache.lengths + 1
    if progress:
        progress(len(finished))
    out = out.tolist()
    return [ids[:ids.index(eos) + 1] if eos in ids else ids for ids in out]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face's layout, read and written, and Meta's, read


def read_config(directory, quiet=False):
    """config.json -> (Config, the raw dict). Absent keys take the documented LLaMA default and, unless quiet, are
    printed; a value that this network does not implement raises InputError, because ignoring it would load another
    function. A directory in Meta's layout has params.json instead."""
    path = Path(directory) / "config.json"
    if not path.is_file() and (Path(directory) / "params.json").is_file():
        return read_meta_config(directory, quiet)
    if not path.is_file():
        raise InputError(f"{directory}: neither config.json (Hugging Face's layout) nor params.json (Meta's)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None

    def refuse(key, value, expected):
        raise InputError(f"{path}: {key} is {value!r}; this LLaMA implements {expected}")

    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON {type(raw).__name__}, expected an object")
    if raw.get("model_type") != "llama":
        refuse("model_type", raw.get("model_type"), "'llama' only")
    rope = raw.get("rope_parameters") or {}                 # transformers 5 nests them; older files have rope_theta
    scaling = raw.get("rope_scaling") or {}                 # and rope_scaling at the top
    for key, found in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(found, dict):
            refuse(key, found, "an object or null")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            refuse(f"{key}.rope_type", kind, "unscaled rotary positions ('default')")
        if found.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(f"{key}.partial_rotary_factor", found["partial_rotary_factor"], "1.0")
    for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if raw.get(key, expected) != expected:
            refuse(key, raw[key], repr(expected))

    missing = []

    def get(key, default, source=raw):
        if source.get(key) is None:
            missing.append(f"{key} = {default}")
            return default
        return source[key]

    try:
        D, H = raw["hidden_size"], raw["num_attention_heads"]
        config = Config(vocab_size=raw["vocab_size"], hidden_size=D, intermediate_size=raw["intermediate_size"],
                        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=H,
                        num_key_value_heads=get("num_key_value_heads", H), head_dim=get("head_dim", D // H),
                        max_position_embeddings=get("max_position_embeddings", 2048),
                        rope_theta=float(get("rope_theta", 10000.0, rope if "rope_theta" in rope else raw)),
                        rms_norm_eps=get("rms_norm_eps", 1e-6), initializer_range=get("initializer_range", 0.02),
                        tie_word_embeddings=get("tie_word_embeddings", False))
    except KeyError as error:
        raise InputError(f"{path}: the key {error} is missing") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a value of the wrong kind: {error}") from None
    if missing and not quiet:
        print0(f"{path}: absent, so the LLaMA defaults hold: {', '.join(missing)}")
    return config, raw


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A safetensors file: 8 bytes with the header's length, a JSON header {name: dtype, shape, data_offsets}, the raw
    little-endian numbers. Returns {name: tensor}; the tensors are views of the mapped file, so nothing is read yet."""
    if os.path.getsize(path) < 8:
        raise InputError(f"{path}: {os.path.getsize(path)} bytes are no safetensors file: download it again")
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)             # private pages: a write copies, on demand
    size = int.from_bytes(data[:8], "little")
    try:
        header = dict(json.loads(data[8:8 + size]))
    except ValueError:
        raise InputError(f"{path}: not a safetensors file (its header is not a JSON object)") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {name} has dtype {entry['dtype']}; known: {', '.join(SAFETENSORS_DTYPES)}")
        dtype, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], entry["data_offsets"]
        if 8 + size + end > len(data):
            raise InputError(f"{path}: {name} ends at byte {8 + size + end} of {len(data)}: the file is cut short")
        count = (end - begin) // dtype.itemsize
        if count != math.prod(entry["shape"]):
            raise InputError(f"{path}: {name} has {count} numbers for shape {entry['shape']}: the file is damaged")
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + size + begin) if count else torch.zeros(0)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    """Writes {name: tensor} as safetensors, to a temporary name first: the file is there whole or not at all."""
    kinds = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                         # numbers start at a multiple of 8
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_weights(directory):
    """All tensors of a checkpoint directory: model.safetensors or pytorch_model.bin, whole or in shards with an index;
    or Meta's consolidated.NN.pth. Pickled files are read with weights_only=True, which refuses code."""
    d = Path(directory)
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = d / f"{name}.index.json"
        if (d / name).is_file():
            return read(d / name)
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{index}: no 'weight_map' that says which shard holds which weight") from None
            state = {}
            for shard in sorted(set(weight_map.values())):
                if not (d / shard).is_file():
                    raise InputError(f"{index}: names {shard}, which is not there: download it again")
                state.update(read(d / shard))
            if absent := sorted(set(weight_map) - set(state)):
                raise InputError(f"{index}: {absent[0]} is in none of the shards")
            return state
    if (d / "params.json").is_file():
        return read_meta_weights(d)
    raise InputError(f"{directory}: neither model.safetensors nor pytorch_model.bin (nor an index of shards)")


def read_bin(path):
    """A pickled state_dict. weights_only refuses code; files in PyTorch's older format cannot be memory-mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as plain weights: {str(error).splitlines()[0]}") from None


# Meta's names, and along which dimension its model-parallel shards are parts (None: each shard has the whole).
META_LAYERS = {"attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
               "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
               "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
               "feed_forward.w3": ("mlp.up_proj", 0), "attention_norm": ("input_layernorm", None),
               "ffn_norm": ("post_attention_layernorm", None)}
META_TOP = {"tok_embeddings": ("model.embed_tokens", 1), "norm": ("model.norm", None), "output": ("lm_head", 0)}


def read_meta_config(directory, quiet=False):
    """params.json -> (Config, the raw dict). It does not say the MLP's width, nor, as released, the vocabulary
    (vocab_size -1): the weights do."""
    path = Path(directory) / "params.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        D, H = raw["dim"], raw["n_heads"]
        parts = meta_shards(directory)
        if raw.get("use_scaled_rope"):
            raise InputError(f"{path}: use_scaled_rope is {raw['use_scaled_rope']!r}; this LLaMA implements unscaled "
                             "rotary positions")
        ffn = sum(part["layers.0.feed_forward.w1.weight"].shape[0] for part in parts)
        vocab = raw.get("vocab_size", -1)
        vocab = vocab if vocab > 0 else sum(part["output.weight"].shape[0] for part in parts)
        config = Config(vocab_size=vocab, hidden_size=D, intermediate_size=ffn, num_hidden_layers=raw["n_layers"],
                        num_attention_heads=H, num_key_value_heads=raw.get("n_kv_heads") or H, head_dim=D // H,
                        max_position_embeddings=raw.get("max_seq_len", 4096), rms_norm_eps=raw["norm_eps"],
                        rope_theta=float(raw.get("rope_theta", 10000.0)))
    except KeyError as error:
        raise InputError(f"{path}: the key {error} is missing, there or in the weights beside it") from None
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path}: not a LLaMA's parameters: {error}") from None
    if not quiet:
        print0(f"{path}: Meta's layout in {len(parts)} part(s), vocabulary {vocab}, MLP width {ffn}")
    return config, raw


def meta_shards(directory):
    """The tensors of consolidated.00.pth, .01.pth and so on, in that order, mapped and not yet read."""
    paths = sorted(Path(directory).glob("consolidated.*.pth"))
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or [p.name for p in paths] != expected:
        raise InputError(f"{directory}: {', '.join(p.name for p in paths) or 'no consolidated.NN.pth'} beside "
                         f"params.json, expected {', '.join(expected) or 'consolidated.00.pth'}: download it again")
    return [read_bin(path) for path in paths]


class MetaParts(NamedTuple):
    """A weight in Meta's shards: it has a shape, and `to` makes it, straight into its last place."""
    parts: list
    dim: int | None         # along which the shards are parts; None: each has the whole
    head_dim: int           # of q and k, whose rows are permuted; else 0

    @property
    def shape(self):
        shape = list(self.parts[0].shape)
        if self.dim is not None:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return torch.Size(shape)

    def to(self, device, dtype):
        if self.dim is None:
            return self.parts[0].to(device, dtype)
        whole = torch.empty(self.shape, device=device, dtype=dtype)
        for place, part in zip(whole.split([p.shape[self.dim] for p in self.parts], self.dim), self.parts):
            if self.head_dim:       # rotary pairs are rows (2j, 2j + 1) of a head at Meta's, (j, j + hd/2) here
                place = place.unflatten(0, (-1, 2, self.head_dim // 2))
                part = part.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2)
            place.copy_(part)
        return whole


def read_meta_weights(directory):
    """Meta's checkpoint under Hugging Face's names: {name: MetaParts}."""
    config, shards = read_meta_config(directory, quiet=True)[0], meta_shards(directory)
    state = {}
    for name in shards[0]:
        words = name.removesuffix(".weight").split(".", 2)
        layer = words[0] == "layers" and len(words) == 3
        known = META_LAYERS.get(words[2]) if layer else META_TOP.get(".".join(words))
        if name == "rope.freqs" or name.endswith("inner_attention.rope.freqs"):
            continue                                                        # a buffer: the angles are computed here
        if known is None or any(name not in shard for shard in shards):
            raise InputError(f"{directory}: {name} is {'in some shards only' if known else 'no weight of a LLaMA'}")
        (ours, dim), parts = known, [shard[name] for shard in shards]
        if ours == "model.embed_tokens" and parts[0].shape[1] == config.hidden_size:
            dim = 0                                                         # LLaMA 3's shards split the vocabulary
        ours = f"model.layers.{words[1]}.{ours}" if layer else ours
        rotary = layer and words[2] in ("attention.wq", "attention.wk")
        state[f"{ours}.weight"] = MetaParts(parts, dim, config.head_dim * rotary)
    return state


def fill(model, state, directory, dtype, device):
    """Gives a model made on the meta device its weights, each cast and moved by itself, so that there is never a second
    copy of the whole. Names and shapes must agree exactly."""
    state = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq")}      # a buffer of old files
    wanted = model.state_dict()
    if absent := sorted(set(wanted) - set(state)):
        raise InputError(f"{directory}: lacks {len(absent)} of {len(wanted)} weights, {absent[0]} for one")
    if unknown := sorted(set(state) - set(wanted)):
        raise InputError(f"{directory}: {unknown[0]} is no weight of this model")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise InputError(f"{directory}: {name} has shape {list(state[name].shape)}, its config "
                             f"says {list(tensor.shape)}")
    model.load_state_dict({name: state[name].to(device, dtype) for name in wanted}, assign=True)
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        model.lm_head.weight = model.model.embed_tokens.weight              # assignment has parted the two
    return model.requires_grad_(True)


def save_checkpoint_dir(directory, config, state, architecture, tokenizer=None, shard_bytes=5 * 2**30, extra=None):
    """Writes what LLaMA.from_pretrained, transformers and vLLM open."""
    d = Path(directory)
    d.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    raw = {"architectures": [architecture], "model_type": "llama", **dataclasses.asdict(config), "hidden_act": "silu",
           "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
           "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}, "torch_dtype": dtype}
    if tokenizer is not None:
        raw.update(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=None)
        tokenizer.save(d)
    shards, size = [{}], 0
    for name, tensor in state.items():
        size += tensor.numel() * tensor.element_size()
        if shards[-1] and size > shard_bytes:
            shards, size = shards + [{}], tensor.numel() * tensor.element_size()
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        write_safetensors(d / name, shard)
    for old in d.glob("model*.safetensors*"):           # an older save in another layout would be found first
        if old.name not in names:
            old.unlink()
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in state.values())
        write_json(d / "model.safetensors.index.json", {"metadata": {"total_size": total},
                   "weight_map": {k: name for name, shard in zip(names, shards) for k in shard}})
    write_json(d / "config.json", {**raw, **(extra or {})})                 # last: its presence says the rest is there


# ----------------------------------------------------------------------------------------------------------------------
# Memory, known before it is spent


def block_activations(block, dtype, autocast=False, device_type="cpu"):
    """What one block keeps for its backward pass, in bytes: (a token of the batch, once a pass).

    s and p are the sizes of a number in the residual stream and in the products; CUDA's norm and dropout are fused and
    keep less than the CPU's, which are made of several operations."""
    attention, mlp, cuda = block.self_attn, block.mlp, device_type == "cuda"
    s = dtype.itemsize
    p, wide = 2 if autocast else s, max(s, 4)
    D, F_ = mlp.gate_proj.in_features, mlp.gate_proj.out_features
    token, once = 0, 0
    for norm in (block.input_layernorm, block.post_attention_layernorm):    # the input, 1 / rms; x / rms for the weight
        token += D * (s if cuda else wide) + wide
        token += 0 if cuda or not norm.weight.requires_grad else D * wide
    token += 2 * (attention.H + attention.Hkv) * attention.hd * p           # q, k, v and the attention's output,
    token += attention.H * wide                                             # log-sum-exp
    token += 3 * F_ * p                                                     # gate, up, silu(gate)
    for layers, width, size in (((attention.q_proj, attention.k_proj, attention.v_proj), D, s),
                                ((attention.o_proj,), attention.H * attention.hd, p),
                                ((mlp.gate_proj, mlp.up_proj), D, s), ((mlp.down_proj,), F_, p)):
        inputs = 0                                                          # copies of the input that the layers keep
        for layer in layers:
            lora, dropout = isinstance(layer, LoRALinear), 0.0
            if lora:
                rank, dropout = layer.lora_A.out_features, layer.dropout.p
                token += rank * p + (width * ((1 if cuda else size) + p) if dropout else 0)     # mask, what is left
                once += rank * (layer.in_features + layer.out_features) * p * (layer.lora_A.weight.element_size() != p)
            if layer is not attention.o_proj:                               # its input is the output counted above
                inputs += layer.weight.requires_grad or lora and not dropout
            once += layer.weight.numel() * p if size != p or autocast else 0                # autocast's copy in bf16
        token += width * p * (inputs if size != p else min(inputs, 1))      # a cast makes each layer a copy of its own
    return token, once


def memory_estimate(config, dtype, readings, response_tokens, *, lora_rank=0, lora_dropout=0.0, targets=MLP_PROJECTIONS,
                    checkpoint=False, autocast=False, zero_ranks=1, device_type="cpu"):
    """Bytes at the peak of a training step, by what they are for: {"weights", "gradients", "optimizer", "activations",
    "working"}; their sum is the peak.

    readings: the (rows, tokens) of the passes of one micro-batch (CUT's bad responses have two), response_tokens the N
    of one of them. `working` is the largest of what the fused head holds (logits tile, its gradients, an fp32 copy of
    a half-precision head), what the backward pass of one block takes, and what a save with --zero takes. Gradients are
    counted as there in full: with one micro-batch a step and no DistributedDataParallel (whose buckets they are views
    of) they grow as activations shrink, and the estimate is high by up to the smaller of the two."""
    with torch.device("meta"):
        model = LLaMA(config).to(dtype)
        if lora_rank:
            add_lora(model, lora_rank, lora_rank, lora_dropout, targets)
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sorted((size for size, grad in sizes if grad), reverse=True)
    shares = [0] * zero_ranks
    for size in trained:                                                    # ZeRO's way: the next to the least laden
        shares[shares.index(min(shares))] += size

    D, V, s, wide = config.hidden_size, config.vocab_size, dtype.itemsize, max(dtype.itemsize, 4)
    block, layers = model.model.layers[0], config.num_hidden_layers
    token, once = block_activations(block, dtype, autocast, device_type)
    count, largest = sum(b * t for b, t in readings), max(b * t for b, t in readings)
    kept = count * D * s if checkpoint else count * token + once * len(readings)
    norm = D * (s if device_type == "cuda" else wide) + wide                # the last norm's input and 1 / rms
    norm += D * wide if model.model.norm.weight.requires_grad and device_type != "cuda" else 0

    R, head = len(readings), model.lm_head.weight.requires_grad
    hidden, weight = R * response_tokens * D * s, V * D * wide
    tiles = R * min(256, response_tokens) * (V + D) * wide * (2 if response_tokens > 256 else 1)
    first = 2 * hidden + weight * (s < 4) + weight * head + tiles           # its forward pass, which forms gradients
    second = 2 * hidden + (2 * weight + V * D * s * (s < 4)) * head         # its backward pass, which scales them
    product = 2 if autocast else s
    wide_gradient = max([0] + [p.numel() * p.element_size() for p in block.parameters() if p.requires_grad])
    backward = largest * (4 * config.intermediate_size + 4 * D) * product + wide_gradient
    backward += largest * token + once if checkpoint else 0
    activations = layers * kept + count * norm
    # A save with --zero passes each rank's moments to all, as bytes and as tensors; no activations are there then.
    saving = 2 * 2 * max(shares) - activations if zero_ranks > 1 else 0
    return {"weights": sum(size for size, _ in sizes), "gradients": sum(trained), "optimizer": 2 * max(shares),
            "activations": activations, "working": max(first, second, backward, saving)}


HELPS = {"weights": "--dtype bfloat16 halves fp32 weights", "gradients": "--lora-rank 16 trains adapters only",
         "optimizer": "--lora-rank 16 trains adapters only, --zero shares it out over ranks",
         "activations": "--checkpoint-activations, a smaller --micro-batch-size or --max-length",
         "working": "a smaller --micro-batch-size or --max-length"}


def available_memory(device):
    """Bytes that this process may still take on its device; 0 if that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))               # ranks of one machine share it


def check_memory(estimate, device):
    """Prints memory_estimate beside what the device has; raises InputError if it cannot fit."""
    total, have = sum(estimate.values()), available_memory(device)
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    terms = " + ".join(f"{size / unit:.1f} {key}" for key, size in estimate.items())
    there = f"{have / 1e9:.1f} GB free on {device}"
    print0(f"memory: {terms} = {total / unit:.1f} {name}" + f" of {there}" * bool(have))
    if have and total > have:
        worst = sorted(estimate, key=estimate.get)[:-3:-1]
        raise InputError(f"this run takes about {total / unit:.1f} {name}, and there are {there}. What would help: "
                         + "; ".join(f"{key} {estimate[key] / unit:.1f} {name}: {HELPS[key]}" for key in worst))


# ----------------------------------------------------------------------------------------------------------------------
# Devices, processes, optimizer, resuming


def setup_device(device=""):
    """The device of this process; joins torchrun's process group if there is one. device "" picks CUDA, then Apple MPS,
    then CPU. Every rank must reach every collective: no `if rank() == 0` around anything that communicates."""
    if not device:
        mps = torch.backends.mps.is_available() and world_size() == 1             # MPS has no collectives
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device!r} is unknown: use cuda, mps or cpu") from None
    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device.type, lambda: True)():
        raise InputError(f"--device {device.type}: not here, or not in this PyTorch: leave --device out")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        device = torch.device("cuda", torch.cuda.current_device())
        # TF32 rounds the factors of an fp32 product to 10 bits of mantissa and adds up in fp32. bf16 has 7 bits, so the
        # head's products of bf16 weights, made in fp32, stay exact and get the tensor cores' speed. With fp32 weights
        # log-probabilities move by 0.001 (rounding simulated at width 4,096); CUT's test has to resolve 0.095.
        torch.set_float32_matmul_precision("high")
        print0("fp32 products run in TF32: 10 bits of mantissa, which is exact for bf16 weights")
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def rank():
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def share(items):
    """This rank's part of a list that all ranks have: every world_size-th item."""
    return items[rank()::world_size()]


def barrier():
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(values):
    """Sums a list of numbers over all ranks, in float64."""
    if not dist.is_initialized():
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t)
    return t.tolist()


def gather_lists(items):
    """Concatenates every rank's list, in rank order, on every rank."""
    if not dist.is_initialized():
        return list(items)
    parts = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [x for part in parts for x in part]


def lr_at(step, peak, warmup, steps, floor=0.05):
    """Linear warm-up over `warmup` steps (the first step already has peak / warmup, not 0), then cosine down to
    floor * peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def lr_linear(step, peak, warmup, steps):
    """AlpacaFarm's schedule for PPO and Quark: from 0 (the first step has no effect) to peak at step `warmup`, then
    straight down to nearly 0 at the last."""
    return peak * (step / warmup if step < warmup else (steps - step) / max(1, steps - warmup))


def set_execution(model, device, checkpoint=False, compiled=False, autocast=False):
    """How the blocks run. Up to rounding, none of these changes what they compute.

    checkpoint  keep only each block's input for the backward pass and compute the block again there, dropout included:
                less memory for a third more time. Sampling and evaluation keep nothing anyway.
    compiled    torch.compile each block (they share one compilation); sampling stays uncompiled.
    autocast    products in bf16 with weights, their gradients and the residual stream in fp32: in full fine-tuning,
                updates smaller than 1/256 of a weight are lost in bf16 weights."""
    if autocast and model.lm_head.weight.dtype != torch.float32:
        raise InputError(f"--autocast with --dtype {str(model.lm_head.weight.dtype).removeprefix('torch.')}: it is for "
                         "weights in float32, whose products it makes in bf16: leave one of the two out")
    model.model.checkpoint, model.model.autocast = checkpoint, autocast
    if compiled:
        try:                                                                # a compiler may be missing: find out now
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"--compile does not work here ({reason}): leave it out") from None
        # Lengths are dynamic; one row or several, training or not, first block of a frozen base or later ones are not:
        # they make up to a dozen variants, and past the limit PyTorch would silently go on uncompiled.
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        for block in model.model.layers:
            block.compile(dynamic=True)


def make_optimizer(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, zero=False):
    """AdamW over all trainable parameters; decay, if any, on matrices only (norm weights are scales, not directions).
    The learning rate is set before every step by the training loop. With zero every rank keeps the moments of its share
    of the parameters, updates those and sends them to the others (ZeRO, stage 1): the same numbers."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    groups, fused = [g for g in groups if g["params"]], params[0].device.type != "mps"
    if not zero:
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=fused)
    if not dist.is_initialized():
        raise InputError("--zero shares the optimizer's state out over ranks, and there is 1: launch with torchrun "
                         "--nproc_per_node 2 or more, or leave --zero out")
    from torch.distributed.optim import ZeroRedundancyOptimizer             # absent where PyTorch has no collectives
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.0, betas=betas, eps=eps, fused=fused)


def save_resume(path, model, optimizer, state, rank):
    """One file with all that a run needs to go on: what it trains (all weights, or the adapters), the optimizer, and
    `state` (the step and such). Random choices derive from (seed, step), so no generator state has to be kept. Every
    rank calls this: what --zero has shared out is collected on rank 0."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for torn in Path(path).parent.glob(f"{Path(path).name}.tmp-*"):
            torn.unlink()                                                   # left by a kill -9 in the middle of a save
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        with atomic_write(path) as temporary:
            torch.save({"model": trained, "optimizer": optimizer.state_dict(), "state": state}, temporary)


# Flags that may differ between a run and its resumption, because they do not change what it computes.
MAY_DIFFER = {"resume", "out", "device", "save_every", "micro_batch_size", "sample_batch_size", "zero",
              "checkpoint_activations"}


def load_resume(path, model, optimizer, run):
    """Undoes save_resume; returns its `state`. `run` are this run's flags: state["run"] must agree with them."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for key, now in run.items():
        before = saved["state"]["run"].get(key)
        if key not in MAY_DIFFER and before != now:
            raise InputError(f"{path}: --{key.replace('_', '-')} was {before!r}, is {now!r}: resume with equal flags")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(set(trained) | set(saved["model"])):
        shapes = [list(found[name].shape) if name in found else None for found in (saved["model"], trained)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{path}: {name} was trained with shape {shapes[0]}, this run has {shapes[1]}: resume "
                             "with the same model")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(saved["model"][name])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["state"]


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop answers after its step, by saving and leaving. A
    second one ends the program at once."""

    def __init__(self):
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def _handle(self, number, frame):
        self.requested = True
        print0("\nstopping after this step; once more to stop at once")
        signal.signal(number, signal.SIG_DFL)


def open_metrics(path, start, rank):
    """Returns a function that appends one JSON line a step. Lines of steps from `start` on, which a resumed run will
    write again, are removed first."""
    if rank:
        return lambda line: None
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() and start else []
    old = [line for line in old if line.endswith("\n")]                     # a kill may have torn the last one
    path.write_text("".join(line for line in old if json.loads(line)["step"] < start), encoding="utf-8")
    file = open(path, "a", encoding="utf-8", buffering=1)
    return lambda line: file.write(json.dumps(line) + "\n")


def peak_memory(device):
    """Peak bytes of this process: the device's where it has its own count, else the resident set's high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                     # Windows has no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024          # macOS counts bytes, Linux kibibytes
