"""CUT, contrastive unlikelihood training: judged responses -> policy (arXiv 2312.14591).

  python train_cut.py                                       the built-in world, online: sample, judge, train, repeat
  python train_cut.py --model DIR --data judged.json        offline: one pass over judged responses
  torchrun --nproc_per_node 8 train_cut.py --model ...      the same on eight GPUs

A bad response y to an instruction x, with a judgment j- that says what is wrong, is read by the same model in two
passes:

  after (x, j-)    It says The frog is white where it should say pink.    The   frog  is    white  and   lives ...
  after x alone                                                           The   frog  is    white  and   lives ...
  p(y|x, j-) / p(y|x), seed 0's SFT model                                 1.00  1.00  1.00  1.95   1.00  1.00

Tokens that the judgment makes more than lambda times as likely are those it complains about. After x they get
unlikelihood and the rest of the response likelihood (L1). The whole response after (x, j-) gets likelihood (L2), which
teaches the model to read judgments. Good responses get plain likelihood. `train` below is the loop of train_sft.py with
this loss; the formula is losses.cut_token_loss.

SDPO (--recipe sdpo, arXiv 2601.20802): the model that has read the judgment as advice, the teacher, teaches the model
that has not. Its prompt (data.FORMATS) asks for a better response than the judged one, CUT's for that very one: a
token that the judgment makes likelier is blamed by CUT and praised by SDPO. Before each round, gates are printed: does
the advice make right answers likelier, and does another response's advice not?

Replay: in the built-in world each step also repeats 32 judged SFT examples, (x, j) -> y, so that the model does not
unlearn to read judgments. SDPO has none: there y is a demonstration, and demonstrations are careless.

metrics.jsonl in the run folder has a line for each step:
  loss             mean over the step's examples (of a bad response L1 + L2), plus the mean over the replay, nats. Near
                   0 from the start: responses hardly differ, or the model is overfit
  flagged          fraction of the bad responses' tokens that are flagged. 0: the model cannot read judgments, and CUT
                   is SFT on bad responses; above 0.5: lambda is too low, or the judgments are human prose. SDPO: tokens
                   that the advice made less likely by more than lambda, as the round began
  lr, grad_norm    learning rate; gradient norm before clipping
  log_ratio        mean of log p(y|x, j-) - log p(y|x); in SDPO, where the teacher reads j-, the advantage A
  flagged_loss     unlikelihood of flagged tokens after x; with live detection at most ln(lambda / (lambda - 1))
  unflagged_loss   NLL of the other tokens after x
results.json has the table of the online rounds; round-N.jsonl and flags-N.jsonl (N from 0) what was judged and flagged,
flags-after.jsonl the last round's responses as the trained model reads them.
"""
import argparse
import copy
import functools
import math
import time
from pathlib import Path

import torch

from data import (
    ADVICE, IGNORE, JUDGES, Batches, HelpFormatter, InputError, Tokenizer, World, chunks, collate,
    corrected, downsample_positives, encode, fraction, in_range, nonnegative_float, nonnegative_int, positive_int,
    print0, read_json, read_judged, run_main, write_json, write_json_lines)
from evaluate import (
    MAX_NEW_TOKENS, answer_errors, detection, exact_match, judged_and_plain_logp, mark, win_rate)
from losses import (
    cut_step_loss, detect, detection_sums, find_flagged, full_vocabulary, nll_token_loss, sdpo_step_loss)
from model import (
    DTYPES, LLaMA, all_sum, barrier, copy_weights, distribute, lr_at, make_optimizer, peak_memory, rank,
    read_config, share, trained_weights, world_size)
from simulate import sample_responses
from train_sft import (
    add_common_flags, add_execution_flags, built_in, describe_defaults, estimate_memory, fill_defaults,
    folder_name, prepare, save_run, set_up, start_run)

# Defaults: (with --data, in the built-in world). With --data they are the published code's, except for --warmup (100
# steps there) and --lr: its peak was 4e-4, but its online runs ended within the warm-up, at 1.5e-4.
DEFAULTS = {
    "format": ("cut", "short"),
    "max_length": (2048, 256),
    "rounds": (1, 3),
    "steps": (None, 94),
    "epochs": (1.0, None),
    "batch_size": (8, 32),
    "micro_batch_size": (1, 8),
    "lr": (1.5e-4, 8e-4),
    "alpha": (1.0, 0.5),
    "downsample": (0.25, -1.0),
    "replay": (0, 32),
    "lora_rank": (16, 0),
    "save_every": (50, 50),
}


SHOWN = 200      # bad responses of --data, and of the trained model, that the detector and SDPO's gates show to people

# What a method trains on, as functions of a round's judged records. CUT takes them as they are; the others are what it
# is compared with, at equal numbers of updates and with the same replay.


def only_good(judged):
    """Expert iteration: the responses that the judge found nothing wrong with."""
    return [r for r in judged if r["judgment"] is None]


def only_corrections(judged):
    """SFT on the answer that the judge `corrects` states."""
    return [{**r, "output": r["correction"], "judgment": None} for r in judged]


def only_demonstrations(judged):
    """SFT on further demonstrations of the same instructions."""
    return [{**r, "output": r["demonstration"], "judgment": None} for r in judged]


RECIPES = {
    "cut": list,
    "hindsight": list,                # L2 alone: the judgment joins the prompt, see encode_round
    "sdpo": list,
    "expert": only_good,
    "corrected": only_corrections,
    "sft": only_demonstrations,
}


# ----------------------------------------------------------------------------------------------------------------------
# The lesson


def train(model, examples, flagged, replay, steps, peak, seed, run, args):
    """One round: judged responses. The loop of train_sft.py, but a bad response is read in two passes."""
    warmup = math.ceil(args.warmup * steps)
    batches = Batches([e.size() for e in examples], args.batch_size, seed)
    if replay:
        replays = Batches([e.size() for e in replay], args.replay, seed + 1000)
    for step in run.steps(steps, f"round {run.state['round'] + 1}: cut"):
        batch = [examples[i] for i in batches(step)]              # the whole step's examples, on every rank
        again = [replay[i] for i in replays(step)] if replay else []
        # A rank for which the last batch of an epoch has no example takes part with an empty response.
        local = share(batch) or [batch[0]._replace(response=[], judged_prompt=None)]
        bad = [(e, 1 / len(batch)) for e in local if e.judged_prompt]        # (example, its weight)
        good = [(e, 1 / len(batch)) for e in local if not e.judged_prompt]
        good += [(e, 1 / len(again)) for e in share(again)]
        micro = [judged_batch(part, flagged, args, run.device) for part in chunks(bad, args.micro_batch_size)]
        micro += [good_batch(part, args, run.device) for part in chunks(good, 2 * args.micro_batch_size)]

        loss_sum = 0.0
        for i, (tokens, targets, token_loss, per_token) in enumerate(micro):
            # DDP averages gradients over ranks in the last backward pass only; it reads this switch in forward.
            model.require_backward_grad_sync = i == len(micro) - 1
            loss, logp = model(tokens, targets, token_loss, per_token)      # weights make it a mean over examples
            (loss * world_size()).backward()                      # DDP takes the mean over ranks; we want the sum
            loss_sum += loss.item()
            if len(logp) == 2:                                    # two passes: bad responses
                run.add(**detection_sums(*logp, find_flagged(logp, args.lam, *per_token[1:])))

        lr = lr_at(step, peak, warmup, steps)
        loss, norm = run.update(loss_sum, lr, [e.id for e in batch])
        run.log(loss=loss, **detection_means(run.totals()), lr=lr, grad_norm=norm)


def judged_batch(part, flagged, args, device):
    """Bad responses in two passes: part of (example, weight) pairs -> tokens, targets, token_loss, per_token.

    Only the prompts differ, so the passes have the same N response tokens in the same order, at other positions: this
    is why everything is gathered by response token, never by position. `flagged`: columns {id: (tokens,)} of what is
    known of each token, the flags and log p(y|x) as the round began; none if CUT finds the flags as it trains.
    """
    # tokens, targets (b, T1) after (x, j-), and tokens, targets (b, T2) after x alone
    judged = collate([(e.judged_prompt, e.response) for e, _ in part], device)
    plain = collate([(e.prompt, e.response) for e, _ in part], device)
    per_token = [token_weights(part, args, device)]
    for column in flagged:
        per_token.append(torch.cat([column[e.id] for e, _ in part]).to(device))
    token_loss = functools.partial(cut_step_loss, lam=args.lam, alpha=args.alpha, gamma=args.gamma)
    if args.recipe == "sdpo":
        token_loss = functools.partial(sdpo_step_loss, form=args.divergence, alpha=args.alpha)
    return [judged[0], plain[0]], [judged[1], plain[1]], token_loss, per_token


def good_batch(part, args, device):
    """Good responses and replay, in one pass with plain likelihood: part of (example, weight) pairs -> as above."""
    tokens, targets = collate([(e.prompt, e.response) for e, _ in part], device)
    return tokens, targets, nll_token_loss, [token_weights(part, args, device)]


def token_weights(part, args, device):
    """Spreads an example's weight evenly over its response tokens: (example, weight) pairs -> (N,)."""
    lengths = torch.tensor([len(e.response) for e, _ in part])
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    weights = torch.tensor([weight for _, weight in part], dtype=dtype)
    return (weights / lengths).repeat_interleave(lengths).to(device)


def detection_means(total):
    """losses.detection_sums over all ranks -> means for the metrics file."""
    tokens, flagged = max(1, total["tokens"]), total["flagged"]
    return {
        "flagged": flagged / tokens,
        "log_ratio": total["log_ratio"] / tokens,
        "flagged_loss": total["flagged_loss"] / max(1, flagged),
        "unflagged_loss": total["unflagged_loss"] / max(1, tokens - flagged),
    }


class StudentAndTeacher(torch.nn.Module):
    """What SDPO trains, and its teacher, a copy of the trained weights (with LoRA, of A and B) that follows them. After
    each step, teacher <- (1 - rate) teacher + rate student: at rate 0 it is frozen, at 1 live, between them an EMA."""

    def __init__(self, student, run, rate):
        super().__init__()
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.student, self.teacher, self.rate = student, copy.deepcopy(student, shared), rate
        self.weights = trained_weights(self.teacher)
        self.teacher.requires_grad_(False)
        copy_weights(self.weights, run.state.get("teacher", self.weights), run.path)
        run.state["teacher"] = self.weights                                 # not a copy: a save finds them as they are
        run.optimizer.register_step_post_hook(self.follow)

    def follow(self, *_):
        for name, p in trained_weights(self.student).items():
            self.weights[name].lerp_(p.detach(), self.rate)

    def forward(self, tokens, targets, token_loss, per_token):
        """As LLaMA.forward, but the first of two passes, after the advice, is the teacher's."""
        if token_loss is nll_token_loss:                                    # good responses, one pass
            return self.student(tokens, targets, token_loss, per_token)
        advised, plain = zip(tokens, targets)
        with torch.no_grad():
            teacher_hidden = self.teacher.response_hidden(*advised)         # (N, D)
        hidden = self.student.response_hidden(*plain)                       # (N, D)
        response_ids = targets[1][targets[1] != IGNORE]                     # (N,)
        loss, *logp = full_vocabulary(hidden, self.student.lm_head.weight, teacher_hidden, self.teacher.lm_head.weight,
                                      response_ids, token_loss, per_token)
        return loss.sum(), torch.stack(logp).detach()


def print_gates(model, tokenizer, bad, flagged, args, device):
    """Whether the model has something to teach itself: how likely a token of the right answer is after the advice, and
    after the advice to another response, which must not do as well. Right answers are the records' references."""
    known = [e.record for e in bad if isinstance(e.record.get("reference"), str)]
    if not known:
        print0("no gates: no bad response has a 'reference', the right answer")
        return
    for advice, others in (("advice", known), ("another response's advice", known[1:] + known[:1])):
        right = [{**r, "output": r["reference"], "judgment": other["judgment"]} for r, other in zip(known, others)]
        examples = encode(tokenizer, right, args.format, math.inf)
        p = torch.cat(judged_and_plain_logp(model, examples, device), dim=1).exp().mean(1)
        print0(f"gate: a token of the right answer has p {p[0]:.3f} after {advice}, {p[1]:.3f} without")
    print0("gate: of the words made less likely {precision:.3f} are wrong; {recall:.3f} of the wrong words are"
           .format(**detection(tokenizer, flagged, known)))


# ----------------------------------------------------------------------------------------------------------------------
# A round: responses and judgments, flagged tokens, measurement


def collect_feedback(model, tokenizer, world, number, args):
    """Fresh instructions, answered by the model as it is now, and judged -> records."""
    asked = world.instructions("train", args.samples, f"round {number}")
    responses = sample_responses(
        model, tokenizer, asked, args.format, max_new_tokens=MAX_NEW_TOKENS, temperature=0.7,
        seed=args.seed * 1000 + number, label=f"round {number + 1}: sampling")
    judge, judged = JUDGES[args.judge], []
    for r, (text,) in zip(asked, responses):
        output = text or "."                                    # the readers refuse an empty output
        judged.append({
            "id": r["id"], "instruction": r["instruction"], "input": "", "output": output,
            "judgment": judge(output, r["reference"]), "reference": r["reference"],
            "correction": corrected(output, r["reference"]), "demonstration": world.demonstrate_once(r)})
    return judged


def load_feedback(model, tokenizer, world, number, args):
    """The judged responses of a round, kept in round-N.jsonl. Offline, the first model answers those of all rounds."""
    for n in range(number, args.rounds if args.offline else number + 1):
        path = Path(args.out, f"round-{n}.jsonl")
        if missing(path):
            judged = collect_feedback(model, tokenizer, world, n, args)
            write_on_rank_0(path, judged)
    return read_json(Path(args.out, f"round-{number}.jsonl"))


def flag_tokens(model, tokenizer, examples, name, args, device):
    """CUT's detector on bad responses, or for SDPO what advice makes less likely, with the model as it is now:
    {id: (tokens,) bool}, and log p(y|x), {id: (tokens,)}.

    Kept in flags-NAME.jsonl, with the texts for people, and because the model of a resumed run has moved on.
    """
    path = Path(args.out, f"flags-{name}.jsonl")
    if missing(path):
        logp = judged_and_plain_logp(model, examples, device)
        lines = []
        for e, (judged, plain) in zip(examples, logp):
            blamed = (plain, judged) if args.recipe == "sdpo" else (judged, plain)
            texts = {key: e.record.get(key) for key in ("instruction", "input", "judgment", "output", "reference")}
            lines.append({
                "id": e.id, **texts, "tokens": tokenizer.pieces(e.response),
                "log_ratio": (judged - plain).tolist(), "flags": detect(*blamed, args.lam).tolist(),
                "logp": plain.tolist()})
        write_on_rank_0(path, lines)
    lines = read_json(path, empty=True)
    return {r["id"]: torch.tensor(r["flags"]) for r in lines}, {r["id"]: torch.tensor(r["logp"]) for r in lines}


def to_flag(examples, judged, tokenizer, args):
    """The bad responses that are flagged before a round: all, but of --data only as many as a person may look at,
    unless --detect frozen trains on these flags."""
    if args.recipe != "cut" and not args.data:                  # the baselines' examples have lost their judgments
        examples = encode(tokenizer, judged, args.format, args.max_length)
    bad = [e for e in examples if e.judged_prompt]
    return bad[:SHOWN] if args.data and args.detect != "frozen" else bad


def all_tokens(examples):
    """Every token as flagged, for plain unlikelihood: {id: (tokens,) bool}."""
    return {e.id: torch.ones(len(e.response), dtype=torch.bool) for e in examples}


def missing(path):
    """Whether the file has yet to be made; all ranks agree."""
    return all_sum([not path.is_file()]) != [0]


def write_on_rank_0(path, content, write=write_json_lines):
    if rank() == 0:
        write(path, content)
    barrier()                                                   # the others wait until the file is there


def encode_round(tokenizer, judged, args):
    """What the round trains on."""
    return encode(tokenizer, RECIPES[args.recipe](judged), args.format, args.max_length,
                  hindsight=args.recipe == "hindsight")


def measure(model, tokenizer, test, sft_errors, args):
    """Exact match and errors on the test instructions, and the win rate against the SFT model."""
    _, errors = answer_errors(model, tokenizer, test, args.format)
    found = {"exact_match": exact_match(errors), "errors": sum(errors) / len(errors)}
    if sft_errors is not None:
        found["win_rate"], found["win_rate_se"] = win_rate(errors, sft_errors)
    return found, errors


HEADER = "round  exact match  errors  win rate vs SFT  precision  recall  flagged  seconds"
FOOTER = ("precision, recall and flagged: of the round's bad responses, with the model as the round began; {:.0f} s in "
          "all, peak memory {:.0f} MiB")


def row(number, found):
    """One line of the table, of what was measured after a round."""
    line = "{:<5}        {exact_match:.3f}   {errors:.3f}".format(number, **found)
    if "win_rate" in found:
        line += ("    {win_rate:.3f} +- {win_rate_se:.3f}      {precision:.3f}   {recall:.3f}    {flagged:.3f}  "
                 "{seconds:7.1f}").format(**found)
    return line


def examples_marked(out, number, count=2):
    """What CUT flagged: responses of a round with the flagged tokens in brackets."""
    lines = read_json(Path(out, f"flags-{number}.jsonl"), empty=True)
    flags = [flag for r in lines for flag in r["flags"]]
    marked = ["", f"what CUT flagged in the last round, {sum(flags)} of {len(flags)} tokens: in brackets, more than "
              "lambda times as likely after the judgment"]
    for r in [r for r in lines if any(r["flags"])][:count]:
        marked += [f"  instruction  {r['instruction']}", f"  judgment     {r['judgment']}",
                   f"  response     {mark(r['tokens'], r['flags'])}", ""]
    if not any(flags):
        marked.append("nothing is flagged: the model cannot read these judgments, and this was SFT on bad responses")
    return "\n".join(marked)


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


def load_data(args):
    """(tokenizer, the judged records of --data or None, the world or None, replay examples, test instructions)."""
    tokenizer = Tokenizer.from_pretrained(args.model)
    if args.data:
        judged = downsample_positives(read_judged(args.data, args.filter_noise), args.downsample)
        bad = sum(r["judgment"] is not None for r in judged)
        print0(f"training on {bad} negatives and {len(judged) - bad} positives")
        return tokenizer, judged, None, [], []
    world, replay = World(args.seed), []
    if args.replay:
        records = world.demonstrations(4000, JUDGES[args.judge], "replay", advice=args.recipe == "sdpo")
        records = [r for r in records if r["judgment"]]
        replay = encode(tokenizer, records, args.format, args.max_length, hindsight=True)
    return tokenizer, None, world, replay, world.instructions(args.split, 800)


def largest_micro_batch(examples, rows, max_length):
    """Tokens of the micro-batch that takes most memory: `rows` bad responses in two passes, or twice as many good ones
    in one. Without examples (those of an online run are yet to be sampled), all have max_length."""
    if not examples:
        return 2 * rows * max_length
    tokens = []
    for e in examples:
        if e.judged_prompt:
            tokens.append(len(e.judged_prompt) + len(e.prompt) + 2 * len(e.response))
        else:
            tokens.append(2 * e.size())
    return rows * max(tokens)


def main(argv=None):
    args = parse(argv)
    start = time.time()
    device = set_up(args)
    if not args.data and not args.model:
        args.model = built_in(args.seed, args.judge, args.device, ADVICE if args.recipe == "sdpo" else "")
        torch.manual_seed(args.seed)                            # training it has drawn random numbers
    tokenizer, judged, world, replay, test = load_data(args)
    examples = encode_round(tokenizer, judged, args) if judged else []

    # --- memory estimate, model and optimizer
    rows = min(args.micro_batch_size, args.batch_size // world_size())
    config, _ = read_config(args.model, quiet=True)
    copies = 2 if args.recipe == "sdpo" else 1                  # SDPO's teacher is one
    estimate_memory(config, largest_micro_batch(examples, rows, args.max_length), args, device, copies)
    model = LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device)
    prepare(model, args, device)
    optimizer = make_optimizer(model, zero=args.zero)
    results = {}
    if test:
        results["sft"], sft_errors = measure(model, tokenizer, test, None, args)
        print0(HEADER + "\n" + row("SFT", results["sft"]))
    run = start_run(model, optimizer, args, round=0, results=[])
    wrapped = distribute(StudentAndTeacher(model, run, args.teacher_rate) if args.recipe == "sdpo" else model)
    if rank() == 0 and not args.resume:
        for kind in ("round", "flags"):
            for old in Path(args.out).glob(f"{kind}-*.jsonl"):  # of an earlier run
                old.unlink()
    barrier()

    for number in range(run.state["round"], args.rounds):
        # --- the round's data, and what the detector makes of it
        round_start = time.time()
        if not args.data:
            judged = load_feedback(model, tokenizer, world, number, args)
            examples = encode_round(tokenizer, judged, args)
        bad = to_flag(examples, judged, tokenizer, args)
        flagged_at_start, old_logp = flag_tokens(model, tokenizer, bad, number, args, device)
        flagged = {"live": [], "frozen": [flagged_at_start, old_logp], "all": [all_tokens(examples)]}[args.detect]
        if args.recipe == "sdpo" and not run.state["step"]:
            print_gates(model, tokenizer, bad[:SHOWN], flagged_at_start, args, device)
        steps = args.steps or math.ceil(args.epochs * -(-len(examples) // args.batch_size))
        peak = args.lr * args.lr_decay ** number

        train(wrapped, examples, flagged, replay, steps, peak, args.seed + number, run, args)
        if run.stopped:
            break
        if test:
            found, _ = measure(model, tokenizer, test, sft_errors, args)
            found.update(detection(tokenizer, flagged_at_start, judged), seconds=time.time() - round_start)
            run.state["results"].append(found)
            print0(row(number + 1, found))
        if number + 1 == args.rounds:
            flag_tokens(model, tokenizer, bad[:SHOWN], "after", args, device)
        run.state.update(round=number + 1, step=0)
        if test or number + 1 < args.rounds:
            run.save()

    save_run(model, tokenizer, args)
    if run.stopped:
        return run.finish()
    if test:
        results.update(rounds=run.state["results"], seconds=time.time() - start, peak_memory_bytes=peak_memory(device))
        write_on_rank_0(Path(args.out, "results.json"), results, write_json)
        print0(FOOTER.format(results["seconds"], results["peak_memory_bytes"] / 2**20))
    if args.recipe == "cut" and args.detect != "all":
        print0(examples_marked(args.out, args.rounds - 1))
    return run.finish()


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, epilog=describe_defaults(DEFAULTS),
                                formatter_class=HelpFormatter)
    add_common_flags(p)
    add_execution_flags(p)
    # method
    p.add_argument("--recipe", choices=RECIPES, default="cut", help="method; all but cut and sdpo are baselines")
    p.add_argument("--detect", choices=("live", "frozen", "all"), default="live",
                   help="flag tokens with the model as it trains (the paper), as it was when the round began, or all")
    p.add_argument("--lam", type=in_range(float, 1e-6), default=1.1, help="lambda: flag where p(y|x,j) > lambda p(y|x)")
    p.add_argument("--alpha", type=nonnegative_float, help="weight of unlikelihood, or of SDPO's divergence")
    p.add_argument("--divergence", choices=("forward", "reverse", "jsd", "sampled"), default="reverse",
                   help="SDPO's loss: KL(teacher || student), KL(student || teacher), between them, of sampled tokens")
    p.add_argument("--teacher-rate", type=fraction, default=0.01,
                   help="how fast SDPO's teacher follows the model: 0 never, 1 at once")
    p.add_argument("--gamma", type=nonnegative_float, default=0.0, help="exponent of its weight p(y|x,j)^gamma")
    # data
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="the built-in world's judge")
    p.add_argument("--filter-noise", action="store_true", help="leave out '$ERROR$' and 'perfect' judgments")
    p.add_argument("--downsample", type=in_range(float, -1), help="positives kept per negative (-1 keeps all)")
    p.add_argument("--rounds", type=positive_int, help="online rounds")
    p.add_argument("--samples", type=positive_int, default=1500, help="instructions answered in a round")
    p.add_argument("--offline", action="store_true", help="collect all rounds' responses from the first model")
    p.add_argument("--replay", type=nonnegative_int, help="judged SFT examples repeated beside each batch, see above")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="what the table is measured on")
    # optimization
    p.add_argument("--steps", type=positive_int, help="optimizer steps per round (default: from --epochs)")
    p.add_argument("--epochs", type=nonnegative_float, help="passes over --data, if --steps is not given")
    p.add_argument("--lr-decay", type=nonnegative_float, default=0.6, help="factor on the peak rate a round")
    p.add_argument("--warmup", type=fraction, default=0.1, help="fraction of a round; then cosine")
    args = p.parse_args(argv)
    if args.recipe == "sdpo":
        args.replay = args.replay or 0                          # it would repeat careless demonstrations
    fill_defaults(args, DEFAULTS)
    args.format = args.format.removesuffix(ADVICE)
    parts = [part for part in (args.recipe, args.detect, args.judge) if part not in ("cut", "live", "corrects")]
    if args.recipe == "sdpo":
        args.format, args.detect = args.format + ADVICE, "frozen"           # flags are only logged
    args.out = args.out or folder_name(args, "cut", *parts, "offline" if args.offline else "")
    if args.data and (args.offline or args.replay or args.recipe in ("corrected", "sft")):
        raise InputError("--offline, --replay and the recipes corrected and sft are for the built-in world: leave "
                         "--data out, or these")
    return args


if __name__ == "__main__":
    run_main(main, "--resume")
