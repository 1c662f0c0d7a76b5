"""One step of CUT with LoRA at true size, beside transformers + PEFT written plainly:  python tests/bench_gpu.py 7b 13b

Random weights of the true shapes, made on the device in bfloat16; a batch of 8 bad responses of 512 tokens after
prompts of 512, in two passes, one response a micro-batch, CUT's adapters. The plain form shares the base weights, has
adapters of its own, full logits in fp32 and the same activation checkpointing. Steps alternate; medians after a warm-
up. MFU counts 4 FLOPs a parameter and token (frozen base) plus causal attention, not the recomputation. Memory is the
peak of a step above what was there before it. Without a GPU it runs a small shape on the CPU, which shows only that
it runs.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_cut  # noqa: E402
from data import IGNORE, Example, chunks  # noqa: E402
from losses import cut_token_loss, detect, plain_logp  # noqa: E402
from model import (MLP_MODULES, Config, LLaMA, add_lora, make_optimizer, memory_estimate, on_meta,  # noqa: E402
                   set_execution, setup_device)

SHAPES = {              # width, MLP width, layers, heads, vocabulary
    "7b": (4096, 11008, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 32000),
    "small": (128, 344, 2, 2, 1000),
}
BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "RTX 4090": 165e12}       # dense


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sizes", nargs="*", choices=[*SHAPES, []], help="default: 7b 13b on CUDA, small elsewhere")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-size", type=int, default=1)
    p.add_argument("--length", type=int, help="tokens of each pass (default 1024; 128 on a CPU)")
    p.add_argument("--steps", type=int, default=5, help="steps of each form that count")
    p.add_argument("--checkpoint-activations", action="store_true")
    p.add_argument("--compile", action="store_true", help="ours only")
    p.add_argument("--no-plain", action="store_true", help="ours alone")
    p.add_argument("--peak", type=float, help="the device's dense bf16 TFLOP/s, if it is not in the table")
    return p.parse_args(argv)


def make_model(size, device):
    """A random LLaMA on the device, without a copy anywhere else."""
    width, mlp, layers, heads, vocabulary = SHAPES[size]
    config = Config(vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads, rms_norm_eps=1e-5)
    model = on_meta(LLaMA, config).to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
    return model


def plain_model(model, checkpoint):
    """transformers' LLaMA on the same base weights, with PEFT's adapters."""
    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, rms_norm_eps=c.rms_norm_eps,
        num_key_value_heads=c.num_key_value_heads, use_cache=False)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), assign=True)
    with model.lm_head.weight.device:                   # its table of frequencies is not a weight: made anew
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    if checkpoint:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=list(MLP_MODULES))
    return get_peft_model(theirs, lora).train()


def our_backward(model, micro_batch):
    tokens, targets, token_loss, per_token = micro_batch
    model(tokens, targets, token_loss, per_token)[0].backward()


def plain_backward(model, micro_batch):
    tokens, targets, _, (weight,) = micro_batch
    logp = []
    for x, y in zip(tokens, targets):                                       # (b, T)
        logits = model(input_ids=x).logits.float()                          # (b, T, V)
        logp.append(plain_logp(logits, y.clamp(min=0))[y != IGNORE])        # (N,)
    judged, plain = logp
    (weight * cut_token_loss(judged, plain, detect(judged, plain, 1.1), 1.0)).sum().backward()


def timed_step(backward, model, optimizer, batch, cut_args, device):
    """One optimizer step -> seconds, and on CUDA its peak memory above what was there (0 elsewhere)."""
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    weighted = [(example, 1 / len(batch)) for example in batch]
    for part in chunks(weighted, cut_args.micro_batch_size):
        backward(model, train_cut.judged_batch(part, [], cut_args, device))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before if cuda else 0


def measure(size, args, device):
    torch.manual_seed(0)
    length = args.length or (1024 if device.type == "cuda" else 128)
    vocabulary = SHAPES[size][-1]
    batch = []
    for i in range(args.batch_size):
        prompt, response, judged = torch.randint(3, vocabulary, (3, length // 2)).tolist()
        batch.append(Example(str(i), prompt, response, judged))
    cut_args = train_cut.parse(["--dtype", "bfloat16", "--data", "none"])
    cut_args.micro_batch_size = args.micro_batch_size

    model, forms = make_model(size, device), {}
    weights = sum(p.nbytes for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    if not args.no_plain:                               # before ours gets its adapters: the names are still those
        theirs = plain_model(model, args.checkpoint_activations)
        forms["plain"] = (plain_backward, theirs, make_optimizer(theirs))
    add_lora(model)
    set_execution(model, device, args.checkpoint_activations, args.compile)
    forms["ours"] = (our_backward, model, make_optimizer(model))

    found = {name: [] for name in forms}
    for _ in tqdm(range(args.steps + 1), size):         # alternately; the first one warms up
        for name, form in forms.items():
            found[name].append(timed_step(*form, batch, cut_args, device))
    medians = {}
    for name, steps in found.items():
        medians[name] = [statistics.median(column) for column in zip(*steps[1:])]

    tokens = 2 * args.batch_size * length
    attention = 3 * 2 * length * model.config.hidden_size * model.config.num_hidden_layers      # causal, for each token
    flops = tokens * (4 * matrices + attention)
    report(size, medians, tokens, flops, weights, args, device)
    estimate = memory_estimate(model, 2 * args.micro_batch_size * length, args.checkpoint_activations)
    terms = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in estimate.items())
    print(f"{size:<6} memory estimate {sum(estimate.values()) / 1e9:.2f} GB: {terms}")


def report(size, medians, tokens, flops, weights, args, device):
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    peak = args.peak * 1e12 if args.peak else next((v for k, v in BF16_FLOPS.items() if k in name), None)
    for form, (seconds, extra) in medians.items():
        mfu = f"{flops / seconds / peak:6.1%}" if peak else "     -"
        memory = f"{extra / 1e9:6.2f} GB above {weights / 1e9:.1f} GB of weights" if cuda else "memory: CUDA only"
        print(f"{size:<6} {form:<6} {seconds:8.3f} s/step {tokens / seconds:10,.0f} tokens/s  MFU {mfu}  {memory}")
    if len(medians) == 2:
        (seconds, extra), (plain_seconds, plain_extra) = medians["ours"], medians["plain"]
        memory = f", memory {extra / plain_extra:.2f}" if cuda else ""
        print(f"{size:<6} ours / plain: tokens/s {plain_seconds / seconds:.2f}{memory}")


def main():
    args = parse()
    device = setup_device("" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "no GPU here: a small shape on the CPU"
    checkpointing = "with" if args.checkpoint_activations else "without"
    print(f"{name}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {checkpointing} activation checkpointing, "
          f"{args.micro_batch_size} responses a micro-batch", flush=True)
    for size in args.sizes or (["7b", "13b"] if cuda else ["small"]):
        try:
            measure(size, args, device)
        except torch.OutOfMemoryError:
            print(f"{size:<6} out of memory: try --checkpoint-activations or --no-plain")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
