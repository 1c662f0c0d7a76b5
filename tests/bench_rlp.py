"""Compares RLP-UML and RLP-SPG (arXiv 2403.19279) with plain PPO in the built-in world, and with a control:

  python tests/bench_rlp.py --seeds 3 4 5
  python tests/bench_rlp.py --seeds 100 101 --split validation --tune      only reward models, of several settings

Plain PPO is step 3 of RLP. Both methods then train a second reward model and run PPO once more, from the SFT model and
with the same flags. The control does so with a reward model of the same pairs and another seed: RLP has to be better
than this, because running everything twice can help by itself. Every PPO run chooses its checkpoint by the truth on the
same 400 validation instructions. Lambda 0.5 and gamma 0.5 are the paper's.

Accuracy on policy samples is that of a reward model against the truth, on the pairs of different responses of plain
PPO's policy (ten to each of 400 instructions of the split, at temperature 1) that do not have equally many errors.

Runs are kept in out/bench_rlp, a folder for each seed; started again, finished ones are left out. After changing a
command, remove its folders. A seed takes about 20 minutes on a core (OMP_NUM_THREADS=1).
"""
import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_methods import NOISE, folder_name, read_results, train  # noqa: E402
from data import Tokenizer, World, count_errors, read_json, run_main  # noqa: E402
from evaluate import MAX_NEW_TOKENS, answer_errors, exact_match, win_rate  # noqa: E402
from model import LLaMA  # noqa: E402
from simulate import built_in_preferences, mean_and_se, sample_responses, score_texts  # noqa: E402
from train_ppo import built_in_reward  # noqa: E402
from train_sft import built_in  # noqa: E402

# Row of the table: the reward model's command. PPO's is the same for all, with README's learning rate.
PPO = "train_ppo.py ppo --reward {reward} --lr 3e-4"
AGAIN = ("train_ppo.py reward --model {sft} --data {pairs} --format short --max-length 256 --batch-size 128 "
         "--micro-batch-size 64 --lr 1e-3 --epochs 6")
METHODS = {
    "PPO, second reward model": AGAIN,
    "RLP-SPG": "train_ppo.py spg",
    "RLP-UML": "train_ppo.py uml",
}
TUNED = {
    "RLP-UML, lambda 0.05": "train_ppo.py uml --lam 0.05",
    "RLP-SPG, gamma 0.8": "train_ppo.py spg --gamma 0.8",
}


def train_seed(seed, args):
    """Trains all methods of one seed: {row: (reward model, policy or None)}."""
    folder = Path(args.out, str(seed))
    paths = {"sft": built_in(seed, "corrects"), "reward": built_in_reward(seed, NOISE)}
    paths["pairs"] = built_in_preferences(paths["sft"], seed, NOISE, "cpu")
    plain = train(PPO, seed, Path(f"out/ppo-{seed}"), **paths)             # where uml and spg look for it
    models = {"PPO": (paths["reward"], plain)}
    for name, command in {**METHODS, **(TUNED if args.tune else {})}.items():
        own_seed = seed + 1000 if command == AGAIN else seed                # with --data it is not the world's
        paths["reward"], policy = train(command, own_seed, folder / f"reward-{folder_name(name)}", **paths), None
        if not args.tune:
            policy = train(PPO, seed, folder / folder_name(name), **paths)
        models[name] = (paths["reward"], policy)
    return paths["sft"], models


def policy_accuracy(policy, rewards, records, seed):
    """Of each reward model, the fraction of pairs of the policy's responses that it orders as the truth does."""
    texts = sample_responses(LLaMA.from_pretrained(policy), Tokenizer.from_pretrained(policy), records, "short",
                             max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=seed, n=10, label=None)
    texts = [sorted(set(outputs)) for outputs in texts]
    found = []
    for reward in rewards:
        scores, right = score_texts(reward, records, texts, "short"), []
        for r, outputs, row in zip(records, texts, scores):
            errors = [count_errors(text, r["reference"]) for text in outputs]
            for (e, s), (other_e, other_s) in itertools.combinations(zip(errors, row), 2):
                if e != other_e:
                    right.append(float((e < other_e) == (s > other_s)))
        found.append(sum(right) / len(right))
    return found, len(right)


def measure_seed(seed, args):
    """{row: (accuracy on held-out pairs by the truth, on policy samples, exact match, win rate against SFT)}."""
    sft, models = train_seed(seed, args)
    tokenizer, records = Tokenizer.from_pretrained(sft), World(seed).instructions(args.split, 800)
    rewards = [reward for reward, _ in models.values()]
    accuracies, pairs = policy_accuracy(models["PPO"][1], rewards, records[:400], seed)
    print(f"seed {seed}: {pairs} pairs of policy samples")
    _, before = answer_errors(LLaMA.from_pretrained(sft), tokenizer, records, "short")
    rows = {"SFT": (None, None, exact_match(before), 0.5)}
    for (name, (reward, policy)), on_policy in zip(models.items(), accuracies):
        exact = wins = None
        if policy:
            _, errors = answer_errors(LLaMA.from_pretrained(policy), tokenizer, records, "short")
            exact, wins = exact_match(errors), win_rate(errors, before)[0]
        results = read_results(reward)
        rows[name] = (results["truth"], on_policy, exact, wins)
        if "spg" in str(reward).lower():
            print_synthetic(seed, name, Path(reward), results)
    return rows


def print_synthetic(seed, name, reward, results):
    """What RLP-SPG has added: how much, how true, and how long."""
    pairs = read_json(reward / "synthetic.jsonl", empty=True)
    true, lengths = [], []
    for p in pairs:
        chosen, rejected = p["output_1"], p["output_2"]
        true.append(float(count_errors(chosen, p["reference"]) < count_errors(rejected, p["reference"])))
        lengths.append(len(chosen) / max(1, len(rejected)))
    if pairs:
        print(f"seed {seed}, {name}: {len(pairs)} synthetic pairs among {results['trained_on']}, true "
              f"{mean_and_se(true)[0]:.3f}, chosen / rejected characters {mean_and_se(lengths)[0]:.3f}")


def print_rows(tables, args):
    """tables: rows of each seed."""
    print(f"{args.split} split: one column a seed, then mean and standard error over seeds")
    titles = ("truth, held-out pairs", "truth, policy samples", "exact match", "win rate against SFT")
    for i, title in enumerate(titles):
        print(f"| {title} | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | minus PPO |")
        for name in tables[0]:
            values = [table[name][i] for table in tables]
            if None not in values:
                line = " | ".join(f"{v:.3f}" for v in values)
                gains = [""]
                if tables[0]["PPO"][i] is not None:
                    gains = mean_and_se([v - table["PPO"][i] for v, table in zip(values, tables)])
                    gains = ["{:+.3f} +- {:.3f}".format(*gains)]
                print("| {} | {} | {:.3f} +- {:.3f} | {} |".format(name, line, *mean_and_se(values), *gains))


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="of the built-in world")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="measured on")
    p.add_argument("--tune", action="store_true", help="reward models of further settings, and no PPO with them")
    p.add_argument("--out", default="out/bench_rlp", help="folder for the runs")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    print_rows([measure_seed(seed, args) for seed in args.seeds], args)
    return 0


if __name__ == "__main__":
    run_main(main)
