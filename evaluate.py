"""Evaluation: exact match and win rates, detection, agreement of annotators, best-of-n.

One judged response on its way (probabilities of the built-in world's SFT model):

  instruction   I want to know what 23 less 20 is in one sentence.
  reference     The answer is 3.
  response      The answer is 4.              1 error: no exact match; it wins against a response with 2 errors
  judgment      It says The answer is 4 where it should say 3.

  tokens        The   answer  is    4     .     </s>
  p(y | x, j)   1.00  1.00    1.00  0.99  1.00  1.00
  p(y | x)      1.00  1.00    1.00  0.09  1.00  1.00
  flagged       .     .       .     x     .     .            p(y | x, j) > lambda p(y | x)
  words         0     1       2     3     4     5            word 3 is flagged and wrong: precision 1, recall 1
  marked        The answer is [4].

Commands:

  python evaluate.py --model out/cut-0                                  a model on the built-in world's test split
  python evaluate.py --model out/cut-0 --against out/sft-0-corrects     and its win rate against another model
  python evaluate.py agreement --data preferences.jsonl --labels truth.jsonl    agreement, variance, bias
  python evaluate.py score --reward out/reward-0 --data outputs.jsonl   a reward model's scores of any outputs
"""
import argparse
import bisect
import itertools
import math
import re

import torch

from data import (FORMATS, InputError, Tokenizer, World, collate, count_errors, positive_int, print0, read_outputs,
                  read_preferences, run_main, write_json_lines, wrong_words)
from model import DTYPES, LLaMA, rank, read_config, setup_device
from simulate import conditioned, mean_and_se, sample_responses, score_texts

MAX_NEW_TOKENS = 32          # the built-in world's longest answer has 16


# ----------------------------------------------------------------------------------------------------------------------
# Metrics: exact match, errors, win rate


def answer_errors(model, tokenizer, records, prompt_format):
    """Greedy responses to records with a `reference`: (texts, number of wrong words of each)."""
    samples = sample_responses(model, tokenizer, records, prompt_format, max_new_tokens=MAX_NEW_TOKENS,
                               temperature=0, seed=0, label="evaluating")
    texts = [outputs[0] for outputs in samples]                             # one a record
    errors = [count_errors(text, r["reference"]) for text, r in zip(texts, records)]
    return texts, errors


def exact_match(errors):
    """Fraction of responses without an error."""
    return sum(e == 0 for e in errors) / len(errors)


def win_score(errors, reference_errors):
    """One response against another: fewer errors wins (1), a tie counts half."""
    if errors == reference_errors:
        return 0.5
    return 1.0 if errors < reference_errors else 0.0


def win_rate(errors, reference_errors):
    """Win rate against a reference over all instructions, and its standard error."""
    return mean_and_se([win_score(ours, theirs) for ours, theirs in zip(errors, reference_errors)])


def preference_from_logprobs(logp_1, logp_2):
    """AlpacaEval's weighted preference, 1 + P(output 2 is better), of a judge that answers with one token.

    logp_1, logp_2: log-probabilities of the two possible tokens. A token that is not among the reported ones has -inf;
    None if both are missing."""
    if max(logp_1, logp_2) == -math.inf:
        return None
    return 2 - 1 / (1 + math.exp(min(700.0, logp_2 - logp_1)))


# ----------------------------------------------------------------------------------------------------------------------
# Detection: which words did the judgment make more likely, and are they the wrong ones?


@torch.no_grad()
def judged_and_plain_logp(model, examples, device, batch_size=64):
    """Log-probabilities of bad responses after (x, j-) and after x alone: a list of (2, n), n response tokens."""
    logp = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start:start + batch_size]
        judged_tokens, judged_targets = collate([(e.judged_prompt, e.response) for e in batch], device)      # (b, T1)
        plain_tokens, plain_targets = collate([(e.prompt, e.response) for e in batch], device)        # (b, T2)
        both = model([judged_tokens, plain_tokens], [judged_targets, plain_targets])                  # (2, N)
        logp += both.cpu().split([len(e.response) for e in batch], dim=1)
    return logp


def token_words(pieces):
    """For each token of a response the index of its word, in the order of data.units. The last token, EOS, has the
    index after the last word."""
    text = "".join(pieces[:-1])
    word_ends = [m.end() for m in re.finditer(r"\w+|[^\w\s]", text)]
    words, begin = [], 0
    for piece in pieces[:-1]:
        last = begin + max(0, len(piece) - 1)               # its last character: the first one may be a space
        words.append(bisect.bisect_right(word_ends, last))  # the words before it end at or before this character
        begin += len(piece)
    return words + [len(word_ends)]


def detection(tokenizer, flagged, judged):
    """Flagged words against the words that are really wrong, over all bad responses. A rate over nothing is 0.

    flagged: {record id: (n,) booleans, one a response token}; a word is flagged if one of its tokens is.
    judged: records with output and reference.
    Returns {"precision", "recall", "flagged"}, the last one the fraction of flagged tokens."""
    hits = n_flagged = n_wrong = 0
    for r in judged:
        if str(r["id"]) not in flagged:
            continue
        flags = flagged[str(r["id"])].tolist()
        words = token_words(tokenizer.pieces(tokenizer.encode_response(r["output"])))
        flagged_words = {word for word, flag in zip(words, flags) if flag}
        wrong = wrong_words(r["output"], r["reference"])
        hits += len(flagged_words & wrong)
        n_flagged += len(flagged_words)
        n_wrong += len(wrong)

    flagged_tokens = sum(flags.sum().item() for flags in flagged.values())
    tokens = sum(len(flags) for flags in flagged.values())
    return {
        "precision": hits / max(1, n_flagged),
        "recall": hits / max(1, n_wrong),
        "flagged": flagged_tokens / max(1, tokens),
    }


def mark(pieces, flagged):
    """The response as text with its flagged tokens in brackets; EOS shows only if it is flagged."""
    text = ""
    for piece, flag in zip(pieces, flagged):
        if flag:
            text += re.sub(r"^(\s*)(.*)$", r"\1[\2]", piece)                # the space stays in front of the bracket
        elif piece != "</s>":
            text += piece
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Agreement of annotators, by AlpacaEval's definitions. An annotator, or the human annotators together,
# is a dict {pair: list of labels}; a label is 1 or 2, the preferred output, or 1.5 for a tie.


def mean_or_none(scores):
    """Mean and standard error, or None without scores."""
    return mean_and_se(scores) if scores else None


def labels_by_pair(records):
    """Preference records -> {pair: list of labels}. The same two outputs in the other order are the same pair, with
    label 3 - label."""
    labels = {}
    for r in records:
        output_1, output_2, preference = r["output_1"], r["output_2"], r["preference"]
        label = 1 if preference < 1.5 else 2 if preference > 1.5 else 1.5
        if output_1 > output_2:
            output_1, output_2, label = output_2, output_1, 3 - label
        pair = (r["instruction"], r.get("input") or "", output_1, output_2)
        labels.setdefault(pair, []).append(label)
    return labels


def vote(labels):
    """The set of the most frequent labels: several if they tie."""
    most = max(labels.count(label) for label in labels)
    return {label for label in labels if labels.count(label) == most}


def leave_one_out_votes(labels):
    """The vote without label i, for each i. (A single label has no others: it votes for itself.)"""
    votes = []
    for i in range(len(labels)):
        others = labels[:i] + labels[i + 1:]
        votes.append(vote(others or labels))
    return votes


def match(vote_1, vote_2):
    """Chance that random elements of two votes are equal."""
    return len(vote_1 & vote_2) / (len(vote_1) * len(vote_2))


def agreement(annotator, humans):
    """Accuracy of one label of the annotator against the vote of the humans with one of them left out, which scores
    the humans by the same rule: mean and standard error over the pairs that both have labelled."""
    scores = []
    for pair in annotator:
        if pair in humans:
            labels, votes = annotator[pair], leave_one_out_votes(humans[pair])
            matches = [match({label}, v) for label, v in itertools.product(labels, votes)]
            scores.append(sum(matches) / len(labels) / len(votes))
    return mean_or_none(scores)


def variance(annotator):
    """Chance that one label differs from the vote of the annotator's other labels, over pairs with several labels."""
    scores = []
    for labels in annotator.values():
        if len(labels) > 1:
            matches = [match({label}, v) for label, v in zip(labels, leave_one_out_votes(labels))]
            scores.append(1 - sum(matches) / len(labels))
    return mean_or_none(scores)


def bias(annotator, humans):
    """Chance that the annotator's vote differs from the humans' vote: the error that more labels do not average out."""
    pairs = [pair for pair in annotator if pair in humans]
    return mean_or_none([1 - match(vote(annotator[pair]), vote(humans[pair])) for pair in pairs])


def prefers_longer(records):
    """Fraction of labels for the longer output, of pairs whose lengths differ by more than 30 characters. 0.5 is no
    bias, unless longer outputs are better."""
    scores = []
    for r in records:
        longer = len(r["output_2"]) - len(r["output_1"])
        if abs(longer) > 30:
            second = r["preference"] - 1                    # how much output_2 is preferred, from 0 to 1
            scores.append(second if longer > 0 else 1 - second)
    return mean_or_none(scores)


def prefers_first(records):
    """Fraction of labels for the output that was shown first, of records that note `switched`; 0.5 is no bias."""
    scores = []
    for r in records:
        if "switched" in r and r.get("annotator") not in ("noise", "equal texts"):
            second = r["preference"] - 1
            scores.append(second if r["switched"] else 1 - second)
    return mean_or_none(scores)


# ----------------------------------------------------------------------------------------------------------------------
# Best-of-n: what n does to the reward that is optimized (proxy) and to the truth (gold)


def best_of_n(proxy, gold, n):
    """Unbiased estimate of best-of-n from N >= n samples of one instruction: (expected proxy, expected gold).

    proxy: the N scores by the reward model that chooses; gold: the N true scores.
    The sample of rank i by proxy (from 0, the worst) is the best of n in C(i, n - 1) of the C(N, n) choices."""
    order = sorted(range(len(proxy)), key=lambda i: proxy[i])               # worst first
    choices = math.comb(len(proxy), n)
    weights = [math.comb(i, n - 1) / choices for i in range(len(order))]
    expected_proxy = sum(w * proxy[i] for w, i in zip(weights, order))
    expected_gold = sum(w * gold[i] for w, i in zip(weights, order))
    return expected_proxy, expected_gold


def best_of_n_kl(n):
    """KL(best-of-n || sampled model) in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def world_errors(directory, args, device):
    """Prints exact match and errors of one model on the built-in world; returns the errors of its responses."""
    tokenizer = Tokenizer.from_pretrained(directory)
    _, raw = read_config(directory, quiet=True)
    seed = raw.get("run", {}).get("seed", 0) if args.seed is None else args.seed
    records = conditioned(directory, World(seed).instructions(args.split, 800))
    model = LLaMA.from_pretrained(directory, device=device)
    _, errors = answer_errors(model, tokenizer, records, raw.get("prompt_format", "short"))
    exact, se = mean_and_se([float(e == 0) for e in errors])
    print0(f"{directory}: {len(errors)} {args.split} instructions of world {seed}: exact match {exact:.3f} +- "
           f"{se:.3f}, errors per response {sum(errors) / len(errors):.3f}")
    return errors


def evaluate_world(args):
    """Exact match and errors on the built-in world; with --against, the win rate against that model."""
    device = setup_device(args.device)
    errors = world_errors(args.model, args, device)
    if args.against:
        wins, se = win_rate(errors, world_errors(args.against, args, device))
        print0(f"win rate against {args.against}: {wins:.3f} +- {se:.3f}")
    return 0


def evaluate_annotator(args):
    """Variance and biases of one annotator's preferences; with --labels, agreement with those of human annotators."""
    records = []
    for path in args.data:
        records += read_preferences(path, ties=True)
    annotator = labels_by_pair(records)
    print(f"{len(records)} labels of {len(annotator)} pairs")
    print_row("variance", variance(annotator))
    print_row("prefers the longer (by > 30 characters)", prefers_longer(records))
    print_row("prefers the first shown", prefers_first(records))
    if args.labels:
        humans = labels_by_pair(read_preferences(args.labels, ties=True))
        print(f"{len(annotator.keys() & humans.keys())} pairs also in {args.labels}")
        print_row("agreement", agreement(annotator, humans))
        print_row("bias", bias(annotator, humans))
    return 0


def print_row(name, result):
    """Prints a mean and its standard error, unless there was nothing to take it over."""
    if result is not None:
        mean, se = result
        print(f"{name:<42} {mean:.3f} +- {se:.3f}")


def score_outputs(args):
    """A reward model's mean score of the outputs in a file; with --out, writes each score."""
    device = setup_device(args.device)
    records = read_outputs(args.data[0])
    texts = [[r["output"]] for r in records]                                # one text a record
    scores = score_texts(args.reward, records, texts, args.format, args.dtype, device, args.batch_size)
    rewards = [row[0] for row in scores]
    mean, se = mean_and_se(rewards)
    print0(f"{args.data[0]}: {len(records)} outputs, reward {mean:.3f} +- {se:.3f}")
    if rank() == 0 and args.out:
        write_json_lines(args.out, [{**r, "reward": reward} for r, reward in zip(records, rewards)])
    return 0


COMMANDS = {"world": evaluate_world, "agreement": evaluate_annotator, "score": score_outputs}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", nargs="?", choices=COMMANDS, default="world", help="default: world")
    # world
    p.add_argument("--model", help="model directory")
    p.add_argument("--against", help="a second one, for a win rate (fewer errors wins, ties count half)")
    p.add_argument("--seed", type=int, help="seed of the world (default: the one that the model was trained in)")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the world's instructions")
    # agreement
    p.add_argument("--data", nargs="+", help="agreement: preference files of one annotator (several: repeated "
                   "labels); score: a file of outputs")
    p.add_argument("--labels", help="agreement: preferences of human annotators, or the truth, to compare with")
    # score
    p.add_argument("--reward", help="score: reward model's directory")
    p.add_argument("--format", choices=FORMATS, help="score: its prompt format (default: as its config.json says)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="score: of weights and arithmetic")
    p.add_argument("--batch-size", type=positive_int, default=64, help="score: outputs per forward pass")
    p.add_argument("--out", default="", help="score: file for the scored outputs")
    # machine
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best available)")
    args = p.parse_args(argv)
    if args.command == "world" and not args.model:
        raise InputError("give --model DIR, or one of the commands agreement and score")
    if args.command == "agreement" and not args.data:
        raise InputError("agreement needs --data, one or more files of preferences")
    if args.command == "score" and not (args.reward and args.data):
        raise InputError("score needs --reward DIR and --data FILE")
    return args


def main(argv=None):
    args = parse(argv)
    return COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main(main)
