"""Learning from preferences: pairs -> reward model -> policy (AlpacaFarm's methods, RLP). ppo is the default:

  python train_ppo.py                                    reward (if it is not there), then ppo, in the built-in world
  python train_ppo.py reward --model DIR --data pairs.json                     pairs -> reward model
  python train_ppo.py dpo --model DIR --data pairs.json                        pairs -> policy, without a reward model
  python train_ppo.py ppo --model DIR --reward DIR --data instructions.json    reward model -> policy, by PPO
  python train_ppo.py quark --model DIR --reward DIR --data instructions.json  reward model -> policy, by Quark
  python train_ppo.py uml --model DIR --data pairs.json --samples FILE         pairs, PPO's responses -> reward model
  python train_ppo.py spg --model DIR --data pairs.json --samples FILE --reward DIR --judge --model DIR    the same
  torchrun --nproc_per_node 8 train_ppo.py ppo --model DIR --reward DIR --data FILE     any of them on eight GPUs

There are two loops. `train_pairs` fits rewards to preferences: those of a scalar head, or DPO's implicit rewards.
`train_policy` repeats: sample responses (rollout), score them, update the policy. PPO holds four models:

  policy      learns; starts as the SFT model; answers the instructions
  reference   the SFT model, frozen: beta times KL(policy || reference) is subtracted from the reward, token by token
  reward      frozen: one score for the whole response, which lands on its last token (EOS, if it has finished)
  critic      learns; the reward model's backbone under a fresh head; predicts the return before each token

With --lora-rank the reference is the policy without its adapters. If the reward model was trained as adapters of the
same --model, all four are adapters and heads on one frozen backbone, and what fits one model for training fits PPO. Ids
are scored as they were sampled, EOS included, at the sampling temperature.

metrics.jsonl of reward and dpo: loss (dpo: ln 2 at step 0, or policy and reference differ), accuracy of the batch,
margin (mean reward of chosen - rejected), chosen_reward (dpo: below 0 means that chosen responses get less likely too).
uml adds information (losses.mutual_information) and kl (of two views); -1.386 and 0: its codes have collapsed to one.
metrics.jsonl of ppo (quark: reward, finished, length, nll; its kl and entropy are exact, and per token):
  reward              mean score of the rollouts. Rises; if gold in results.json falls meanwhile, it is over-optimized
  kl, kl_k1, kl_k3    KL(policy || reference) of a response: the penalized estimate, and two unbiased ones. 0 at step 0,
                      then 0.3 to 1.5 in the built-in world; above 4: lower --lr or raise --beta
  finished, length    fraction of responses with EOS; their tokens
  entropy             estimate for a token; near 0 within a few steps: collapsed
  clip_fraction       tokens whose ratio left the clip range; below 0.02, above 0.2 the updates are too large
  approx_kl           KL of the rollouts' policy from the updated one, per token; 0 at step 0, whose learning rate is 0
  explained_variance  of the returns, by the critic: 0 at first, 0.6 by step 20; below 0 it reads the wrong position
  value_clip_fraction values that moved more than --value-clip in a step
  seconds_rollout, seconds_scoring, seconds_update
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

import train_sft
from data import (
    IGNORE, Batches, HelpFormatter, InputError, Tokenizer, World, atomic_write, chosen_and_rejected, chunks,
    collate, count_errors, fraction, in_range, nonnegative_float, pad, positive_int, print0, prompt_ids,
    read_instructions, read_pairs, read_preferences, reading, run_main, units, write_json, write_json_lines)
from evaluate import MAX_NEW_TOKENS, answer_errors, exact_match, win_rate
from losses import (
    explained_variance, full_vocabulary, gae, implicit_reward, kl_estimate, masked_mean, mutual_information, next_beta,
    per_example_sum, ppo_policy_loss, ppo_value_loss, quantiles, quark_token_loss, reward_loss, shape_rewards,
    symmetric_kl, whiten)
from model import (
    DTYPES, HALF, LLaMA, RewardModel, add_lora, barrier, check_memory, copy_weights, distribute, gather_lists,
    generate, load_adapter, lora_disabled, lr_at, lr_linear, make_optimizer, memory_estimate, on_meta, peak_memory,
    rank, read_config, read_pickle, share, trained_weights, world_size)
from simulate import (
    built_in_preferences, get_completions, mean_and_se, parse as parse_simulate, reward_scores, sample_responses,
    score_texts)

# Defaults: (with --data, in the built-in world). With --data they are AlpacaFarm's, with its learning rates of full
# fine-tuning; LoRA needs about 10x these. Of its 390 steps of PPO it used 20 to 80.
PAIRS = {
    "format": ("alpaca", "short"),
    "max_length": (512, 256),
    "save_every": (100, 100),
}
ROLLOUTS = {
    "format": ("alpaca", "short"),
    "max_length": (192, 256),
    "max_new_tokens": (300, MAX_NEW_TOKENS),
    "batch_size": (256, 64),
    "micro_batch_size": (2, 64),
    "sample_batch_size": (32, 512),
    "eval_every": (10, 10),
    "save_every": (10, 10),
}
DEFAULTS = {
    "reward": {
        **PAIRS,
        "batch_size": (16, 128),
        "micro_batch_size": (2, 64),
        "lr": (3e-6, 1e-3),
        "epochs": (1.0, 6.0),
    },
    "dpo": {
        **PAIRS,
        "batch_size": (64, 32),
        "micro_batch_size": (2, 16),
        "lr": (1e-6, 1e-4),
        "epochs": (2.0, 2.0),
    },
    "ppo": {
        **ROLLOUTS,
        "steps": (80, 100),
        "rollouts": (512, 128),
        "lr": (1e-5, 3e-4),
    },
    "quark": {
        **ROLLOUTS,
        "steps": (80, 50),
        "rollouts": (512, 256),
        "lr": (3e-6, 3e-4),
    },
}
DEFAULTS["uml"] = DEFAULTS["spg"] = DEFAULTS["reward"]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs: rewards of the chosen and the rejected response, and the loop that pulls them apart


class Pair(NamedTuple):
    """Token ids of a preference record. DPO adds the reference's log-probabilities of the whole responses."""
    record: dict
    prompt: list
    chosen: list
    rejected: list
    ref_chosen: float = 0.0
    ref_rejected: float = 0.0

    def size(self):
        """Tokens of the longer of its two rows."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    def response_tokens(self):
        """Tokens of both responses."""
        return len(self.chosen) + len(self.rejected)


def head_rewards(model, pairs, args, device):
    """The reward model's rewards: its head at the last token of prompt + response -> chosen (b,), rejected (b,)."""
    chosen = [p.prompt + p.chosen for p in pairs]
    rejected = [p.prompt + p.rejected for p in pairs]
    return model(*pad(chosen + rejected, device)).chunk(2)


def implicit_rewards(model, pairs, args, device):
    """DPO's rewards: beta * log(p / p_ref) of each response -> chosen (b,), rejected (b,)."""
    chosen, rejected = chosen_rejected_logp(model, pairs, args, device)
    ref_chosen = chosen.new_tensor([p.ref_chosen for p in pairs])
    ref_rejected = chosen.new_tensor([p.ref_rejected for p in pairs])
    return (implicit_reward(chosen, ref_chosen, args.beta),
            implicit_reward(rejected, ref_rejected, args.beta))


def chosen_rejected_logp(model, pairs, args, device):
    """Log-probabilities of whole responses, EOS included -> chosen (b,), rejected (b,)."""
    rows = [(p.prompt, p.chosen) for p in pairs]
    rows += [(p.prompt, p.rejected) for p in pairs]
    lengths = torch.tensor([len(response) for _, response in rows], device=device)
    logp = model(*collate(rows, device))                         # (N,)
    return per_example_sum(logp, lengths).chunk(2)


def load_reward_model(args, device):
    """A scalar head on the SFT model's backbone."""
    return RewardModel.from_backbone(load_policy(args, device))


def load_policy(args, device):
    return LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device)


# stage: (the model that is trained, its rewards, the length by which pairs are sorted into batches)
PAIR_METHODS = {
    "reward": (load_reward_model, head_rewards, Pair.response_tokens),
    "dpo": (load_policy, implicit_rewards, Pair.size),
}
PAIR_METHODS["uml"] = PAIR_METHODS["spg"] = PAIR_METHODS["reward"]     # RLP adds a loss (view_loss) or synthetic_pairs


def train_pairs(args, device):
    """Fits rewards to preferences by the Bradley-Terry loss: p(chosen wins) = sigmoid(r_chosen - r_rejected)."""
    tokenizer, train, held_out = load_pairs(args, device)
    load_model, rewards_of, length = PAIR_METHODS[args.stage]
    batches = Batches([length(p) for p in train], args.batch_size, args.seed)
    steps = args.steps or math.ceil(args.epochs * batches.per_epoch)
    warmup = math.ceil(args.warmup * steps)
    config, _ = read_config(args.model, quiet=True)
    longest = max(p.size() for p in train)
    rows = min(args.micro_batch_size, args.batch_size // world_size())
    train_sft.estimate_memory(config, (5 if args.stage == "uml" else 2) * rows * longest, args, device)

    model = load_model(args, device)
    train_sft.prepare(model, args, device)
    if args.stage == "dpo":                                      # before the weights of a resumed run are loaded
        train = add_reference(model, train, args, device)
        held_out = add_reference(model, held_out, args, device)
    trained, more_loss = model, lambda *_: (0.0, {})             # no second term, nothing to log of it
    if args.stage == "uml" and args.lam:
        trained, more_loss = RewardAndViews(model), view_loss(tokenizer, args, device)
    run = train_sft.start_run(trained, make_optimizer(trained), args)
    wrapped = distribute(trained)

    for step in run.steps(steps, args.stage):
        batch = batches(step)                                    # the whole step's pairs, on every rank
        local = share(batch)
        micro = chunks(local or batch[:1], args.micro_batch_size)
        loss_sum = 0.0
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            chosen, rejected = rewards_of(wrapped, [train[j] for j in part], args, device)        # (b,), (b,)
            more, terms = more_loss(wrapped, [step * args.batch_size + batch.index(j) for j in part])
            loss = (reward_loss(chosen, rejected) * len(part) + more) / len(batch)
            loss = loss * bool(local)                             # a rank without a pair takes part with weight 0
            (loss * world_size()).backward()                     # DDP takes the mean over ranks; we want the sum
            loss_sum += loss.item()
            if local:
                margin = chosen - rejected
                run.add(accuracy=(margin > 0).sum(), margin=margin.sum(), chosen_reward=chosen.sum(), **terms)

        lr = lr_at(step, args.lr, warmup, steps)
        loss, norm = run.update(loss_sum, lr, batch)
        means = {name: total / len(batch) for name, total in run.totals().items()}
        run.log(loss=loss, **means, lr=lr, grad_norm=norm)

    if not run.stopped:
        margins = [chosen - rejected for chosen, rejected in over_pairs(rewards_of, model, held_out, args, device)]
        results = accuracy(margins, held_out)
        results["margin"] = sum(margins) / len(margins)
        results.update(held_out=len(held_out), trained_on=len(train), seconds=run.seconds())
        train_sft.save_run(model, tokenizer, args)
        if rank() == 0:
            write_json(Path(args.out, "results.json"), results)
    return run.finish()


def add_reference(model, pairs, args, device):
    """DPO's reference is the policy before the first step. Its log-probabilities are computed once, so that no second
    model is kept."""
    logp = over_pairs(chosen_rejected_logp, model, pairs, args, device)
    return [p._replace(ref_chosen=chosen, ref_rejected=rejected) for p, (chosen, rejected) in zip(pairs, logp)]


@torch.no_grad()
def over_pairs(function, model, pairs, args, device):
    """What function(model, pairs, args, device) -> chosen (b,), rejected (b,) gives for each pair, on all ranks."""
    found = []
    for part in chunks(share(range(len(pairs))), args.micro_batch_size):
        chosen, rejected = function(model, [pairs[i] for i in part], args, device)
        found += zip(part, chosen.tolist(), rejected.tolist())
    return [values for _, *values in sorted(gather_lists(found))]


def accuracy(margins, pairs):
    """Held-out accuracy: the fraction of pairs with r(chosen) > r(rejected), and its standard error.

    In the built-in world also by the truth (fewer errors wins), and the ceiling: how many labels agree with the truth.
    """
    found = {}
    found["accuracy"], found["accuracy_se"] = mean_and_se([float(m > 0) for m in margins])
    line = f"accuracy on {len(margins)} held-out pairs {found['accuracy']:.3f} +- {found['accuracy_se']:.3f}"
    if all("reference" in p.record for p in pairs):
        leads = []                                               # errors(rejected) - errors(chosen)
        for p in pairs:
            truth = p.record["reference"]
            chosen, rejected = chosen_and_rejected(p.record)
            leads.append(count_errors(rejected, truth) - count_errors(chosen, truth))
        agree = [float(margin * lead > 0) for margin, lead in zip(margins, leads)]
        found["truth"], found["truth_se"] = mean_and_se(agree)
        found["ceiling"] = sum(lead > 0 for lead in leads) / len(leads)
        line += (f" (labels that are true: {found['ceiling']:.3f}); against the truth {found['truth']:.3f} +- "
                 f"{found['truth_se']:.3f}")
    print0(line)
    return found


def load_pairs(args, device):
    """The tokenizer, and the training and held-out pairs that fit in --max-length."""
    path = args.data or built_in_preferences(args.model, args.seed, args.noise, device)
    tokenizer = Tokenizer.from_pretrained(args.model)
    records = read_preferences(path)
    # AlpacaFarm's split: a permutation with seed 42, of which the last pairs are held out.
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(42)).tolist()
    count = min(args.held_out or min(500, max(1, len(records) // 10)), len(records))
    synthetic = synthetic_pairs(args, device) if args.stage == "spg" else []
    pairs = []
    for r in [*synthetic, *(records[i] for i in order)]:
        prompt = prompt_ids(tokenizer, r, args.format)
        chosen, rejected = map(tokenizer.encode_response, chosen_and_rejected(r))
        pairs.append(Pair(r, prompt, chosen, rejected))
    train = [p for p in pairs[:-count] if p.size() <= args.max_length]
    held_out = [p for p in pairs[-count:] if p.size() <= args.max_length]
    if too_long := len(pairs) - len(train) - len(held_out):
        print0(f"left out {too_long} of {len(pairs)} pairs longer than {args.max_length} tokens")
    if not (train and held_out):
        raise InputError(f"{path}: of {len(pairs)} pairs {len(train)} are left to train on and {len(held_out)} to hold "
                         f"out: raise --max-length {args.max_length}, or give --held-out {max(1, len(pairs) // 10)}")
    return tokenizer, train, held_out


# ----------------------------------------------------------------------------------------------------------------------
# RLP (arXiv 2403.19279): PPO leaves the responses that its reward model has learnt to compare. A second reward model
# learns from that policy's responses, too, as views (UML) or as pairs (SPG); then PPO, from SFT again: ppo --reward DIR


def policy_samples(args, device):
    """Records whose `output` lists a policy's responses: those of --samples; in the built-in world, ten of PPO's policy
    to each instruction, made once."""
    path = Path(args.samples or f"out/world-{args.seed}/samples-{args.noise}.jsonl")
    if not args.samples and not path.is_file():
        policy = built_in_stage("ppo", args.seed, args.noise, args.device)
        records = World(args.seed).instructions("train", 10000, "unlabeled")
        texts = sample_responses(
            LLaMA.from_pretrained(policy, device=device), Tokenizer.from_pretrained(policy), records, args.format,
            max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=args.seed, n=10)
        if rank() == 0:
            write_json_lines(path, [{**r, "output": outputs} for r, outputs in zip(records, texts)])
        barrier()                                                # wait for rank 0 to write
        torch.manual_seed(args.seed)                             # PPO has drawn random numbers
    records = read_pairs(path)
    for i, r in enumerate(records):
        if not r.get("output"):
            raise InputError(f"{path}: record {i} has no 'output', a list of the policy's responses: make the file "
                             "with simulate.py sample --outputs 10")
    return records


def view_loss(tokenizer, args, device):
    """The second term of RLP-UML, lambda L_M (losses.py): more_loss(wrapped, numbers) -> its sum over that many
    instructions, and what to log. A number decides all that is drawn, whatever the micro-batch or the rank."""
    records, samples = policy_samples(args, device), []
    for r in records:
        prompt = prompt_ids(tokenizer, r, args.format)
        rows = [prompt + tokenizer.encode_response(text) for text in r["output"]]
        samples.append([row for row in rows if len(row) <= args.max_length])
    samples = [rows for rows in samples if len(rows) > 1]
    print0(f"{len(samples)} of {len(records)} instructions have two responses within --max-length {args.max_length}")
    if len(samples) < 2:
        raise InputError(f"{args.samples}: views need two instructions with two responses within --max-length "
                         f"{args.max_length}, there are {len(samples)}: raise it, or sample more responses")

    def more_loss(wrapped, numbers):
        rows, noise = zip(*[draw_views(samples, f"views {args.seed} {number}") for number in numbers])
        information, kl = wrapped(*pad(sum(rows, []), device), torch.stack(noise).to(device))        # (k,), (k,)
        return args.lam * (kl - information).sum(), {"information": information.sum(), "kl": kl.sum()}
    return more_loss


CODE = 64                # Z, the dimensions of a view's code; the paper does not say


def draw_views(samples, seed):
    """Two responses to one instruction and a response to another, 3 rows of ids; the noise of their codes, (3, Z)."""
    rng = random.Random(seed)
    one, other = rng.sample(samples, 2)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return [*rng.sample(one, 2), rng.choice(other)], torch.randn(3, CODE, generator=generator)


class RewardAndViews(nn.Module):
    """What RLP-UML trains. The reward model, which is all that is saved; MLPs that read a code's mean and standard
    deviation where its head reads the reward; a discriminator of two codes, T in losses.mutual_information."""

    def __init__(self, reward):
        super().__init__()
        self.reward, D, mlps = reward, reward.config.hidden_size, []
        for inputs, outputs in ((D, CODE), (D, CODE), (2 * CODE, 1)):
            layers = nn.Linear(inputs, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, outputs)
            mlps.append(nn.Sequential(*layers).to(reward.score.weight))
        self.mean, self.std, self.discriminator = mlps

    def forward(self, tokens, lengths, noise=None):
        """As RewardModel.forward. With noise (k, 3, Z), rows are those of draw_views: I (k,), SKL (k,)."""
        if noise is None:
            return self.reward(tokens, lengths)
        rows = torch.arange(len(tokens), device=tokens.device)
        hidden = self.reward.model(tokens)[rows, lengths - 1].to(self.reward.score.weight)
        hidden = hidden.unflatten(0, (-1, 3))                    # (k, 3, D)
        mean, std = self.mean(hidden), nn.functional.softplus(self.std(hidden)) + 1e-3    # so that SKL stays finite
        z = mean + std * noise
        together, apart = (self.discriminator(z[:, [0, i]].flatten(1)).squeeze(1) for i in (1, 2))
        return mutual_information(together, apart), symmetric_kl(mean[:, 0], std[:, 0], mean[:, 1], std[:, 1])


def synthetic_pairs(args, device):
    """RLP-SPG's pairs: where enough responses of the policy agree, the best of those is preferred to another one."""
    check_reward_format(args)
    records, pairs = policy_samples(args, device), []
    texts = [sorted(set(r["output"])) for r in records]
    scores = score_texts(args.reward, records, texts, args.format, args.dtype, device, args.micro_batch_size)
    for r, distinct, rewards, same in zip(records, texts, scores, compare_meanings(records, texts, args)):
        if None not in same.values():
            pairs += select_pair(r, clusters(r["output"], same), dict(zip(distinct, rewards)), args)
    if rank() == 0:
        write_json_lines(Path(args.out, "synthetic.jsonl"), pairs)
    print0(f"{len(pairs)} synthetic pairs of {len(records)} instructions, in {args.out}/synthetic.jsonl")
    return pairs


def same_meaning(a, b):
    """Whether two responses mean the same: here, if they have the same words in any order, in the built-in world the
    same facts. (The paper has DeBERTa predict entailment in both directions.)"""
    return set(units(a)) == set(units(b))


SAME_MEANING = ("Question:\n{instruction}\n\nAnswer A:\n{output}\n\nAnswer B:\n{judgment}\n\n"
                "Do both answers say the same, be it in other words? Reply with one word, yes or no.")


def compare_meanings(records, texts, args):
    """Compares each record's texts in pairs -> [{(text, later text): bool, or None without a clear answer}], by
    same_meaning or, for real text, by asking --judge once for both directions."""
    found, questions = [dict.fromkeys(itertools.combinations(distinct, 2)) for distinct in texts], []
    for record, same in zip(records, found):
        for a, b in same:
            same[a, b] = None if args.judge else same_meaning(a, b)
            questions.append({**record, "output": a, "judgment": b, "same": same})
    if args.judge:
        flags = "refine", "--data", "-", "--out", f"{args.out}/judge", "--temperature", "0", *args.judge
        done, failed, _ = get_completions(parse_simulate(flags), questions, template=SAME_MEANING)
        for r, (reply,) in done:
            answer = re.match(r"\W*(yes|no)\b", reply.lower())
            r["same"][r["output"], r["judgment"]] = answer and answer[1] == "yes"
        unclear = sum(None in same.values() for same in found)
        print0(f"left out {unclear} instructions: the judge failed ({len(failed)} times) or said neither yes nor no")
    return found


def clusters(texts, same):
    """Groups texts by meaning -> a list of lists. Greedy: in alphabetical order, a text joins the first group whose
    first text means the same. same: {(text, later text): bool}, which need not be transitive."""
    groups = {}                                                  # first text: the group
    for text in sorted(texts):
        first = next((first for first in groups if first == text or same[first, text]), text)
        groups.setdefault(first, []).append(text)
    return list(groups.values())


def select_pair(record, groups, score, args):
    """RLP-SPG's pair of an instruction, in a list: of the largest group (of equals, the first) the text with the best
    score, and a random response outside. [] if less than --gamma of the responses agree, or all do."""
    largest = max(groups, key=len)
    outside = [text for text in sorted(record["output"]) if text not in largest]
    confidence = len(largest) / len(record["output"])
    if confidence < args.gamma or not outside:
        return []
    rejected = random.Random(f"rejected {args.seed} {record['instruction']}").choice(outside)
    pair = {"output_1": max(largest, key=score.get), "output_2": rejected, "preference": 1, "confidence": confidence}
    return [{**record, **pair}]


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts: sample responses, score them, update the policy


class Rollout(NamedTuple):
    """A sampled response and what the models say of it before this step's updates; n is its number of tokens."""
    number: int                              # of the instruction in this step's batch
    prompt: list                             # ids, without a control token
    response: list                           # n ids
    score: float = 0.0                       # by the reward model
    logp: torch.Tensor | None = None         # (n,), by the policy; PPO only, like all that follows
    ref_logp: torch.Tensor | None = None     # (n,)
    values: torch.Tensor | None = None       # (n,), by the critic
    advantages: torch.Tensor | None = None   # (n,)
    returns: torch.Tensor | None = None      # (n,)

    def size(self):
        return len(self.prompt) + len(self.response)


def longest_first(rollouts):
    """Similar lengths side by side: less padding."""
    return sorted(rollouts, key=lambda r: -r.size())


def control_prompt(tokenizer, prompt, control):
    """The prompt's ids with control token 0 (best) to 7 after BOS; unchanged if control is None."""
    if control is None:
        return prompt
    control_id = tokenizer.encode_prompt("", control)[1]
    return [prompt[0], control_id, *prompt[1:]]


def roll_out(policy, task, asked, control, step, args):
    """One sampled response to each of this rank's share of the asked records -> [Rollout].

    The random numbers belong to (seed, step, number), so the responses do not depend on how many ranks share them.
    """
    numbers = share(range(len(asked)))
    plain = [prompt_ids(task.tokenizer, asked[i], args.format) for i in numbers]
    prompts = [control_prompt(task.tokenizer, prompt, control) for prompt in plain]
    responses = generate(
        policy, prompts, args.max_new_tokens, task.tokenizer.eos, temperature=args.temperature,
        seed=args.seed * 10**6 + step, rows=numbers, batch_size=args.sample_batch_size)
    return [Rollout(i, prompt, response) for i, prompt, (response,) in zip(numbers, plain, responses)]


@torch.no_grad()
def add_scores(models, rollouts, args, device):
    """Adds the reward model's scores."""
    found = []
    for part in chunks(longest_first(rollouts), args.micro_batch_size):
        tokens, lengths = pad([r.prompt + r.response for r in part], device)              # (b, T), (b,)
        scores = models.reward(tokens, lengths).tolist()
        found += [r._replace(score=score) for r, score in zip(part, scores)]
    return found


@torch.no_grad()
def add_model_outputs(models, rollouts, args, device):
    """Adds what all four models say: scores, log-probabilities of policy and reference, values of the critic."""
    found = []
    for part in chunks(add_scores(models, rollouts, args, device), args.micro_batch_size):
        tokens, targets = collate([(r.prompt, r.response) for r in part], device)         # (b, T), (b, T)
        logp, values = models.trained(tokens, targets, temperature=args.temperature)      # (N,), (N,)
        with as_reference(models) as reference:
            ref_logp = reference(tokens, targets, temperature=args.temperature)           # (N,)
        lengths = [len(r.response) for r in part]
        logp, ref_logp, values = (x.cpu().split(lengths) for x in (logp, ref_logp, values))
        for i, r in enumerate(part):
            found.append(r._replace(logp=logp[i], ref_logp=ref_logp[i], values=values[i]))
    return found


def compute_advantages(rollouts, beta, scale, eos, args):
    """Scores -> advantages and returns of every token, in numbered stages; and the step's statistics.

    scale is the mean and standard deviation of the SFT model's scores. Inside, responses are rows of (B, T) matrices,
    and `mask` is 1 on their tokens.
    """
    lengths = torch.tensor([len(r.response) for r in rollouts])
    logp = pad_sequence([r.logp for r in rollouts], batch_first=True)                     # (B, T)
    ref_logp = pad_sequence([r.ref_logp for r in rollouts], batch_first=True)
    values = pad_sequence([r.values for r in rollouts], batch_first=True)
    mask = (torch.arange(logp.shape[1]) < lengths.unsqueeze(1)).float()

    # 1. Scores in standard deviations of the SFT model's own: a unit that means the same for every reward model.
    raw = torch.tensor([r.score for r in rollouts])              # (B,)
    scores = (raw - scale[0]) / scale[1]
    # 2. A truncated response is worth less: it has no EOS for the reward model to see.
    finished = torch.tensor([r.response[-1] == eos for r in rollouts])
    scores = scores - args.ending_penalty * ~finished
    # 3. KL penalty per token; the score lands on the last sampled token.
    kl = kl_estimate(logp, ref_logp, args.kl)
    rewards = shape_rewards(scores, kl, lengths - 1, beta)
    if args.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    # 4. Advantages, whitened over all tokens of the step.
    advantages, returns = gae(rewards, values, args.gamma, args.lam)
    advantages = whiten(advantages, mask)

    k1 = kl_estimate(logp, ref_logp, "k1")
    k3 = kl_estimate(logp, ref_logp, "k3")
    statistics = {
        "reward": raw.mean().item(),
        "kl": kl.sum(1).mean().item(),
        "kl_k1": k1.sum(1).mean().item(),
        "kl_k3": k3.sum(1).mean().item(),
        "entropy": -masked_mean(logp, mask).item(),
        "finished": finished.float().mean().item(),
        "length": lengths.float().mean().item(),
        "explained_variance": explained_variance(values, returns, mask).item(),
        "beta": beta,
    }
    found = []
    for i, r in enumerate(rollouts):
        n = len(r.response)
        found.append(r._replace(advantages=advantages[i, :n], returns=returns[i, :n]))
    return found, statistics


def ppo_update(models, wrapped, rollouts, run, lr, step, task, args):
    """PPO: advantages, then K epochs of clipped updates over the step's rollouts, in batches of --batch-size.

    Every quantity belongs to a response token: (n,) in a rollout, (N,) in a micro-batch. logp, values, advantages and
    returns of a rollout are constants.
    """
    if "beta" not in run.state:                                  # the first step
        raw = torch.tensor([r.score for r in rollouts])
        run.state["beta"] = args.beta
        run.state["scale"] = [raw.mean().item(), raw.std(unbiased=False).item() + 1e-8]
    rollouts, statistics = compute_advantages(
        rollouts, run.state["beta"], run.state["scale"], task.tokenizer.eos, args)

    token_loss = functools.partial(ppo_policy_loss, clip=args.ratio_clip)
    for batch in shuffled_batches(rollouts, step, args):
        n_tokens = sum(len(r.response) for r in batch)           # over all ranks
        loss_sum = 0.0
        # Never empty: --rollouts and --batch-size are multiples of the number of ranks.
        micro = chunks(longest_first(share(batch)), args.micro_batch_size)
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            tokens, targets = collate([(r.prompt, r.response) for r in part], run.device)     # (b, T), (b, T)
            old_logp = torch.cat([r.logp for r in part]).to(run.device)                       # (N,)
            old_values = torch.cat([r.values for r in part]).to(run.device)
            advantages = torch.cat([r.advantages for r in part]).to(run.device)
            returns = torch.cat([r.returns for r in part]).to(run.device)

            (policy_loss, logp), values = wrapped(
                tokens, targets, token_loss, (old_logp, advantages), args.temperature)
            value_loss = ppo_value_loss(values, old_values, returns, args.value_clip).sum()
            loss = (policy_loss + args.value_coef * value_loss) / n_tokens
            (loss * world_size()).backward()                     # DDP takes the mean over ranks; we want the sum
            loss_sum += loss.item()

            clipped = ((logp[0] - old_logp).exp() - 1).abs() > args.ratio_clip
            approx_kl = kl_estimate(old_logp, logp[0], "k3")
            value_clipped = (values - old_values).abs() > args.value_clip
            run.add(tokens=len(old_logp), policy_loss=policy_loss, value_loss=value_loss,
                    clip_fraction=clipped.sum(), approx_kl=approx_kl.sum(),
                    value_clip_fraction=value_clipped.sum())
        _, norm = run.update(loss_sum, lr)

    if args.target_kl:
        run.state["beta"] = next_beta(run.state["beta"], statistics["kl"], args.target_kl)
    return {**statistics, **token_means(run.totals()), "grad_norm": norm}


def token_means(totals):
    """Sums over tokens -> means."""
    tokens = totals.pop("tokens")
    return {name: total / tokens for name, total in totals.items()}


def quark_update(models, wrapped, rollouts, run, lr, step, task, args):
    """Quark (arXiv 2205.13636, as adapted in AlpacaFarm): sorts rollouts by reward into quantiles and trains on them.

    --quantiles all: on all of them, each after the control token of its quantile; the policy is later asked for the
    best. --quantiles best: on the best quantile, without control tokens. A KL penalty, over the whole vocabulary, keeps
    the policy near the SFT model. EOS is trained (the released code dropped it, so the model did not learn to stop).
    """
    raw = torch.tensor([r.score for r in rollouts])
    truncated = torch.tensor([r.response[-1] != task.tokenizer.eos for r in rollouts])
    groups = quantiles(raw - args.ending_penalty * raw.std(unbiased=False) * truncated, args.count)
    rows = []                                                    # (rollout, prompt to train on)
    for control, group in zip([None] if args.quantiles == "best" else range(args.count), groups):
        for i in group:
            prompt = control_prompt(task.tokenizer, rollouts[i].prompt, control)
            rows.append((rollouts[i], prompt))

    for batch in shuffled_batches(rows, step, args):
        n_tokens = sum(len(r.response) for r, _ in batch)        # over all ranks
        loss_sum = 0.0
        local = share(batch)
        rows_by_length = sorted(local or batch[:1], key=lambda row: -row[0].size())
        micro = chunks(rows_by_length, args.micro_batch_size)
        for i, part in enumerate(micro):
            wrapped.require_backward_grad_sync = i == len(micro) - 1
            tokens, targets = collate([(prompt, r.response) for r, prompt in part], run.device)        # (b, T), (b, T)
            plain = collate([(r.prompt, r.response) for r, _ in part], run.device)
            with torch.no_grad(), as_reference(models) as reference:
                ref_hidden = reference.response_hidden(*plain)   # (N, D)
                ref_weight = reference.lm_head.weight.detach()
            logp, kl, entropy = wrapped(tokens, targets, ref_hidden, ref_weight, args.temperature)   # three (N,)
            losses = quark_token_loss(logp, kl, entropy, args.kl_coef, args.entropy_coef)
            loss = losses.sum() * bool(local) / n_tokens
            (loss * world_size()).backward()                     # DDP takes the mean over ranks; we want the sum
            loss_sum += loss.item()
            if local:
                run.add(tokens=len(logp), kl=kl.sum(), entropy=entropy.sum(), nll=-logp.sum())
        _, norm = run.update(loss_sum, lr)

    return {
        "reward": raw.mean().item(),
        **token_means(run.totals()),
        "finished": 1 - truncated.float().mean().item(),
        "length": sum(len(r.response) for r in rollouts) / len(rollouts),
        "grad_norm": norm,
    }


def shuffled_batches(rows, step, args):
    """--epochs passes over the rows of a step, each in an order that depends on (seed, step, epoch) alone."""
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 10**6 + step * 100 + epoch)
        order = torch.randperm(len(rows), generator=generator)
        for batch in order.split(args.batch_size):
            yield [rows[i] for i in batch.tolist()]


# stage: (what is added to the rollouts, the update)
POLICY_METHODS = {
    "ppo": (add_model_outputs, ppo_update),
    "quark": (add_scores, quark_update),
}


def train_policy(args, device):
    """The loop of PPO and Quark: sample responses, score them, update the policy, and look at it now and then."""
    check_policy_flags(args)
    task = load_task(args)
    check_memory(policy_memory(args), device)
    models = load_models(args, device)
    observe, update = POLICY_METHODS[args.stage]
    optimizer = make_optimizer(models.trained, eps=1e-5)        # AlpacaFarm's epsilon
    run = train_sft.start_run(models.trained, optimizer, args, curve=[])
    wrapped = distribute(models.trained)
    best = Path(args.out, "best.pt")
    if task.validation and not run.state["curve"]:
        run.state["curve"].append(validate(models, task, 0, None, args, device))
        save_if_best(models.policy, run.state["curve"], best)

    batches = Batches([1] * len(task.records), args.rollouts, args.seed)     # equal lengths: a plain shuffle
    for step in run.steps(args.steps, args.stage):
        # --- rollout: responses to new instructions, from the policy as it is now
        clock = [time.time()]
        asked = [task.records[i] for i in batches(step)]
        control = task.control if step else None                     # control tokens mean nothing yet at step 0
        rollouts = roll_out(models.policy, task, asked, control, step, args)
        clock.append(time.time())

        # --- scoring; then each rank gets all rollouts, so no number depends on how many ranks there are
        rollouts = sorted(gather_lists(observe(models, rollouts, args, device)))
        clock.append(time.time())

        # --- update
        lr = lr_linear(step, args.lr, args.warmup, args.steps)
        statistics = update(models, wrapped, rollouts, run, lr, step, task, args)
        clock.append(time.time())

        # --- report and validation
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        run.log(**statistics, lr=lr, seconds_rollout=seconds[0], seconds_scoring=seconds[1],
                seconds_update=seconds[2])
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            write_samples(Path(args.out, "samples.jsonl"), step, asked, rollouts, task)
            if task.validation:
                run.state["curve"].append(validate(models, task, step + 1, task.control, args, device))
                save_if_best(models.policy, run.state["curve"], best)
                run.due = True                                   # best.pt and the curve are saved together

    if not run.stopped:
        evaluate_and_save(models.policy, task, run, args, device)
    return run.finish()


# ----------------------------------------------------------------------------------------------------------------------
# Choosing the checkpoint: the reward that is optimized (proxy) always rises, so something else has to choose (gold)


class Task(NamedTuple):
    """What a policy is trained, chosen and tested on."""
    tokenizer: Tokenizer
    records: list                # instructions to answer
    validation: list             # instructions to choose the checkpoint on; none: the last checkpoint is kept
    test: list
    control: int | None          # the control token that the policy is asked with (Quark with all quantiles)


def load_task(args):
    """Instructions to answer, and those that the checkpoint is chosen and tested on."""
    tokenizer = Tokenizer.from_pretrained(args.model)
    if Tokenizer.from_pretrained(args.reward).serialized != tokenizer.serialized:
        raise InputError(f"{args.model} and {args.reward} have different tokenizers: sampled ids mean the same to both "
                         "only if they come from one base model")
    validation, test = [], []
    if args.data:
        records = read_instructions(args.data)
        if args.validation:
            validation = read_instructions(args.validation)
    else:
        world = World(args.seed)
        records = world.instructions("train", 10000, "unlabeled")
        validation, test = world.instructions("validation", 400), world.instructions("test", 800)
    fitting = [r for r in records if len(prompt_ids(tokenizer, r, args.format)) <= args.max_length]
    if len(fitting) < len(records):
        print0(f"left out {len(records) - len(fitting)} of {len(records)} prompts longer than {args.max_length} tokens")
    if len(fitting) < args.rollouts:
        raise InputError(f"{args.data or 'the built-in world'}: {len(fitting)} prompts fit in --max-length "
                         f"{args.max_length}, fewer than --rollouts {args.rollouts}: lower --rollouts")
    fitting = fitting[:len(fitting) // args.rollouts * args.rollouts]        # every step has --rollouts prompts
    control = 0 if getattr(args, "quantiles", "") == "all" else None
    return Task(tokenizer, fitting, validation, test, control)


def with_control(records, control):
    """The records, to be asked with a control token."""
    return records if control is None else [{**r, "reward_token": control} for r in records]


def validate(models, task, step, control, args, device):
    """Answers to the validation instructions: {"step", "proxy": mean score by the reward model, "gold": mean by an
    independent measure, "characters"}. Gold is the truth in the built-in world, else --gold-reward."""
    responses = sample_responses(
        models.policy, task.tokenizer, with_control(task.validation, control), args.format,
        max_new_tokens=args.max_new_tokens, temperature=0.7 if args.data else 0, seed=args.seed,
        batch_size=args.sample_batch_size, label=None)
    texts = [text for text, in responses]
    rows = []
    for r, text in zip(task.validation, texts):
        response = task.tokenizer.encode_response(text)[:args.max_new_tokens]             # no EOS if it was truncated
        rows.append(prompt_ids(task.tokenizer, r, args.format) + response)
    proxy = reward_scores(models.reward, rows, args.micro_batch_size)
    if args.data:                                # read from disk each time, so that it takes no memory in between
        found = score_texts(
            args.gold_reward, task.validation, [[t] for t in texts], dtype=args.dtype, device=device,
            batch_size=args.micro_batch_size, most=args.max_new_tokens)
        gold = [score for score, in found]
    else:
        gold = [float(text == r["reference"]) for text, r in zip(texts, task.validation)]
    return {
        "step": step,
        "proxy": sum(proxy) / len(proxy),
        "gold": sum(gold) / len(gold),
        "characters": sum(map(len, texts)) / len(texts),
    }


def save_if_best(policy, curve, path):
    """Writes the policy's trained weights if the last entry of the curve is the best by gold."""
    before = [c["gold"] for c in curve[:-1]]
    if rank() == 0 and curve[-1]["gold"] > max(before, default=-math.inf):
        weights = {name: p.detach() for name, p in trained_weights(policy).items()}
        with atomic_write(path) as temporary:
            torch.save(weights, temporary)


def write_samples(path, step, asked, rollouts, task):
    """Writes 20 rollouts as text: metrics alone hide what the policy says."""
    if rank() == 0:
        write_json_lines(path, [{
            "step": step,
            "instruction": asked[r.number]["instruction"],
            "score": r.score,
            "output": task.tokenizer.decode_response(r.response),
        } for r in rollouts[:20]])


def evaluate_and_save(policy, task, run, args, device):
    """Restores the best checkpoint, measures it on the test instructions if there are any, and saves it."""
    curve, control = run.state["curve"], task.control
    results = {"curve": curve}
    if curve:
        barrier()                                                # best.pt is there
        best = max(curve, key=lambda c: c["gold"])
        with reading(path := Path(args.out, "best.pt")):
            copy_weights(trained_weights(policy), read_pickle(path), path)
        results.update(best)
        if best["step"] == 0:                                    # the SFT model, to which control tokens mean nothing
            control = None
        for name, c in (("SFT", curve[0]), ("best", best), ("last", curve[-1])):
            print0(f"validation, {name}, step {c['step']}: gold {c['gold']:.3f}, reward {c['proxy']:.2f}")
    else:
        print0("this is the last step's model; with --validation and --gold-reward it would be the best on validation")
    if task.test:
        _, before = answer_errors(load_policy(args, device), task.tokenizer, task.test, args.format)
        _, errors = answer_errors(policy, task.tokenizer, with_control(task.test, control), args.format)
        results.update(sft=exact_match(before), exact_match=exact_match(errors))
        results["win_rate"], results["win_rate_se"] = win_rate(errors, before)
        print0(f"exact match on {len(errors)} test instructions: SFT {results['sft']:.3f}, now "
               f"{results['exact_match']:.3f}; win rate {results['win_rate']:.3f} +- {results['win_rate_se']:.3f}")
    train_sft.save_run(policy, task.tokenizer, args, reward_token=control)
    if rank() == 0:
        results.update(seconds=run.seconds(), peak_memory_bytes=peak_memory(device))
        write_json(Path(args.out, "results.json"), results)


# ----------------------------------------------------------------------------------------------------------------------
# The models


class Models(NamedTuple):
    policy: LLaMA
    reference: LLaMA | None      # None: the policy without its adapters
    reward: RewardModel
    trained: nn.Module           # what learns, as one module with one forward, for DDP and one optimizer


class PolicyAndCritic(nn.Module):
    """What PPO trains."""

    def __init__(self, policy, critic):
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(self, tokens, targets, token_loss=None, per_token=(), temperature=1.0):
        """As LLaMA.forward, and values (N,). A target's value is read where it is predicted: *before* it is chosen."""
        return (self.policy(tokens, targets, token_loss, per_token, temperature),
                self.critic.values(tokens, targets))


class PolicyBesideReference(nn.Module):
    """What Quark trains."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, tokens, targets, ref_hidden, ref_weight, temperature):
        """losses.full_vocabulary of the targets, at a temperature: log p, KL(p || p_ref), entropy, each (N,)."""
        hidden = self.policy.response_hidden(tokens, targets)    # (N, D)
        response_ids = targets[targets != IGNORE]                # (N,)
        return full_vocabulary(hidden / temperature, self.policy.lm_head.weight, ref_hidden / temperature, ref_weight,
                               response_ids)


def as_reference(models):
    """Context that gives the reference: the frozen copy, or the policy with its adapters disabled."""
    if models.reference is None:
        return lora_disabled(models.policy)
    return contextlib.nullcontext(models.reference)


def load_models(args, device):
    """The models of a stage. Without adapters PPO holds four backbones; with them one, if --reward was trained as
    adapters of --model (they are then where the critic starts), else two."""
    policy = load_policy(args, device)
    reward = load_reward(policy, args, device)
    reference = None if args.lora_rank else copy.deepcopy(policy).requires_grad_(False)
    trained = PolicyBesideReference(policy)
    if args.stage == "ppo":
        trained = PolicyAndCritic(policy, load_critic(policy, reward, args, device))
    train_sft.prepare(policy, args, device)
    reward.requires_grad_(False)
    return Models(policy, reference, reward, trained)


def load_reward(policy, args, device):
    """The reward model, on the policy's backbone if it was trained as adapters of it."""
    if args.lora_rank and (adapter := shared_adapter(args)):
        reward = RewardModel.from_backbone(policy)
        load_adapter(reward, adapter)
        return reward
    if args.lora_rank:
        print0(f"{args.reward} has no adapters of {args.model}, so it is held whole beside it. To share one backbone, "
               "train the reward model with --lora-rank")
    return RewardModel.from_pretrained(args.reward, DTYPES[args.dtype], device)


def load_critic(policy, reward, args, device):
    """The critic: the reward model's backbone under a head of zeros, so that it predicts nothing at first."""
    if not args.lora_rank:
        critic = copy.deepcopy(reward)
    elif shared_adapter(args):
        critic = load_reward(policy, args, device)
    else:
        critic = RewardModel.from_backbone(reward)
        train_sft.prepare(critic, args, device)
    critic.model.checkpoint = args.checkpoint_activations
    nn.init.zeros_(critic.score.weight)
    return critic


def shared_adapter(args):
    """The directory of --reward's adapters if they were trained on --model; else None."""
    path = Path(args.reward, "adapter", "adapter_config.json")
    if not path.is_file():
        return None
    with reading(path):
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return path.parent if base and Path(base).resolve() == Path(args.model).resolve() else None


def policy_memory(args):
    """Memory estimate of a PPO or Quark step: that of training the policy, and for PPO the critic. Rollouts need a
    key-value cache in place of activations (1.5 times its size while finished rows are removed)."""
    config, _ = read_config(args.model, quiet=True)
    dtype, tokens = DTYPES[args.dtype], args.max_length + args.max_new_tokens
    model = on_meta(LLaMA, config).to(dtype)
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, train_sft.lora_modules(args))
    rows = min(args.micro_batch_size, args.batch_size // world_size())
    estimate = memory_estimate(model, rows * tokens, args.checkpoint_activations)
    if args.stage == "ppo":
        for name in ("gradients", "optimizer", "activations"):
            estimate[name] *= 2
    if not args.lora_rank:
        estimate["weights"] *= 4 if args.stage == "ppo" else 3
    elif not shared_adapter(args):
        estimate["weights"] *= 2
    per_token = 3 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    cache = per_token * tokens * args.sample_batch_size
    estimate["activations"] = max(estimate["activations"], cache)
    return estimate


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


def built_in_stage(stage, seed, noise, device=""):
    """The directory of the model that a stage makes in the built-in world."""
    argv = [stage, "--seed", str(seed), "--noise", str(noise), "--device", device]
    return train_sft.make_once(main, argv, parse(argv))


built_in_reward = functools.partial(built_in_stage, "reward")


def check_policy_flags(args):
    """Flags that contradict each other; InputError says which."""
    if bool(args.validation) != bool(args.gold_reward):
        raise InputError("--validation FILE and --gold-reward DIR, the reward model that chooses, belong together")
    if args.validation and not args.data:
        raise InputError("--validation needs --data: the built-in world has validation instructions of its own")
    if args.steps < args.warmup:
        raise InputError(f"--steps {args.steps} is less than --warmup {args.warmup}: the rate would not reach --lr")
    if args.rollouts % world_size():
        raise InputError(f"--rollouts {args.rollouts} is not a multiple of the {world_size()} ranks")
    if args.rollouts < getattr(args, "count", 1):
        raise InputError(f"--rollouts {args.rollouts} is less than the {args.count} quantiles (--count)")
    out, reward = Path(args.out).resolve(), Path(args.reward).resolve()
    gold_reward = Path(args.gold_reward).resolve() if args.gold_reward else None
    if reward == gold_reward:
        raise InputError(f"--gold-reward {args.gold_reward} is the --reward: it cannot see over-optimization; train a "
                         "second one on other pairs")
    if out in (reward, gold_reward):
        raise InputError(f"--out {args.out} is a reward model that this run reads, and would overwrite; choose another")
    check_reward_format(args)


def check_reward_format(args):
    recorded = read_config(args.reward, quiet=True)[1].get("prompt_format", args.format)
    if recorded != args.format:
        raise InputError(f"{args.reward} was trained with --format {recorded}, this run has {args.format}")


def main(argv=None):
    args = parse(argv)
    if DTYPES[args.dtype] in HALF and not args.lora_rank:
        raise InputError(f"--dtype {args.dtype} with all weights: at these learning rates rounding swallows the "
                         "updates: give --lora-rank 16, or leave --dtype at float32")
    device = train_sft.set_up(args)
    if not args.data:
        args.model = args.model or train_sft.built_in(args.seed, "corrects", args.device)
        if "reward" in args:
            args.reward = args.reward or built_in_reward(args.seed, args.noise, args.device)
        torch.manual_seed(args.seed)                             # training these has drawn random numbers
    for name, what in (("reward", "the directory of a reward model"), ("samples", "a file of the policy's responses")):
        if args.data and getattr(args, name, None) == "":
            raise InputError(f"--data needs --{name}, {what}")
    if args.stage in PAIR_METHODS:
        return train_pairs(args, device)
    return train_policy(args, device)


def add_pair_flags(p):
    p.add_argument("--held-out", type=positive_int, help="pairs kept for measuring accuracy (default: a tenth, at most "
                   "500)")
    p.add_argument("--steps", type=positive_int, help="optimizer steps (default: from --epochs)")
    p.add_argument("--epochs", type=in_range(float, 1e-6), help="passes over the pairs, if --steps is not given")
    p.add_argument("--warmup", type=fraction, default=0.03, help="fraction of the steps; then cosine decay")


def add_rlp_flags(uml, spg):
    for p in (uml, spg):
        p.add_argument("--samples", default="", help="responses of PPO's policy, as simulate.py sample --outputs 10 "
                       "--temperature 1 writes them (default: the built-in world's)")
    uml.add_argument("--lam", type=nonnegative_float, default=0.5, help="weight of L_M, see losses.py")
    spg.add_argument("--reward", default="", help="reward model that finds the best of the responses that agree")
    spg.add_argument("--gamma", type=nonnegative_float, default=0.5, help="fraction of the responses that must agree")
    spg.add_argument("--judge", nargs=argparse.REMAINDER, default=[], help="who says what agrees: flags of "
                     "simulate.py refine, last, as --model DIR, or --api URL --api-model NAME (default: equal words)")


def add_rollout_flags(p):
    p.add_argument("--reward", default="", help="reward model's directory (default: the stage reward's)")
    p.add_argument("--validation", default="", help="instructions to choose the checkpoint on")
    p.add_argument("--gold-reward", default="", help="a second reward model, of other pairs, that chooses it")
    p.add_argument("--steps", type=positive_int, help="rollouts; each is followed by several updates")
    p.add_argument("--rollouts", type=positive_int, help="responses per step, over all ranks")
    p.add_argument("--max-new-tokens", type=positive_int, help="a response is truncated here")
    p.add_argument("--sample-batch-size", type=positive_int, help="responses sampled side by side: what fits")
    p.add_argument("--temperature", type=in_range(float, 0.01), default=1.0, help="of sampling and of scoring")
    p.add_argument("--epochs", type=positive_int, default=2, help="passes over the rollouts of a step")
    p.add_argument("--warmup", type=positive_int, default=5, help="warm-up steps; then linear decay to 0")
    p.add_argument("--eval-every", type=positive_int, help="steps between measurements on validation")
    p.add_argument("--ending-penalty", type=nonnegative_float, default=1.0,
                   help="subtracted from the score of a truncated response, in standard deviations")


def add_ppo_flags(p):
    p.add_argument("--beta", type=nonnegative_float, default=0.05, help="KL penalty: rewards per nat")
    p.add_argument("--kl", choices=("k1", "k2", "k3", "clamped"), default="k1", help="see losses.kl_estimate")
    p.add_argument("--target-kl", type=nonnegative_float, default=0.0, help="adapt beta to this KL (0: fixed)")
    p.add_argument("--whiten-rewards", action="store_true", help="as AlpacaFarm did, without a shift")
    p.add_argument("--gamma", type=fraction, default=1.0, help="discount")
    p.add_argument("--lam", type=fraction, default=0.95, help="lambda of GAE")
    p.add_argument("--ratio-clip", type=nonnegative_float, default=0.2, help="the policy's clip range")
    p.add_argument("--value-clip", type=nonnegative_float, default=0.2, help="the critic's clip range")
    p.add_argument("--value-coef", type=nonnegative_float, default=0.1, help="weight of the value loss")


def add_quark_flags(p):
    p.add_argument("--quantiles", choices=("best", "all"), default="all", help="see quark_update")
    p.add_argument("--count", type=in_range(int, 1, 8), default=4, help="number of quantiles")
    p.add_argument("--kl-coef", type=nonnegative_float, default=0.05, help="weight of KL(policy || reference)")
    p.add_argument("--entropy-coef", type=nonnegative_float, default=0.0, help="weight of the entropy bonus")


def parse(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["ppo", *argv]                                    # the default stage
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    stages, parsers = parser.add_subparsers(dest="stage", required=True), {}
    for stage in DEFAULTS:
        p = parsers[stage] = stages.add_parser(
            stage, help="pairs -> model" if stage in PAIR_METHODS else "reward model -> policy",
            epilog=train_sft.describe_defaults(DEFAULTS[stage]), formatter_class=HelpFormatter)
        train_sft.add_common_flags(p)
        p.set_defaults(lora_rank=0, autocast=False, compile=False, zero=False)
        (add_pair_flags if stage in PAIR_METHODS else add_rollout_flags)(p)
        p.add_argument("--noise", type=in_range(float, 0, 0.5), default=0.25,
                       help="fraction of flipped labels in the built-in world")
    parsers["dpo"].add_argument("--beta", type=nonnegative_float, default=0.1, help="rewards per nat of log-ratio")
    add_ppo_flags(parsers["ppo"])
    add_quark_flags(parsers["quark"])
    add_rlp_flags(parsers["uml"], parsers["spg"])

    args = parser.parse_args(argv)
    train_sft.fill_defaults(args, DEFAULTS[args.stage])
    noise = f"noise-{args.noise}" if args.noise != 0.25 and not args.data else ""
    args.out = args.out or train_sft.folder_name(args, args.stage, noise)
    return args


if __name__ == "__main__":
    run_main(main, "--resume")
