"""CUT, contrastive unlikelihood training: judged responses -> policy.

  python train_cut.py                                       the built-in world, online: sample, judge, train, repeat
  python train_cut.py --model DIR --data judged.json        offline: one pass over judged responses
  torchrun --nproc_per_node 8 train_cut.py --model ...      the same on eight GPUs

A bad response y to an instruction x, with a judgment j- that says what is wrong, is read twice: after x alone, and
after x and j-. Tokens that the judgment makes more than lambda times as likely are the ones it complains about: under x
they get unlikelihood, the rest of the response likelihood (L1). The whole of y after (x, j-) gets likelihood (L2):
this is what teaches the model to read judgments. Good responses get plain likelihood. `diff train_sft.py train_cut.py`
shows what this takes; the formula is losses.cut_token_loss.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train_sft
from data import (FORMATS, Batches, InputError, Tokenizer, World, collate, downsample_positives, encode,
                  read_json, read_judged, split, write_json_lines)
from evaluate import MAX_NEW_TOKENS, answer_errors, detection, exact_match, mark, judged_and_plain_logp, win_rate
from losses import cut_token_loss, detect, detection_sums
from model import (ATTENTION_PROJECTIONS, DTYPES, MLP_PROJECTIONS, LLaMA, StopSignal, add_lora, all_sum,
                   check_memory, run_main, load_resume, lr_at, make_optimizer, memory_estimate, merge_lora, open_metrics,
                   peak_memory, print0, read_config, save_adapter, save_resume, set_execution, setup_distributed,
                   in_range, write_json)
from simulate import JUDGES, corrected, sample_responses

# What a flag that was not given means: (with --data, in the built-in world). With --data they are the paper's; its
# learning rate of 4e-4 was never reached in an online run, whose data ended within the warm-up: 1.5e-4 is what ran.
DEFAULTS = {"batch_size": (8, 32), "micro_batch_size": (1, 8), "lr": (1.5e-4, 8e-4), "rounds": (1, 3),
            "steps": (-1, 94), "epochs": (1.0, 0.0), "format": ("cut", "short"), "max_length": (1024, 256),
            "alpha": (1.0, 0.5), "downsample": (0.25, -1.0), "replay": (0, 32), "lora_rank": (16, 0)}

# What is trained on, as functions of a round's judged records. CUT takes them as they are; the others are the methods
# that it is compared with, at equal numbers of updates and with the same replay. The right answer that
# `--judge corrects` states is in r["correction"].
RECIPES = {
    "cut": lambda judged: judged,
    "hindsight": lambda judged: judged,                                     # L2 alone: the judgment joins the prompt
    "expert": lambda judged: [r for r in judged if r["judgment"] is None],  # expert iteration: the good ones only
    "corrected": lambda judged: [{**r, "output": r["correction"], "judgment": None} for r in judged],
    "sft": lambda judged: [{**r, "output": r["demonstration"], "judgment": None} for r in judged],
}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # what goes in and out
    p.add_argument("--model", default="", help="checkpoint directory to start from (default: made by train_sft.py)")
    p.add_argument("--data", default="", help="judged responses, JSON or JSONL (default: online in the built-in world)")
    p.add_argument("--format", choices=FORMATS, help="prompt format (default: cut; short in the built-in world)")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="the built-in world's judge")
    p.add_argument("--filter-noise", action="store_true", help="leave out '$ERROR$' and 'perfect' judgments")
    p.add_argument("--downsample", type=float, help="positives kept per negative (default 0.25; -1 keeps all)")
    p.add_argument("--out", default="", help="run folder (default: out/cut-SEED, or out/cut-DATA)")
    p.add_argument("--resume", action="store_true", help="go on from the last save in the run folder")
    # method
    p.add_argument("--recipe", choices=RECIPES, default="cut", help="what to train on; all but cut are baselines")
    p.add_argument("--flags", choices=("live", "frozen", "all"), default="live",
                   help="flag tokens with the model as it trains (the paper), as it was when the round began, or all")
    p.add_argument("--lam", type=in_range(float, 1e-6), default=1.1, help="lambda: flag where p(y|x,j) > lambda p(y|x)")
    p.add_argument("--alpha", type=in_range(float, 0), help="weight of unlikelihood (default 1)")
    p.add_argument("--gamma", type=in_range(float, 0), default=0.0, help="exponent of its dynamic weight p(y|x,j)^gamma")
    p.add_argument("--rounds", type=in_range(int, 1), help="online rounds (default 3)")
    p.add_argument("--samples", type=in_range(int, 1), default=1500, help="instructions answered and judged in a round")
    p.add_argument("--offline", action="store_true", help="judge all rounds' responses of the first model at once")
    p.add_argument("--replay", type=in_range(int, 0), help="judged SFT examples trained on beside each batch (default 0)")
    # optimization
    p.add_argument("--steps", type=in_range(int, 1), help="optimizer steps a round (default: from --epochs)")
    p.add_argument("--epochs", type=in_range(float, 0), help="passes over the data, if --steps is not given (default 1)")
    p.add_argument("--batch-size", type=in_range(int, 1), help="examples a step, over all ranks (default 8)")
    p.add_argument("--micro-batch-size", type=in_range(int, 1), help="examples a forward pass: what fits (default 1)")
    p.add_argument("--lr", type=in_range(float, 0), help="peak learning rate of the first round (default 1.5e-4)")
    p.add_argument("--lr-decay", type=in_range(float, 0), default=0.6, help="factor on the peak a round")
    p.add_argument("--warmup", type=in_range(float, 0, 1), default=0.1, help="share of a round; then cosine decay")
    p.add_argument("--lora-rank", type=in_range(int, 0), help="train adapters of this rank (0: all weights; default 16)")
    p.add_argument("--lora-alpha", type=in_range(float, 0), default=16.0, help="adapters are scaled by alpha / rank")
    p.add_argument("--lora-dropout", type=in_range(float, 0, 1), default=0.05, help="dropout in front of the adapters")
    p.add_argument("--lora-attention", action="store_true", help="adapt the attention projections too")
    p.add_argument("--clip", type=in_range(float, 0), default=1.0, help="gradient norm is clipped to this")
    p.add_argument("--seed", type=in_range(int, 0), default=0, help="of the world, the sampling, the data's order")
    # machine
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    p.add_argument("--checkpoint-activations", action="store_true", help="recompute blocks in backward: less memory")
    p.add_argument("--autocast", action="store_true", help="products in bf16, on weights in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--zero", action="store_true", help="share the optimizer's state out over the ranks")
    p.add_argument("--max-length", type=in_range(int, 2), help="tokens; longer examples are left out (default 1024)")
    p.add_argument("--save-every", type=in_range(int, 1), default=50, help="steps between saves for --resume")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="what the table is measured on")
    args = p.parse_args(argv)
    for name, (with_data, built_in) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, with_data if args.data else built_in)
    args.out = args.out or f"out/cut-{Path(args.data).stem if args.data else args.seed}"
    if args.data and (args.offline or args.replay or args.recipe in ("corrected", "sft")):
        raise InputError("--offline, --replay and the recipes corrected and sft are for the built-in world, not --data")
    return args


def judged_round(model, tokenizer, world_, number, args, rank, world):
    """The data of one online round: fresh instructions, answered by the model as it is now and judged."""
    records = world_.instructions("train", args.samples, f"round {number}")
    texts = sample_responses(model, tokenizer, records, args.format, max_new_tokens=MAX_NEW_TOKENS, temperature=0.7,
                    seed=args.seed * 1000 + number, rank=rank, world=world, label=f"round {number + 1}: sampling")
    return [{"id": r["id"], "instruction": r["instruction"], "input": "", "output": text or ".",
             "judgment": JUDGES[args.judge](text or ".", r["reference"]), "reference": r["reference"],
             "correction": corrected(text or ".", r["reference"]), "demonstration": world_.demonstrate_once(r)}
            for r, (text,) in zip(records, texts)]


def pair_batch(part, weight, flags, args, device, detector=None):
    """Bad responses, each read twice: (tokens, targets, token_loss, flags given or None), the first two with an entry
    for each reading. `flags` holds those decided beforehand, if any: {example id: (response tokens,) bool}. A
    `detector` is a model whose dropout would make the two readings differ by itself: it decides without.

    Only the prompts differ, so the two readings have the same N response tokens in the same order; their positions
    differ, which is why everything is gathered by response token and never by position."""
    judged = collate([(e.judged, e.response) for e in part], device)        # (b, T1) twice: Align-N, after (x, j-)
    plain = collate([(e.prompt, e.response) for e in part], device)         # (b, T2) twice: Misalign, after x alone
    w = token_weights(part, [weight] * len(part), args.dtype, device)       # (N,)
    given = torch.cat([flags[e.id] for e in part]).to(device) if flags else None        # (N,)

    if detector is not None:
        detector.eval()
        with torch.no_grad():
            given = detect(*detector([judged[0], plain[0]], [judged[1], plain[1]]), args.lam)
        detector.train()

    def token_loss(logp, s):                                                # logp (2, n), of the tokens s of the N
        flagged = detect(logp[0], logp[1], args.lam) if given is None else given[s]
        return w[s] * cut_token_loss(logp[0], logp[1], flagged, args.alpha, args.gamma)

    return [judged[0], plain[0]], [judged[1], plain[1]], token_loss, given


def single_batch(part, device, dtype):
    """Rows that get plain likelihood, good responses (Align-P) and replay; part holds (example, weight) pairs."""
    tokens, targets = collate([(e.prompt, e.response) for e, _ in part], device)
    w = token_weights([e for e, _ in part], [weight for _, weight in part], dtype, device)
    return tokens, targets, lambda logp, s: -w[s] * logp[0], None


def token_weights(examples, weights, dtype, device):
    """An example's weight spread evenly over its response tokens (a mean over the example): (N,)."""
    lengths = torch.tensor([len(e.response) for e in examples])
    wide = torch.float64 if dtype == "float64" else torch.float32
    return (torch.tensor(weights, dtype=wide) / lengths).repeat_interleave(lengths).to(device)


def largest_micro_batch(examples, size, max_length):
    """(the (rows, tokens) of its passes, response tokens) of the micro-batch that may take most memory: `size` bad
    responses, read twice, or twice as many good ones, read once. Without examples (those of an online run are yet to
    be sampled), all of max_length."""
    bad, good = ([e for e in examples if bool(e.judged) == kind] for kind in (True, False))
    length = max((len(e.response) for e in examples), default=max_length)
    kinds = [[(size, max(len(prompt) + len(e.response) for e, prompt in zip(bad, prompts)) - 1) for prompts in
              ([e.judged for e in bad], [e.prompt for e in bad])]] if bad else []
    kinds += [[(2 * size, max(e.size() for e in good) - 1)]] if good else []
    passes = max(kinds or [[(size, max_length)] * 2], key=lambda passes: sum(b * t for b, t in passes))
    return passes, passes[0][0] * length


def table(results):
    """results.json as text, a line a round."""
    lines = ["round  exact match  errors  win rate vs SFT  precision  recall  flagged  seconds",
             f"SFT          {results['sft']['exact_match']:.3f}   {results['sft']['errors']:.3f}"]
    for i, r in enumerate(results["rounds"], 1):
        lines.append(f"{i:<5}        {r['exact_match']:.3f}   {r['errors']:.3f}    {r['win_rate']:.3f} +- "
                     f"{r['win_rate_se']:.3f}      {r['precision']:.3f}   {r['recall']:.3f}    {r['flagged']:.3f}  "
                     f"{r['seconds']:7.1f}")
    lines.append("precision, recall and flagged: of the round's bad responses, with the model as the round began; "
                 f"{results['seconds']:.0f} s in all, peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)


def examples_marked(tokenizer, out, number, count=2):
    """What CUT sees: sampled responses of a round, the flagged tokens in brackets."""
    judged = read_json(out / f"round-{number}.jsonl")
    detected = {r["id"]: torch.tensor(r["flags"]) for r in read_json(out / f"flags-{number}.jsonl", empty=True)}
    lines = ["", "what CUT saw in the last round: in brackets, the tokens that the judgment made more than lambda "
             "times as likely"]
    for r in [r for r in judged if r["id"] in detected and detected[r["id"]].any()][:count]:
        marked = mark(tokenizer.pieces(tokenizer.encode_response(r["output"])), detected[r["id"]].tolist())
        lines.append(f"  instruction  {r['instruction']}\n  judgment     {r['judgment']}\n  response     {marked}\n")
    return "\n".join(lines)


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
        judged = downsample_positives(read_judged(args.data, args.filter_noise), args.downsample)
        bad = sum(r["judgment"] is not None for r in judged)
        print0(f"training on {bad} negatives and {len(judged) - bad} positives")
        answered = encode(tokenizer, judged, args.format, args.max_length)
        replay, test = [], []
    else:
        args.model = args.model or train_sft.built_in(args.seed, args.judge, args.device)
        tokenizer = Tokenizer.from_pretrained(args.model)
        world_ = World(args.seed)
        replay = [r for r in world_.demonstrations(4000, JUDGES[args.judge], "replay") if r["judgment"]]
        replay = encode(tokenizer, replay, args.format, args.max_length, hindsight=True) if args.replay else []
        answered, test = [], world_.instructions(args.split, 800)

    # --- memory, before any of it is taken
    targets = MLP_PROJECTIONS + (ATTENTION_PROJECTIONS if args.lora_attention else ())
    size = min(args.micro_batch_size, args.batch_size // world)
    check_memory(memory_estimate(
        read_config(args.model, quiet=True)[0], dtype, *largest_micro_batch(answered, size, args.max_length),
        lora_rank=args.lora_rank, lora_dropout=args.lora_dropout, targets=targets,
        checkpoint=args.checkpoint_activations, autocast=args.autocast, zero_ranks=world if args.zero else 1,
        device_type=device.type), device)

    # --- model and optimizer
    stop = StopSignal()
    model = LLaMA.from_pretrained(args.model, dtype, device)
    if args.lora_rank:
        trainable = add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout, targets)
        print0(f"training {trainable / 1e6:.1f} M adapter parameters, the rest is frozen")
    detector = model if args.lora_rank and args.lora_dropout and args.flags == "live" else None
    set_execution(model, device, args.checkpoint_activations, args.compile, args.autocast)
    optimizer = make_optimizer(model, zero=args.zero)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
    results, position = {"rounds": []}, {"round": 0, "step": 0}
    if test:
        _, sft_errors = answer_errors(model, tokenizer, test, args.format, rank, world)
        results["sft"] = {"exact_match": exact_match(sft_errors), "errors": sum(sft_errors) / len(test)}
    if args.resume:
        position = load_resume(out / "resume.pt", model, optimizer, vars(args))
        results["rounds"] = json.loads(position["results"])
    elif rank == 0:
        for old in [*out.glob("round-*.jsonl"), *out.glob("flags-*.jsonl"), *out.glob("resume.pt")]:
            old.unlink()
    all_sum([0], device)                                                    # no rank may find an old file
    metrics = open_metrics(out / "metrics.jsonl", position["round"] * args.steps + position["step"], rank)
    run = {"prompt_format": args.format, "run": vars(args)}

    stopping = False
    for number in range(position["round"], args.rounds):
        # --- this round's responses and judgments; what the detector makes of them
        round_time, start = time.time(), position["step"] if number == position["round"] else 0
        if not args.data:
            for n in range(number, args.rounds if args.offline else number + 1):
                path = out / f"round-{n}.jsonl"                             # offline: all rounds from the first model
                if not path.is_file():
                    judged = judged_round(model, tokenizer, world_, n, args, rank, world)
                    if rank == 0:
                        write_json_lines(path, judged)
                    all_sum([0], device)                                    # the others wait until the file is there
            judged = read_json(out / f"round-{number}.jsonl")
            answered = encode(tokenizer, judged, args.format, args.max_length)
        examples = answered if args.recipe == "cut" else encode(
            tokenizer, RECIPES[args.recipe](judged), args.format, args.max_length, hindsight=args.recipe == "hindsight")
        flags = {}
        if args.flags == "all":
            flags = {e.id: torch.ones(len(e.response), dtype=torch.bool) for e in examples if e.judged}
        if test or args.flags == "frozen":
            path = out / f"flags-{number}.jsonl"                            # kept: a resumed run's model has moved on
            if not (start and path.is_file()):
                bad = [e for e in answered if e.judged]
                detected = [detect(*logp, args.lam).tolist() for logp in judged_and_plain_logp(model, bad, device)]
                if rank == 0:
                    write_json_lines(path, [{"id": e.id, "flags": f} for e, f in zip(bad, detected)])
                all_sum([0], device)
            detected = {r["id"]: torch.tensor(r["flags"]) for r in read_json(path, empty=True)}
            flags = detected if args.flags == "frozen" else flags
        batches = Batches([e.size() for e in examples], args.batch_size, args.seed + number)
        replays = Batches([e.size() for e in replay], args.replay, args.seed + 1000 + number) if replay else None
        steps = args.steps if args.steps >= 0 else math.ceil(args.epochs * batches.per_epoch)
        if args.data:
            print0(f"{len(examples)} examples, {steps} steps of {args.batch_size} over {world} ranks; an epoch's last "
                   f"batch has {len(examples) - (batches.per_epoch - 1) * args.batch_size}")

        # --- loop
        bar = tqdm(range(start, steps), desc=f"round {number + 1}: cut", initial=start, total=steps, disable=rank > 0,
                   unit="step", leave=False)
        for step in bar:
            step_time = time.time()
            torch.manual_seed((args.seed * 1000 + number) * 10**6 + step + 10**9 * rank)    # dropout: the step decides
            batch = [examples[i] for i in batches(step)]                    # the whole step's examples, on every rank
            again = [replay[i] for i in replays(step)] if replay else []
            mine = batch[rank::world]
            pairs = [e for e in mine if e.judged]
            singles = [(e, 1 / len(batch)) for e in mine if not e.judged]
            singles += [(e, 1 / len(again)) for e in again[rank::world]]
            if not pairs and not singles:                                   # an uneven tail left this rank without any
                singles = [(batch[0]._replace(judged=None), 0.0)]
            micro = [pair_batch(part, 1 / len(batch), flags, args, device, detector)
                     for part in chunks(pairs, args.micro_batch_size)]
            micro += [single_batch(part, device, args.dtype) for part in chunks(singles, 2 * args.micro_batch_size)]
            loss_sum, seen = 0.0, torch.zeros(5, dtype=torch.float64)
            for i, (tokens, targets, token_loss, given) in enumerate(micro):
                wrapped.require_backward_grad_sync = i == len(micro) - 1
                loss, logp = wrapped(tokens, targets, token_loss)           # already a mean over the step's examples
                (loss * world).backward()                                   # DDP averages over ranks: hence * world
                loss_sum += loss.item()
                if len(logp) == 2:
                    seen += detection_sums(*logp, detect(*logp, args.lam) if given is None else given).cpu()
            loss_sum, stopping, *seen = all_sum([loss_sum, stop.requested, *seen.tolist()], device)
            if not math.isfinite(loss_sum):
                raise FloatingPointError(f"step {step}: the loss is {loss_sum}; examples {[e.id for e in batch]}")
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            lr = lr_at(step, args.lr * args.lr_decay ** number, math.ceil(args.warmup * steps), steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # --- log and save
            count, flagged, log_ratio, flagged_loss, unflagged_loss = seen
            metrics({"step": number * steps + step, "round": number, "loss": loss_sum, "lr": lr,
                     "grad_norm": norm.item(), "flagged": flagged / max(1, count),
                     "log_ratio": log_ratio / max(1, count), "flagged_loss": flagged_loss / max(1, flagged),
                     "unflagged_loss": unflagged_loss / max(1, count - flagged), "seconds": time.time() - step_time})
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss_sum:.3f}", flagged=f"{flagged / max(1, count):.1%}")
            if stopping or (step + 1) % args.save_every == 0:
                save_resume(out / "resume.pt", model, optimizer,
                            {"round": number, "step": step + 1, "results": json.dumps(results["rounds"]),
                             "run": vars(args)}, rank)
            if stopping:
                break
        if stopping:
            break

        # --- evaluate
        if test:
            _, errors = answer_errors(model, tokenizer, test, args.format, rank, world)
            results["rounds"].append({
                "exact_match": exact_match(errors), "errors": sum(errors) / len(test),
                **dict(zip(("win_rate", "win_rate_se"), win_rate(errors, sft_errors))),
                **detection(tokenizer, detected, judged), "seconds": time.time() - round_time})
            save_resume(out / "resume.pt", model, optimizer,
                        {"round": number + 1, "step": 0, "results": json.dumps(results["rounds"]),
                         "run": vars(args)}, rank)

    # --- save
    if rank == 0:
        if args.lora_rank:
            save_adapter(model, out / "adapter", args.model)
            merge_lora(model)                                               # the next round's base, as published
        model.save_pretrained(out, tokenizer, extra=run)
    if test and rank == 0 and not stopping:
        results.update(seconds=time.time() - start_time, peak_memory_bytes=peak_memory(device))
        write_json(out / "results.json", results)
        print(table(results))
        if args.flags != "all" and results["rounds"]:
            print(examples_marked(tokenizer, out, args.rounds - 1))
    print0(f"{'stopped: go on with --resume; ' if stopping else ''}model in {out}, {time.time() - start_time:.0f} s")
    return 130 if stopping else 0


if __name__ == "__main__":
    run_main(main)
