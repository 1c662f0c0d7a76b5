"""How good responses are: exact match, errors, win rate; and what CUT's detector finds.

  python evaluate.py --model out/cut-0                                  a model on the built-in world's test split
  python evaluate.py --model out/cut-0 --against out/sft-0-corrects     and its win rate against another
  python evaluate.py compare --seeds 3 4 5                              every method beside CUT, as in the README
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from data import InputError, Tokenizer, World, collate, units
from model import LLaMA, print0, read_config, setup_distributed
from simulate import JUDGES, count_errors, respond, wrong_words

MAX_NEW_TOKENS = 32          # the built-in world's longest answer has 16


def mean_and_se(values):
    """Mean and its standard error (sample standard deviation, ddof 1, over sqrt n)."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


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
    logp = []
    for start in range(0, len(examples), batch_size):
        part = examples[start:start + batch_size]
        judged, plain = (collate([(prompt, e.response) for prompt, e in zip(prompts, part)], device)
                         for prompts in ([e.judged for e in part], [e.prompt for e in part]))
        both = model([judged[0], plain[0]], [judged[1], plain[1]]).cpu()    # (2, N)
        logp += both.split([len(e.response) for e in part], dim=1)
    return logp


def token_words(pieces):
    """For each token of a response the index of the word that it belongs to, in the order of data.units; the last
    token (EOS) has the index after the last word."""
    words, begin = [], 0
    text = "".join(pieces[:-1])
    spans = [m.span() for m in re.finditer(r"\w+|[^\w\s]", text)]
    for piece in pieces[:-1]:
        middle = begin + len(piece) - 1                                     # pieces may begin with a space, none ends so
        words.append(next((k for k, (a, b) in enumerate(spans) if a <= middle < b), len(spans)))
        begin += len(piece)
    return words + [len(spans)]


def detection(tokenizer, examples, flags, records):
    """Precision and recall of flagged words against the words that are truly wrong, over all bad responses.

    flags: for each example a bool tensor over its tokens; a word counts as flagged if one of its tokens is."""
    hit = flagged = wrong = 0
    for e, f, r in zip(examples, flags, records):
        words = token_words(tokenizer.pieces(e.response))
        chosen = {w for w, on in zip(words, f.tolist()) if on}
        truth = wrong_words(r["output"], r["reference"])
        hit, flagged, wrong = hit + len(chosen & truth), flagged + len(chosen), wrong + len(truth)
    return hit / max(1, flagged), hit / max(1, wrong)


def mark(pieces, flags):
    """The response as text, with flagged tokens in brackets."""
    return "".join(re.sub(r"(\s*)(.*)", r"\1[\2]", p) if on else p for p, on in zip(pieces, flags)
                   if on or p != "</s>")
