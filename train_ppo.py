"""Preferences -> reward model: the first stage of learning from preferences (AlpacaFarm section 4.4).

  python train_ppo.py                                        pairs from the built-in world's SFT model
  python train_ppo.py --model DIR --data preferences.json    a LLaMA checkpoint and AlpacaFarm's pairs
  torchrun --nproc_per_node 8 train_ppo.py --model ...       the same on eight GPUs

The reward model is the SFT model's backbone with a scalar head, read at the last real token. A pair (better, worse) is
explained by Bradley and Terry: p(better wins) = sigmoid(r(better) - r(worse)), and the loss is its negative logarithm.
EOS is part of the text that is scored, in training and later, so that the model can tell an ended answer from one that
was cut off (AlpacaFarm leaves it out).
"""
import argparse
import math
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train_sft
from data import (FORMATS, Batches, InputError, Tokenizer, World, format_prompt, read_preferences, split)
from losses import reward_loss
from model import (DTYPES, LLaMA, RewardModel, StopSignal, all_sum, launch, load_resume, lr_at, make_optimizer,
                   open_metrics, print0, save_resume, setup_distributed, within, write_json)
from simulate import count_errors, respond

# What a flag that was not given means: (with --data, in the built-in world). With --data they are AlpacaFarm's.
DEFAULTS = {"batch_size": (16, 32), "micro_batch_size": (2, 16), "lr": (3e-6, 1e-3), "steps": (-1, 600),
            "format": ("alpaca", "short"), "max_length": (512, 256)}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in and out
    p.add_argument("--model", default="", help="SFT checkpoint directory (default: made by train_sft.py)")
    p.add_argument("--data", default="", help="preferences, JSON or JSONL (default: the built-in world)")
    p.add_argument("--format", choices=FORMATS, help="prompt format (default: alpaca; short in the built-in world)")
    p.add_argument("--held-out", type=within(int, 1), default=500, help="pairs kept for measuring accuracy")
    p.add_argument("--out", default="", help="run folder (default: out/reward-SEED, or out/reward-DATA)")
    p.add_argument("--resume", action="store_true", help="go on from the last save in the run folder")
    # optimization
    p.add_argument("--steps", type=within(int, 1), help="optimizer steps (default: one pass)")
    p.add_argument("--batch-size", type=within(int, 1), help="pairs a step, over all ranks (default 16)")
    p.add_argument("--micro-batch-size", type=within(int, 1), help="pairs a forward pass: what fits (default 2)")
    p.add_argument("--lr", type=within(float, 0), help="peak learning rate (default 3e-6)")
    p.add_argument("--warmup", type=within(float, 0, 1), default=0.03, help="share of the steps; then cosine decay")
    p.add_argument("--clip", type=within(float, 0), default=1.0, help="gradient norm is clipped to this")
    p.add_argument("--seed", type=within(int, 0), default=0, help="of the world, the head, the data's order")
    # machine
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    p.add_argument("--max-length", type=within(int, 2), help="tokens; longer pairs are left out (default 512)")
    p.add_argument("--save-every", type=within(int, 1), default=100, help="steps between saves for --resume")
    args = p.parse_args(argv)
    for name, (with_data, built_in) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_data if args.data else built_in)
    args.out = args.out or f"out/reward-{Path(args.data).stem if args.data else args.seed}"
    return args


def world_preferences(model, tokenizer, records, args, rank, world):
    """Two answers of the SFT model to each instruction; the one with fewer wrong words is preferred; no ties."""
    texts = respond(model, tokenizer, records, args.format, max_new_tokens=32, temperature=1.0, seed=args.seed, n=2,
                    rank=rank, world=world, label="sampling pairs")
    pairs = []
    for r, (a, b) in zip(records, texts):
        errors = count_errors(a, r["reference"]) - count_errors(b, r["reference"])
        if errors and a and b:
            pairs.append({"id": r["id"], "instruction": r["instruction"], "input": "", "output_1": a, "output_2": b,
                          "preference": 1 if errors < 0 else 2})
    print0(f"{len(pairs)} pairs of answers that differ in their number of errors, from {len(records)} instructions")
    return pairs


def encode_pairs(tokenizer, pairs, form, max_length):
    """Pairs -> list of (ids of prompt + better, ids of prompt + worse)."""
    encoded = []
    for r in pairs:
        prompt = tokenizer.encode_prompt(format_prompt(r, form))
        texts = (r["output_1"], r["output_2"]) if r["preference"] < 1.5 else (r["output_2"], r["output_1"])
        encoded.append(tuple(prompt + tokenizer.encode_response(text) for text in texts))
    fits = [pair for pair in encoded if max(map(len, pair)) <= max_length]
    if len(fits) < len(encoded):
        print0(f"left out {len(encoded) - len(fits)} of {len(encoded)} pairs longer than {max_length} tokens")
    if not fits:
        raise InputError(f"no pair fits in {max_length} tokens: raise --max-length")
    return fits


def pad(sequences, device):
    """Lists of ids -> tokens (B, T) padded on the right, lengths (B,)."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for i, s in enumerate(sequences):
        tokens[i, :len(s)] = torch.tensor(s)
    return tokens.to(device), lengths.to(device)


def accuracy(model, pairs, device, rank, world, batch_size=64):
    """Share of pairs in which the better answer gets the higher reward, over all ranks, and its standard error."""
    mine, right = pairs[rank::world], 0
    with torch.no_grad():
        for part in split(mine, batch_size):
            better, worse = model(*pad([b for b, _ in part] + [w for _, w in part], device)).chunk(2)
            right += (better > worse).sum().item()
    share = all_sum([right], device)[0] / len(pairs)
    return share, math.sqrt(share * (1 - share) / len(pairs))


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

    # --- data, before the model where it can be: mistakes surface early
    if args.data:
        if not args.model:
            raise InputError("--data needs --model, a checkpoint directory whose tokenizer reads it")
        tokenizer = Tokenizer.from_pretrained(args.model)
        records = read_preferences(args.data)
    else:
        args.model = args.model or train_sft.built_in(args.seed, "corrects", args.device)
        tokenizer = Tokenizer.from_pretrained(args.model)
    policy = LLaMA.from_pretrained(args.model, dtype, device)
    if not args.data:
        the_world = World(args.seed)
        records = world_preferences(policy, tokenizer, the_world.instructions("train", 10000, "preferences"), args,
                                    rank, world)
    pairs = encode_pairs(tokenizer, records, args.format, args.max_length)
    if not 0 < args.held_out < len(pairs):
        raise InputError(f"--held-out {args.held_out} of {len(pairs)} pairs: some must be left to train on")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(42)).tolist()
    held_out, train = ([pairs[i] for i in part] for part in (order[:args.held_out], order[args.held_out:]))
    batches = Batches([len(b) + len(w) for b, w in train], args.batch_size, args.seed)
    if args.steps < 0:
        args.steps = batches.per_epoch

    # --- model and optimizer
    stop = StopSignal()
    model = RewardModel.from_policy(policy).to(device)
    del policy
    optimizer = make_optimizer(model)
    start = load_resume(out / "resume.pt", model, optimizer, vars(args))["step"] if args.resume else 0
    if rank == 0 and not args.resume:
        (out / "resume.pt").unlink(missing_ok=True)                         # of an earlier run: not to be resumed
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", start, rank)

    # --- loop
    stopping = False
    bar = tqdm(range(start, args.steps), desc="reward", initial=start, total=args.steps, disable=rank > 0, unit="step")
    for step in bar:
        step_time = time.time()
        batch = batches(step)                                               # the whole step's pairs, on every rank
        mine = batch[rank::world]
        rows = [train[i] for i in mine or batch[:1]]
        micro = split(rows, args.micro_batch_size)
        loss_sum, right = 0.0, 0
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            rewards = wrapped(*pad([b for b, _ in part] + [w for _, w in part], device))    # (2 b,), better ones first
            better, worse = rewards.chunk(2)                                # (b,), (b,)
            loss = reward_loss(better, worse) * len(part) * bool(mine)      # summed over the part's pairs
            (loss * world / len(batch)).backward()
            loss_sum, right = loss_sum + loss.item(), right + (better > worse).sum().item() * bool(mine)
        loss_sum, right, stopping = all_sum([loss_sum, right, stop.requested], device)
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"step {step}: the loss is {loss_sum}; pairs {batch}")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = lr_at(step, args.lr, math.ceil(args.warmup * args.steps), args.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # --- log and save
        metrics({"step": step, "loss": loss_sum / len(batch), "accuracy": right / len(batch), "lr": lr,
                 "grad_norm": norm.item(), "seconds": time.time() - step_time})
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss_sum / len(batch):.3f}")
        if stopping or (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save_resume(out / "resume.pt", model, optimizer, {"step": step + 1, "run": vars(args)}, rank)
        if stopping:
            break

    # --- save and measure
    if rank == 0:
        model.save_pretrained(out, tokenizer, extra={"prompt_format": args.format, "run": vars(args)})
    share, se = accuracy(model, held_out, device, rank, world)
    if rank == 0:
        write_json(out / "results.json", {"accuracy": share, "accuracy_se": se, "held_out": len(held_out),
                                          "trained_on": len(train), "seconds": time.time() - start_time})
    print0(f"accuracy on {len(held_out)} held-out pairs {share:.3f} +- {se:.3f}, trained on {len(train)}")
    print0(f"{'stopped: go on with --resume; ' if stopping else ''}model in {out}, {time.time() - start_time:.0f} s")
    return 130 if stopping else 0


if __name__ == "__main__":
    launch(main)
