"""How good responses are: exact match, errors, win rate; and what CUT's detector finds.

  python evaluate.py --model out/cut-0                                  a model on the built-in world's test split
  python evaluate.py --model out/cut-0 --against out/sft-0-corrects     and its win rate against another
  python evaluate.py compare --seeds 3 4 5                              every method beside CUT, as in the README
  python evaluate.py meter --data preferences.jsonl --labels truth.jsonl    agreement, variance and biases of a judge
"""
import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import torch

from data import InputError, Tokenizer, World, collate, read_preferences
from model import LLaMA, launch, print0, read_config, setup_distributed
from simulate import JUDGES, count_errors, mean_and_se, respond, wrong_words

MAX_NEW_TOKENS = 32          # the built-in world's longest answer has 16


def win_rate(errors, reference_errors):
    """Share of instructions on which fewer errors are made than by the reference, ties counting half, and its SE."""
    return mean_and_se([0.5 * (1 + (b > a) - (b < a)) for a, b in zip(errors, reference_errors)])


def answer_errors(model, tokenizer, records, form, rank=0, world=1):
    """Greedy answers to records with a `reference`: (texts, number of wrong words of each)."""
    texts = [ys[0] for ys in respond(model, tokenizer, records, form, max_new_tokens=MAX_NEW_TOKENS, temperature=0,
                                     seed=0, rank=rank, world=world, label="evaluating")]
    return texts, [count_errors(text, r["reference"]) if text != r["reference"] else 0
                   for text, r in zip(texts, records)]


def exact_match(errors):
    return sum(e == 0 for e in errors) / len(errors)


# ----------------------------------------------------------------------------------------------------------------------
# Detection: which words did the judgment make more likely, and were they the wrong ones?


@torch.no_grad()
def pair_logp(model, examples, device, batch_size=64):
    """Log-probabilities of bad responses after (x, j-) and after x: a list of (2, tokens of the response) tensors."""
    logp, was_training = [], model.training
    model.eval()                                                            # dropout would make the two readings differ
    for start in range(0, len(examples), batch_size):
        part = examples[start:start + batch_size]
        judged, plain = (collate([(prompt, e.response) for prompt, e in zip(prompts, part)], device)
                         for prompts in ([e.judged for e in part], [e.prompt for e in part]))
        both = model([judged[0], plain[0]], [judged[1], plain[1]]).cpu()    # (2, N)
        logp += both.split([len(e.response) for e in part], dim=1)
    model.train(was_training)
    return logp


def token_words(pieces):
    """For each token of a response the index of the word that it belongs to, in the order of data.units; the last
    token (EOS) has the index after the last word."""
    words, begin = [], 0
    spans = [m.span() for m in re.finditer(r"\w+|[^\w\s]", "".join(pieces[:-1]))]
    for piece in pieces[:-1]:
        last = begin + max(0, len(piece) - 1)                               # a piece may begin with a space
        words.append(next((k for k, (_, end) in enumerate(spans) if end > last), len(spans)))
        begin += len(piece)
    return words + [len(spans)]


def detection(tokenizer, detected, judged):
    """Flagged words against truly wrong words, over all bad responses: {"precision", "recall", "flagged"}.

    detected: {record id: flags of the tokens of its response}; a word counts as flagged if one of its tokens is.
    judged: records with output and reference. "flagged" is the share of tokens. A rate of nothing is 0."""
    hit = flagged = wrong = 0
    for r in judged:
        if str(r["id"]) in detected:
            on = detected[str(r["id"])].tolist()
            words = token_words(tokenizer.pieces(tokenizer.encode_response(r["output"])))
            chosen, truth = {w for w, f in zip(words, on) if f}, wrong_words(r["output"], r["reference"])
            hit, flagged, wrong = hit + len(chosen & truth), flagged + len(chosen), wrong + len(truth)
    tokens = sum(len(f) for f in detected.values())
    return {"precision": hit / max(1, flagged), "recall": hit / max(1, wrong),
            "flagged": sum(f.sum().item() for f in detected.values()) / max(1, tokens)}


def mark(pieces, flags):
    """The response as text, with flagged tokens in brackets."""
    return "".join(re.sub(r"^(\s*)(.*)$", r"\1[\2]", p) if on else p for p, on in zip(pieces, flags)
                   if on or p != "</s>")


# ----------------------------------------------------------------------------------------------------------------------
# The meter of annotators (AlpacaFarm section 3.4; definitions of AlpacaEval). Labels are 1 or 2 (1.5 a tie); an
# annotator, or a group of people, is a dict: pair -> list of its labels.


def vote(labels):
    """The most frequent labels (several if tied)."""
    return {v for v in labels if labels.count(v) == max(map(labels.count, labels))}


def agree(a, b):
    """Chance that a random element of a equals a random element of b: two sets of tied labels."""
    return len(a & b) / (len(a) * len(b))


def agreement(annotator, people):
    """Expected accuracy of one label of the annotator against the majority of the people with one left out (so that
    people can be scored by the same rule against themselves): mean and standard error over pairs."""
    scores = []
    for pair in annotator.keys() & people.keys():
        theirs = people[pair]
        majorities = [vote(theirs[:j] + theirs[j + 1:] or theirs) for j in range(len(theirs))]
        scores.append(sum(agree({x}, m) for x in annotator[pair] for m in majorities)
                      / len(annotator[pair]) / len(majorities))
    return mean_and_se(scores)


def variance(annotator):
    """Chance that one label differs from the majority of the annotator's other labels for the same pair; pairs with one
    label say nothing and are left out."""
    return mean_and_se([1 - sum(agree({x}, vote(own[:i] + own[i + 1:])) for i, x in enumerate(own)) / len(own)
                        for own in annotator.values() if len(own) > 1])


def bias(annotator, people):
    """Chance that the annotator's majority differs from the people's: what more labels would not average away."""
    both = annotator.keys() & people.keys()
    return mean_and_se([1 - agree(vote(annotator[pair]), vote(people[pair])) for pair in both])


def prefers(records, what):
    """Share of labels that go to the longer output ("length": pairs that differ by more than 30 characters) or to the
    one that was shown first ("position": records that note `switched`); 0.5 is no bias, unless quality leans so."""
    scores = []
    for r in records:
        second = r["preference"] - 1                                        # how much output_2 is preferred, 0 to 1
        longer = len(r["output_2"]) - len(r["output_1"])
        if what == "length" and abs(longer) > 30:
            scores.append(second if longer > 0 else 1 - second)
        elif what == "position" and "switched" in r and r.get("annotator") not in ("noise", "equal texts"):
            scores.append(second if r["switched"] else 1 - second)
    return mean_and_se(scores) if scores else (float("nan"), float("nan"))


def labels_of(records):
    """Preference records -> {pair: labels}. A pair stored the other way round is the same, its label 3 - label."""
    labels = {}
    for r in records:
        head, pair = (r["instruction"], r.get("input") or ""), (r["output_1"], r["output_2"])
        label = 1.5 if r["preference"] == 1.5 else 1 if r["preference"] < 1.5 else 2       # a vote: yes, no or tie
        label = label if pair <= pair[::-1] else 3 - label
        labels.setdefault((*head, *min(pair, pair[::-1])), []).append(label)
    return labels


def meter(args):
    """Prints agreement, variance and biases of one file of preferences, against another if there is one."""
    records = [r for path in args.data for r in read_preferences(path, ties=True)]
    annotator, line = labels_of(records), "{:<42} {:.3f} +- {:.3f}"
    print(f"{len(records)} labels of {len(annotator)} pairs")
    if any(len(v) > 1 for v in annotator.values()):
        print(line.format("variance", *variance(annotator)))
    for what, name in (("length", "prefers the longer (by > 30 characters)"), ("position", "prefers the first shown")):
        mean, se = prefers(records, what)
        if not math.isnan(mean):
            print(line.format(name, mean, se))
    if args.labels:
        people = labels_of(read_preferences(args.labels, ties=True))
        print(f"{len(annotator.keys() & people.keys())} pairs also in {args.labels}")
        if annotator.keys() & people.keys():
            print(line.format("agreement", *agreement(annotator, people)))
            print(line.format("bias", *bias(annotator, people)))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# The commands

# name in the table: the flags that make train_cut.py that method. All take the same number of updates of the same size,
# with the same replay, on instructions from the same streams.
METHODS = {
    "SFT on more demonstrations": ["--recipe", "sft"],
    "unlikelihood on every token": ["--flags", "all"],
    "expert iteration, same judge": ["--recipe", "expert"],
    "Hindsight (L2 alone)": ["--recipe", "hindsight"],
    "CUT offline": ["--offline"],
    "CUT": [],
    "CUT, frozen flags (ours)": ["--flags", "frozen"],
    "SFT on the answer that the judgment states": ["--recipe", "corrected"],
}


def gap_closed(results):
    """Share of the way from the SFT model's exact match to 1 that the last round has come."""
    sft = results["sft"]["exact_match"]
    return (results["rounds"][-1]["exact_match"] - sft) / (1 - sft)


def compare(args):
    """Runs train_cut.py once for every method and seed (finished runs are kept) and prints the table."""
    rows = {}
    for name, flags in METHODS.items():
        if "corrected" in flags and args.judge == "points":                 # this judge never states an answer
            continue
        for seed in args.seeds:
            out = Path(args.out) / args.split / args.judge / f"{seed}-{'-'.join(flags).replace('--', '') or 'cut'}"
            if not (out / "results.json").is_file():
                print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
                subprocess.run([sys.executable, str(Path(__file__).with_name("train_cut.py")), "--seed", str(seed),
                                "--judge", args.judge, "--split", args.split, "--out", str(out), *flags],
                               check=True, stdout=subprocess.DEVNULL)
            rows.setdefault(name, []).append(json.loads((out / "results.json").read_text(encoding="utf-8")))
    print(f"judge {args.judge}: exact match on the {args.split} split after each round, one column a seed; gap closed "
          "after the last round, mean and standard error over seeds")
    print(f"| | {' | '.join(f'seed {s}' for s in args.seeds)} | gap closed |")
    print("|---" * (len(args.seeds) + 2) + "|")
    sft = [f"{r['sft']['exact_match']:.3f}" for r in next(iter(rows.values()))]
    print(f"| SFT (start) | {' | '.join(sft)} | |")
    for name, runs in rows.items():
        cells = [" ".join(f"{x['exact_match']:.3f}".lstrip("0") for x in r["rounds"]) for r in runs]
        mean, se = mean_and_se([gap_closed(r) for r in runs])
        print(f"| {name} | {' | '.join(cells)} | {mean:.2f} +- {se:.2f} |")
    first = [r["rounds"][0] for r in rows["CUT"]]
    for what in ("precision", "recall"):
        print(f"detection before round 1: {what} {' '.join(f'{r[what]:.3f}' for r in first)}")
    return 0


def evaluate_world(args):
    """Exact match and errors of a model on the built-in world; with --against, its win rate."""
    rank, world, device = setup_distributed(args.device)
    found = []
    for directory in filter(None, (args.model, args.against)):
        tokenizer = Tokenizer.from_pretrained(directory)
        _, raw = read_config(directory, quiet=True)
        seed = raw.get("run", {}).get("seed", 0) if args.seed is None else args.seed
        records = World(seed).instructions(args.split, 800)
        model = LLaMA.from_pretrained(directory, device=device)
        _, errors = answer_errors(model, tokenizer, records, raw.get("prompt_format", "short"), rank, world)
        exact, se = mean_and_se([float(e == 0) for e in errors])
        print0(f"{directory}: {len(errors)} {args.split} instructions of world {seed}: exact match {exact:.3f} +- "
               f"{se:.3f}, errors per response {sum(errors) / len(errors):.3f}")
        found.append(errors)
    if args.against:
        wins, se = win_rate(*found)
        print0(f"win rate against {args.against}: {wins:.3f} +- {se:.3f}")
    return 0


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=("world", "compare", "meter"), default="world", help="default: world")
    p.add_argument("--data", nargs="+", help="meter: preference files of one annotator (several: repeated labels)")
    p.add_argument("--labels", help="meter: preferences to compare with, of people or the truth")
    p.add_argument("--model", help="model directory")
    p.add_argument("--against", help="a second one, for a win rate (fewer errors wins, ties count half)")
    p.add_argument("--seed", type=int, help="seed of the world (default: the one that the model was trained in)")
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="compare: world and model seeds")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="compare: what the judge says")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the world's instructions")
    p.add_argument("--out", default="out/compare", help="compare: folder of the runs")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = p.parse_args(argv)
    if args.command == "world" and not args.model:
        raise InputError("give --model DIR, or one of the commands compare and meter")
    if args.command == "meter" and not args.data:
        raise InputError("meter needs --data, one or more files of preferences")
    return args


def main(argv=None):
    args = parse(argv)
    return {"world": evaluate_world, "compare": compare, "meter": meter}[args.command](args)


if __name__ == "__main__":
    launch(main)
