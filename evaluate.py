"""How good responses are: exact match, errors, win rate; what CUT's detector finds; over-optimization.

  python evaluate.py --model out/cut-0                                  a model on the built-in world's test split
  python evaluate.py --model out/cut-0 --against out/sft-0-corrects     and its win rate against another
  python evaluate.py compare --seeds 3 4 5                              every method beside CUT, as in the README
  python evaluate.py farm --seeds 3 4 5                                 AlpacaFarm's methods beside each other, likewise
  python evaluate.py meter --data preferences.jsonl --labels truth.jsonl    agreement, variance and biases of a judge
  python evaluate.py score --reward out/reward-0 --data outputs.jsonl       a reward model's score of any outputs
"""
import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from data import (FORMATS, JUDGES, InputError, Tokenizer, World, collate, count_errors, in_range, print0, read_outputs,
                  read_preferences, run_main, write_json, write_json_lines, wrong_words)
from model import DTYPES, LLaMA, rank, read_config, setup_device
from simulate import conditioned, mean_and_se, sample_responses, score_texts

MAX_NEW_TOKENS = 32          # the built-in world's longest answer has 16


def win_rate(errors, reference_errors):
    """Share of instructions on which fewer errors are made than by the reference, ties counting half, and its SE."""
    return mean_and_se([0.5 * (1 + (b > a) - (b < a)) for a, b in zip(errors, reference_errors)])


def answer_errors(model, tokenizer, records, prompt_format):
    """Greedy answers to records with a `reference`: (texts, number of wrong words of each)."""
    texts = [ys[0] for ys in sample_responses(model, tokenizer, records, prompt_format, max_new_tokens=MAX_NEW_TOKENS,
                                              temperature=0, seed=0, label="evaluating")]
    return texts, [count_errors(text, r["reference"]) if text != r["reference"] else 0
                   for text, r in zip(texts, records)]


def exact_match(errors):
    return sum(e == 0 for e in errors) / len(errors)


# ----------------------------------------------------------------------------------------------------------------------
# Detection: which words did the judgment make more likely, and were they the wrong ones?


@torch.no_grad()
def judged_and_plain_logp(model, examples, device, batch_size=64):
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
# Over-optimization: what n, or more steps, do to the reward that is optimized (proxy) and to the truth (gold)


def best_of_n(proxy, gold, n):
    """What best-of-n gives, estimated without bias from N >= n samples of one instruction: their scores by the reward
    model that chooses and by the truth -> (expected proxy, expected gold) of the chosen one.

    The sample of rank i by proxy (from 1, the worst) is the best of n drawn ones in C(i-1, n-1) of C(N, n) cases."""
    order, total = sorted(range(len(proxy)), key=lambda i: proxy[i]), math.comb(len(proxy), n)
    weights = [math.comb(rank, n - 1) / total for rank in range(len(order))]
    return tuple(sum(w * values[i] for w, i in zip(weights, order)) for values in (proxy, gold))


def best_of_n_kl(n):
    """KL of best-of-n from the sampled model, in nats: ln n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def plot(path, panels):
    """Writes an SVG with panels side by side, two in a row. A panel is (title, label of x, {name: (xs, means, standard
    errors)}); the error bars are one standard error to either side."""
    width, height, left, top, colors = 430, 300, 60, 40, ("#0b62a4", "#d95f02", "#2e8b57", "#7a3e9d")
    parts, rows = [], -(-len(panels) // 2)
    for k, (title, label, lines) in enumerate(panels):
        x0, y0, w, h = k % 2 * width + left, k // 2 * height + top, width - left - 20, height - top - 50
        xs = [x for line in lines.values() for x in line[0]]
        lows = [m - e for line in lines.values() for m, e in zip(*line[1:])]
        highs = [m + e for line in lines.values() for m, e in zip(*line[1:])]
        low, high = min(lows), max(max(highs), min(lows) + 1e-9)
        at_x = lambda x: x0 + w * (x - min(xs)) / (max(xs) - min(xs) or 1)
        at_y = lambda y: y0 + h * (high - y) / (high - low)
        parts += [f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{title}</text>',
                  f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="none" stroke="#999"/>',
                  f'<text x="{x0 + w / 2}" y="{y0 + h + 34}" text-anchor="middle">{label}</text>']
        for i in range(5):
            x, y = min(xs) + (max(xs) - min(xs)) * i / 4, low + (high - low) * i / 4
            parts += [f'<text x="{at_x(x):.0f}" y="{y0 + h + 16}" text-anchor="middle" fill="#555">{x:.3g}</text>',
                      f'<text x="{x0 - 6}" y="{at_y(y) + 4:.0f}" text-anchor="end" fill="#555">{y:.2f}</text>']
        for color, (row, (name, (xs_, means, errors))) in zip(colors, enumerate(lines.items())):
            points = [(at_x(x), at_y(m), at_y(m - e), at_y(m + e)) for x, m, e in zip(xs_, means, errors)]
            parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="'
                         + " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points) + '"/>')
            parts += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{a:.1f}" y2="{b:.1f}" stroke="{color}"/>'
                      for x, _, a, b in points]
            parts.append(f'<text x="{x0 + 8}" y="{y0 + h - 8 - 15 * row}" fill="{color}">{name}</text>')
    size = f'width="{2 * width}" height="{rows * height}"'
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
                          f'<rect {size} fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


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


# AlpacaFarm's methods: the commands that make each from the SFT model {sft}, at equal pairs ({pairs}, and the reward
# model {reward} trained on them). Each learning rate is the best of 1e-4, 3e-4 and 1e-3
# on world seeds 100 and 101, validation split (released PPO has PPO's).
_SFT = "train_sft.py --model {sft} --format short --batch-size 32 --epochs 2"
FARM = {
    "binary reward conditioning": f"{_SFT} --recipe conditioning --data {{pairs}} --lr 1e-3",
    "binary FeedME": f"{_SFT} --recipe feedme --data {{pairs}} --lr 3e-4",
    "expert iteration": f"{_SFT} --data {{winners}} --lr 1e-3",
    "Quark, all quantiles": "train_ppo.py quark --quantiles all --reward {reward} --lr 3e-4",
    "Quark, best quantile": "train_ppo.py quark --quantiles best --reward {reward} --lr 3e-4",
    "PPO": "train_ppo.py ppo --reward {reward} --lr 3e-4",
    "PPO, released arithmetic": "train_ppo.py ppo --released --reward {reward} --lr 3e-4",
    "DPO": "train_ppo.py dpo --lr 1e-4",
}
SAMPLES, UNLABELED = 64, 2000        # answers to each test instruction; instructions that expert iteration answers


def run_once(out, finished, seed, command):
    """Runs `command --seed SEED --out OUT` unless the file OUT/finished is there; returns OUT. (Flags are not compared:
    after a change to FARM, remove the runs that it concerns.)"""
    (script, *flags), done = command.split(), Path(out, finished)
    found = json.loads(done.read_text(encoding="utf-8")) if done.name == "config.json" and done.is_file() else {}
    if not done.is_file() or "steps_done" in found and found["steps_done"] < found["run"]["steps"]:     # half done
        print(f"seed {seed}: {command}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *flags, "--seed", str(seed), "--out",
                        str(out)], check=True, stdout=subprocess.DEVNULL)
    return str(out)


def sample_scores(sft, rewards, records, path):
    """SAMPLES answers of the SFT model at temperature 1 to each record: {"errors": lists of their errors, and for each
    of `rewards` ({name: directory}) lists of its scores}. Kept in `path`."""
    if not path.is_file():
        tokenizer = Tokenizer.from_pretrained(sft)
        texts = sample_responses(LLaMA.from_pretrained(sft), tokenizer, records, "short", max_new_tokens=MAX_NEW_TOKENS,
                        temperature=1.0, seed=1, n=SAMPLES, label="sampling")
        found = {"errors": [[count_errors(t, r["reference"]) for t in ys] for ys, r in zip(texts, records)]}
        write_json(path, {**found, **{k: score_texts(d, records, texts, "short") for k, d in rewards.items()}})
    return json.loads(path.read_text(encoding="utf-8"))


def farm_seed(seed, args):
    """Runs everything of one seed (finished runs are kept). Returns {row of the table: (exact match, win rate against
    the SFT model, win rate's standard error over instructions)}, and what there is to plot: {name: [(x, value)]}."""
    import train_ppo                                                        # these two import this file
    import train_sft
    folder = Path(args.out, "farm", str(seed))
    sft, reward = train_sft.built_in(seed, "corrects"), train_ppo.built_in_reward(seed, 0.25)
    noise_free = run_once(folder / "reward-noise-free", "config.json", seed, "train_ppo.py reward --noise 0")
    asked, winners = folder / "unlabeled.jsonl", folder / "winners.jsonl"
    if not winners.is_file():
        write_json_lines(asked, [{k: r[k] for k in ("id", "instruction", "input")}
                                 for r in World(seed).instructions("train", UNLABELED, "unlabeled")])
        run_once(winners, "", seed, f"simulate.py sample --model {sft} --data {asked} --best-of 16 --reward {reward} "
                 f"--temperature 1 --max-new-tokens {MAX_NEW_TOKENS}")
    places = {"sft": sft, "reward": reward, "winners": winners,
              "pairs": train_sft.built_in_preferences(seed, 0.25, "cpu")}
    runs = {name: run_once(folder / re.sub(r"\W+", "-", name), "config.json", seed, command.format(**places))
            for name, command in FARM.items()}
    free = run_once(folder / "PPO-noise-free", "config.json", seed,
                    FARM["PPO"].format(**{**places, "reward": noise_free}))

    records = World(seed).instructions(args.split, 800)
    tokenizer, errors = Tokenizer.from_pretrained(sft), {}
    for name, directory in {"SFT": sft, **runs}.items():
        _, errors[name] = answer_errors(LLaMA.from_pretrained(directory), tokenizer, conditioned(directory, records),
                                        "short")
    rows = {name: (exact_match(found), *win_rate(found, errors["SFT"])) for name, found in errors.items()}

    sampled = sample_scores(sft, {"noise 0.25": reward, "no noise": noise_free}, records,
                            folder / f"samples-{args.split}.json")
    right = [[float(e == 0) for e in mine] for mine in sampled["errors"]]
    wins = [[0.5 * (1 + (e < base) - (e > base)) for e in mine] for mine, base in zip(sampled["errors"], errors["SFT"])]

    def best_of(n, proxy):
        """(exact match, win rate, its standard error), and the mean proxy, of the best of n by `proxy`."""
        best, exact = zip(*[best_of_n(p, g, n) for p, g in zip(proxy, right)])
        won = [best_of_n(p, w, n)[1] for p, w in zip(proxy, wins)]
        return (sum(exact) / len(exact), *mean_and_se(won)), sum(best) / len(best)

    rows["one sample at T = 1"] = best_of(1, sampled["noise 0.25"])[0]
    rows["best of 16"] = best_of(16, sampled["noise 0.25"])[0]
    rows["best of 16, oracle"] = best_of(16, [[-e for e in mine] for mine in sampled["errors"]])[0]
    lines = {}
    for noise, run in (("noise 0.25", runs["PPO"]), ("no noise", free)):
        flat = [x for mine in sampled[noise] for x in mine]                 # proxies in standard deviations of SFT's
        mean, deviation = sum(flat) / len(flat), statistics.pstdev(flat)
        for n in (2 ** k for k in range(7)):
            (exact, _, _), proxy = best_of(n, sampled[noise])
            lines.setdefault(("best of n", "proxy", noise), []).append((best_of_n_kl(n), (proxy - mean) / deviation))
            lines.setdefault(("best of n", "truth", noise), []).append((best_of_n_kl(n), exact))
        for c in json.loads(Path(run, "results.json").read_text(encoding="utf-8"))["curve"]:
            lines.setdefault(("PPO", "proxy", noise), []).append((c["step"], (c["proxy"] - mean) / deviation))
            lines.setdefault(("PPO", "truth", noise), []).append((c["step"], c["judge"]))
    return rows, lines, json.loads(Path(reward, "results.json").read_text(encoding="utf-8"))


def farm(args):
    """Prints the table of AlpacaFarm's methods, and with --plot draws over-optimization."""
    found = [farm_seed(seed, args) for seed in args.seeds]
    for seed, (_, _, r) in zip(args.seeds, found):
        print(f"seed {seed}: reward model of {r['trained_on']} pairs: {r['accuracy']:.3f} of the held-out labels, of "
              f"which the noise leaves {r['ceiling']:.3f} right (ratio {r['accuracy'] / r['ceiling']:.2f}); "
              f"against the truth {r['truth']:.3f} +- {r['truth_se']:.3f}")
    closed = [(r["best of 16"][0] - r["one sample at T = 1"][0])
              / (r["best of 16, oracle"][0] - r["one sample at T = 1"][0]) for r, _, _ in found]
    print("best of 16 closes {:.2f} +- {:.2f} of the gap from one sample to the oracle's".format(*mean_and_se(closed)))
    print(f"| {args.split} split | {' | '.join(f'seed {s}' for s in args.seeds)} | gap closed | win rate against SFT |")
    print("|---" * (len(args.seeds) + 3) + "|")
    rows = {name: [r[name] for r, _, _ in found] for name in found[0][0]}
    for name, cells in sorted(rows.items(), key=lambda row: sum(c[0] for c in row[1])):
        gaps = [(c[0] - base[0]) / (1 - base[0]) for c, base in zip(cells, rows["SFT"])]
        print("| {} | {} | {:.2f} +- {:.2f} | {:.3f} +- {:.3f} |".format(
            name, " | ".join(f"{c[0]:.3f}" for c in cells), *mean_and_se(gaps), *mean_and_se([c[1] for c in cells])))
    if args.plot:
        panels = {}
        for key in found[0][1]:
            method, what, noise = key
            xs = [x for x, _ in found[0][1][key]]
            values = [mean_and_se(column) for column in zip(*[[v for _, v in lines[key]] for _, lines, _ in found])]
            title = f"{method}: {'reward model, SFT deviations' if what == 'proxy' else 'truth, exact match'}"
            label = "KL of best of n, ln n - (n - 1) / n, for n = 1 to 64" if method == "best of n" else "step"
            panels.setdefault((title, label), {})[noise] = (xs, *zip(*values))
        plot(args.plot, [(*key, lines) for key, lines in panels.items()])
        print(f"{args.plot}: means over {len(args.seeds)} seeds, bars of one standard error")
    return 0


def score_outputs(args):
    """Prints the mean score that a reward model gives to the outputs of a file; with --out, writes each."""
    device = setup_device(args.device)
    records = read_outputs(args.data[0])
    scores = [s for s, in score_texts(args.reward, records, [[r["output"]] for r in records], args.format, args.dtype,
                                      device, args.batch_size)]
    print0("{}: {} outputs, reward {:.3f} +- {:.3f}".format(args.data[0], len(records), *mean_and_se(scores)))
    if rank() == 0 and args.out:
        write_json_lines(args.out, [{**r, "reward": s} for r, s in zip(records, scores)])
    return 0


def evaluate_world(args):
    """Exact match and errors of a model on the built-in world; with --against, its win rate."""
    device = setup_device(args.device)
    found = []
    for directory in filter(None, (args.model, args.against)):
        tokenizer = Tokenizer.from_pretrained(directory)
        _, raw = read_config(directory, quiet=True)
        seed = raw.get("run", {}).get("seed", 0) if args.seed is None else args.seed
        records = conditioned(directory, World(seed).instructions(args.split, 800))
        model = LLaMA.from_pretrained(directory, device=device)
        _, errors = answer_errors(model, tokenizer, records, raw.get("prompt_format", "short"))
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
    p.add_argument("command", nargs="?", choices=("world", "compare", "farm", "meter", "score"), default="world",
                   help="default: world")
    p.add_argument("--data", nargs="+", help="meter: preference files of one annotator (several: repeated labels); "
                   "score: a file of outputs")
    p.add_argument("--reward", help="score: reward model's directory")
    p.add_argument("--format", choices=FORMATS, help="score: its prompt format (default: what its config.json records)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="score: of weights and arithmetic")
    p.add_argument("--batch-size", type=in_range(int, 1), default=64, help="score: outputs side by side")
    p.add_argument("--plot", help="farm: draw over-optimization into this SVG")
    p.add_argument("--labels", help="meter: preferences to compare with, of people or the truth")
    p.add_argument("--model", help="model directory")
    p.add_argument("--against", help="a second one, for a win rate (fewer errors wins, ties count half)")
    p.add_argument("--seed", type=int, help="seed of the world (default: the one that the model was trained in)")
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="compare, farm: world and model seeds")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="compare: what the judge says")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the world's instructions")
    p.add_argument("--out", default="", help="compare, farm: folder of the runs (default: out/compare); score: file")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    args = p.parse_args(argv)
    args.out = args.out or ("" if args.command == "score" else "out/compare")
    if args.command == "score" and not (args.reward and args.data):
        raise InputError("score needs --reward DIR and --data FILE")
    if args.command == "world" and not args.model:
        raise InputError("give --model DIR, or one of the commands compare, farm, meter and score")
    if args.command == "meter" and not args.data:
        raise InputError("meter needs --data, one or more files of preferences")
    return args


def main(argv=None):
    args = parse(argv)
    return {"world": evaluate_world, "compare": compare, "farm": farm, "meter": meter,
            "score": score_outputs}[args.command](args)


if __name__ == "__main__":
    run_main(main)
