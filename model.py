"""A LLaMA in one file: the network, LoRA, sampling with a key-value cache, checkpoints, and what a training run needs.

    tokens (B, T) -> embedding -> L blocks (attention, MLP) -> norm -> hidden (B, T, D) -> head -> logits (B, T, V)

Top to bottom: Config and the network; LLaMA and the reward model on top of it; LoRA; sampling; checkpoints in Hugging
Face's layout; devices and processes; optimizer and schedules; memory estimate; Run (progress, metrics, resuming).

Shapes, used in every comment of the repository:
  B batch, T tokens, D width, H query heads, Hkv key/value heads, hd head dimension, V vocabulary, S cache length,
  N response tokens of a batch, R passes over the same responses.

Modules carry the names of Hugging Face's LLaMA, so a state_dict *is* the published layout and no table of names is
needed: model.layers.0.self_attn.q_proj.weight and so on.
"""
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import mmap
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import FORMATS, IGNORE, InputError, atomic_write, pad, print0, reading, same_command, write_json
from losses import fused_logp, fused_loss

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HALF = (torch.bfloat16, torch.float16)


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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")


class RMSNorm(nn.Module):
    """Root mean square norm, x / rms(x) * weight, computed in fp32 or above."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_tables(positions, head_dim, theta, dtype):
    """cos and sin of the rotary angles: positions (..., T) -> two (..., 1, T, hd), to be broadcast over heads.

    Pair j of a head turns by position * theta^(-2j/hd). Pairs are (j, j + hd/2), Hugging Face's order.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions.unsqueeze(-1).float() * theta ** -exponents          # (..., T, hd/2)
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(-3)                # (..., 1, T, hd)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Applies the rotary embedding to x (B, H, T, hd)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings and grouped key/value heads: (B, T, D) -> (B, T, D)."""

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
        # Training needs no padding mask: batches are padded on the right, where causality hides it.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.H != self.Hkv)
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
    """A pre-norm transformer block."""

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
        c = self.config
        x = self.embed_tokens(tokens)                                       # (B, T, D)
        if cache is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)         # (T,)
        else:
            positions = cache.begin(tokens.shape[1])                        # (B, T)
        cos, sin = rope_tables(positions, c.head_dim, c.rope_theta, x.dtype)
        checkpoint = self.checkpoint and cache is None and torch.is_grad_enabled()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            for i, block in enumerate(self.layers):
                if cache is not None:
                    x = block.forward(x, cos, sin, cache, i)        # never compiled: the cache grows at every step
                elif checkpoint:
                    x = torch.utils.checkpoint.checkpoint(block, x, cos, sin, use_reentrant=False)
                else:
                    x = block(x, cos, sin)
        return self.norm(x)


def init_weights(module, config):
    """Initializes weights as Normal(0, initializer_range), RMSNorm's as 1.

    The two projections that write into the residual stream get 1 / sqrt(2 * layers) of it, so that the stream's
    variance does not grow with depth.
    """
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=config.initializer_range)
    std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for m in module.modules():
        if isinstance(m, Block):
            nn.init.normal_(m.self_attn.o_proj.weight, std=std)
            nn.init.normal_(m.mlp.down_proj.weight, std=std)


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

    def forward(self, tokens, targets=None, token_loss=None, per_token=(), temperature=1.0):
        """Logits, or what the fused head makes of them without holding them. tokens (B, T).

        targets (B, T) holds the token that follows tokens[b, t] where it belongs to a response, else IGNORE; N is the
        number of those that count, in row order.

            model(tokens)                                     logits (B, T, V)
            model(tokens, targets)                            log-probabilities of the targets (N,), with gradient
            model(tokens, targets, token_loss, per_token)     losses.fused_loss: (scalar loss, logp (R, N))

        tokens and targets may be lists of R tensors, passes over the same responses after different prompts: then logp
        is (R, N). `temperature` divides the logits: a response is scored at the temperature at which it was sampled.
        All of this happens inside forward because DistributedDataParallel has to see one call of one module.
        """
        if targets is None:
            return self.lm_head(self.model(tokens))
        if isinstance(tokens, torch.Tensor):
            tokens, targets = [tokens], [targets]
        hidden = [self.response_hidden(x, y) / temperature for x, y in zip(tokens, targets)]        # R times (N, D)
        response_ids = targets[0][targets[0] != IGNORE]                     # (N,), the same in each pass
        if token_loss is not None:
            return fused_loss(torch.stack(hidden), self.lm_head.weight, response_ids, token_loss, per_token)
        logp = [fused_logp(h, self.lm_head.weight, response_ids) for h in hidden]
        return torch.stack(logp) if len(logp) > 1 else logp[0]

    def response_hidden(self, tokens, targets):
        """Hidden states that predict the targets: tokens, targets (B, T) -> (N, D)."""
        return self.model(tokens)[targets != IGNORE]

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """Opens a model directory in Hugging Face's layout; InputError names the file if it is anything else.

        On a CPU, a tensor that already has the dtype is not copied: it stays memory-mapped, copy-on-write, so training
        it never touches the file.
        """
        config, _ = read_config(directory)
        weights = read_weights(directory)
        if config.tie_word_embeddings:
            weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight"))
        model = load_into(on_meta(cls, config), weights, directory, dtype, device)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight          # loading has separated the two
        return model

    def save_pretrained(self, directory, tokenizer=None, extra=None):
        """Writes config.json (with the entries of `extra`), model.safetensors and, if given, the tokenizer."""
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        write_model_directory(directory, self.config, weights, "LlamaForCausalLM", tokenizer, extra)


class RewardModel(nn.Module):
    """A LLaMA backbone with a scalar head, read at the last real token. The head is AlpacaFarm's without the bias,
    which cancels in every difference of rewards. Its files are Hugging Face's LlamaForSequenceClassification with one
    label.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        if self.score.weight.device.type != "meta":
            init_weights(self, config)

    @classmethod
    def from_backbone(cls, other):
        """A reward model on the backbone of another model: the same tensors, not a copy. Adapters on one of the two
        leave the other unchanged. The head is fresh, and in fp32 if the backbone is in half precision."""
        reward = on_meta(cls, other.config)
        reward.model.load_state_dict(other.model.state_dict(), assign=True)
        weight = other.model.norm.weight
        dtype = torch.float32 if weight.dtype in HALF else weight.dtype
        reward.score = nn.Linear(other.config.hidden_size, 1, bias=False, device=weight.device, dtype=dtype)
        nn.init.normal_(reward.score.weight, std=other.config.initializer_range)
        return reward

    def forward(self, tokens, lengths):
        """Rewards: tokens (B, T) padded on the right, lengths (B,) without padding -> (B,)."""
        hidden = self.model(tokens)                                         # (B, T, D)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self._read(hidden[rows, lengths - 1])

    def values(self, tokens, targets):
        """PPO's critic: the head at the positions that predict the targets, (B, T), (B, T) -> values (N,) in row order.
        The value at a position is that of the state *before* the next token is chosen."""
        return self._read(self.model(tokens)[targets != IGNORE])

    def _read(self, hidden):
        reward = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return reward.float() if reward.dtype in HALF else reward

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32, device="cpu"):
        """As LLaMA.from_pretrained. The head is in fp32 at least, the precision that it was trained in."""
        config, _ = read_config(directory)
        weights = read_weights(directory)
        model = load_into(on_meta(cls, config), weights, directory, dtype, device)
        if dtype in HALF:
            model.score.weight = nn.Parameter(weights["score.weight"].to(device, torch.float32))
        return model

    def save_pretrained(self, directory, tokenizer=None, extra=None):
        """As LLaMA.save_pretrained."""
        labels = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        write_model_directory(directory, self.config, self.state_dict(), "LlamaForSequenceClassification", tokenizer,
                              {**labels, **(extra or {})})


def on_meta(cls, config):
    """A model of this shape without memory for its weights."""
    with torch.device("meta"):
        return cls(config)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA: train a low-rank update of some matrices and freeze the rest (arXiv 2106.09685)


class LoRALinear(nn.Linear):
    """y = W x + (alpha / rank) B A x, with W frozen.

    B starts at zero, so training starts from the base model; with `enabled` off it *is* the base model, a reference for
    free. A and B stay in fp32 when W is in half precision, whose rounding would swallow their updates. There is no
    dropout: with it, two passes over the same response would disagree by chance, and CUT compares exactly these.
    """

    def __init__(self, linear, rank, alpha):
        nn.Module.__init__(self)                                            # the weight is shared, not made again
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = linear.weight
        dtype = torch.float32 if self.weight.dtype in HALF else self.weight.dtype
        kwargs = {"bias": False, "device": self.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(self.in_features, rank, **kwargs)
        self.lora_B = nn.Linear(rank, self.out_features, **kwargs)
        nn.init.zeros_(self.lora_B.weight)
        self.alpha, self.enabled = alpha, True

    @property
    def scale(self):
        return self.alpha / self.lora_A.out_features

    def forward(self, x):
        y = F.linear(x, self.weight)                                        # (..., out)
        if not self.enabled:
            return y
        low = F.linear(x, self.lora_A.weight.to(x.dtype))                   # (..., rank)
        return y + self.scale * F.linear(low, self.lora_B.weight.to(x.dtype))


MLP_MODULES = ("gate_proj", "up_proj", "down_proj")                         # what CUT adapts
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora_layers(model):
    """{name: LoRALinear} of all adapted layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, rank=16, alpha=16, modules=MLP_MODULES):
    """Freezes the model and adds adapters to the linear layers named in `modules`; returns the number of trainable
    parameters: with CUT's setting, the default, 23.2 M for LLaMA-2 7B and 36.4 M for 13B. The scalar head of a reward
    model stays trainable."""
    model.requires_grad_(False)
    if isinstance(model, RewardModel):
        model.score.requires_grad_(True)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in modules and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    adapted = {name.rsplit(".", 1)[-1] for name in lora_layers(model)}
    if missing := sorted(set(modules) - adapted):
        raise InputError(f"LoRA module {missing[0]!r} matches no layer: use "
                         f"{', '.join(MLP_MODULES + ATTENTION_MODULES)}")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def lora_disabled(model):
    """Context in which the model is its frozen base."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def merge_lora(model):
    """Adds every adapter to its matrix and removes it: a plain model again."""
    for name in list(lora_layers(model)):
        layer = model.get_submodule(name)
        with torch.no_grad():
            update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
            merged = (layer.weight.to(update.dtype) + update).to(layer.weight.dtype)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain)              # one at a time: the old matrix can go
    return model.requires_grad_(True)


def trained_weights(model):
    """{name: parameter} of all that is trained: every weight, or adapters and scalar head."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_adapter(model, directory, base):
    """Writes the adapters in PEFT's layout: adapter_config.json, adapter_model.safetensors."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    is_reward = isinstance(model, RewardModel)
    Path(directory).mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": p for name, p in trained_weights(model).items()}
    write_safetensors(Path(directory, "adapter_model.safetensors"), tensors)
    write_json(Path(directory, "adapter_config.json"), {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward else "CAUSAL_LM",
        "modules_to_save": ["score"] if is_reward else None,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": first.lora_A.out_features,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
    })


# Keys of PEFT's adapter_config.json that we read, that change no function, or that have one value for what LoRALinear
# does. All others have to be absent or empty (null, false, {}, []): they are options of other functions.
PLAIN_LORA = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, None, "gaussian"]}
HARMLESS = {"r", "lora_alpha", "target_modules", "modules_to_save", "task_type", "base_model_name_or_path", "revision",
            "inference_mode", "lora_dropout", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"}


def load_adapter(model, directory):
    """Adds a saved adapter (ours or PEFT's) to a model that has none."""
    path, weights = Path(directory, "adapter_config.json"), Path(directory, "adapter_model.safetensors")
    with reading(path, "give a directory with an adapter in PEFT's layout"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(set(config) - HARMLESS):
            if config[key] not in PLAIN_LORA.get(key, [None, False, {}, []]):
                raise InputError(f"{path}: {key} is {config[key]!r}, which is not implemented")
        saved = {name.removeprefix("base_model.model."): t for name, t in read_safetensors(weights).items()}
        ranks = {len(t) for name, t in saved.items() if name.endswith("lora_A.weight")}
        if ranks != {config["r"]} or not 0 < config["lora_alpha"] < 2**20:       # before any memory is taken
            raise ValueError(f"r {config['r']}, lora_alpha {config['lora_alpha']}, weights of rank {sorted(ranks)}")
        add_lora(model, config["r"], config["lora_alpha"], tuple(config["target_modules"]))
    copy_weights(trained_weights(model), saved, weights)


@torch.no_grad()
def copy_weights(parameters, saved, source):
    """Copies saved tensors into parameters of the same names and shapes; anything else is an InputError."""
    check_weights(parameters, saved, source)
    for name, p in parameters.items():
        p.copy_(saved[name])


def check_weights(wanted, saved, source):
    """Saved tensors have to be floating-point numbers with the names and shapes of those wanted."""
    kind = " (a reward model)" if "score.weight" in set(saved) - set(wanted) else ""
    for name in sorted({**wanted, **saved}):
        before, now = (list(weights[name].shape) if name in weights else "none" for weights in (saved, wanted))
        if before != now or not saved[name].is_floating_point():
            raise InputError(f"{source}{kind}: {name} was saved with shape {before}, this model has {now}: use the "
                             "model that it was saved from")


# ----------------------------------------------------------------------------------------------------------------------
# Sampling: prefill reads the prompts, decode adds one token at a time, generate does both for any number of prompts


class KVCache:
    """Keys and values of every layer, for rows of unequal length.

    Row b holds real tokens at 0 .. lengths[b] - 1. What lies beyond is padding: the mask hides it and the next tokens
    overwrite it, so there is no padding side to get wrong.
    """

    def __init__(self, config, rows, size, device, dtype):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.rows = torch.arange(rows, device=device)   # the numbers of the rows that are still here
        self.end = 0                                    # the longest row; a Python int spares a device sync a step

    def begin(self, count):
        """Announces `count` new tokens a row; returns their positions (B, T), which follow each row's own length."""
        device = self.lengths.device
        self.positions = self.lengths.unsqueeze(1) + torch.arange(count, device=device)
        self.lengths = self.lengths + count
        self.end += count
        # Key s is visible to a token at position p if s <= p: causality among the new tokens, and no padding.
        visible = torch.arange(self.end, device=device) <= self.positions.unsqueeze(-1)     # (B, T, S)
        self.mask = visible.unsqueeze(1)                                    # (B, 1, T, S)
        return self.positions

    def update(self, layer, k, v):
        """Stores k, v (B, Hkv, T, hd) at the announced positions; returns all keys and values so far, and the mask."""
        rows = torch.arange(len(k), device=k.device).unsqueeze(1)           # (B, 1), broadcast against positions (B, T)
        self.k[layer][rows, :, self.positions] = k.transpose(1, 2)          # (B, T, Hkv, hd)
        self.v[layer][rows, :, self.positions] = v.transpose(1, 2).to(self.v.dtype)         # bf16 under --autocast
        return self.k[layer][:, :, :self.end], self.v[layer][:, :, :self.end], self.mask

    def select(self, rows):
        """Keeps the given rows. An index may repeat, which is how n samples share one prefill."""
        self.k = self.k[:, rows]                                            # one after the other: each is a copy
        self.v = self.v[:, rows]
        self.lengths, self.rows = self.lengths[rows], self.rows[rows]


def sample_token(logits, u, temperature, top_k=0, top_p=1.0):
    """Samples one token a row by inverse CDF: logits (B, V), u (B,) uniform in [0, 1) -> ids (B,).

    A draw is a function of (logits, u), so it cannot depend on the other rows. top_k keeps the k likeliest tokens,
    top_p the smallest set of those whose mass reaches top_p (one token at least). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # In fp32 the tail of the CDF is rounding noise; MPS has nothing else.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    p, order = torch.softmax(logits.to(dtype) / temperature, dim=-1), None  # (B, V)
    if top_k or top_p < 1:
        p, order = p.sort(dim=-1, descending=True)
        if top_k:
            p[:, top_k:] = 0
        mass_before = p.cumsum(dim=-1) - p                                  # mass of the likelier tokens
        keep = (mass_before < top_p * p.sum(dim=-1, keepdim=True)) | (mass_before == 0)
        p = p * keep
    cdf = p.cumsum(dim=-1)                                                  # (B, V); the last column is the total mass
    threshold = u.unsqueeze(1).to(dtype) * cdf[:, -1:]
    pick = torch.searchsorted(cdf, threshold, right=True)                   # the first token with cdf > threshold
    last = p.shape[-1] - 1 - (p > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    pick = torch.minimum(pick, last)                                        # where rounding went past the last p > 0
    if order is not None:
        pick = order.gather(1, pick)
    return pick.squeeze(1)


@torch.no_grad()
def prefill(model, prompts, max_new_tokens, n=1):
    """Reads B prompts in one pass -> (cache with n rows for each, hidden (B * n, D) that predicts each first token)."""
    weight = model.lm_head.weight
    tokens, lengths = pad(prompts, weight.device)                           # (B, T), (B,)
    B, T = tokens.shape
    cache = KVCache(model.config, B, T + max_new_tokens, weight.device, weight.dtype)
    hidden = model.model(tokens, cache)                                     # (B, T, D)
    cache.lengths = lengths
    rows = torch.arange(B, device=weight.device).repeat_interleave(n)       # each prompt's row, n times
    cache.select(rows)
    cache.rows = torch.arange(B * n, device=weight.device)
    return cache, hidden[rows, lengths[rows] - 1]                           # at the last real position


@torch.no_grad()
def decode(model, cache, hidden, u, eos, choose, progress=None, logp=None):
    """Samples one token after the other until every row has finished (EOS) or u (rows, steps) has no more columns.

    choose(logits (rows, V), u (rows,)) -> ids (rows,). Returns the new ids of each row of the cache, EOS included, as
    lists. To go on with it: cache.rows says which rows are left, and the last token of each is not in it yet. `logp`
    (rows, steps), if given, takes the log-probabilities of the new ids at temperature 1.
    """
    weight = model.lm_head.weight
    rows, steps = cache.rows, u.shape[1]
    out = torch.full(u.shape, eos, device=weight.device)
    finished = torch.zeros_like(rows, dtype=torch.bool)
    for t in range(steps):
        token = choose(hidden @ weight.T, u[cache.rows, t])                 # (rows,)
        out[cache.rows, t] = token                          # what follows a row's first EOS is removed at the end
        if logp is not None:
            logp[cache.rows, t] = fused_logp(hidden, weight, token).to(logp.dtype)
        finished = finished | (token == eos)
        count = int(finished.sum())
        if t + 1 == steps or count == len(finished):
            break
        # Removing finished rows copies the cache of the others, so it waits until an eighth of them has finished.
        if count * 8 >= len(finished):
            stay = (~finished).nonzero().squeeze(1)
            token, finished = token[stay], finished[stay]
            cache.select(stay)
            if progress:
                progress(count)
        hidden = model.model(token.unsqueeze(1), cache)[:, -1]              # (rows, D)
    if progress:
        progress(len(finished))
    ids = out[rows].tolist()
    return [row[:row.index(eos) + 1] if eos in row else row for row in ids]


def read_logp(model, cache, hidden, tokens):
    """Log-probabilities of each row's next tokens (rows, T), the first of which hidden (rows, D) predicts -> (rows, T).
    As after `decode`, the last token is not in the cache yet."""
    hidden = torch.cat([hidden.unsqueeze(1), model.model(tokens[:, :-1], cache)], dim=1)       # (rows, T, D)
    return fused_logp(hidden.flatten(0, 1), model.lm_head.weight, tokens.flatten()).view_as(tokens)


def sample_rows(model, prompts, u, eos, choose, progress=None):
    """The decoder of plain sampling: u (B * n, steps) -> n independent responses to each prompt, B * n lists of ids."""
    return decode(model, *prefill(model, prompts, u.shape[1], len(u) // len(prompts)), u, eos, choose, progress)


def generate(model, prompts, max_new_tokens, eos, *, n=1, temperature=1.0, top_k=0, top_p=1.0, seed=0, rows=None,
             batch_size=512, progress=None, decoder=sample_rows):
    """Samples n continuations of every prompt: lists of ids -> for each prompt, a list of n lists of new ids.

    A continuation ends with eos, or is truncated after max_new_tokens. Randomness is one uniform number for each (seed,
    row, position), where row = n * rows[i] + sample and rows (default 0, 1, 2, ...) numbers the prompts. Give each
    rank's prompts their global numbers, and the samples depend neither on the number of ranks nor on the batch size.
    progress, if given, is called with the number of continuations just finished. decoder: sample_rows, or TreeBoN's.
    """
    if rows is None:
        rows = range(len(prompts))
    for row, prompt in zip(rows, prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: a prompt has at least its BOS token")
    device = model.lm_head.weight.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    choose = functools.partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
    samples = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths share a prefill
    per_batch = max(1, batch_size // n)
    for start in range(0, len(by_length), per_batch):
        batch = by_length[start:start + per_batch]
        numbers = [n * rows[i] + j for i in batch for j in range(n)]
        u = [np.random.default_rng([seed, number]).random(max_new_tokens) for number in numbers]
        u = torch.from_numpy(np.stack(u)).to(device, dtype)                 # (B * n, max_new_tokens)
        ids = decoder(model, [prompts[i] for i in batch], u, eos, choose, progress)
        for k, i in enumerate(batch):
            samples[i] = ids[k * n:(k + 1) * n]
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints in Hugging Face's layout

# What this network implements, the default first; a config.json that says otherwise describes another function.
IMPLEMENTED = {
    "model_type": ["llama"],
    "hidden_act": ["silu"],
    "attention_bias": [False],
    "mlp_bias": [False],
    "rope_type": ["default"],
    "partial_rotary_factor": [1.0],
    "prompt_format": [None, *FORMATS],                      # recorded by our scripts, as is the control token
    "reward_token": [None, *range(8)],
}
# No LLaMA has larger numbers, more than a million elsewhere: a network of any size can be described, but not built.
LARGEST = {"num_hidden_layers": 1000, "rope_theta": 1e10}


def read_config(directory, quiet=False):
    """config.json -> (Config, the raw dict).

    Absent keys take LLaMA's documented defaults, which are printed unless quiet. A value that this network does not
    implement is an InputError: ignoring it would load another function.
    """
    path = Path(directory, "config.json")
    with reading(path, "give the directory of a LLaMA in Hugging Face's layout"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        config, defaults = parse_config(path, raw)
    if defaults and not quiet:
        listed = ", ".join(f"{key} = {value}" for key, value in defaults.items())
        print0(f"{path}: absent keys take LLaMA's defaults: {listed}")
    return config, raw


def parse_config(path, raw):
    """The raw dict of config.json -> (Config, {absent key: its default})."""
    found = {"model_type": raw.get("model_type")}
    for key in ("hidden_act", "attention_bias", "mlp_bias", "prompt_format", "reward_token"):
        found[key] = raw.get(key, IMPLEMENTED[key][0])
    rope = raw.get("rope_parameters") or {}                 # transformers 5 nests what older files have at the top
    for name, nested in (("rope_parameters", rope), ("rope_scaling", raw.get("rope_scaling") or {})):
        found[f"{name}.rope_type"] = nested.get("rope_type", nested.get("type", "default"))
        found[f"{name}.partial_rotary_factor"] = nested.get("partial_rotary_factor", 1.0)
    for key, value in found.items():
        expected = IMPLEMENTED[key.rsplit(".", 1)[-1]]
        if value not in expected:
            raise InputError(f"{path}: {key} is {value!r}; this LLaMA implements {expected} only")

    given = {**raw, "rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    heads = raw["num_attention_heads"]
    optional = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads}
    for field in ("max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range", "tie_word_embeddings"):
        optional[field] = getattr(Config, field)
    defaults = {key: value for key, value in optional.items() if given.get(key) is None}
    values = {}
    for field in dataclasses.fields(Config):
        value, most = defaults.get(field.name, given.get(field.name)), LARGEST.get(field.name, 2**20)
        kinds = (float, int) if field.type is float else (field.type,)
        if type(value) not in kinds or not (value is False or 0 < value <= most):
            raise ValueError(f"{field.name} is {value!r}, expected {field.type.__name__}, at most {most}")
        values[field.name] = field.type(value)
    return Config(**values), defaults


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def read_safetensors(path):
    """Maps a safetensors file: {name: tensor}. The tensors are views of the mapped file; nothing is read yet.

    Layout: 8 bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, the raw little-endian
    numbers, one tensor right after the other.
    """
    tensors = {}
    known = ", ".join(SAFETENSORS_DTYPES)
    with reading(path, f"download it again, or convert it to {known}"), open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)             # copy-on-write, page by page
        begin = start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, count = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], math.prod(entry["shape"])
            end = begin + count * dtype.itemsize
            if entry["data_offsets"] != [begin - start, end - start] or end > len(data):
                raise ValueError(f"{name} of shape {shape} has offsets {entry['data_offsets']}, expected "
                                 f"{[begin - start, end - start]} in {len(data) - start} bytes")
            flat = torch.zeros(0, dtype=dtype)
            if count:
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
            tensors[name], begin = flat.view(shape), end
        if begin != len(data):
            raise ValueError(f"{len(data) - begin} bytes belong to no tensor")
    return tensors


def write_safetensors(path, tensors):
    """Writes {name: tensor} as a safetensors file, atomically: it is there whole or not at all."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        end = offset + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                         # numbers start at a multiple of 8
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def read_bin(path):
    """A pickled state_dict, memory-mapped where PyTorch can."""
    with reading(path, "download it again, or save plain weights"):
        return {name: tensor.detach() for name, tensor in read_pickle(path, zipfile.is_zipfile(path)).items()}


def read_pickle(path, mmap=False):
    """What torch.save wrote. Runs no code (weights_only) and compares the checksums, which PyTorch does not."""
    if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
        raise ValueError("its checksums are wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_weights(directory):
    """All tensors of a model directory: model.safetensors or pytorch_model.bin, whole or in shards with an index."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        path, index = Path(directory, name), Path(directory, f"{name}.index.json")
        if path.is_file():
            return read(path)
        if index.is_file():
            return read_shards(index, read)
    raise InputError(f"{directory}: neither model.safetensors nor pytorch_model.bin (nor an index of shards)")


def read_shards(index, read):
    """All tensors of the shards that an index file names."""
    weights = {}
    with reading(index, "its 'weight_map' has to name files beside it; download it again"):
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for shard in sorted(set(shard_of.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{shard!r} is in another folder")
            weights.update(read(index.parent / shard))
        if absent := sorted(set(shard_of) - set(weights)):
            raise ValueError(f"{absent[0]} is in none of the shards")
    return weights


def load_into(model, weights, directory, dtype, device):
    """Gives a model on the meta device its weights, each cast and moved on its own, so that there is never a second
    copy of the whole. Names and shapes have to match exactly."""
    wanted = model.state_dict()
    weights = {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}  # buffer, old files
    check_weights(wanted, weights, directory)
    model.load_state_dict({name: weights[name].to(device, dtype) for name in wanted}, assign=True)
    return model.requires_grad_(True)


def write_model_directory(directory, config, weights, architecture, tokenizer, extra):
    """Writes what LLaMA.from_pretrained, transformers and vLLM open."""
    d = Path(directory)
    d.mkdir(parents=True, exist_ok=True)
    raw = {
        "architectures": [architecture], "model_type": "llama", **dataclasses.asdict(config),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "torch_dtype": str(next(iter(weights.values())).dtype).removeprefix("torch."),
    }
    if tokenizer is not None:
        raw.update(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=None)
        tokenizer.save(d)
    write_safetensors(d / "model.safetensors", weights)
    write_json(d / "config.json", {**raw, **(extra or {})})                 # last: its presence says the rest is there


# ----------------------------------------------------------------------------------------------------------------------
# Devices and processes. Every rank must reach every collective: no `if rank() == 0` around anything that communicates.

PATIENCE = datetime.timedelta(minutes=10)        # after which a rank no longer waits for one that is stuck


def setup_device(name=""):
    """The device of this process; joins torchrun's process group if there is one. "" picks CUDA, then MPS, then CPU."""
    if not name:
        mps = torch.backends.mps.is_available() and world_size() == 1      # MPS has no collectives
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is unknown: use cuda, mps or cpu") from None
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device.type in available and not available[device.type]():
        raise InputError(f"--device {name}: not available in this PyTorch: leave --device out")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        device = torch.device("cuda", torch.cuda.current_device())
        # TF32 rounds the factors of an fp32 matmul to 10 bits of mantissa and accumulates in fp32. bf16 has 7 bits, so
        # logits of bf16 weights stay exact at the tensor cores' speed; gradients are rounded. With fp32 weights,
        # log-probabilities move by 0.001 (simulated at width 4,096); CUT's ratio test has to resolve 0.095.
        torch.set_float32_matmul_precision("high")
        print0("fp32 matmuls run in TF32 (10 bits of mantissa)")
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
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


def distribute(model):
    """The model as training calls it: in DistributedDataParallel if there are several ranks."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size() > 1 else model


# ----------------------------------------------------------------------------------------------------------------------
# Execution, optimizer, schedules, memory estimate


def set_execution(model, device, checkpoint=False, compiled=False, autocast=False):
    """How the blocks run. Up to rounding, none of these changes what they compute.

    checkpoint  activation checkpointing: keep each block's input only and recompute the block in the backward pass;
                far less memory for a third more time
    compiled    torch.compile each block; sampling stays uncompiled
    autocast    matmuls in bf16, with weights, gradients and the residual stream in fp32. Full fine-tuning of bf16
                weights would lose updates smaller than 1/256 of a weight.
    """
    dtype = model.model.norm.weight.dtype
    if autocast and dtype != torch.float32:
        raise InputError(f"--autocast with --dtype {str(dtype).removeprefix('torch.')}: it runs the matmuls of fp32 "
                         "weights in bf16: leave one of the two out")
    model.model.checkpoint, model.model.autocast = checkpoint, autocast
    if not compiled:
        return
    try:                                                                    # is there a compiler? find out now
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--compile does not work here ({reason}): leave it out") from None
    # Lengths are dynamic, but the number of rows being 1 or not, training or not, and a frozen first block make up to
    # a dozen variants. Past its limit PyTorch would silently continue uncompiled.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in model.model.layers:
        block.compile(dynamic=True)


def make_optimizer(model, betas=(0.9, 0.999), eps=1e-8, zero=False):
    """AdamW over all trainable parameters, without weight decay; Run.update sets the learning rate before each step.

    With zero, each rank keeps the moments of its part of the parameters, updates those, and sends them to the others
    (ZeRO stage 1): the same numbers.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": params[0].device.type != "mps"}
    if not zero:
        return torch.optim.AdamW(params, **settings)
    if not dist.is_initialized():
        raise InputError("--zero shards the optimizer state over ranks, and there is 1: launch with torchrun "
                         "--nproc_per_node 2 or more, or leave --zero out")
    from torch.distributed.optim import ZeroRedundancyOptimizer             # absent where PyTorch has no collectives
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, **settings)


def lr_at(step, peak, warmup, steps):
    """Linear warm-up over `warmup` steps (the first step has peak / warmup, not 0), then cosine decay to 5 % of peak at
    the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (0.05 + 0.95 * cosine)


def lr_linear(step, peak, warmup, steps):
    """AlpacaFarm's schedule for PPO and Quark: linear from 0 (the first step has no effect) to peak at step `warmup`,
    then linear to nearly 0 at the last step."""
    if step < warmup:
        return peak * (step / warmup)
    return peak * ((steps - step) / max(1, steps - warmup))


def memory_estimate(model, tokens, checkpoint=False, autocast=False, ranks=1):
    """Memory estimate of a training step, in bytes by purpose, good to about 15 %; the sum is the peak.

    model: a model on the meta device, adapters included. tokens: those of one micro-batch (CUT: of both passes). AdamW
    keeps two moments of each trained weight, divided over `ranks` by ZeRO. Each block keeps its activations for the
    backward pass, or with activation checkpointing its input only.
    """
    c, head = model.config, model.lm_head.weight
    size = head.element_size()
    matmul_size = 2 if autocast else size
    trained = sum(p.nbytes for p in trained_weights(model).values())
    stream = 4 * c.hidden_size                                              # inputs and outputs of two norms
    heads = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)        # q, k, v, attention's output
    matmul = 2 * c.hidden_size + heads + 4 * c.intermediate_size            # inputs of q k v and gate up; SwiGLU
    block = tokens * (stream * size + matmul * matmul_size)
    if autocast:                                                            # a bf16 copy of the block's weights
        block += 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    tiles = 4 * 256 * c.vocab_size * 4                                      # logits of two tiles in two passes, fp32
    copies = (size < 4) + 2 * head.requires_grad                            # of the head: in fp32, and its gradient
    head_work = tiles + copies * 4 * head.numel()
    layers = c.num_hidden_layers
    activations = layers * block
    if checkpoint:                                                          # a block is recomputed after the head
        activations = tokens * layers * c.hidden_size * size + max(0, block - head_work)
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": trained,
        "optimizer": 2 * trained // ranks,
        "activations": activations,
        "head": head_work,
    }


def available_memory(device):
    """Bytes that this process may allocate on its device (MPS: the recommended maximum); 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))               # the ranks of a machine share it


def check_memory(estimate, device):
    """Prints a memory estimate beside what the device has free; InputError if the run cannot fit."""
    total, free = sum(estimate.values()), available_memory(device)
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    terms = " + ".join(f"{size / unit:.1f} {purpose}" for purpose, size in estimate.items())
    line = f"memory estimate: {terms} = {total / unit:.1f} {name}"
    if free:
        line += f" of {free / 1e9:.1f} GB free on {device}"
    print0(line)
    if free and total > free:
        raise InputError(f"this run takes about {total / unit:.1f} {name}, {free / 1e9:.1f} GB are free on {device}: "
                         "lower --micro-batch-size or --max-length, or try --checkpoint-activations, --dtype bfloat16 "
                         "with --lora-rank 16, or --zero on several ranks")


def peak_memory(device):
    """Peak bytes of this process: the device's own count on CUDA, else the resident set's high-water mark."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                                     # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024          # macOS counts bytes, Linux kibibytes


# ----------------------------------------------------------------------------------------------------------------------
# Run: what a training run has besides its lesson (you may skip this)

# Flags that may differ between a run and its resumption, because they do not change what it computes.
MAY_CHANGE = {"resume", "overwrite", "out", "device", "save_every", "micro_batch_size", "sample_batch_size", "zero",
              "checkpoint_activations"}


def changed_flag(before, now):
    """The first flag in which two runs differ, as text; "" if they compute the same."""
    for name, value in now.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            return f"--{name.replace('_', '-')} was {before.get(name)!r}, is {value!r}"
    return ""


@functools.cache
def lock(folder):
    """Keeps other processes from running in this folder until this one ends, however it ends."""
    try:
        import fcntl
    except ImportError:                                                     # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another run is at work here: wait for it, or give another --out") from None


def check_finite(model):
    """Raises InputError if trained weights are NaN, infinite, or so large that their squares overflow, before they are
    written over usable ones."""
    for name, p in trained_weights(model).items():
        if not p.square().sum().isfinite():
            raise InputError(f"the run has diverged: {name} is not finite or too large; it was not written, an earlier "
                             "save stays: lower --lr")


class Run:
    """A training run: progress bar, metrics file, optimizer step, saves, Ctrl-C, and resuming.

        run = Run(model, optimizer, out, flags, clip, save_every)
        for step in run.steps(args.steps, "sft"):
            ...                                          # the lesson: backward passes over the step's examples
            loss, norm = run.update(loss, lr)
            run.log(loss=loss, grad_norm=norm)           # and run.totals(), of numbers that were added

    `state` is what a resumed run needs besides weights and optimizer; a loop may add to it. Random choices derive from
    (seed, step), so no generator state is kept. resume.pt exists from the first save until the run has finished.
    """

    def __init__(self, model, optimizer, out, flags, clip, save_every, resume=False, state=None):
        self.model, self.optimizer, self.clip, self.save_every = model, optimizer, clip, save_every
        self.out, self.flags = Path(out), flags
        self.device = next(model.parameters()).device
        self.path = self.out / "resume.pt"
        self.state = {"step": 0, "lines": 0, **(state or {})}
        self.start = self.step_start = time.time()
        self.sums = collections.Counter()
        self.stopped = self.due = False
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lock(self.out.resolve())
        if resume:
            self.load()
        elif rank() == 0:
            self.path.unlink(missing_ok=True)                               # of an earlier run: not to be resumed
        if rank() == 0:
            self.metrics = self.open_metrics(self.out / "metrics.jsonl")
        barrier()                                                           # no rank may find an old file

    def steps(self, count, label):
        """Yields the steps that are left of `count`. After each, saves if that is due, and stops after Ctrl-C.

        Every --save-every steps a save is due, and after a step in which the loop has set `due`."""
        first = self.state["step"]
        self.bar = tqdm(range(first, count), label, initial=first, total=count, disable=rank() > 0, unit="step")
        with catch_interrupts() as interrupted:
            for step in self.bar:
                self.step_start = time.time()
                self.due = (step + 1) % self.save_every == 0
                yield step
                self.state["step"] = step + 1
                self.stopped = all_sum([interrupted.is_set()]) != [0]       # on any rank
                if self.stopped or self.due and step + 1 < count:
                    self.save()
                if self.stopped:
                    break
        self.bar.close()

    def update(self, loss, lr, examples=()):
        """One optimizer step with clipped gradients. loss: this rank's part of the step's loss.

        Returns the loss over all ranks and the gradient norm before clipping. `examples` are named if one of the two is
        not finite, which ends the run before the step is taken.
        """
        loss, = all_sum([loss])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip).item()      # equal on all ranks
        if not math.isfinite(loss + norm):
            raise InputError(f"the run has diverged: step {self.state['step']} has loss {loss} and gradient norm {norm}"
                             f": lower --lr, or look at its examples {list(examples)}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def add(self, **numbers):
        """Adds numbers of a micro-batch to the sums that the step will log."""
        for name, number in numbers.items():
            self.sums[name] += number.item() if isinstance(number, torch.Tensor) else number

    def totals(self):
        """{name: sum} of what all ranks have added since the last call; 0 for a name that nobody has added."""
        totals = collections.Counter()
        for name, number in gather_lists(self.sums.items()):
            totals[name] += number
        self.sums.clear()
        return totals

    def log(self, **metrics):
        """Appends one line to metrics.jsonl, numbered by `step`; the progress bar shows its first three entries."""
        if rank() == 0:
            line = {"step": self.state["lines"], **metrics, "seconds": time.time() - self.step_start}
            self.metrics.write(json.dumps(line) + "\n")
            shown = list(metrics.items())[:3]
            self.bar.set_postfix({key: f"{value:.3g}" for key, value in shown}, refresh=False)
        self.state["lines"] += 1

    def save(self):
        """Writes resume.pt. Every rank calls this: what --zero has sharded is collected on rank 0."""
        check_finite(self.model)
        if hasattr(self.optimizer, "consolidate_state_dict"):
            self.optimizer.consolidate_state_dict(to=0)
        if rank():
            return
        for torn in self.out.glob("*.tmp-*"):                       # left by a kill in the middle of a save
            torn.unlink()
        weights = {name: p.detach() for name, p in trained_weights(self.model).items()}
        with atomic_write(self.path) as temporary:
            torch.save({"model": weights, "optimizer": self.optimizer.state_dict(), "state": self.state,
                        "flags": self.flags}, temporary)

    def load(self):
        """Restores what save() wrote; the flags have to agree."""
        with reading(self.path, "start over with --overwrite"):
            saved = read_pickle(self.path)
            if changed := changed_flag(saved["flags"], self.flags):
                raise InputError(f"{self.path}: {changed}: resume with equal flags, or delete the folder")
            copy_weights(trained_weights(self.model), saved["model"], self.path)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.state = saved["state"]

    def open_metrics(self, path):
        """Opens metrics.jsonl for appending. Keeps the lines up to the saved step, since later steps run again."""
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(lines[:self.state["lines"]]), encoding="utf-8")
        return open(path, "a", encoding="utf-8", buffering=1)

    def seconds(self):
        """Seconds since the run began, or was resumed."""
        return time.time() - self.start

    def finish(self):
        """Ends the run and says where its model is. Returns the exit code: 130 if it was stopped."""
        if rank() == 0 and not self.stopped:
            self.path.unlink(missing_ok=True)
        barrier()                                                           # the model is saved, resume.pt is gone
        if self.stopped:
            print0(f"stopped after {self.seconds():.0f} s: go on with {same_command('--resume')}")
            return 130
        print0(f"model in {self.out}, {self.seconds():.0f} s; its curves: python evaluate.py report {self.out}")
        return 0


@contextlib.contextmanager
def catch_interrupts():
    """Context in which the first Ctrl-C or SIGTERM sets the event that it gives; a second one ends the program."""
    interrupted, before = threading.Event(), {}

    def handle(number, frame):
        interrupted.set()
        print0("\nstopping after this step; press Ctrl-C again to stop at once")
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
