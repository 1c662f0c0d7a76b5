"""TreeBoN beside best-of-n in the built-in world, at the same number n of responses and of tokens for each:

  python tests/bench_tree.py --seeds 100 101 --split validation --count 400 --n 16 --shapes 2x4 4x2 4x4 8x2 16x2
  python tests/bench_tree.py --seeds 3 4 5                                                       README's figures

The first one chose the shapes, 8x2 among those that take at most 1.6 times best-of-n's seconds.

A shape is LAYERSxCHILDREN or LAYERSxCHILDRENxKEEP. Both methods sample at T = 1, at most 16 tokens (the longest answer
has 16), and the same reward model chooses. Models that are not in out/ are made. Measurements are kept in
out/bench_tree, a file for each seed, n and shape: started again, this script leaves out the finished ones.

exact, win      exact match, and win rate against the SFT model's greedy answers; best-of-n's are the unbiased estimates
                from 64 samples; "three" is exact match on the instructions that ask for three facts
tokens          sampled; passes: tokens that any model has read (policy, DPO model, reward model; prompts and padding
                included); seconds: of this process, on one thread
"""
import argparse
import functools
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model as model_py  # noqa: E402
import train_ppo  # noqa: E402
from data import Tokenizer, World, count_errors, prompt_ids, run_main, write_json  # noqa: E402
from evaluate import answer_errors, best_of_n, win_score  # noqa: E402
from model import Backbone, LLaMA, RewardModel, sample_rows, sample_token  # noqa: E402
from simulate import grow_tree, mean_and_se, reward_scores, sample_responses  # noqa: E402
from train_sft import built_in  # noqa: E402

MAX_NEW_TOKENS, SAMPLES = 16, 64


class Meter:
    """Counts what a block costs: sampled tokens, tokens that pass through a backbone, seconds."""

    def __enter__(self):
        self.tokens = self.passes = 0
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.passed)
        model_py.sample_token = self.sampled
        self.start = time.process_time()
        return self

    def passed(self, module, inputs, output):
        if isinstance(module, Backbone):
            self.passes += inputs[0].numel()

    def sampled(self, logits, *args, **kw):
        self.tokens += len(logits)
        return sample_token(logits, *args, **kw)

    def __exit__(self, *error):
        self.seconds = time.process_time() - self.start
        self.hook.remove()
        model_py.sample_token = sample_token

    def costs(self):
        return {"tokens": self.tokens, "passes": self.passes, "seconds": self.seconds}


class Models:
    """One seed's models and instructions, and the errors of the SFT model's greedy answers."""

    def __init__(self, seed, split, count):
        sft = built_in(seed, "corrects", "")
        dpo, reward = [train_ppo.built_in_stage(stage, seed, 0.25) for stage in ("dpo", "reward")]
        self.policy, self.dpo = LLaMA.from_pretrained(sft), LLaMA.from_pretrained(dpo)
        self.reward = RewardModel.from_pretrained(reward)
        self.tokenizer = Tokenizer.from_pretrained(sft)
        self.records = World(seed).instructions(split, count)
        self.three = [len(r["facts"]) == 3 for r in self.records]
        self.sft = answer_errors(self.policy, self.tokenizer, self.records, "short")[1]
        self.greedy_dpo = answer_errors(self.dpo, self.tokenizer, self.records, "short")[1]


def measure(models, n, decoder):
    """Samples and scores n responses to each instruction: their errors and scores, and the costs."""
    with Meter() as meter:
        texts = sample_responses(models.policy, models.tokenizer, models.records, "short", n=n, seed=1,
                                 max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, decoder=decoder, label=None)
        sequences = []
        for r, outputs in zip(models.records, texts):
            prompt = prompt_ids(models.tokenizer, r, "short")
            for text in filter(None, outputs):                              # without a tree's empty slots
                sequences.append(prompt + models.tokenizer.encode_response(text)[:MAX_NEW_TOKENS])
        scores = iter(reward_scores(models.reward, sequences))
    found = {"errors": [], "scores": [], **meter.costs(), "leaves": len(sequences)}
    for r, outputs in zip(models.records, texts):
        outputs = [text for text in outputs if text]
        found["errors"].append([count_errors(text, r["reference"]) for text in outputs])
        found["scores"].append([next(scores) for _ in outputs])
    return found


def kept(path, make):
    """What make() returns, kept in a file."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def shape_of(text, n):
    """LAYERSxCHILDREN or LAYERSxCHILDRENxKEEP."""
    layers, children, *keep = map(int, text.split("x"))
    return layers, children, keep[0] if keep else max(1, n // children)


def outcome(models, found, n):
    """Exact match, win rate, exact match on three facts and the expected score of the chosen response."""
    rows = []
    for errors, scores, sft, three in zip(found["errors"], found["scores"], models.sft, models.three):
        exact = [float(e == 0) for e in errors]
        wins = [win_score(e, sft) for e in errors]
        among = min(n, len(scores))                                         # a tree's leaves: all of them
        rows.append((best_of_n(scores, exact, among)[1], best_of_n(scores, wins, among)[1], three,
                     best_of_n(scores, exact, among)[0]))
    count = len(rows)
    of_three = [exact for exact, _, three, _ in rows if three]
    return {"exact": sum(r[0] for r in rows) / count, "win": sum(r[1] for r in rows) / count,
            "three": sum(of_three) / len(of_three), "proxy": sum(r[3] for r in rows) / count,
            "rows": [r[0] for r in rows]}


def measure_seed(seed, args):
    """{(n, method): outcome and costs} of one seed."""
    models = Models(seed, args.split, args.count)
    folder = Path(args.out, f"{args.split}-{args.count}", str(seed))
    print(f"seed {seed}: greedy SFT {sum(e == 0 for e in models.sft) / args.count:.3f}, greedy DPO "
          f"{sum(e == 0 for e in models.greedy_dpo) / args.count:.3f}", flush=True)
    samples = kept(folder / f"best-of-{SAMPLES}.json", lambda: measure(models, SAMPLES, sample_rows))
    results = {}
    for n in args.n:
        plain = kept(folder / f"best-of-{n}.json", lambda: measure(models, n, sample_rows))
        results[n, "best-of-n"] = {**plain, **outcome(models, samples, n)}
        for text in args.shapes:
            shape = shape_of(text, n)
            if shape[1] * shape[2] > n:
                continue
            decoder = functools.partial(grow_tree, models.dpo, shape)
            found = kept(folder / f"tree-{n}-{text}.json", lambda: measure(models, n, decoder))
            results[n, text] = {**found, **outcome(models, found, n)}
            r, b = results[n, text], results[n, "best-of-n"]
            print(f"  {n} {text}: exact {r['exact']:.3f} (best-of-n {b['exact']:.3f})", file=sys.stderr, flush=True)
    return results


def show(results, args):
    """The table: means over seeds and standard errors of the difference to best-of-n, seed by seed."""
    print(f"{args.split} split, seeds {args.seeds}: mean over seeds; difference to best-of-n +- standard error over "
          "seeds; costs as ratios to best-of-n's")
    columns = "n, method, exact, difference, three facts, difference, win rate, difference, tokens, passes, seconds"
    print(f"| {columns.replace(',', ' |')} |")
    print("|---" * 11 + "|")
    for n, method in results[0]:
        cells = []
        for key in ("exact", "three", "win"):
            values = [r[n, method][key] for r in results]
            differences = [r[n, method][key] - r[n, "best-of-n"][key] for r in results]
            mean, se = mean_and_se(differences)
            cells += [f"{sum(values) / len(values):.3f}", f"{mean:+.3f} +- {se:.3f}"]
        for key in ("tokens", "passes", "seconds"):
            total = sum(r[n, method][key] for r in results)
            plain = sum(r[n, "best-of-n"][key] for r in results)
            cells.append(f"{total:.0f}" if method == "best-of-n" else f"{total / plain:.2f}")
        print(f"| {n} | {method} | {' | '.join(cells)} |")


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="world and model seeds")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="of the world's instructions")
    p.add_argument("--count", type=int, default=800, help="instructions")
    p.add_argument("--n", type=int, nargs="+", default=[8, 16, 32, 64], help="responses")
    p.add_argument("--shapes", nargs="+", default=["8x2", "4x4", "4x2"], help="LAYERSxCHILDREN[xKEEP]")
    p.add_argument("--out", default="out/bench_tree", help="folder of the measurements")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    show([measure_seed(seed, args) for seed in args.seeds], args)
    return 0


if __name__ == "__main__":
    run_main(main)
