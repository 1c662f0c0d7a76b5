"""Evaluation: exact match, detection, agreement of annotators, win rates as AlpacaEval's, decoders, and a report.

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

Commands (FILES are annotations and run folders):

  python evaluate.py                                    the newest run on the built-in world's test split (--model DIR)
  python evaluate.py compare --model out/cut-0          win rate against its SFT model, by simulated annotators
  python evaluate.py compare --model mine.json --against davinci.json --by api --api URL --api-model NAME
  python evaluate.py leaderboard FILES                  one table; --rank-with OTHER.csv: agreement of the ranks
  python evaluate.py decoders --model out/cut-0         greedy, sampling, best-of-n at their cost in tokens
  python evaluate.py agreement --data preferences.jsonl --labels truth.jsonl    agreement, variance, bias
  python evaluate.py score --reward out/reward-0 --data outputs.jsonl   rewards; --model DIR: perplexity
  python evaluate.py report FILES                       one HTML page: curves, leaderboard, what CUT flagged
"""
import argparse
import bisect
import csv
import html
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from data import (
    FORMATS, HelpFormatter, InputError, Tokenizer, World, atomic_write, count_errors, positive_int,
    print0, prompt_ids, read_instructions, read_json, read_outputs, read_preferences, read_records, reading, run_main,
    write_json, write_json_lines, wrong_words)
from model import DTYPES, LLaMA, rank, read_config, setup_device
from simulate import (
    add_annotator_flags, compare_pairs, conditioned, mean_and_se, model_format, newest_run, question,
    response_logp, sample_responses, score_texts, write_outputs)

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


# ----------------------------------------------------------------------------------------------------------------------
# Detection: which words did the judgment make more likely, and are they the wrong ones?


def judged_and_plain_logp(model, examples, device, batch_size=64):
    """Log-probabilities of bad responses after (x, j-) and after x alone: a list of (2, n), n response tokens."""
    judged = response_logp(model, [(e.judged_prompt, e.response) for e in examples], device, batch_size)
    plain = response_logp(model, [(e.prompt, e.response) for e in examples], device, batch_size)
    return [torch.stack(both) for both in zip(judged, plain)]


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
    return [vote(labels[:i] + labels[i + 1:] or labels) for i in range(len(labels))]


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
# Win rates against a baseline, by AlpacaEval's definitions. An annotation is a preference record with generator_1 (the
# baseline), generator_2 (the model) and `score`, its preference - 1: 1 won, 0 lost, 0.5 a tie, NaN a failed annotation.

# Keys of a leaderboard's rows, most of them AlpacaEval's columns, and how they are shown.
COLUMNS = {
    "win_rate": "win rate", "standard_error": "+-", "low": "from", "high": "to", "discrete_win_rate": "discrete",
    "length_controlled_winrate": "controlled", "lc_standard_error": "+-", "n_wins": "won", "n_wins_base": "lost",
    "n_draws": "tied", "n_total": "n", "n_failed": "failed", "n_missing": "missing", "avg_length": "length",
    "difference": "to first", "difference_se": "+-", "p": "p",
}
RIDGE = 10.0                 # times theta^2: penalty on the length coefficient without regularizing rows
NO_ROWS = np.zeros((0, 3))


def read_annotations(path):
    """Annotations in AlpacaEval's layout: {model: its annotations}."""
    models = {}
    for i, r in enumerate(read_records(path, "instruction", "input?", "output_1", "output_2")):
        with reading(path):
            preference = math.nan if r.get("preference") is None else float(r["preference"])
        if preference < 1 and preference != 0 or preference > 2:
            raise InputError(f"{path}: record {i}: 'preference' is {preference}, expected a number from 1 to 2, null "
                             "for a failed annotation, or 0 for a tie (older files)")
        name = r.get("generator_2") or r.get("generator") or Path(path).stem
        models.setdefault(str(name), []).append({**r, "score": (preference or 1.5) - 1, "difficulty": 0.0})
    return models


def leaderboard_row(name, annotations, asked=(), regularizer=NO_ROWS):
    """The values of COLUMNS for one model, in percent; low and high are a 95 % bootstrap interval of the win rate. The
    questions of `asked` that have no annotation are missing."""
    scores = np.array([r["score"] for r in annotations])
    lengths = np.array([(len(r["output_1"]), len(r["output_2"])) for r in annotations])
    difficulty = np.array([r.get("difficulty", 0.0) for r in annotations])
    valid = 100 * scores[~np.isnan(scores)]
    if not len(valid):
        raise InputError(f"{name}: all of its {len(scores)} annotations failed: there is no win rate")
    wins, draws, losses = [int((np.sign(valid - 50) == sign).sum()) for sign in (1, 0, -1)]
    mean, se = mean_and_se(valid.tolist())
    low, high = bootstrap(valid, np.mean)
    controlled, controlled_se = length_controlled(scores, lengths[:, 0] - lengths[:, 1], difficulty, regularizer)
    n_missing = len(set(asked) - set(map(question, annotations)))
    values = [mean, se, low, high, (100 * wins + 50 * draws) / len(valid), controlled, controlled_se, wins, losses,
              draws, len(valid), len(scores) - len(valid), n_missing, int(lengths[:, 1].mean())]
    return {"name": name, **dict(zip(COLUMNS, values)), "mode": "community"}


def bootstrap(values, statistic, draws=1000):
    """95 % percentile interval of a statistic of the values, which are drawn with replacement along axis 0."""
    rng, n = np.random.default_rng(0), len(values)
    sample = [statistic(values[rng.integers(n, size=n)]) for _ in range(draws)]
    return np.nanpercentile(sample, [2.5, 97.5], axis=0).tolist()


def paired_test(annotations, others):
    """A paired z test of two models on the instructions that both have: the difference of their win rates, its standard
    error and the two-sided p."""
    theirs = {question(r): r["score"] for r in others}
    differences = np.array([100 * (r["score"] - theirs.get(question(r), math.nan)) for r in annotations])
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return {}
    mean, se = mean_and_se(differences.tolist())
    return {"difference": mean, "difference_se": se, "p": math.erfc(abs(mean) / se / math.sqrt(2)) if se else 1.0}


def length_controlled(scores, delta, difficulty, regularizer=NO_ROWS):
    """AlpacaEval 2's length-controlled win rate and its standard error, in percent.

      logit P(win) = theta tanh(delta / std(delta)) + psi difficulty + phi

    is fitted to the scores (n,), and the win rate is what it predicts for delta = 0. delta (n,): characters of the
    baseline's output minus those of the model's; difficulty (n,) of the instructions, or zeros. regularizer (m, 3):
    delta / std, difficulty and score of the baseline prompted to be verbose or concise; these rows lack phi, and each
    counts 0.1. Without them theta has a ridge penalty."""
    std = delta.std(ddof=min(1, len(delta) - 1)) or 1.0
    rows = np.concatenate([np.stack([delta / std, difficulty, scores], axis=1), regularizer])
    is_model = np.arange(len(rows)) < len(delta)
    features = np.stack([np.tanh(rows[:, 0]), rows[:, 1], is_model], axis=1)
    weights = np.where(is_model, 1, 0.1) * ~np.isnan(rows[:, 2])
    penalty = np.array([0 if len(regularizer) else RIDGE, 0, 0]) + 1e-6             # 1e-6: it always has a solution
    _, psi, phi = fit_logistic(features, np.nan_to_num(rows[:, 2]), weights, penalty)
    mean, se = mean_and_se((100 / (1 + np.exp(-psi * difficulty - phi))).tolist())
    return mean, se if difficulty.any() else None           # without difficulty all predictions are equal


def fit_logistic(features, targets, weights, penalty):
    """Logistic regression on soft targets by Newton's method: coefficients x (k,) that minimize the weighted sum of the
    cross-entropies plus sum penalty x^2. features (n, k); targets, weights (n,); penalty (k,)."""
    def loss(x):
        logits = features @ x
        return weights @ (np.logaddexp(0, logits) - targets * logits) + penalty @ x**2

    x = np.zeros(features.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ x))
        gradient = features.T @ (weights * (p - targets)) + 2 * penalty * x
        hessian = (features.T * (weights * p * (1 - p))) @ features + 2 * np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        while loss(x - step) > loss(x):                     # too long
            step /= 2
        x -= step
    return x


def rank_correlations(table):
    """Spearman's rho, ties at their mean rank, and Kendall's tau-b of two columns (m, 2); NaN if one is constant."""
    def cosine(pairs):
        a, b = pairs.reshape(-1, 2).T
        return (a @ b) / (math.sqrt((a @ a) * (b @ b)) or math.nan)

    above = np.sign(table[:, None] - table)                 # (m, m, 2): 1 where row i is above row j, -1 below
    return cosine(above.sum(1)), cosine(above)              # the row sums are ranks around their mean


# ----------------------------------------------------------------------------------------------------------------------
# Leaderboards


def leaderboard_rows(files, column="win_rate", difficulty=None, asked=()):
    """Annotation files and run folders as rows of a leaderboard, best first; the differences are to the first model."""
    models, rows = {}, []
    for path in map(Path, files):
        if not path.exists():
            raise InputError(f"{path}: no such run folder or file of annotations")
        if path.is_dir():
            rows += run_row(path)
            continue
        for name, annotations in read_annotations(path).items():
            models[name if name not in models else f"{name} ({path})"] = annotations
    asked = set(asked).union(*[map(question, annotations) for annotations in models.values()])
    regularizer = add_difficulty(difficulty, models.values()) if difficulty else NO_ROWS
    for name, annotations in models.items():
        row, parts = leaderboard_row(name, annotations, asked, regularizer), {}
        for r in annotations:
            if not math.isnan(r["score"]):                  # a part of which all have failed has no row
                parts.setdefault(r.get("dataset"), []).append(r)
        if len(parts) > 1:
            row["datasets"] = [leaderboard_row(f"  {key}", part, (), regularizer) for key, part in parts.items()]
        rows.append(row)
    rows.sort(key=lambda row: -(row.get(column) or 0))
    compared = [row for row in rows if row["name"] in models]
    for row in compared[1:]:
        row.update(paired_test(models[row["name"]], models[compared[0]["name"]]))
    return rows


def run_row(folder):
    """The leaderboard row of a run folder, from its results.json; none if that has no win rate."""
    results = load_run(folder)["results"]
    last = (results.get("rounds") or [results])[-1]
    if "win_rate" not in last:
        return []
    with reading(folder / "results.json"):
        mean, se = 100 * float(last["win_rate"]), 100 * float(last.get("win_rate_se", 0))
    return [{"name": str(folder), "win_rate": mean, "standard_error": se}]


def read_csv(path):
    """The rows of a CSV file as dicts; a column without a name is `name`."""
    with reading(path), open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
        names = [key or "name" for key in header]
        return [dict(zip(names, row)) for row in rows]


def add_difficulty(path, models):
    """Adds `difficulty` to annotations, which stand in AlpacaEval's order of instructions, from its df_gamed.csv or
    instruction_difficulty.csv; returns the regularizing rows (m, 3) of the former, see length_controlled."""
    rows, keys = read_csv(path), ("std_delta_len", "instruction_difficulty", "preference")
    with reading(path):
        difficulty = {int(r.get("index", r.get("name"))): float(r["instruction_difficulty"]) for r in rows}
        if any(len(annotations) != len(difficulty) for annotations in models):
            raise ValueError(f"it is for {len(difficulty)} instructions in AlpacaEval's order, none missing")
        for i, r in itertools.chain(*map(enumerate, models)):
            r["difficulty"] = difficulty[i]
        return np.array([[float(r[key]) for key in keys] for r in rows if keys[0] in r]).reshape(-1, 3)


def show(value):
    return "" if value is None else f"{value:#.4g}" if isinstance(value, float) else str(value)


def shown_columns(rows):
    """The keys of COLUMNS that some row has."""
    return [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]


def print_leaderboard(rows, args):
    """Prints a leaderboard, with a line for each dataset; writes it as JSON and in AlpacaEval's CSV."""
    keys = shown_columns(rows)
    table = [["", *[COLUMNS[key] for key in keys]]]
    for row in rows:
        for r in [row, *row.get("datasets", [])]:
            table.append([r["name"], *[show(r.get(key)) for key in keys]])
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print0(first.ljust(widths[0]), *cells)
    if "length_controlled_winrate" in keys:
        print0("controlled: at equal length, with AlpacaEval's instruction difficulty" if args.difficulty else
               f"controlled: at equal length; without --difficulty a ridge penalty of {RIDGE:g} theta^2 on the length "
               "coefficient is in the place of AlpacaEval's regularizing rows")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(args.out, "leaderboard.json"), rows)
        with atomic_write(Path(args.out, "leaderboard.csv")) as path, open(path, "w", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["", *COLUMNS, "mode"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows({"": row["name"], **row} for row in rows)


# ----------------------------------------------------------------------------------------------------------------------
# The report: one HTML page without scripts. Every text in it goes through html.escape.

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learning from feedback</title><style>{style}</style>
<body><header><h1>Learning from feedback</h1><p>{keys}</p></header>
<main><section><h2>What the judgment changes</h2><p class="note">Bad responses, as the model reads
them before the round and after it. Each token is coloured by
log p(y | x, j) &minus; log p(y | x): <span class="tokens"><span class="up" style="--r:60%">more likely</span> or
<span class="down" style="--r:60%">less likely</span></span> with the judgment.
<span class="flag">Underlined</span> tokens are flagged, <span class="wrong">boxed</span> words are wrong.</p>
{examples}</section>
<section><h2>Curves</h2><div class="grid">{curves}</div></section>
<section><h2>Win rates</h2>{leaderboard}</section></main></body></html>
"""
CHARTS = ("exact_match", "errors", "win_rate", "precision", "recall", "flagged", "loss", "reward", "proxy", "gold",
          "kl", "clip_fraction", "entropy", "accuracy", "margin", "log_ratio", "grad_norm")


def load_run(folder):
    """A run folder: its results.json, and {(metric, source): (n, 3) of step, value, standard error}."""
    folder, curves, results, steps = Path(folder), {}, {}, []
    if (folder / "results.json").is_file():
        with reading(folder / "results.json"):
            results = dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    if (folder / "metrics.jsonl").is_file():
        with reading(folder / "metrics.jsonl"):
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]     # a kill tears the last
            steps = [json.loads(line) for line in lines]
    rounds = [results.get("sft", {}), *results["rounds"]] if "rounds" in results else []        # round 0: the SFT model
    sources = {"rounds": rounds, "training": steps, "validation": results.get("curve", [])}
    for name, source in itertools.product(CHARTS, sources):
        points = []
        for i, r in enumerate(sources[source]):
            value = r.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((r.get("step", i), value, r.get(f"{name}_se", 0)))
        if points:
            curves[name, source] = np.array(points, dtype=float)
    if not (results or curves):
        raise InputError(f"{folder}: not a run folder: it has neither results.json nor metrics.jsonl")
    return {"name": folder.name, "folder": folder, "results": results, "curves": curves}


def number(value):
    """A number as it is read, and in full for a program."""
    return "" if value is None else f'<data value="{value}">{show(value)}</data>'


def svg_chart(lines):
    """Curves as an SVG; lines: {number of the run: (n, 3) of step, value, standard error}. Of more than 80 points, the
    mean of each of 80 stretches is drawn, in a band from the lowest to the highest."""
    points = np.concatenate(list(lines.values()))
    left, right = points[:, 0].min(), points[:, 0].max()
    bottom, top = (points[:, 1] - points[:, 2]).min(), (points[:, 1] + points[:, 2]).max()
    span = max(top - bottom, 1e-6 * abs(top), 1e-6)
    tick = 10 ** math.floor(math.log10(span))
    tick *= next(m for m in (0.1, 0.2, 0.5, 1, 2, 5) if span / (tick * m) <= 5)
    bottom, top = tick * math.floor(bottom / tick), tick * (math.floor(top / tick) + 1)

    def place(x, y):
        return f"{44 + 266 * (x - left) / max(right - left, 1):.1f},{150 - 136 * (y - bottom) / (top - bottom):.1f}"

    parts = [f'<text x="44" y="168">{left:g}</text><text x="310" y="168" class="end">{right:g}</text>']
    for y in np.arange(bottom, top + tick / 2, tick):
        height = place(left, y).split(",")[1]
        parts.append(f'<path d="M44 {height}H310"/><text x="38" y="{height}" dy="4" class="end">{round(y, 9):g}</text>')
    for i, line in lines.items():
        rows = []
        for x, y, se in [part.T for part in np.array_split(line, min(80, len(line)))]:
            rows.append((x[-1], y.mean(), (y + se).max(), (y - se).min()))
        middle, upper, lower = [[place(row[0], row[k]) for row in rows] for k in (1, 2, 3)]
        parts.append(f'<polygon class="r{i % 6}" points="{" ".join(upper + lower[::-1])}"/>'
                     f'<polyline class="r{i % 6}" points="{" ".join(middle)}"/>')
    return f'<svg viewBox="0 0 320 176">{"".join(parts)}</svg>'


def curves_html(runs):
    """A figure for each metric: the curves of all runs, and their last values."""
    figures = []
    for key in dict.fromkeys(itertools.chain(*[run["curves"] for run in runs])):
        lines, last = {}, ""
        for i, run in enumerate(runs):
            if key in run["curves"]:
                lines[i] = run["curves"][key]
                last += f'<span class="key r{i % 6}">{number(lines[i][-1, 1].item())}</span>'
        name, source = key
        figures.append(f'<figure><figcaption>{name.replace("_", " ")} <small>{source}</small></figcaption>'
                       f'{svg_chart(lines)}<p>{last}</p></figure>')
    return "".join(figures)


def leaderboard_html(rows):
    """The leaderboard; win rates with a bar and a whisker of 1.96 standard errors to either side."""
    keys = shown_columns(rows)
    lines = ["<th></th><th></th>" + "".join(f"<th>{COLUMNS[key]}</th>" for key in keys)]
    for row in rows:
        for r in [row, *row.get("datasets", [])]:
            mean, se = r["win_rate"], r["standard_error"]
            low, wide = mean - 1.96 * se, 3.92 * se                             # a 95 % interval
            bar = f'<i style="width:{mean:.2f}%"></i><b style="left:{low:.2f}%;width:{wide:.2f}%"></b>'
            cells = "".join(f"<td>{number(r.get(key))}</td>" for key in keys)
            lines.append(f'<td>{html.escape(r["name"])}</td><td><div class="bar">{bar}</div></td>{cells}')
    return rows and f'<div class="wide"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def tokens_html(r):
    """A response, each token coloured by its log ratio; flagged tokens underlined, wrong words boxed."""
    wrong, spans = wrong_words(r["output"], r["reference"]) if r.get("reference") else (), []
    for token, ratio, flag, word in zip(r["tokens"], r["log_ratio"], r["flags"], token_words(r["tokens"])):
        kinds = f"{'up' if ratio > 0 else 'down'}{' flag' * flag}{' wrong' * (word in wrong)}"
        text = token.lstrip(" ")
        spans.append(f'{" " * (len(token) - len(text))}<span class="{kinds}" title="{ratio:+.3f}" '
                     f'style="--r:{100 - 100 * math.exp(-abs(ratio)):.0f}%">{html.escape(text)}</span>')
    return "".join(spans)


def examples_html(run, most=12):
    """What CUT flagged at the beginning of each round, the last one first and also as the trained model reads it."""
    after, parts = [], []
    if (run["folder"] / "flags-after.jsonl").is_file():
        after = read_json(run["folder"] / "flags-after.jsonl", empty=True)
    after = {r["id"]: r for r in after}
    paths = sorted(run["folder"].glob("flags-[0-9]*.jsonl"), key=lambda path: (len(path.name), path))
    for number, path in reversed(list(enumerate(paths, 1))):
        records, cards = [r for r in read_json(path, empty=True) if "tokens" in r], []     # not in older runs
        for r in records[:most]:
            responses = f'<dt>before</dt><dd class="tokens">{tokens_html(r)}</dd>'
            if r["id"] in after:
                responses += f'<dt>after</dt><dd class="tokens">{tokens_html(after[r["id"]])}</dd>'
            asked = html.escape("; ".join(filter(None, question(r))))
            cards.append(f'<article><p class="ask">{asked}</p><dl>{responses}</dl>'
                         f'<blockquote>{html.escape(r["judgment"])}</blockquote></article>')
        last = " open" * (path == paths[-1])
        parts.append(f'<details{last}><summary>{html.escape(run["name"])}, round {number} <small>{len(cards)} of '
                     f'{len(records)} bad responses</small></summary>{"".join(cards)}</details>')
    return "".join(parts)


def report(args):
    """Runs and annotations as one self-contained HTML page."""
    runs = [load_run(path) for path in args.files if Path(path).is_dir()]
    style = Path(__file__).with_name("assets") / "report.css"
    page = PAGE.format(
        style=style.read_text(encoding="utf-8"), leaderboard=leaderboard_html(leaderboard_rows(args.files)) or "",
        keys="".join(f'<span class="key r{i % 6}">{html.escape(run["name"])}</span>' for i, run in enumerate(runs)),
        curves=curves_html(runs), examples="".join(map(examples_html, runs)))
    out = args.out or (runs[0]["folder"] / "report.html" if len(args.files) == len(runs) == 1 else "out/report.html")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print0(f"report in {out}")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def open_policy(directory, args):
    """(model, tokenizer, prompt format, the built-in world that it was trained in) of a model directory."""
    _, raw = read_config(directory, quiet=True)
    model = LLaMA.from_pretrained(directory, DTYPES[args.dtype], setup_device(args.device))
    seed = (raw.get("run") or {}).get("seed", 0) if args.seed is None else args.seed
    return model, Tokenizer.from_pretrained(directory), model_format(directory, args.format), World(seed)


def evaluate_world(args):
    """Exact match and errors on the built-in world; with --against, the win rate against that model."""
    errors = world_errors(args.model[0] if args.model else newest_run(), args)
    if args.against:
        wins, se = win_rate(errors, world_errors(args.against, args))
        print0(f"win rate against {args.against}: {wins:.3f} +- {se:.3f}")
    return 0


def world_errors(directory, args):
    """Prints exact match and errors of one model on the built-in world; returns the errors of its responses."""
    model, tokenizer, prompt_format, world = open_policy(directory, args)
    records = conditioned(directory, world.instructions(args.split, 800))
    _, errors = answer_errors(model, tokenizer, records, prompt_format)
    exact, se = mean_and_se([float(e == 0) for e in errors])
    print0(f"{directory}: {len(errors)} {args.split} instructions of world {world.seed}: exact match {exact:.3f} +- "
           f"{se:.3f}, errors per response {sum(errors) / len(errors):.3f}")
    return errors


def read_answers(path, args):
    """(generator, {question: record}) of a file of outputs, or of a model directory's greedy responses to the
    instructions of --data, or else of the built-in world."""
    if Path(path).is_dir():
        model, tokenizer, prompt_format, world = open_policy(path, args)
        name, most = Path(path).name, 300 if args.data else MAX_NEW_TOKENS
        records = read_instructions(args.data[0]) if args.data else world.instructions(args.split, 800)
        texts = sample_responses(
            model, tokenizer, conditioned(path, records), prompt_format, max_new_tokens=most, temperature=0, seed=0,
            batch_size=args.batch_size, label=f"sampling {name}")
        records = [{**r, "output": text, "generator": name} for r, (text,) in zip(records, texts)]
    else:
        records = read_outputs(path)
        name = Path(str(records[0].get("generator") or Path(path).stem)).name
    answers = {question(r): r for r in records}
    if len(answers) < len(records):
        print0(f"{path}: left out {len(records) - len(answers)} repeated instructions")
    return name, answers


def compare(args):
    """Win rates of outputs against a baseline's, by any annotator of simulate.py."""
    args.model, args.out = args.model or [newest_run()], args.out or "out/compare"
    run = {}
    if Path(args.model[0]).is_dir():
        run = read_config(args.model[0], quiet=True)[1].get("run") or {}
    if args.seed is None:
        args.seed = run.get("seed", 0)                      # the world of the first model, for all of them
    against = args.against or run.get("model")
    if not against:
        raise InputError(f"{args.model[0]} does not say which model it was trained from: give a baseline as --against")
    if Path(against).is_file() and not args.data:
        args.data = [against]
    outputs, files, code = [read_answers(path, args) for path in (against, *args.model)], [], 0
    names = [name for name, _ in outputs]                   # files are named after them
    outputs = [(f"{name}-{i}" if names.count(name) > 1 else name, answers) for i, (name, answers) in enumerate(outputs)]
    for name, answers in outputs:
        write_outputs(argparse.Namespace(out=f"{args.out}/{name}.outputs.json"), flat(answers.values()), [])
    (baseline, theirs), *models = outputs
    for name, ours in models:
        pairs = []
        for key in filter(ours.get, theirs):
            texts = {"output_1": theirs[key]["output"], "output_2": ours[key]["output"]}
            pairs.append({**theirs[key], **ours[key], "generator_1": baseline, "generator_2": name, **texts})
        if not pairs:
            raise InputError(f"{name} and {baseline} have no instruction in common")
        labelled, failed, client = compare_pairs(args, pairs)
        files.append(f"{args.out}/{name}.annotations.json")
        order = {question(r): i for i, r in enumerate(pairs)}              # AlpacaEval's package goes by position
        annotations = labelled + [{**r, "preference": None} for r in failed]
        annotations.sort(key=lambda r: order[question(r)])
        code |= write_outputs(argparse.Namespace(out=files[-1]), flat(annotations), failed, client)
    if rank() == 0:
        asked = set().union(*[answers for _, answers in outputs])
        print_leaderboard(leaderboard_rows(files, args.column, args.difficulty, asked), args)
    return code


def flat(records):
    """The records without nested values: AlpacaEval's package reads no others."""
    kept = []
    for r in records:
        kept.append({key: value for key, value in r.items() if not isinstance(value, (list, tuple, dict))})
    return kept


def leaderboard(args):
    """One table of annotations and run folders; with --rank-with, the agreement of its ranks with another one's."""
    rows = leaderboard_rows(args.files, args.column, args.difficulty)
    print_leaderboard(rows, args)
    if args.rank_with:
        with reading(args.rank_with, "give a leaderboard.csv with this --column"):
            theirs = {r["name"]: float(r[args.column]) for r in read_csv(args.rank_with) if r[args.column]}
        ours = {r["name"]: r[args.column] for r in rows if r.get(args.column) is not None}
        table = np.array([(value, theirs[name]) for name, value in ours.items() if name in theirs])
        if len(table) < 2:
            raise InputError(f"{args.rank_with}: has {len(table)} of these models; ranks need two at least")
        interval = bootstrap(table, rank_correlations)
        for name, value, low, high in zip(("Spearman", "Kendall"), rank_correlations(table), *interval):
            print0(f"{name} with {args.rank_with}, {len(table)} models by {args.column}: {value:.3f}, 95 % interval "
                   f"{low:.3f} to {high:.3f}")
    return 0


def decoders(args):
    """Greedy, sampling and best-of-n for all n, with the tokens that they generate for an instruction."""
    directory = args.model[0] if args.model else newest_run()
    model, tokenizer, prompt_format, world = open_policy(directory, args)
    records = conditioned(directory, world.instructions(args.split, 800))
    print0("decoder       tokens  reward  exact match")
    for temperature, n in ((0, 1), (1, args.samples)):                # tree search would be another way to sample
        texts = sample_responses(model, tokenizer, records, prompt_format, max_new_tokens=MAX_NEW_TOKENS,
                                 temperature=temperature, seed=0, n=n)
        gold = []
        for r, samples in zip(records, texts):
            gold.append([float(count_errors(text, r["reference"]) == 0) for text in samples])
        proxy = score_texts(args.reward, records, texts, device=setup_device(args.device)) if args.reward else gold
        lengths = [len(tokenizer.encode_response(text)) for text in itertools.chain(*texts)]
        for k in range(1, n + 1):
            expected = [best_of_n(p, g, k) for p, g in zip(proxy, gold)]
            (reward, _), (exact, se) = [mean_and_se(column) for column in zip(*expected)]
            name = f"best of {k}" if temperature else "greedy"
            print0(f"{name:<12} {k * np.mean(lengths):7.1f}  {reward:6.3f}  {exact:.3f} +- {se:.3f}")
    return 0


def evaluate_annotator(args):
    """Variance and biases of an annotator's preferences; with --labels, agreement with human annotators."""
    records = []
    for path in args.data:
        records += [r for r in read_preferences(path, ties=True, failed=True) if r["preference"] is not None]
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
    """A reward model's scores of the outputs in a file, or a model's perplexity; with --out, writes each."""
    records = read_outputs(args.data[0])
    if args.model:
        model, tokenizer, prompt_format, _ = open_policy(args.model[0], args)
        rows = []
        for r in conditioned(args.model[0], records):
            rows.append((prompt_ids(tokenizer, r, prompt_format), tokenizer.encode_response(r["output"])))
        logp = response_logp(model, rows, setup_device(args.device), args.batch_size)
        print0(f"{args.data[0]}: {len(records)} outputs, perplexity {math.exp(-torch.cat(logp).mean()):.3f}")
        scores = [math.exp(-tokens.mean()) for tokens in logp]
    else:
        texts = [[r["output"]] for r in records]                            # one text a record
        scores = score_texts(args.reward, records, texts, args.format, args.dtype, setup_device(args.device),
                             args.batch_size)
        scores = [score for score, in scores]
        mean, se = mean_and_se(scores)
        print0(f"{args.data[0]}: {len(records)} outputs, reward {mean:.3f} +- {se:.3f}")
    if rank() == 0 and args.out:
        key = "perplexity" if args.model else "reward"
        write_json_lines(args.out, [{**r, key: score} for r, score in zip(records, scores)])
    return 0


COMMANDS = {"world": evaluate_world, "compare": compare, "leaderboard": leaderboard, "decoders": decoders,
            "agreement": evaluate_annotator, "score": score_outputs, "report": report}
NEEDS = {"leaderboard": "files", "report": "files", "agreement": "data", "score": "data"}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("command", nargs="?", choices=COMMANDS, default="world", help="default: world")
    p.add_argument("files", nargs="*", help="leaderboard, report: annotations and run folders")
    p.add_argument("--model", nargs="+", help="model directory (default: the newest run in out/); compare: one or "
                   "more, or files of outputs")
    p.add_argument("--against", help="world: a second model. compare: the baseline, a model directory or outputs "
                   "(default: what --model was trained from)")
    p.add_argument("--data", nargs="+", help="agreement: preference files of one annotator (several: repeated labels); "
                   "score: a file of outputs; compare: instructions for the models (default: those of --against)")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the built-in world")
    p.add_argument("--column", choices=COLUMNS, default="win_rate", help="leaderboard, compare: orders the table")
    p.add_argument("--difficulty", help="leaderboard, compare: AlpacaEval's df_gamed.csv or instruction_difficulty.csv")
    p.add_argument("--rank-with", help="leaderboard: another one (CSV), for the agreement of the two rankings")
    p.add_argument("--labels", help="agreement: preferences of human annotators, or the truth, to compare with")
    p.add_argument("--samples", type=positive_int, default=16, help="decoders: largest n of best-of-n")
    p.add_argument("--reward", help="score, decoders: reward model's directory (decoders: default the truth)")
    p.add_argument("--format", choices=FORMATS, help="prompt format (default: as config.json says)")
    p.add_argument("--out", default="", help="score: file for the scored outputs; leaderboard, compare: folder; "
                   "report: HTML file")
    add_annotator_flags(p)
    p.set_defaults(seed=None)                               # of the world: the one that the model was trained in
    args = p.parse_intermixed_args(argv)
    need = NEEDS.get(args.command, "command")
    if not getattr(args, need):
        raise InputError(f"{args.command} needs {need.replace('data', '--data')}")
    if args.command == "score" and not (args.reward or args.model):
        raise InputError("score needs --reward DIR or --model DIR")
    return args


def main(argv=None):
    args = parse(argv)
    return COMMANDS[args.command](args)


if __name__ == "__main__":
    run_main(main)
