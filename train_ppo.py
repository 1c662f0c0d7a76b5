"""Learning from preferences: pairs -> reward model -> policy (AlpacaFarm's methods). Four stages, one command each:

  python train_ppo.py                                    reward, then ppo, in the built-in world
  python train_ppo.py reward --model DIR --data pairs.json        pairs -> reward model
  python train_ppo.py ppo --model DIR --reward DIR --data instructions.json    reward model -> policy, by PPO
  python train_ppo.py quark --model DIR --reward DIR --data instructions.json  reward model -> policy, by Quark
  python train_ppo.py dpo --model DIR --data pairs.json           pairs -> policy, without a reward model
  torchrun --nproc_per_node 8 train_ppo.py ppo --model DIR --reward DIR --data FILE     any of them on eight GPUs

PPO holds four models, of which two learn:
  policy      learns; starts as the SFT model; answers the instructions
  reference   the SFT model, frozen: straying from it costs beta times KL(policy || reference), token by token
  reward      frozen: one score for the whole answer, which lands on its last token (EOS, if it ended)
  critic      learns; the reward model's backbone under a fresh head; foresees, before each token, what is still to come
With --lora-rank all four are adapters and heads on one frozen backbone (the reference is the policy without its
adapter), so that what fits one model for training fits PPO.

One step: answer (rollout), score the answers, turn scores into advantages, go over the rollouts `--epochs` times in
batches of `--batch-size`, report. Ids are scored as they were sampled, EOS included, at the sampling temperature.
"""
import argparse
import contextlib
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train_sft
from data import (FORMATS, Batches, InputError, Tokenizer, World, chosen_and_rejected, collate, pad, prompt_ids,
                  read_instructions, read_preferences, split, write_json_lines)
from evaluate import MAX_NEW_TOKENS, answer_errors, exact_match, win_rate
from losses import (IGNORE, dpo_loss, explained_variance, gae, kl_estimate, masked_mean, next_beta, per_example_sum,
                    ppo_policy_loss, ppo_value_loss, quantiles, quark_token_loss, reward_loss, shape_rewards, whiten)
from model import (ATTENTION_PROJECTIONS, DTYPES, MAY_DIFFER, MLP_PROJECTIONS, LLaMA, RewardModel, StopSignal,
                   add_lora, all_sum, check_memory, gather_lists, generate, run_main, load_adapter, load_resume,
                   lora_disabled, lr_at, lr_linear, make_optimizer, memory_estimate, merge_lora, open_metrics,
                   peak_memory, print0, read_config, atomic_write, save_adapter, save_resume, setup_distributed, in_range,
                   write_json)
from simulate import count_errors, mean_and_se, sample_responses, score, score_texts

# What a flag that was not given means: (with --data, in the built-in world). With --data they are AlpacaFarm's, with
# its learning rates of full fine-tuning, LoRA wants about ten times as much; of its 390 steps of PPO it used 20 to 80.
PAIRS = {"format": ("alpaca", "short"), "max_length": (512, 256), "save_every": (100, 100)}
ANSWERS = {"format": ("alpaca", "short"), "max_length": (192, 256), "max_new_tokens": (300, MAX_NEW_TOKENS),
           "eval_every": (10, 10), "save_every": (10, 25), "sample_batch_size": (32, 512)}
DEFAULTS = {
    "reward": {**PAIRS, "batch_size": (16, 128), "micro_batch_size": (2, 64), "lr": (3e-6, 1e-3), "epochs": (1.0, 6.0)},
    "dpo": {**PAIRS, "batch_size": (64, 32), "micro_batch_size": (2, 16), "lr": (1e-6, 1e-4), "epochs": (2.0, 2.0)},
    "ppo": {**ANSWERS, "batch_size": (256, 64), "micro_batch_size": (2, 64), "lr": (1e-5, 3e-4), "steps": (80, 100),
            "rollouts": (512, 128)},
    "quark": {**ANSWERS, "batch_size": (256, 64), "micro_batch_size": (2, 64), "lr": (3e-6, 3e-4), "steps": (80, 50),
              "rollouts": (512, 256)},
}
# AlpacaFarm's arithmetic as released, which --released puts in the place of ours.
RELEASED = {"kl": ("clamped", "k1"), "beta": (0.0067, 0.05), "lam": (1.0, 0.95), "ending_penalty": (0.0, 1.0)}


def parse(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] not in [[stage] for stage in DEFAULTS] + [["-h"], ["--help"]]:
        argv = ["both", *argv]
    files, lora, machine, pairs, rollouts = (argparse.ArgumentParser(add_help=False) for _ in range(5))
    # what goes in and out
    files.add_argument("--model", default="", help="SFT checkpoint directory (default: made by train_sft.py)")
    files.add_argument("--data", default="", help="pairs (reward, dpo) or instructions; default: the built-in world's")
    files.add_argument("--format", choices=FORMATS, help="prompt format (default: alpaca; short in the built-in world)")
    files.add_argument("--out", default="", help="run folder (default: out/STAGE-SEED, or out/STAGE-DATA)")
    files.add_argument("--resume", action="store_true", help="go on from the last save in the run folder")
    # optimization
    files.add_argument("--batch-size", type=in_range(int, 1), help="pairs or responses an update, over all ranks")
    files.add_argument("--micro-batch-size", type=in_range(int, 1), help="of them in a forward pass: what fits")
    files.add_argument("--lr", type=in_range(float, 0), help="peak learning rate")
    files.add_argument("--clip", type=in_range(float, 0), default=1.0, help="gradient norm is clipped to this")
    lora.add_argument("--lora-rank", type=in_range(int, 0), default=0, help="rank of the adapters (0: all weights)")
    lora.add_argument("--lora-alpha", type=in_range(float, 0), default=16.0, help="adapters are scaled by alpha / rank")
    lora.add_argument("--lora-attention", action="store_true", help="adapt the attention projections too")
    machine.add_argument("--seed", type=in_range(int, 0), default=0, help="of the world, the sampling, the data's order")
    machine.add_argument("--noise", type=in_range(float, 0, 0.5), default=0.25, help="flipped labels, built-in world")
    machine.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    files.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    files.add_argument("--checkpoint-activations", action="store_true", help="recompute in backward: less memory")
    files.add_argument("--max-length", type=in_range(int, 2), help="tokens; longer pairs or prompts are left out")
    files.add_argument("--save-every", type=in_range(int, 1), help="steps between saves for --resume")
    # pairs
    pairs.add_argument("--held-out", type=in_range(int, 1), default=500, help="pairs kept for measuring accuracy")
    pairs.add_argument("--steps", type=in_range(int, 1), help="optimizer steps (default: from --epochs)")
    pairs.add_argument("--epochs", type=in_range(float, 1e-6), help="passes over the pairs, if --steps is not given")
    pairs.add_argument("--warmup", type=in_range(float, 0, 1), default=0.03, help="share of the steps; then cosine decay")
    # rollouts
    rollouts.add_argument("--reward", default="", help="reward model's directory (default: made by the stage reward)")
    rollouts.add_argument("--validation", default="", help="instructions to choose the checkpoint on (needs --judge)")
    rollouts.add_argument("--judge", default="", help="a second reward model, of other pairs, that chooses it")
    rollouts.add_argument("--steps", type=in_range(int, 1), help="rollouts; each is followed by several updates")
    rollouts.add_argument("--rollouts", type=in_range(int, 1), help="responses a step, over all ranks")
    rollouts.add_argument("--max-new-tokens", type=in_range(int, 1), help="a response is cut off here")
    rollouts.add_argument("--sample-batch-size", type=in_range(int, 1), help="sampled side by side: what fits")
    rollouts.add_argument("--temperature", type=in_range(float, 0.01), default=1.0, help="of sampling and of scoring")
    rollouts.add_argument("--epochs", type=in_range(int, 1), default=2, help="passes over the rollouts of a step")
    rollouts.add_argument("--warmup", type=in_range(int, 1), default=5, help="steps of warm-up; then linear decay to 0")
    rollouts.add_argument("--eval-every", type=in_range(int, 1), help="steps between measurements on validation")
    rollouts.add_argument("--ending-penalty", type=in_range(float, 0), help="taken from an answer that does not end")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = p.add_subparsers(dest="stage", required=True)
    stages.add_parser("both", parents=[machine], help="reward, then ppo, in the built-in world (the default)")
    s = stages.add_parser("reward", parents=[files, lora, machine, pairs], help="pairs -> reward model")
    s = stages.add_parser("dpo", parents=[files, lora, machine, pairs], help="pairs -> policy")
    s.add_argument("--beta", type=in_range(float, 0), default=0.1, help="how much log-ratio a preference is worth")
    s = stages.add_parser("ppo", parents=[files, lora, machine, rollouts], help="reward model -> policy, by PPO")
    s.add_argument("--beta", type=in_range(float, 0), help="price of a nat of KL, in rewards (default 0.05)")
    s.add_argument("--kl", choices=("k1", "k2", "k3", "clamped"), help="its estimator: losses.kl_estimate (default k1)")
    s.add_argument("--target-kl", type=in_range(float, 0), default=0.0, help="adapt beta to this KL (0: fixed)")
    s.add_argument("--gamma", type=in_range(float, 0, 1), default=1.0, help="discount")
    s.add_argument("--lam", type=in_range(float, 0, 1), help="lambda of the advantages (default 0.95)")
    s.add_argument("--ratio-clip", type=in_range(float, 0), default=0.2, help="the policy's clip range")
    s.add_argument("--value-clip", type=in_range(float, 0), default=0.2, help="the critic's")
    s.add_argument("--value-coef", type=in_range(float, 0), default=0.1, help="weight of the critic's loss")
    s.add_argument("--released", action="store_true", help="AlpacaFarm's arithmetic: padding counts, KL clamped at 0, "
                   "rewards whitened, statistics of each process, lambda 1, beta 0.0067, no penalty")
    s = stages.add_parser("quark", parents=[files, lora, machine, rollouts], help="reward model -> policy, by Quark")
    s.add_argument("--quantiles", choices=("best", "all"), default="all", help="train on all rollouts, each after the "
                   "control token of its quantile, or on the best quarter without (as released)")
    s.add_argument("--count", type=in_range(int, 1, 8), default=4, help="number of quantiles")
    s.add_argument("--kl-coef", type=in_range(float, 0), default=0.05, help="weight of KL(policy || reference)")
    s.add_argument("--entropy-coef", type=in_range(float, 0), default=0.0, help="weight of the entropy bonus")
    args = p.parse_args(argv)
    if args.stage == "both":
        return args
    for name, (with_data, built_in) in DEFAULTS[args.stage].items():
        if getattr(args, name) is None:
            setattr(args, name, with_data if args.data else built_in)
    for name, (released, ours) in RELEASED.items() if args.stage in ("ppo", "quark") else ():
        if getattr(args, name, 0) is None:
            setattr(args, name, released if getattr(args, "released", False) else ours)
    args.out = args.out or f"out/{args.stage}-{Path(args.data).stem if args.data else args.seed}"
    return args


def built_in_reward(seed, noise, device=""):
    """The directory of the built-in world's reward model: made when it is not there yet or was made otherwise."""
    argv = ["reward", "--seed", str(seed), "--noise", str(noise)]
    wanted = vars(parse(argv))
    path = Path(wanted["out"], "config.json")
    found = json.loads(path.read_text())["run"] if path.is_file() else {}
    sft = Path(train_sft.built_in(seed, "corrects", device), "config.json")
    same = found and sft.stat().st_mtime <= path.stat().st_mtime and all(
        found.get(k) == v for k, v in wanted.items() if k not in MAY_DIFFER | {"model", "steps"})
    if not same and main([*argv, "--device", device]):
        raise SystemExit(130)                                               # stopped by the user
    return wanted["out"]


def targets_of(args):
    return MLP_PROJECTIONS + (ATTENTION_PROJECTIONS if args.lora_attention else ())


def adapt(model, args):
    """Adapters on the model, if --lora-rank asks for them. No dropout: it would make two readings of a response by the
    same weights differ, and PPO's ratio and DPO's margin with them."""
    model.model.checkpoint = args.checkpoint_activations
    if args.lora_rank:
        trainable = add_lora(model, args.lora_rank, args.lora_alpha, 0.0, targets_of(args))
        print0(f"training {trainable / 1e6:.1f} M adapter parameters, the rest is frozen")


def save_model(model, out, tokenizer, args, **extra):
    """The run folder's model: whole, and its adapter beside it if it has one (which the stage ppo then shares)."""
    if args.lora_rank:
        save_adapter(model, out / "adapter", args.model)
        merge_lora(model.to("cpu"))                                         # the device has no room to merge at 7 B
    model.save_pretrained(out, tokenizer, extra={"prompt_format": args.format, "run": vars(args), **extra})


# ----------------------------------------------------------------------------------------------------------------------
# Pairs: the reward model, and DPO


def load_pairs(args, device):
    """The tokenizer, and the pairs that stay in --max-length as [(prompt, better, worse) ids], split into training and
    held-out ones, the records of the latter beside them."""
    if not args.data:
        args.model = args.model or train_sft.built_in(args.seed, "corrects", args.device)
    elif not args.model:
        raise InputError("--data needs --model, a checkpoint directory whose tokenizer reads it")
    tokenizer = Tokenizer.from_pretrained(args.model)
    records = read_preferences(args.data or train_sft.built_in_preferences(args.seed, args.noise, device))
    encoded = []
    for r in records:
        prompt, (better, worse) = prompt_ids(tokenizer, r, args.format), chosen_and_rejected(r)
        encoded.append((prompt, tokenizer.encode_response(better), tokenizer.encode_response(worse)))
    fits = [i for i, (x, b, w) in enumerate(encoded) if len(x) + max(len(b), len(w)) <= args.max_length]
    if len(fits) < len(encoded):
        print0(f"left out {len(encoded) - len(fits)} of {len(encoded)} pairs longer than {args.max_length} tokens")
    if not 0 < args.held_out < len(fits):
        raise InputError(f"--held-out {args.held_out} of the {len(fits)} pairs that fit in --max-length "
                         f"{args.max_length}: some must be left to train on")
    order = torch.randperm(len(fits), generator=torch.Generator().manual_seed(42)).tolist()
    held_out, train = order[:args.held_out], order[args.held_out:]
    return (tokenizer, [encoded[fits[i]] for i in train], [encoded[fits[i]] for i in held_out],
            [records[fits[i]] for i in held_out])


def accuracy(margins, records):
    """Share of held-out pairs whose preferred answer has the larger reward (margin > 0), with its standard error; in
    the built-in world also by the truth, and the ceiling of the first: how often the labels agree with the truth."""
    found = dict(zip(("accuracy", "accuracy_se"), mean_and_se([float(m > 0) for m in margins])))
    if all("reference" in r for r in records):
        lead = [count_errors(worse, r["reference"]) - count_errors(better, r["reference"])
                for r in records for better, worse in [chosen_and_rejected(r)]]
        found.update(zip(("truth", "truth_se"), mean_and_se([float(m * n > 0) for m, n in zip(margins, lead)])))
        found["ceiling"] = sum(n > 0 for n in lead) / len(lead)
    line = f"accuracy on {len(margins)} held-out pairs {found['accuracy']:.3f} +- {found['accuracy_se']:.3f}"
    print0(line + (f" (labels that are true: {found['ceiling']:.3f}); against the truth {found['truth']:.3f} +- "
                   f"{found['truth_se']:.3f}" if "truth" in found else ""))
    return found


def reward_margins(model, pairs, batch_size, rank, world):
    """r(better) - r(worse) of each pair."""
    scores = score(model, [x + y for x, *answers in pairs for y in answers], batch_size, rank, world)
    return [better - worse for better, worse in zip(scores[::2], scores[1::2])]


def train_reward(args, rank, world, device, out, dtype, start_time):
    """Bradley and Terry explain a pair by p(better wins) = sigmoid(r(better) - r(worse)). The reward model is the SFT
    model's backbone with a scalar head, read at the last real token. EOS is part of the text, here and in PPO, so that
    the model can tell an ended answer from one that was cut off (AlpacaFarm leaves it out)."""
    tokenizer, train, held_out, held_records = load_pairs(args, device)
    batches = Batches([len(b) + len(w) for _, b, w in train], args.batch_size, args.seed)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch)

    # --- model and optimizer
    stop = StopSignal()
    model = RewardModel.sharing(LLaMA.from_pretrained(args.model, dtype, device))
    adapt(model, args)
    optimizer = make_optimizer(model)
    start = load_resume(out / "resume.pt", model, optimizer, vars(args))["step"] if args.resume else 0
    if rank == 0 and not args.resume:
        (out / "resume.pt").unlink(missing_ok=True)                         # of an earlier run: not to be resumed
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", start, rank)

    # --- loop
    stopping = False
    for step in tqdm(range(start, steps), "reward", initial=start, total=steps, disable=rank > 0, unit="step"):
        step_time = time.time()
        batch = batches(step)                                               # the whole step's pairs, on every rank
        mine = batch[rank::world]
        micro = chunks([train[i] for i in mine or batch[:1]], args.micro_batch_size)
        loss_sum, right = 0.0, 0
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            rewards = wrapped(*pad([x + b for x, b, _ in part] + [x + w for x, _, w in part], device))     # (2 b,)
            better, worse = rewards.chunk(2)                                # (b,), (b,)
            loss = reward_loss(better, worse) * len(part) * bool(mine)      # summed over the part's pairs
            (loss * world / len(batch)).backward()
            loss_sum, right = loss_sum + loss.item(), right + (better > worse).sum().item() * bool(mine)
        loss_sum, right, stopping = all_sum([loss_sum, right, stop.requested], device)
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"step {step}: the loss is {loss_sum}; pairs {batch}")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = lr_at(step, args.lr, math.ceil(args.warmup * steps), steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        metrics({"step": step, "loss": loss_sum / len(batch), "accuracy": right / len(batch), "lr": lr,
                 "grad_norm": norm.item(), "seconds": time.time() - step_time})
        if stopping or (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_resume(out / "resume.pt", model, optimizer, {"step": step + 1, "run": vars(args)}, rank)
        if stopping:
            print0(f"stopped: go on with --resume; {out}, {time.time() - start_time:.0f} s")
            return 130

    # --- measure and save
    found = accuracy(reward_margins(model, held_out, 2 * args.micro_batch_size, rank, world), held_records)
    if rank == 0:
        save_model(model, out, tokenizer, args)
        write_json(out / "results.json", {**found, "held_out": len(held_out), "trained_on": len(train),
                                          "seconds": time.time() - start_time})
    all_sum([0], device)                                                    # the others wait until the model is there
    print0(f"model in {out}, {time.time() - start_time:.0f} s")
    return 0


def answer_logp(model, rows, device):
    """log p(response | prompt) of each row, summed over its tokens, EOS too: rows of (prompt, response) -> (B,)."""
    lengths = torch.tensor([len(y) for _, y in rows], device=device)
    return per_example_sum(model(*collate(rows, device)), lengths)


@torch.no_grad()
def chosen_rejected_logp(model, pairs, device, rank, world, batch_size):
    """log p of (better, worse) for each pair, under a model that does not learn: [(float, float)]."""
    mine, found = range(len(pairs))[rank::world], []
    for part in chunks(mine, batch_size) if mine else []:
        rows = [(pairs[i][0], y) for k in (1, 2) for i in part for y in [pairs[i][k]]]
        better, worse = answer_logp(model, rows, device).chunk(2)
        found += zip(part, zip(better.tolist(), worse.tolist()))
    found = dict(gather_lists(found))
    return [found[i] for i in range(len(pairs))]


def train_dpo(args, rank, world, device, out, dtype, start_time):
    """DPO reads the reward off the policy itself: beta times how much likelier than under the reference it makes an
    answer. The reference is the policy at step 0, so its numbers are taken once, and no second model is kept."""
    tokenizer, train, held_out, held_records = load_pairs(args, device)
    batches = Batches([len(x) + max(len(b), len(w)) for x, b, w in train], args.batch_size, args.seed)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch)

    # --- model and optimizer
    stop = StopSignal()
    model = LLaMA.from_pretrained(args.model, dtype, device)
    adapt(model, args)
    model.eval()
    reference = chosen_rejected_logp(model, train, device, rank, world, args.micro_batch_size)    # before a resumed run's weights
    reference_held = chosen_rejected_logp(model, held_out, device, rank, world, args.micro_batch_size)
    optimizer = make_optimizer(model)
    start = load_resume(out / "resume.pt", model, optimizer, vars(args))["step"] if args.resume else 0
    if rank == 0 and not args.resume:
        (out / "resume.pt").unlink(missing_ok=True)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", start, rank)

    # --- loop
    stopping = False
    for step in tqdm(range(start, steps), "dpo", initial=start, total=steps, disable=rank > 0, unit="step"):
        step_time = time.time()
        batch = batches(step)
        mine = batch[rank::world]
        micro = chunks(mine or batch[:1], args.micro_batch_size)
        loss_sum, right, margin, risen = 0.0, 0, 0.0, 0.0
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            better, worse = answer_logp(wrapped, [(train[j][0], train[j][k]) for k in (1, 2) for j in part],
                                        device).chunk(2)                    # (b,), (b,)
            ref_better, ref_worse = torch.tensor([reference[j] for j in part], dtype=better.dtype, device=device).T
            loss = dpo_loss(better, worse, ref_better, ref_worse, args.beta).sum() * bool(mine)
            (loss * world / len(batch)).backward()
            margins = ((better - ref_better) - (worse - ref_worse)).detach() * bool(mine)
            loss_sum, right, margin = loss_sum + loss.item(), right + (margins > 0).sum().item(), margin + \
                margins.sum().item()
            risen += (better - ref_better).sum().item() * bool(mine)
        loss_sum, right, margin, risen, stopping = all_sum([loss_sum, right, margin, risen, stop.requested], device)
        if not math.isfinite(loss_sum):
            raise FloatingPointError(f"step {step}: the loss is {loss_sum}; pairs {batch}")
        # Exact up to rounding, which in half precision moves the sum over a response by tenths of a nat.
        if step == 0 and abs(loss_sum / len(batch) - math.log(2)) > (0.01 if dtype.itemsize > 2 else 0.2):
            raise RuntimeError(f"the loss at step 0 is {loss_sum / len(batch)}, not ln 2: policy and reference differ")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        lr = lr_at(step, args.lr, math.ceil(args.warmup * steps), steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        metrics({"step": step, "loss": loss_sum / len(batch), "accuracy": right / len(batch), "lr": lr,
                 "margin": margin / len(batch), "better_logp_change": risen / len(batch), "grad_norm": norm.item(),
                 "seconds": time.time() - step_time})
        if stopping or (step + 1) % args.save_every == 0 and step + 1 < steps:
            save_resume(out / "resume.pt", model, optimizer, {"step": step + 1, "run": vars(args)}, rank)
        if stopping:
            print0(f"stopped: go on with --resume; {out}, {time.time() - start_time:.0f} s")
            return 130

    # --- measure and save
    now = chosen_rejected_logp(model, held_out, device, rank, world, args.micro_batch_size)
    margins = [(b - rb) - (w - rw) for (b, w), (rb, rw) in zip(now, reference_held)]
    found = {**accuracy(margins, held_records), "margin": sum(margins) / len(margins)}
    if rank == 0:
        save_model(model, out, tokenizer, args)
        write_json(out / "results.json", {**found, "held_out": len(held_out), "trained_on": len(train),
                                          "seconds": time.time() - start_time})
    all_sum([0], device)
    print0(f"model in {out}, {time.time() - start_time:.0f} s")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# What PPO and Quark share: instructions, rollouts, and the judge that chooses the checkpoint


class Task(NamedTuple):
    """What a policy is trained and chosen on. judge(texts) -> a list of numbers, larger is better."""
    tokenizer: Tokenizer
    records: list
    validation: list
    judge: object
    test: list


def load_task(args, device, rank, world):
    """Instructions to answer, and an independent judge of answers to validation instructions: in the built-in world the
    truth; else --judge, a reward model that was trained on other pairs than --reward."""
    if not args.data:
        args.model = args.model or train_sft.built_in(args.seed, "corrects", args.device)
        args.reward = args.reward or built_in_reward(args.seed, args.noise, args.device)
    for name in ("model", "reward"):
        if not getattr(args, name):
            raise InputError(f"--data needs --{name}, a directory: the {'SFT' if name == 'model' else 'reward'} model")
    if bool(args.validation) != bool(args.judge):
        raise InputError("--validation FILE and --judge DIR, the reward model that chooses, belong together")
    if args.validation and not args.data:
        raise InputError("--validation needs --data: the built-in world has validation instructions of its own")
    if args.judge and Path(args.judge).resolve() == Path(args.reward).resolve():
        raise InputError(f"--judge {args.judge} is the --reward: it cannot see over-optimization; train a second one "
                         "on other pairs")
    if args.steps < args.warmup:
        raise InputError(f"--steps {args.steps} is less than --warmup {args.warmup}: the rate would not come near --lr")
    for name in ("model", "reward"):
        recorded = read_config(getattr(args, name), quiet=True)[1].get("prompt_format", args.format)
        if recorded != args.format:
            raise InputError(f"{getattr(args, name)} was trained with --format {recorded}, this run has {args.format}")
    for name in ("reward", "judge"):
        if getattr(args, name) and Path(args.out).resolve() == Path(getattr(args, name)).resolve():
            raise InputError(f"--out {args.out} is the --{name}: the run would write over it; choose another")
    if args.rollouts % world:
        raise InputError(f"--rollouts {args.rollouts} is not a multiple of the {world} ranks")
    tokenizer = Tokenizer.from_pretrained(args.model)
    if Tokenizer.from_pretrained(args.reward).serialized != tokenizer.serialized:
        raise InputError(f"{args.model} and {args.reward} have different tokenizers: sampled ids mean the same to both "
                         "only if they come from one base")
    validation, test, judge = [], [], None
    if args.data:
        records = read_instructions(args.data)
        if args.judge:
            validation = read_instructions(args.validation)
            judge = lambda texts: [s for s, in score_texts(     # read from disk each time, to take no memory in between
                args.judge, validation, [[t] for t in texts], None, args.dtype, device, args.micro_batch_size, rank,
                world, args.max_new_tokens)]
    else:
        world_ = World(args.seed)
        records = world_.instructions("train", 10000, "unlabeled")
        validation, test = world_.instructions("validation", 400), world_.instructions("test", 800)
        judge = lambda texts: [float(t == r["reference"]) for t, r in zip(texts, validation)]
    fits = [r for r in records if len(prompt_ids(tokenizer, r, args.format)) <= args.max_length]
    if len(fits) < len(records):
        print0(f"left out {len(records) - len(fits)} of {len(records)} prompts longer than {args.max_length} tokens")
    if not fits:
        raise InputError(f"{args.data}: no prompt fits in {args.max_length} tokens: raise --max-length")
    fits = fits[:len(fits) // args.rollouts * args.rollouts] or fits        # no small last batch: it is a whole step
    return Task(tokenizer, fits, validation, judge, test)


def roll_out(policy, task, asked, args, step, rank, world):
    """One sampled response to each of this rank's share of the asked records: [(number, prompt ids, response ids)]. The
    random numbers belong to (seed, step, number), so that the answers do not depend on how many ranks share them."""
    numbers = list(range(len(asked)))[rank::world]
    prompts = [prompt_ids(task.tokenizer, asked[i], args.format) for i in numbers]
    responses = generate(policy, prompts, args.max_new_tokens, task.tokenizer.eos, temperature=args.temperature,
                         seed=args.seed * 10**6 + step, rows=numbers, batch_size=args.sample_batch_size)
    return [(i, x, y) for i, x, (y,) in zip(numbers, prompts, responses)]


def validate(policy, reward, task, args, step, rank, world, token=None):
    """{"step", "proxy": the reward model's mean score, "judge": the judge's mean} of answers to validation."""
    records = task.validation if token is None else [{**r, "reward_token": token} for r in task.validation]
    texts = [ys[0] for ys in sample_responses(policy, task.tokenizer, records, args.format, max_new_tokens=args.max_new_tokens,
                                     temperature=0.7 if args.data else 0, seed=args.seed, rank=rank, world=world,
                                     batch_size=args.sample_batch_size, label=None)]
    rows = [prompt_ids(task.tokenizer, r, args.format) + task.tokenizer.encode_response(text)[:args.max_new_tokens]
            for r, text in zip(task.validation, texts)]                     # no EOS where the answer was cut off
    scores = score(reward, rows, args.micro_batch_size, rank, world)
    return {"step": step, "proxy": sum(scores) / len(scores), "judge": mean_and_se(task.judge(texts))[0],
            "characters": sum(map(len, texts)) / len(texts)}


def readable(tokenizer, response):
    """The text of sampled ids; a model's vocabulary may be larger than its tokenizer's."""
    return tokenizer.decode_response([i for i in response if i < tokenizer.vocab_size])


def shuffled(count, args, step, epoch):
    """0 .. count - 1 in an order that depends on (seed, step, epoch) alone, cut into lists of --batch-size."""
    generator = torch.Generator().manual_seed(args.seed * 10**6 + step * 100 + epoch)
    return [batch.tolist() for batch in torch.randperm(count, generator=generator).split(args.batch_size)]


def keep_best(policy, out, curve, rank):
    """Writes the policy's trained weights to best.pt if the last entry of the curve is its best by the judge."""
    if rank == 0 and curve[-1]["judge"] > max([c["judge"] for c in curve[:-1]], default=-math.inf):
        with atomic_write(out / "best.pt") as temporary:
            torch.save({n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}, temporary)


def finish(policy, task, curve, args, out, device, rank, world, start_time, token=None):
    """Puts the best checkpoint's weights back, measures it on the test instructions if there are any, and saves it."""
    results = {"curve": curve}
    if curve:
        all_sum([0], device)                                                # best.pt is there
        best = max(curve, key=lambda c: c["judge"])
        trained = dict(policy.named_parameters())
        with torch.no_grad():
            for name, weight in torch.load(out / "best.pt", map_location="cpu", weights_only=True).items():
                trained[name].copy_(weight)
        results.update(step=best["step"], proxy=best["proxy"], judge=best["judge"])
        for name, c in (("SFT", curve[0]), ("best", best), ("last", curve[-1])):
            print0(f"validation, {name}, step {c['step']}: judge {c['judge']:.3f}, reward {c['proxy']:.2f}")
    else:
        print0("the model is that of the last step: with --validation and --judge it would be the best on validation")
    if task.test:
        first = LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device)
        _, before = answer_errors(first, task.tokenizer, task.test, args.format, rank, world)
        asked = task.test if token is None else [{**r, "reward_token": token} for r in task.test]
        _, errors = answer_errors(policy, task.tokenizer, asked, args.format, rank, world)
        results.update(sft=exact_match(before), exact_match=exact_match(errors))
        results["win_rate"], results["win_rate_se"] = win_rate(errors, before)
        print0(f"exact match on {len(errors)} test instructions: SFT {results['sft']:.3f}, now "
               f"{results['exact_match']:.3f}; win rate {results['win_rate']:.3f} +- {results['win_rate_se']:.3f}")
    if rank == 0:
        save_model(policy, out, task.tokenizer, args, **({} if token is None else {"reward_token": token}))
        results.update(seconds=time.time() - start_time, peak_memory_bytes=peak_memory(device))
        write_json(out / "results.json", results)
    all_sum([0], device)
    print0(f"model in {out}, {time.time() - start_time:.0f} s, peak memory {peak_memory(device) / 2**20:.0f} MiB")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# PPO


class Models(NamedTuple):
    policy: LLaMA
    reference: object        # None: the policy without its adapter
    reward: RewardModel
    critic: RewardModel


class PolicyAndCritic(nn.Module):
    """The two that learn, as one module with one forward: what DistributedDataParallel and one optimizer want."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, tokens, targets, slots, token_loss=None, temperature=1.0):
        """tokens, targets as in LLaMA.forward; slots (B, T): where the critic is read -> what LLaMA.forward gives, and
        values (number of slots,). A target's value is read at the same position: *before* its token is chosen."""
        return self.policy(tokens, targets, token_loss, temperature), self.critic.values(tokens, slots)


def ppo_memory(config, args, dtype, device):
    """Bytes that a PPO step takes, as model.memory_estimate has them for training the policy alone. The critic comes to
    it: with adapters its own and its activations; else, with reference and reward, three more backbones. Rollouts keep
    keys and values (half of them twice while finished rows leave), at a time at which there are no activations; so does
    --judge come and go."""
    tokens, size = args.max_length + args.max_new_tokens, args.micro_batch_size
    estimate = memory_estimate(config, dtype, [(size, tokens)], size * args.max_new_tokens, targets=targets_of(args),
                               lora_rank=args.lora_rank, checkpoint=args.checkpoint_activations,
                               device_type=device.type)
    for name in ("gradients", "optimizer", "activations"):
        estimate[name] *= 2
    backbone = estimate["weights"]
    estimate["weights"] *= 4 if not args.lora_rank else 1 if shared_adapter(args) else 2
    cache = 3 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize * tokens
    elsewhere = max(cache * args.sample_batch_size, backbone if args.judge else 0)
    estimate["working"] = max(estimate["working"], elsewhere - estimate["activations"])
    return estimate


def shared_adapter(args):
    """The adapter of --reward, if it was trained on --model; else None."""
    path = Path(args.reward, "adapter", "adapter_config.json")
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else ""
    return path.parent if base and Path(base).resolve() == Path(args.model).resolve() else None


def load_models(args, dtype, device):
    """The four models. Without adapters four backbones; with them one, if --reward was trained as an adapter of
    --model (the reward model's adapter is then where the critic's starts), else two."""
    policy = LLaMA.from_pretrained(args.model, dtype, device)
    if not args.lora_rank:
        reward = RewardModel.from_pretrained(args.reward, dtype, device)
        reference, critic = copy.deepcopy(policy).requires_grad_(False), copy.deepcopy(reward)
        policy.model.checkpoint = critic.model.checkpoint = args.checkpoint_activations
    else:
        reference = None
        if adapter := shared_adapter(args):
            reward, critic = RewardModel.sharing(policy), RewardModel.sharing(policy)
            load_adapter(reward, adapter)
            load_adapter(critic, adapter)
            critic.model.checkpoint = args.checkpoint_activations
        else:
            print0(f"{args.reward} has no adapter of {args.model}: it is held whole, beside it. To share one backbone, "
                   "train the reward model with --lora-rank")
            reward = RewardModel.from_pretrained(args.reward, dtype, device)
            critic = RewardModel.sharing(reward)
            adapt(critic, args)
        adapt(policy, args)
    nn.init.zeros_(critic.score.weight)                                     # at first the critic foresees nothing
    reward.requires_grad_(False)
    for model in (policy, reward, critic):
        model.eval()                                                        # no dropout of an adapter made elsewhere
    return Models(policy, reference, reward, critic)


class Rollout(NamedTuple):
    """One answered instruction, and what the four models said of it, before any of this step's updates."""
    number: int
    prompt: list
    response: list
    logp: torch.Tensor       # (n,), of its n tokens
    ref_logp: torch.Tensor   # (n,)
    values: torch.Tensor     # (n,), or (max_new_tokens,) in the released form
    score: float


def place(rows, width, device):
    """rows of (prompt, response) -> tokens, targets and slots, all (B, T). Slots are the positions that count: those of
    the targets or, if `width` is given (the released form), so many of each response, as if it had been padded."""
    longer = [(x, y + [0] * (width - len(y))) for x, y in rows]             # y itself if width is 0
    tokens, targets = collate(longer, device)
    slots = targets != IGNORE
    for b, (x, y) in enumerate(rows):
        targets[b, len(x) - 1 + len(y):] = IGNORE
    return tokens, targets, slots


@torch.no_grad()
def look_back(models, both, answered, args, device):
    """Reads this rank's responses with all four models: [(number, prompt, response)] -> [Rollout]."""
    found, width = [], args.max_new_tokens if args.released else 0
    answered = sorted(answered, key=lambda a: -len(a[1]) - len(a[2]))       # like lengths side by side: less padding
    for part in chunks(answered, args.micro_batch_size) if answered else []:
        tokens, targets, slots = place([(x, y) for _, x, y in part], width, device)
        logp, values = both(tokens, targets, slots, None, args.temperature)             # (N,), (slots,)
        with lora_disabled(models.policy) if models.reference is None else contextlib.nullcontext():
            ref_logp = (models.reference or models.policy)(tokens, targets, None, args.temperature)         # (N,)
        scores = models.reward(*pad([x + y for _, x, y in part], device))   # (b,)
        lengths = [len(y) for _, _, y in part]
        said = zip(logp.cpu().split(lengths), ref_logp.cpu().split(lengths),
                   values.cpu().split([width] * len(part) if width else lengths), scores.tolist())
        found += [Rollout(*a, *s) for a, s in zip(part, said)]
    return found


def columns(rows, width):
    """Tensors of unequal length -> (B, width), zeros behind each."""
    return torch.stack([nn.functional.pad(row, (0, width - len(row))) for row in rows])


def process(rollouts, beta, scale, args, eos, world):
    """Scores -> advantages: what the update needs of all rollouts, as (B, T) tensors, and the step's statistics.

    Ours: masked, scores in standard deviations of the SFT model's own. The released form: no mask, so padding counts in
    every mean; KL clamped at 0; rewards whitened too; statistics of each process by itself."""
    width = args.max_new_tokens if args.released else max(len(r.response) for r in rollouts)
    lengths = torch.tensor([len(r.response) for r in rollouts])
    real = (torch.arange(width) < lengths.unsqueeze(1)).float()             # (B, T), 1 on sampled tokens
    mask = None if args.released else real
    logp, ref_logp, values = (columns(x, width) for x in zip(*[(r.logp, r.ref_logp, r.values) for r in rollouts]))
    raw = torch.tensor([r.score for r in rollouts])                         # (B,)

    # 1. Scores in a unit that means the same for every reward model.
    scores = raw if args.released else (raw - scale[0]) / scale[1]
    # 2. An answer that was cut off is worth less: it has no EOS for the reward model to see.
    ended = torch.tensor([r.response[-1] == eos for r in rollouts])
    scores = scores - args.ending_penalty * ~ended
    # 3. The price of straying, token by token; the score lands on the last token that was sampled.
    kl = kl_estimate(logp, ref_logp, args.kl)
    rewards = shape_rewards(scores, kl, lengths - 1, beta)
    # 4. Advantages, with everything behind the last token 0. Released: whitened before and after, process by process.
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for part in [slice(r, None, world) for r in range(world)] if args.released else [slice(None)]:
        own = None if mask is None else mask[part]
        own_rewards = whiten(rewards[part], shift_mean=False) if args.released else rewards[part]
        found, returns[part] = gae(own_rewards, values[part], args.gamma, args.lam)
        advantages[part] = whiten(found, own)
    k1, k3 = (kl_estimate(logp, ref_logp, kind) * real for kind in ("k1", "k3"))
    return {"logp": logp, "values": values, "advantages": advantages, "returns": returns, "lengths": lengths}, {
        "reward": raw.mean().item(), "kl": kl.sum(1).mean().item(), "kl_k1": k1.sum(1).mean().item(),
        "kl_k3": k3.sum(1).mean().item(), "entropy": -masked_mean(logp, real).item(),
        "ended": ended.float().mean().item(), "length": lengths.float().mean().item(),
        "explained_variance": explained_variance(values, returns, mask).item()}


def train_ppo(args, rank, world, device, out, dtype, start_time):
    """PPO (arXiv 1707.06347) as AlpacaFarm ran it, with the differences that --released undoes."""
    task = load_task(args, device, rank, world)
    batches = Batches([1] * len(task.records), args.rollouts, args.seed)    # not by length: all kinds in every step
    check_memory(ppo_memory(read_config(args.model, quiet=True)[0], args, dtype, device), device)

    # --- models and optimizer
    stop = StopSignal()
    models = load_models(args, dtype, device)
    model = PolicyAndCritic(models.policy, models.critic)
    optimizer = make_optimizer(model, eps=1e-5)
    state = {"step": 0, "beta": args.beta, "scale": [0.0, 1.0], "curve": "[]"}
    if args.resume:
        state = load_resume(out / "resume.pt", model, optimizer, vars(args))
    elif rank == 0:
        for old in ("resume.pt", "best.pt"):
            (out / old).unlink(missing_ok=True)                             # of an earlier run
    beta, scale, curve = state["beta"], state["scale"], json.loads(state["curve"])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", state["step"], rank)
    if task.judge and not curve:
        out.mkdir(parents=True, exist_ok=True)
        curve.append(validate(models.policy, models.reward, task, args, 0, rank, world))
        keep_best(models.policy, out, curve, rank)

    # --- loop
    stopping = False
    bar = tqdm(range(state["step"], args.steps), "ppo", initial=state["step"], total=args.steps, disable=rank > 0,
               unit="step")
    for step in bar:
        # --- rollout: answers to new instructions, from the policy as it is now
        clock = [time.time()]
        asked = [task.records[i] for i in batches(step)]
        answered = roll_out(models.policy, task, asked, args, step, rank, world)
        clock.append(time.time())

        # --- scoring, then advantages: each rank gets all rollouts, so no figure depends on how many ranks there are
        rollouts = sorted(gather_lists(look_back(models, model, answered, args, device)))
        if step == 0:
            scale = [torch.tensor([r.score for r in rollouts]).mean().item(),
                     torch.tensor([r.score for r in rollouts]).std(unbiased=False).item() + 1e-8]
        data, stats = process(rollouts, beta, scale, args, task.tokenizer.eos, world)
        clock.append(time.time())

        # --- update: K epochs over the rollouts
        lr = lr_linear(step, args.lr, args.warmup, args.steps)
        width = data["logp"].shape[1]
        sums, updates = torch.zeros(7, dtype=torch.float64), 0
        for epoch in range(args.epochs):
            for batch in shuffled(len(rollouts), args, step, epoch):
                count = width * len(batch) if args.released else data["lengths"][batch].sum().item()
                mine = sorted(batch[rank::world], key=lambda i: -len(rollouts[i].prompt + rollouts[i].response))
                micro = chunks(mine or batch[:1], args.micro_batch_size)
                loss_sum = 0.0
                for i, part in enumerate(micro):
                    wrapped.require_backward_grad_sync = i == len(micro) - 1
                    tokens, targets, slots = place([(rollouts[j].prompt, rollouts[j].response) for j in part],
                                                   width if args.released else 0, device)
                    real = (torch.arange(width) < data["lengths"][part].unsqueeze(1))               # (b, T)
                    old_logp, advantages = (data[k][part][real].to(device) for k in ("logp", "advantages"))       # (N,)
                    seen = torch.ones_like(real) if args.released else real
                    old_values, returns = (data[k][part][seen].to(device) for k in ("values", "returns"))   # (slots,)

                    def token_loss(logp, s):                                # logp (1, n), of the tokens s of the N
                        return ppo_policy_loss(logp[0], old_logp[s], advantages[s], args.ratio_clip)

                    (policy_loss, logp), values = wrapped(tokens, targets, slots, token_loss, args.temperature)
                    value_losses = ppo_value_loss(values, old_values, returns, args.value_clip)     # (slots,)
                    loss = (policy_loss + args.value_coef * value_losses.sum()) * bool(mine) / count
                    (loss * world).backward()                               # DDP averages over ranks: hence * world
                    loss_sum += loss.item()
                    with torch.no_grad():
                        ratio = (logp[0] - old_logp).exp()
                        moved = (ratio - 1).abs() > args.ratio_clip
                        sums += torch.stack([torch.ones_like(ratio).sum(), policy_loss, moved.sum(),
                                             kl_estimate(old_logp, logp[0], "k3").sum(), torch.ones_like(values).sum(),
                                             value_losses.sum(), ((values - old_values).abs() > args.value_clip).sum()
                                             ]).cpu().double() * bool(mine)
                loss_sum, stopping = all_sum([loss_sum, stop.requested], device)
                if not math.isfinite(loss_sum):
                    raise FloatingPointError(f"step {step}: the loss is {loss_sum}")
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                updates += 1
        clock.append(time.time())

        # --- report, measure and save
        tokens, policy_loss, clipped, drift, slots, value_loss, value_clipped = all_sum(sums.tolist(), device)
        rollout_time, scoring_time, update_time = (b - a for a, b in zip(clock, clock[1:]))
        metrics({"step": step, **stats, "beta": beta, "lr": lr, "policy_loss": policy_loss / tokens,
                 "value_loss": value_loss / slots, "clip_fraction": clipped / tokens, "drift": drift / tokens,
                 "value_clip_fraction": value_clipped / slots, "grad_norm": norm.item(), "updates": updates,
                 "tokens": int(data["lengths"].sum()), "seconds_rollout": rollout_time,
                 "seconds_scoring": scoring_time, "seconds_update": update_time})
        if args.target_kl:
            beta = next_beta(beta, stats["kl"], args.target_kl)
        due = (step + 1) % args.eval_every == 0 or step + 1 == args.steps
        if task.judge and due:
            curve.append(validate(models.policy, models.reward, task, args, step + 1, rank, world))
            keep_best(models.policy, out, curve, rank)
        if rank == 0 and due:                                               # look at what it says, not only at figures
            write_json_lines(out / "samples.jsonl", [
                {"step": step, "instruction": asked[r.number]["instruction"], "score": r.score,
                 "output": readable(task.tokenizer, r.response)} for r in rollouts[:20]])
        bar.set_postfix(reward=f"{stats['reward']:.2f}", kl=f"{stats['kl']:.2f}",
                        judge=f"{curve[-1]['judge']:.3f}" if curve else "none")
        if stopping or (due or (step + 1) % args.save_every == 0) and step + 1 < args.steps:
            save_resume(out / "resume.pt", model, optimizer, {"step": step + 1, "beta": beta, "scale": scale,
                                                              "curve": json.dumps(curve), "run": vars(args)}, rank)
        if stopping:
            print0(f"stopped: go on with --resume; {out}, {time.time() - start_time:.0f} s")
            return 130
    return finish(models.policy, task, curve, args, out, device, rank, world, start_time)


# ----------------------------------------------------------------------------------------------------------------------
# Quark


def train_quark(args, rank, world, device, out, dtype, start_time):
    """Quark (arXiv 2205.13636, as adapted in AlpacaFarm): sort the rollouts by reward into quantiles; train on all of
    them, each after the control token of its quantile, and ask for the best (--quantiles all), or on the best quarter
    without control tokens (best: chosen as released, not its number of updates). A KL term holds the policy near the
    SFT model. EOS is trained (the released code dropped it, and with it the model's way to end)."""
    task = load_task(args, device, rank, world)
    if args.rollouts < args.count:
        raise InputError(f"--rollouts {args.rollouts} is less than the {args.count} quantiles (--count)")
    batches = Batches([1] * len(task.records), args.rollouts, args.seed)    # not by length: all kinds in every step
    token = 0 if args.quantiles == "all" else None                          # what the policy is asked with

    # --- models and optimizer
    stop = StopSignal()
    model = LLaMA.from_pretrained(args.model, dtype, device)
    reward = RewardModel.from_pretrained(args.reward, dtype, device).requires_grad_(False)
    reference = None if args.lora_rank else copy.deepcopy(model).requires_grad_(False)
    adapt(model, args)
    model.eval()
    optimizer = make_optimizer(model, eps=1e-5)
    state = {"step": 0, "curve": "[]"}
    if args.resume:
        state = load_resume(out / "resume.pt", model, optimizer, vars(args))
    elif rank == 0:
        for old in ("resume.pt", "best.pt"):
            (out / old).unlink(missing_ok=True)                             # of an earlier run
    curve = json.loads(state["curve"])
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    metrics = open_metrics(out / "metrics.jsonl", state["step"], rank)
    if task.judge and not curve:
        out.mkdir(parents=True, exist_ok=True)
        curve.append(validate(model, reward, task, args, 0, rank, world))
        keep_best(model, out, curve, rank)

    # --- loop
    stopping = False
    bar = tqdm(range(state["step"], args.steps), "quark", initial=state["step"], total=args.steps, disable=rank > 0,
               unit="step")
    for step in bar:
        # --- rollout: asked for the best, once the control tokens mean something
        clock = [time.time()]
        asked = [task.records[i] for i in batches(step)]
        if token is not None and step > 0:
            asked = [{**r, "reward_token": token} for r in asked]
        answered = sorted(gather_lists(roll_out(model, task, asked, args, step, rank, world)))
        clock.append(time.time())

        # --- scoring: the reward model reads the plain prompt; then quantiles of all ranks' rollouts
        plain = [prompt_ids(task.tokenizer, task.records[i], args.format) for i in batches(step)]
        raw = torch.tensor(score(reward, [x + y for x, (_, _, y) in zip(plain, answered)], args.micro_batch_size, rank,
                                 world))
        cut_off = torch.tensor([y[-1] != task.tokenizer.eos for _, _, y in answered])
        scores = raw - args.ending_penalty * raw.std(unbiased=False) * cut_off
        rows = []                                           # (prompt to train on, plain prompt, response)
        for k, group in enumerate(quantiles(scores, args.count)[:None if args.quantiles == "all" else 1]):
            for i in group:
                told = {**task.records[batches(step)[i]], "reward_token": k if args.quantiles == "all" else None}
                rows.append((prompt_ids(task.tokenizer, told, args.format), plain[i], answered[i][2]))
        clock.append(time.time())

        # --- update
        lr = lr_linear(step, args.lr, args.warmup, args.steps)
        sums = torch.zeros(4, dtype=torch.float64)
        for epoch in range(args.epochs):
            for batch in shuffled(len(rows), args, step, epoch):
                count = sum(len(rows[i][2]) for i in batch)
                mine = sorted(batch[rank::world], key=lambda i: -len(rows[i][1]) - len(rows[i][2]))
                micro = chunks(mine or batch[:1], args.micro_batch_size)
                loss_sum = 0.0
                for i, part in enumerate(micro):
                    wrapped.require_backward_grad_sync = i == len(micro) - 1
                    tokens, targets = collate([(rows[j][0], rows[j][2]) for j in part], device)
                    ref_tokens, ref_targets = collate([(rows[j][1], rows[j][2]) for j in part], device)
                    with torch.no_grad(), lora_disabled(model) if reference is None else contextlib.nullcontext():
                        other = reference or model
                        hidden = other.model(ref_tokens)[ref_targets != IGNORE] / args.temperature  # (N, D)
                    logp, kl, entropy = wrapped(tokens, targets, None, args.temperature,
                                                (hidden, other.lm_head.weight.detach()))            # three (N,)
                    losses = quark_token_loss(logp, kl, entropy, args.kl_coef, args.entropy_coef)
                    loss = losses.sum() * bool(mine) / count
                    (loss * world).backward()
                    loss_sum += loss.item()
                    sums += torch.stack([torch.ones_like(logp).sum(), -logp.sum(), kl.sum(), entropy.sum()]
                                        ).detach().cpu().double() * bool(mine)
                loss_sum, stopping = all_sum([loss_sum, stop.requested], device)
                if not math.isfinite(loss_sum):
                    raise FloatingPointError(f"step {step}: the loss is {loss_sum}")
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        clock.append(time.time())

        # --- report, measure and save
        count, nll, kl, entropy = all_sum(sums.tolist(), device)
        rollout_time, scoring_time, update_time = (b - a for a, b in zip(clock, clock[1:]))
        metrics({"step": step, "reward": raw.mean().item(), "nll": nll / count, "kl": kl / count,
                 "entropy": entropy / count, "lr": lr, "grad_norm": norm.item(),
                 "ended": 1 - cut_off.float().mean().item(),
                 "length": sum(len(y) for _, _, y in answered) / len(answered), "seconds_rollout": rollout_time,
                 "seconds_scoring": scoring_time, "seconds_update": update_time})
        due = (step + 1) % args.eval_every == 0 or step + 1 == args.steps
        if task.judge and due:
            curve.append(validate(model, reward, task, args, step + 1, rank, world, token))
            keep_best(model, out, curve, rank)
        if rank == 0 and due:
            write_json_lines(out / "samples.jsonl", [
                {"step": step, "instruction": asked[i]["instruction"], "score": scores[i].item(),
                 "output": readable(task.tokenizer, y)} for i, _, y in answered[:20]])
        bar.set_postfix(reward=f"{raw.mean().item():.2f}", judge=f"{curve[-1]['judge']:.3f}" if curve else "none")
        if stopping or (due or (step + 1) % args.save_every == 0) and step + 1 < args.steps:
            save_resume(out / "resume.pt", model, optimizer,
                        {"step": step + 1, "curve": json.dumps(curve), "run": vars(args)}, rank)
        if stopping:
            print0(f"stopped: go on with --resume; {out}, {time.time() - start_time:.0f} s")
            return 130
    return finish(model, task, curve, args, out, device, rank, world, start_time, token)


STAGES = {"reward": train_reward, "dpo": train_dpo, "ppo": train_ppo, "quark": train_quark}


def main(argv=None):
    args = parse(argv)
    if args.stage == "both":
        common = ["--seed", str(args.seed), "--noise", str(args.noise), "--device", args.device]
        return main(["reward", *common]) or main(["ppo", *common])

    if args.dtype in ("bfloat16", "float16") and not args.lora_rank:
        raise InputError(f"--dtype {args.dtype} with all weights: at these learning rates rounding swallows the "
                         "updates: give --lora-rank 16, or leave --dtype at float32")

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

    # --- the stage, a function with its whole loop in it
    return STAGES[args.stage](args, rank, world, device, out, dtype, start_time)


if __name__ == "__main__":
    run_main(main)
