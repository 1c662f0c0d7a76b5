"""One step of CUT with LoRA at true size, beside transformers + PEFT written plainly:  python tests/bench_gpu.py 7b 13b

Random weights of the true shapes, made on the device in bfloat16; a batch of 8 bad responses whose two readings have
1,024 tokens each, micro-batches of 1, CUT's adapters and dropout (which makes the detector read once more, without
gradients, in both forms; --dropout 0 leaves that out). The plain form shares the base weights, has adapters of its
own, full logits in fp32 and the same checkpointing. Steps alternate; medians after a warm-up. MFU counts 4 FLOPs a
parameter and token (frozen base) plus causal attention, and neither recomputation nor the detector. Memory is the peak
of a step above what was there before it. Without a GPU it runs a small shape on the CPU, which shows only that it runs.
"""
import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_cut  # noqa: E402
from data import Example, split  # noqa: E402
from losses import IGNORE, cut_token_loss, detect, plain_logp  # noqa: E402
from model import (MLP_PROJECTIONS, Config, LLaMA, add_lora, make_optimizer, memory_estimate,  # noqa: E402
                   set_execution, setup_distributed)

SHAPES = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "small": (256, 688, 4, 4)}    # D, MLP, layers, H
DENSE_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sizes", nargs="*", choices=[*SHAPES, []], help="default: 7b 13b on CUDA, small elsewhere")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-size", type=int, default=1)
    p.add_argument("--length", type=int, help="tokens of each reading (default 1024; 128 on a CPU)")
    p.add_argument("--dropout", type=float, default=0.05)
    p.add_argument("--steps", type=int, default=5, help="steps of each form that count")
    p.add_argument("--checkpoint-activations", action="store_true")
    p.add_argument("--compile", action="store_true", help="ours only")
    p.add_argument("--no-plain", action="store_true", help="ours alone")
    p.add_argument("--peak", type=float, help="the device's dense bf16 TFLOP/s, if it is not in the table")
    return p.parse_args(argv)


def make(size, device):
    """A random LLaMA on the device, without a copy anywhere else."""
    D, ffn, layers, heads = SHAPES[size]
    config = Config(vocab_size=32000, hidden_size=D, intermediate_size=ffn, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=heads, head_dim=D // heads, rms_norm_eps=1e-5)
    with torch.device("meta"):
        model = LLaMA(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
    return model


def share(model, args):
    """transformers' LLaMA on the same base weights, with PEFT's adapters."""
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, rms_norm_eps=c.rms_norm_eps,
        num_key_value_heads=c.num_key_value_heads, use_cache=False)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    with model.lm_head.weight.device:                   # its table of frequencies is no weight: made anew
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    if args.checkpoint_activations:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(theirs, LoraConfig(r=16, lora_alpha=16, lora_dropout=args.dropout, task_type="CAUSAL_LM",
                                             target_modules=list(MLP_PROJECTIONS))).train()


def ours(model, flags, args, device, batch):
    for part in split(batch, args.micro_batch_size):
        tokens, targets, token_loss, _ = train_cut.pair_batch(part, 1 / len(batch), {}, flags, device,
                                                              model if args.dropout else None)
        model(tokens, targets, token_loss)[0].backward()


def plain(model, flags, args, device, batch):
    def logp(tokens, targets):
        return plain_logp(model(input_ids=tokens).logits.float(), targets.clamp(min=0))[targets != IGNORE]

    for part in split(batch, args.micro_batch_size):
        tokens, targets, _, _ = train_cut.pair_batch(part, 1.0, {}, flags, device)
        weight = train_cut.token_weights(part, [1 / len(batch)] * len(part), "bfloat16", device)
        if args.dropout:
            model.eval()
            with torch.no_grad():
                flagged = detect(logp(tokens[0], targets[0]), logp(tokens[1], targets[1]), 1.1)
            model.train()
        judged, alone = logp(tokens[0], targets[0]), logp(tokens[1], targets[1])
        flagged = flagged if args.dropout else detect(judged, alone, 1.1)
        (weight * cut_token_loss(judged, alone, flagged, 1.0)).sum().backward()


def measure(size, args, device):
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    length = args.length or (1024 if cuda else 128)
    draw = torch.randint(3, 32000, (args.batch_size, 3, length // 2)).tolist()
    batch = [Example(str(i), prompt, response, judged) for i, (prompt, response, judged) in enumerate(draw)]
    flags = train_cut.parse(["--dtype", "bfloat16", "--data", "none"])
    model = make(size, device)
    N = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    weights = 2 * sum(p.numel() for p in model.parameters())
    forms = {}
    if not args.no_plain:
        theirs = share(model, args)                     # before ours gets its adapters: the names are still those
        forms["plain"] = (plain, theirs)
    add_lora(model, 16, 16, args.dropout)
    model.train()
    set_execution(model, device, args.checkpoint_activations, args.compile)
    forms["ours"] = (ours, model)
    optimizers = {name: make_optimizer(m) for name, (_, m) in forms.items()}
    found = {name: [] for name in forms}
    for _ in range(args.steps + 1):
        for name, (step, m) in forms.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            step(m, flags, args, device, batch)
            torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before if cuda else 0
            found[name].append((time.perf_counter() - start, extra))

    tokens, D, layers = 2 * args.batch_size * length, model.config.hidden_size, model.config.num_hidden_layers
    flops = tokens * (4 * N + 3 * 2 * length * D * layers)                  # causal attention: 2 T D a token forward
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    peak = args.peak * 1e12 if args.peak else next((v for k, v in DENSE_BF16.items() if k in name), None)
    estimate = memory_estimate(
        model.config, torch.bfloat16, [(args.micro_batch_size, length - 1)] * 2, args.micro_batch_size * (length // 2),
        lora_rank=16, lora_dropout=args.dropout, checkpoint=args.checkpoint_activations, device_type=device.type)
    result = {}
    for form, rows in found.items():
        seconds, extra = (statistics.median(column) for column in zip(*rows[1:]))
        result[form] = (tokens / seconds, extra)
        mfu = f"{flops / seconds / peak:6.1%}" if peak else "     -"
        memory = f"{extra / 1e9:6.2f} GB above {weights / 1e9:.1f} GB of weights" if cuda else "memory: CUDA only"
        print(f"{size:<6} {form:<6} {seconds:8.3f} s/step {tokens / seconds:10,.0f} tokens/s  MFU {mfu}  {memory}")
    print(f"{size:<6} estimate {sum(estimate.values()) / 1e9:.2f} GB in all: "
          + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in estimate.items()))
    if len(result) == 2:
        a, b = result["ours"], result["plain"]
        print(f"{size:<6} ours / plain: tokens/s {a[0] / b[0]:.2f}" + (f", memory {a[1] / b[1]:.2f}" if cuda else ""))


def main():
    args = parse()
    _, _, device = setup_distributed("" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    print(f"{torch.cuda.get_device_name(device) if cuda else 'CPU, for want of a GPU: a small shape'}, torch "
          f"{torch.__version__}, {time.strftime('%Y-%m-%d')}, {'with' if args.checkpoint_activations else 'without'} "
          f"activation checkpointing, micro-batches of {args.micro_batch_size} pairs, dropout {args.dropout}")
    for size in args.sizes or (["7b", "13b"] if cuda else ["small"]):
        with contextlib.suppress(torch.OutOfMemoryError):
            measure(size, args, device)
            continue
        print(f"{size:<6} out of memory: try --checkpoint-activations or --no-plain")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
