"""Supervised fine-tuning: demonstrations -> policy. The reference script, which the other two are read against.

  python train_sft.py                                          the built-in world, from random weights
  python train_sft.py --model DIR --data sft.json              a LLaMA checkpoint and AlpacaFarm's demonstrations
  torchrun --nproc_per_node 8 train_sft.py --model ...         the same on eight GPUs

The loss is the negative log-likelihood of the response given the prompt, averaged over the response tokens of the whole
step. Many methods are this loss on other data: a judged file makes it Hindsight (the judgment joins the prompt), the
winners of best-of-n make it expert iteration, and so on.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (FORMATS, Batches, InputError, Tokenizer, World, collate, encode, read_conditioning,
                  read_demonstrations, read_feedme, read_forward, read_judge_training, read_judged, split,
                  world_tokenizer, write_json_lines)
from losses import nll_token_loss
from model import (ATTENTION_PROJECTIONS, DTYPES, MAY_DIFFER, MLP_PROJECTIONS, Config, LLaMA, StopSignal, add_lora,
                   all_sum, check_memory, run_main, load_resume, lr_at, make_optimizer, memory_estimate, merge_lora,
                   open_metrics, print0, read_config, save_adapter, save_resume, set_execution, setup_distributed,
                   in_range)
from simulate import JUDGES, ask_simulated, count_errors, pair_up, prefer, sample_responses, simulated_pool

# What a flag that was not given means: (with --data, in the built-in world).
DEFAULTS = {"batch_size": (128, 32), "micro_batch_size": (4, 8), "lr": (2e-5, 3e-3), "steps": (-1, 2400),
            "epochs": (3.0, 0.0), "format": ("alpaca", "short"), "max_length": (1024, 256), "beta2": (0.999, 0.95),
            "lora_rank": (0, 0)}

# How --data becomes demonstrations. `judge` trains a judge on judged responses; see data.py for each.
RECIPES = {"demonstrations": read_demonstrations, "feedme": read_feedme, "conditioning": read_conditioning,
           "forward": read_forward, "hindsight": read_judged, "judge": read_judge_training}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in and out
    p.add_argument("--model", default="", help="checkpoint directory to start from (default: a small random LLaMA)")
    p.add_argument("--data", default="", help="demonstrations, JSON or JSONL (default: the built-in world)")
    p.add_argument("--format", choices=FORMATS, help="prompt format (default: alpaca; short in the built-in world)")
    p.add_argument("--recipe", choices=RECIPES, default="demonstrations", help="how --data is read")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="whose judgments the built-in data teaches")
    p.add_argument("--out", default="", help="run folder (default: out/sft-SEED-JUDGE, or out/sft-DATA)")
    p.add_argument("--resume", action="store_true", help="go on from the last save in the run folder")
    # optimization
    p.add_argument("--steps", type=in_range(int, 1), help="optimizer steps (default: from --epochs)")
    p.add_argument("--epochs", type=in_range(float, 0), help="passes over the data, if --steps is not given (default 3)")
    p.add_argument("--batch-size", type=in_range(int, 1), help="examples a step, over all ranks (default 128)")
    p.add_argument("--micro-batch-size", type=in_range(int, 1), help="examples a forward pass: what fits (default 4)")
    p.add_argument("--lr", type=in_range(float, 0), help="peak learning rate (default 2e-5)")
    p.add_argument("--warmup", type=in_range(float, 0, 1), default=0.03, help="share of the steps; then cosine decay")
    p.add_argument("--beta2", type=in_range(float, 0, 1), help="AdamW's decay of squared gradients (default 0.999)")
    p.add_argument("--lora-rank", type=in_range(int, 0), help="train adapters of this rank (0: all weights; default 0)")
    p.add_argument("--lora-alpha", type=in_range(float, 0), default=16.0, help="adapters are scaled by alpha / rank")
    p.add_argument("--lora-dropout", type=in_range(float, 0, 1), default=0.05, help="dropout in front of the adapters")
    p.add_argument("--lora-attention", action="store_true", help="adapt the attention projections too")
    p.add_argument("--clip", type=in_range(float, 0), default=1.0, help="gradient norm is clipped to this")
    p.add_argument("--seed", type=in_range(int, 0), default=0, help="of the world, the weights, the data's order")
    # machine
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    p.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in backward: less memory")
    p.add_argument("--autocast", action="store_true", help="products in bf16, on weights in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--zero", action="store_true", help="share the optimizer's state out over the ranks")
    p.add_argument("--max-length", type=in_range(int, 2), help="tokens; longer examples are left out (default 1024)")
    p.add_argument("--save-every", type=in_range(int, 1), default=500, help="steps between saves for --resume")
    args = p.parse_args(argv)
    for name, (with_data, built_in) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_data if args.data else built_in)
    args.out = args.out or ("out/sft-" + Path(args.data).stem if args.data else f"out/sft-{args.seed}-{args.judge}")
    return args


def built_in(seed, judge, device=""):
    """The directory of the built-in world's SFT model, which the other scripts start from: made when it is not there
    yet or was made with other settings, finished when it was stopped half way."""
    argv = ["--seed", str(seed), "--judge", judge]
    wanted = vars(parse(argv))
    out = Path(wanted["out"])
    found = json.loads((out / "config.json").read_text()) if (out / "config.json").is_file() else {}
    same = "run" in found and all(found["run"].get(k) == v for k, v in wanted.items() if k not in MAY_DIFFER)
    if not same or found["steps_done"] < wanted["steps"]:
        half = ["--resume"] if same and (out / "resume.pt").is_file() else []
        if main([*argv, "--device", device, *half]):
            raise SystemExit(130)                                           # stopped by the user: starting anew goes on
    return wanted["out"]


def main(argv=None):
    args = parse(argv)

    # --- set-up (this block is the same in the three train scripts)
    rank, world, device = setup_distributed(args.device)
    out, dtype = Path(args.out), DTYPES[args.dtype]
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of the {world} ranks: "
                         f"use {args.batch_size // world * world or world} or another number of ranks")
    if args.model and out.resolve() == Path(args.model).resolve():
        raise InputError(f"--out {out} is the --model: the run would write over what it starts from; choose another")
    if args.resume and not (out / "resume.pt").is_file():
        raise InputError(f"{out}/resume.pt: nothing to resume: leave --resume out, or give the stopped run's --out")
    torch.manual_seed(args.seed)
    start_time = time.time()

    # --- data, before the model: mistakes surface early
    if args.data:
        if not args.model:
            raise InputError("--data needs --model, a checkpoint directory whose tokenizer reads it")
        tokenizer = Tokenizer.from_pretrained(args.model)
        records = RECIPES[args.recipe](args.data)
    else:
        tokenizer = world_tokenizer()
        records = World(args.seed).demonstrations(args.batch_size * args.steps // 4, JUDGES[args.judge])
    examples = encode(tokenizer, records, args.format, args.max_length, hindsight=True)
    batches = Batches([e.size() for e in examples], args.batch_size, args.seed)
    if args.steps < 0:
        args.steps = math.ceil(args.epochs * batches.per_epoch)
    print0(f"{len(examples)} examples, {args.steps} steps of {args.batch_size}: {world} ranks x "
           f"{math.ceil(args.batch_size / world / args.micro_batch_size)} micro-batches of "
           f"{min(args.micro_batch_size, args.batch_size // world)}; an epoch's last batch has "
           f"{len(examples) - (batches.per_epoch - 1) * args.batch_size}")

    # --- memory, before any of it is taken: the longest examples in one micro-batch
    # A matrix of 96 columns wants larger random numbers than one of 4096: 0.08 is near 1 / sqrt(96).
    config = (read_config(args.model, quiet=True)[0] if args.model else
              Config(vocab_size=tokenizer.vocab_size, initializer_range=0.08))
    targets = MLP_PROJECTIONS + (ATTENTION_PROJECTIONS if args.lora_attention else ())
    size = min(args.micro_batch_size, args.batch_size // world)
    check_memory(memory_estimate(
        config, dtype, [(size, max(e.size() for e in examples) - 1)], size * max(len(e.response) for e in examples),
        lora_rank=args.lora_rank, lora_dropout=args.lora_dropout, targets=targets,
        checkpoint=args.checkpoint_activations, autocast=args.autocast, zero_ranks=world if args.zero else 1,
        device_type=device.type), device)

    # --- model and optimizer
    stop = StopSignal()
    model = LLaMA.from_pretrained(args.model, dtype, device) if args.model else LLaMA(config).to(device, dtype)
    if args.lora_rank:
        trainable = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, targets)
        print0(f"training {trainable / 1e6:.1f} M adapter parameters, the rest is frozen")
    set_execution(model, device, args.checkpoint_activations, args.compile, args.autocast)
    optimizer = make_optimizer(model, betas=(0.9, args.beta2), zero=args.zero)
    start = load_resume(out / "resume.pt", model, optimizer, vars(args))["step"] if args.resume else 0
    if rank == 0 and not args.resume:
        (out / "resume.pt").unlink(missing_ok=True)                         # of an earlier run: not to be resumed
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", start, rank)
    run = {"prompt_format": args.format, "run": vars(args)}
    if args.recipe == "conditioning":
        run["reward_token"] = 0                                         # what answers are asked for with: the good ones

    # --- loop
    stopping, done = False, start
    bar = tqdm(range(start, args.steps), desc="sft", initial=start, total=args.steps, disable=rank > 0, unit="step")
    for step in bar:
        step_time = time.time()
        torch.manual_seed(args.seed * 10**6 + step + 10**9 * rank)          # dropout, if any, is decided by the step
        batch = batches(step)                                               # the whole step's examples, on every rank
        total = sum(len(examples[i].response) for i in batch)               # response tokens, over all ranks
        mine = batch[rank::world]
        rows = [(examples[i].prompt, examples[i].response) for i in mine or batch[:1]]
        loss_sum = 0.0
        micro = chunks(rows, args.micro_batch_size)
        for i, part in enumerate(micro):
            # DistributedDataParallel adds gradients up over ranks in the last backward only; the switch has to be set
            # before forward. A rank without a row of its own still takes part, with weight 0.
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            tokens, targets = collate(part, device)                         # (b, T), (b, T)
            loss, _ = wrapped(tokens, targets, nll_token_loss)              # summed over the part's response tokens
            loss = loss * bool(mine)
            (loss * world / total).backward()                               # DDP averages over ranks: hence * world
            loss_sum += loss.item()
        loss_sum, stopping = all_sum([loss_sum, stop.requested], device)
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"step {step}: the loss is {loss_sum}; examples {[examples[i].id for i in batch]}")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)        # after the sync: equal on all ranks
        lr = lr_at(step, args.lr, math.ceil(args.warmup * args.steps), args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1

        # --- log and save
        seconds = time.time() - step_time
        metrics({"step": step, "loss": loss_sum / total, "lr": lr, "grad_norm": norm.item(), "tokens": total,
                 "seconds": seconds})
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss_sum / total:.3f}", lr=f"{lr:.1e}")
        if stopping or done % args.save_every == 0 and done < args.steps:
            save_resume(out / "resume.pt", model, optimizer, {"step": done, "run": vars(args)}, rank)
        if stopping:
            break

    # --- save
    if rank == 0:
        if args.lora_rank:
            save_adapter(model, out / "adapter", args.model)
            merge_lora(model)
        model.save_pretrained(out, tokenizer, extra={**run, "steps_done": done})
    all_sum([0], device)                                                    # the others wait until the model is there
    print0(f"{'stopped: go on with --resume; ' if stopping else ''}model in {out}, {time.time() - start_time:.0f} s")
    return 130 if stopping else 0


if __name__ == "__main__":
    run_main(main)
