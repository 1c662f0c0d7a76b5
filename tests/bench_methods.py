"""Trains every method and compares them, a command for each table of README:

  python tests/bench_methods.py judgments --judge corrects --seeds 3 4 5      CUT and others that learn from judgments
  python tests/bench_methods.py judgments --judge points --seeds 3 4 5
  python tests/bench_methods.py preferences --seeds 3 4 5 --plot assets/overoptimization.svg      AlpacaFarm's methods

A method is a command, one line of JUDGMENT_METHODS or PREFERENCE_METHODS: add a line to compare another one. Runs are
kept in out/bench_methods, a folder for each seed and method. Started again, this script leaves out the finished ones
and resumes a stopped one. It does not compare flags: after changing a method's command, remove its folders.

On two cores with OMP_NUM_THREADS=1, three seeds take about half an hour (judgments, the two judges side by side) and 40
minutes (preferences, the seeds side by side: run `--seeds 3`, `--seeds 4` and `--seeds 5` at once, then the table). The
last digits depend on the number of threads, and so do README's tables.
"""
import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import JUDGES, Tokenizer, World, count_errors, run_main, write_json, write_json_lines  # noqa: E402
from evaluate import (MAX_NEW_TOKENS, answer_errors, best_of_n, best_of_n_kl, exact_match, win_rate,  # noqa: E402
                      win_score)
from model import LLaMA  # noqa: E402
from simulate import built_in_preferences, conditioned, mean_and_se, sample_responses, score_texts  # noqa: E402
from train_ppo import built_in_reward  # noqa: E402
from train_sft import built_in  # noqa: E402

# Row of the table: the command that trains it, all with the same number of updates of the same size, the same replay,
# and instructions from the same streams.
JUDGMENT_METHODS = {
    "SFT, more demonstrations": "train_cut.py --recipe sft",
    "unlikelihood everywhere": "train_cut.py --detect all",
    "expert iteration, same judge": "train_cut.py --recipe expert",
    "Hindsight (L2 alone)": "train_cut.py --recipe hindsight",
    "CUT offline": "train_cut.py --offline",
    "CUT": "train_cut.py",
    "CUT, frozen flags (ours)": "train_cut.py --detect frozen",
    "SFT on stated corrections": "train_cut.py --recipe corrected",
}

# The same for preferences: every method starts from the SFT model {sft} and gets the same {pairs}, or the {reward}
# model that was trained on them. Each learning rate is the best of 1e-4, 3e-4 and 1e-3 on world seeds 100 and 101,
# validation split.
SFT = "train_sft.py --model {sft} --format short --batch-size 32 --epochs 2"
PREFERENCE_METHODS = {
    "binary reward conditioning": SFT + " --recipe conditioning --data {pairs} --lr 1e-3",
    "binary FeedME": SFT + " --recipe feedme --data {pairs} --lr 3e-4",
    "expert iteration": SFT + " --data {winners} --lr 1e-3",
    "Quark, all quantiles": "train_ppo.py quark --quantiles all --reward {reward} --lr 3e-4",
    "Quark, best quantile": "train_ppo.py quark --quantiles best --reward {reward} --lr 3e-4",
    "PPO": "train_ppo.py ppo --reward {reward} --lr 3e-4",
    "DPO": "train_ppo.py dpo --lr 1e-4",
}
NOISE_FREE_REWARD = "train_ppo.py reward --noise 0"
WINNERS = ("simulate.py sample --model {sft} --data {unlabeled} --best-of 16 --reward {reward} --temperature 1 "
           "--max-new-tokens " + str(MAX_NEW_TOKENS))

NOISE = 0.25                 # fraction of the preference labels that are flipped
UNLABELED = 2000             # instructions that expert iteration answers
SAMPLES = 64                 # responses to each test instruction, for best-of-n


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def run(command, seed, out, **paths):
    """Runs one of the commands above with --seed and --out; {name} in it stands for paths["name"]."""
    script, *flags = [word.format(**paths) for word in command.split()]
    print(f"seed {seed}: {script} {' '.join(flags)}", file=sys.stderr, flush=True)
    argv = [sys.executable, str(ROOT / script), *flags, "--seed", str(seed), "--out", str(out)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)                   # Ctrl-C is the run's, which saves: wait
    code = process.wait()
    signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(f"{script} ended with exit code {code}; started again, this script goes on from there")


def train(command, seed, out, **paths):
    """The same for a train script: keeps a finished run, resumes a stopped one. Returns its folder."""
    stopped = (out / "resume.pt").is_file()
    finished = (out / "config.json").is_file() and not stopped
    if not finished:
        run(command + " --resume" if stopped else command, seed, out, **paths)
    return out


def folder_name(method):
    return re.sub(r"\W+", "-", method).strip("-")


def read_results(directory):
    return json.loads(Path(directory, "results.json").read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# Learning from judgments


def judgments(args):
    """Trains every method on every seed and prints the table."""
    folder = Path(args.out, "judgments", args.split, args.judge)
    rows = {}
    for name, command in JUDGMENT_METHODS.items():
        if "corrected" in command and args.judge == "points":               # this judge never states an answer
            continue
        command += f" --judge {args.judge} --split {args.split}"
        rows[name] = []
        for seed in args.seeds:
            out = train(command, seed, folder / str(seed) / folder_name(name))
            rows[name].append(read_results(out))
    print_judgments(rows, args)
    return 0


def gap_closed(results):
    """Fraction of the gap from the SFT model's exact match to 1 that the last round has closed."""
    sft = results["sft"]["exact_match"]
    return (results["rounds"][-1]["exact_match"] - sft) / (1 - sft)


def print_judgments(rows, args):
    """rows: {name: results.json of each seed}."""
    print(f"judge {args.judge}: exact match on the {args.split} split after each round, one column a seed; gap closed "
          "after the last round, mean and standard error over seeds")
    print(f"| | {' | '.join(f'seed {s}' for s in args.seeds)} | gap closed |")
    print("|---" * (len(args.seeds) + 2) + "|")
    sft = [f"{results['sft']['exact_match']:.3f}" for results in rows["CUT"]]       # the same for every method
    print(f"| SFT (start) | {' | '.join(sft)} | |")
    for name, runs in rows.items():
        cells = []
        for results in runs:
            rounds = [f"{r['exact_match']:.3f}".lstrip("0") for r in results["rounds"]]
            cells.append(" ".join(rounds))
        mean, se = mean_and_se([gap_closed(results) for results in runs])
        print(f"| {name} | {' | '.join(cells)} | {mean:.2f} +- {se:.2f} |")
    for metric in ("precision", "recall"):
        values = [f"{results['rounds'][0][metric]:.3f}" for results in rows["CUT"]]
        print(f"detection before round 1: {metric} {' '.join(values)}")


# ----------------------------------------------------------------------------------------------------------------------
# Learning from preferences: training


class Models(NamedTuple):
    """The directories of one seed's models."""
    sft: str
    methods: dict            # row of the table: its model
    rewards: dict            # noise of the labels: reward model trained on them
    ppo: dict                # noise of the labels: policy trained by PPO with that reward model


def train_methods(seed, folder):
    """Trains all methods of one seed."""
    sft = built_in(seed, "corrects", "")
    reward = built_in_reward(seed, NOISE, "")
    paths = {"sft": sft, "reward": reward, "pairs": built_in_preferences(sft, seed, NOISE, "cpu"),
             "winners": sample_winners(seed, folder, sft, reward)}
    methods = {}
    for name, command in PREFERENCE_METHODS.items():
        methods[name] = train(command, seed, folder / folder_name(name), **paths)

    # Over-optimization is shown beside a reward model whose labels have no noise.
    noise_free = train(NOISE_FREE_REWARD, seed, folder / "reward-noise-free")
    paths["reward"] = noise_free
    noise_free_ppo = train(PREFERENCE_METHODS["PPO"], seed, folder / "PPO-noise-free", **paths)
    return Models(sft, methods, {"noise 0.25": reward, "no noise": noise_free},
                  {"noise 0.25": methods["PPO"], "no noise": noise_free_ppo})


def sample_winners(seed, folder, sft, reward):
    """The demonstrations of expert iteration, best of 16 responses by the reward model: a file."""
    unlabeled, winners = folder / "unlabeled.jsonl", folder / "winners.jsonl"
    if not winners.is_file():
        keep = ("id", "instruction", "input")
        records = World(seed).instructions("train", UNLABELED, "unlabeled")
        write_json_lines(unlabeled, [{key: r[key] for key in keep} for r in records])
        run(WINNERS, seed, winners, sft=sft, unlabeled=unlabeled, reward=reward)
    return winners


# ----------------------------------------------------------------------------------------------------------------------
# Learning from preferences: measurements


class Measured(NamedTuple):
    """What one seed adds to the table and the plot."""
    rows: dict               # row of the table: (exact match, win rate against the SFT model)
    curves: dict             # panel of the plot: {noise of the labels: [(x, value)]}
    reward: dict             # results.json of the reward model


def measure_seed(seed, args):
    """Trains and measures all methods of one seed."""
    folder = Path(args.out, "preferences", str(seed))
    models = train_methods(seed, folder)
    records = World(seed).instructions(args.split, 800)
    tokenizer = Tokenizer.from_pretrained(models.sft)

    errors = {}                                                             # of greedy responses
    for name, directory in {"SFT": models.sft, **models.methods}.items():
        policy = LLaMA.from_pretrained(directory)
        _, errors[name] = answer_errors(policy, tokenizer, conditioned(directory, records), "short")
    rows = {name: (exact_match(e), win_rate(e, errors["SFT"])[0]) for name, e in errors.items()}

    samples = sample_scores(models, tokenizer, records, folder / f"samples-{args.split}.json")
    rows.update(best_of_rows(samples, errors["SFT"]))
    return Measured(rows, overoptimization(samples, models.ppo), read_results(models.rewards["noise 0.25"]))


def sample_scores(models, tokenizer, records, path):
    """SAMPLES responses of the SFT model to each record, at temperature 1: {"errors": their errors, and for each reward
    model its name: their scores}, a list of lists each. Kept in `path`."""
    if not path.is_file():
        policy = LLaMA.from_pretrained(models.sft)
        texts = sample_responses(policy, tokenizer, records, "short", max_new_tokens=MAX_NEW_TOKENS, temperature=1.0,
                                 seed=1, n=SAMPLES, label="sampling")
        samples = {"errors": []}
        for r, outputs in zip(records, texts):
            samples["errors"].append([count_errors(text, r["reference"]) for text in outputs])
        for name, directory in models.rewards.items():
            samples[name] = score_texts(directory, records, texts, "short")
        write_json(path, samples)
    return json.loads(path.read_text(encoding="utf-8"))


def mean_best_of(n, proxy, gold):
    """Expected (proxy, gold) of best-of-n, the mean over instructions. proxy, gold: one list of samples for each."""
    expected = [best_of_n(p, g, n) for p, g in zip(proxy, gold)]
    proxies, golds = zip(*expected)
    return sum(proxies) / len(proxies), sum(golds) / len(golds)


def exact_samples(samples):
    """1.0 for a sample without errors, else 0.0: a list for each instruction."""
    return [[float(e == 0) for e in errors] for errors in samples["errors"]]


def best_of_rows(samples, sft_errors):
    """The rows of best-of-n: {name: (exact match, win rate against the SFT model's greedy responses)}."""
    exact, wins, oracle = exact_samples(samples), [], []
    for errors, sft in zip(samples["errors"], sft_errors):
        wins.append([win_score(e, sft) for e in errors])
        oracle.append([-e for e in errors])                                 # a reward model that knows the truth
    rows = {}
    for name, n, proxy in (("one sample at T = 1", 1, samples["noise 0.25"]),
                           ("best of 16", 16, samples["noise 0.25"]),
                           ("best of 16, oracle", 16, oracle)):
        rows[name] = (mean_best_of(n, proxy, exact)[1], mean_best_of(n, proxy, wins)[1])
    return rows


def overoptimization(samples, ppo):
    """What is gained in the reward model's score (proxy) and in exact match (gold): {panel: {noise: [(x, value)]}}.
    x is the KL of best-of-n for n = 1, 2, 4 ... 64, or PPO's step."""
    panels, exact = {}, exact_samples(samples)
    for noise, directory in ppo.items():
        points = {"best of n": [], "PPO": []}                               # (x, proxy, gold)
        for n in (1, 2, 4, 8, 16, 32, 64):
            points["best of n"].append((best_of_n_kl(n), *mean_best_of(n, samples[noise], exact)))
        for entry in read_results(directory)["curve"]:
            points["PPO"].append((entry["step"], entry["proxy"], entry["gold"]))

        # Scores of different reward models are comparable in standard deviations of the SFT model's own scores.
        scores = [score for row in samples[noise] for score in row]
        mean, deviation = sum(scores) / len(scores), statistics.pstdev(scores)
        for method, curve in points.items():
            proxies = [(x, (proxy - mean) / deviation) for x, proxy, _ in curve]
            golds = [(x, gold) for x, _, gold in curve]
            panels.setdefault(f"{method}: reward model, SFT deviations", {})[noise] = proxies
            panels.setdefault(f"{method}: truth, exact match", {})[noise] = golds
    return panels


def preferences(args):
    """Trains and measures every method on every seed and prints the table; with --plot draws over-optimization."""
    measured = [measure_seed(seed, args) for seed in args.seeds]
    print_preferences(measured, args)
    if args.plot:
        draw([m.curves for m in measured], args.plot)
        print(f"{args.plot}: means over {len(args.seeds)} seeds, bars of one standard error")
    return 0


def print_preferences(measured, args):
    for seed, m in zip(args.seeds, measured):
        r = m.reward
        print(f"seed {seed}: reward model of {r['trained_on']} pairs: {r['accuracy']:.3f} of the held-out labels, of "
              f"which the noise leaves {r['ceiling']:.3f} right (ratio {r['accuracy'] / r['ceiling']:.2f}); "
              f"against the truth {r['truth']:.3f} +- {r['truth_se']:.3f}")

    closed = []
    for m in measured:
        names = ("one sample at T = 1", "best of 16", "best of 16, oracle")
        one, best, oracle = [m.rows[name][0] for name in names]             # exact match
        closed.append((best - one) / (oracle - one))
    mean, se = mean_and_se(closed)
    print(f"best of 16 closes {mean:.2f} +- {se:.2f} of the gap from one sample to the oracle's")

    print(f"| {args.split} split | {' | '.join(f'seed {s}' for s in args.seeds)} | gap closed | win rate against SFT |")
    print("|---" * (len(args.seeds) + 3) + "|")
    sft = [m.rows["SFT"][0] for m in measured]
    for name in sorted(measured[0].rows, key=lambda name: sum(m.rows[name][0] for m in measured)):
        exact = [m.rows[name][0] for m in measured]
        gap, gap_se = mean_and_se([(e - start) / (1 - start) for e, start in zip(exact, sft)])
        wins, wins_se = mean_and_se([m.rows[name][1] for m in measured])
        cells = " | ".join(f"{e:.3f}" for e in exact)
        print(f"| {name} | {cells} | {gap:.2f} +- {gap_se:.2f} | {wins:.3f} +- {wins_se:.3f} |")


# ----------------------------------------------------------------------------------------------------------------------
# The plot: an SVG of panels, two in a row

WIDTH, HEIGHT = 430, 300                                                    # of a panel with its margins
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 50                                   # its margins
COLORS = ("#0b62a4", "#d95f02", "#2e8b57", "#7a3e9d")
X_LABELS = {"best of n": "KL of best of n, ln n - (n - 1) / n, for n = 1 to 64", "PPO": "step"}


def draw(curves, path):
    """Draws each panel's mean and standard error over seeds. curves: {panel: {line: [(x, value)]}} of each seed."""
    elements = []
    for i, title in enumerate(curves[0]):
        lines = {}
        for name, points in curves[0][title].items():
            xs = [x for x, _ in points]
            values = [[value for _, value in seed[title][name]] for seed in curves]
            lines[name] = [(x, *mean_and_se(column)) for x, column in zip(xs, zip(*values))]
        left, top = i % 2 * WIDTH + LEFT, i // 2 * HEIGHT + TOP
        elements += draw_panel(title, X_LABELS[title.split(":")[0]], lines, left, top)
    size = f'width="{2 * WIDTH}" height="{-(-len(curves[0]) // 2) * HEIGHT}"'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
           f'<rect {size} fill="white"/>', *elements, "</svg>"]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(svg) + "\n", encoding="utf-8")


def draw_panel(title, x_label, lines, left, top):
    """The SVG elements of one panel whose axes begin at (left, top). lines: {name: [(x, mean, standard error)]}; the
    error bars are one standard error to either side."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    bottom = top + height
    points = [point for line in lines.values() for point in line]
    x_low, x_high = min(x for x, _, _ in points), max(x for x, _, _ in points)
    y_low, y_high = min(mean - se for _, mean, se in points), max(mean + se for _, mean, se in points)
    y_high = max(y_high, y_low + 1e-9)

    def at_x(x):
        return left + width * (x - x_low) / (x_high - x_low or 1)

    def at_y(y):
        return top + height * (y_high - y) / (y_high - y_low)

    elements = [
        f'<text x="{left}" y="{top - 12}" font-weight="bold">{title}</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
        f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">{x_label}</text>',
    ]
    for i in range(5):                                                      # five ticks on each axis
        x, y = x_low + (x_high - x_low) * i / 4, y_low + (y_high - y_low) * i / 4
        elements += [
            f'<text x="{at_x(x):.0f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{x:.3g}</text>',
            f'<text x="{left - 6}" y="{at_y(y) + 4:.0f}" text-anchor="end" fill="#555">{y:.2f}</text>',
        ]
    for i, (color, name) in enumerate(zip(COLORS, lines)):
        corners = " ".join(f"{at_x(x):.1f},{at_y(mean):.1f}" for x, mean, _ in lines[name])
        elements.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{corners}"/>')
        for x, mean, se in lines[name]:
            ends = f'x1="{at_x(x):.1f}" x2="{at_x(x):.1f}" y1="{at_y(mean - se):.1f}" y2="{at_y(mean + se):.1f}"'
            elements.append(f'<line {ends} stroke="{color}"/>')
        elements.append(f'<text x="{left + 8}" y="{bottom - 8 - 15 * i}" fill="{color}">{name}</text>')
    return elements


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", choices=("judgments", "preferences"), help="what the compared methods learn from")
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="world and model seeds")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="judgments: what the judge says")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the world's instructions")
    p.add_argument("--out", default="out/bench_methods", help="folder of the runs")
    p.add_argument("--plot", help="preferences: draw over-optimization into this SVG")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    return judgments(args) if args.table == "judgments" else preferences(args)


if __name__ == "__main__":
    run_main(main)
