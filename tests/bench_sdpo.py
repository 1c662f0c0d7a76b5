"""SDPO against CUT from the same judges: exact match after each round, and rounds to CUT's final exact match.

  python tests/bench_sdpo.py --judge corrects --seeds 3 4 5                                 README's rows
  python tests/bench_sdpo.py --judge points --seeds 3 4 5
  python tests/bench_sdpo.py --judge corrects --seeds 100 101 --split validation --tune --only EMA    (and points)

The last one chose the weight alpha of each divergence, by the mean gap closed over both judges; among those that do not
differ by a standard error, 0.5 of both KLs is CUT's. It also shows what CUT's replay does to SDPO.

Both methods start from an SFT model of the same size, steps and demonstrations. Half of its examples teach it to read:
for CUT (x, judgment) -> the response that is judged, for SDPO (x, judgment as advice) -> the demonstration that it was
compared with. Neither is told the truth, but the two SFT models differ, so each row begins with its own. Then each has
3 rounds of 94 updates, with the same instructions and batch size. CUT also replays judged SFT examples; SDPO does not,
because its own end in careless demonstrations (with --replay 32 it does worse, on the validation split).

Runs are kept in out/bench_sdpo as bench_methods.py keeps its own: started again, this script goes on from there. A run
takes a minute alone on a core, its SFT model two.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench_methods import folder_name, gap_closed, read_results, train  # noqa: E402
from data import JUDGES, run_main  # noqa: E402
from simulate import mean_and_se  # noqa: E402

SDPO = "train_cut.py --recipe sdpo"
METHODS = {
    "CUT": "train_cut.py",
    "SDPO, reverse KL, EMA": SDPO,
    "SDPO, reverse KL, live teacher": SDPO + " --teacher-rate 1",
    "SDPO, reverse KL, frozen teacher": SDPO + " --teacher-rate 0",
    "SDPO, forward KL, EMA": SDPO + " --divergence forward",
    "SDPO, JSD, EMA": SDPO + " --divergence jsd --alpha 2",
    "SDPO, sampled tokens, EMA": SDPO + " --divergence sampled --alpha 0.125",
}


def grid():
    """What is tried on the world seeds for tuning: weights, for each divergence and teacher, and CUT's replay."""
    rows = {"CUT": METHODS["CUT"], "SDPO, reverse KL, EMA, replay 32": SDPO + " --replay 32"}
    for name, command in list(METHODS.items())[1:]:
        for alpha in (0.125, 0.5, 2.0):
            rows[f"{name}, alpha {alpha}"] = f"{command} --alpha {alpha}"
    return rows


def rounds_to(results, target):
    """The first round after which the exact match is at least the target; "-" if none is."""
    reached = [i for i, found in enumerate(results["rounds"], 1) if found["exact_match"] >= target]
    return str(reached[0]) if reached else "-"


def print_table(rows, args):
    """rows: {name: results.json of each seed}."""
    print(f"judge {args.judge}: exact match on the {args.split} split before the first round and after each, a column "
          "for each seed; gap closed, mean and standard error over seeds; rounds to CUT's final exact match")
    print(f"| | {' | '.join(f'seed {s}' for s in args.seeds)} | gap closed | rounds to CUT's |")
    print("|---" * (len(args.seeds) + 3) + "|")
    for name, runs in rows.items():
        cells = []
        for results in runs:
            measured = [results["sft"], *results["rounds"]]
            cells.append(" ".join(f"{found['exact_match']:.3f}".lstrip("0") for found in measured))
        mean, se = mean_and_se([gap_closed(results) for results in runs])
        targets = [results["rounds"][-1]["exact_match"] for results in rows["CUT"]]
        reached = " ".join(rounds_to(results, target) for results, target in zip(runs, targets))
        print(f"| {name} | {' | '.join(cells)} | {mean:.2f} +- {se:.2f} | {reached} |", flush=True)
    for name, runs in rows.items():
        for key in ("precision", "recall"):
            values = [f"{results['rounds'][0][key]:.3f}" for results in runs]
            print(f"{name}: blame before the first round, {key} {' '.join(values)}")


def main(argv=None):
    args = parse(argv)
    rows, methods = {}, grid() if args.tune else METHODS
    for name, command in methods.items():
        if name != "CUT" and args.only and not any(part in name for part in args.only):
            continue
        rows[name] = []
        for seed in args.seeds:
            out = Path(args.out, args.split, args.judge, str(seed), folder_name(name))
            train(f"{command} --judge {args.judge} --split {args.split}", seed, out)
            rows[name].append(read_results(out))
    print_table(rows, args)
    return 0


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="the built-in world's judge")
    p.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="world seeds")
    p.add_argument("--split", choices=("test", "validation"), default="test", help="instructions to measure on")
    p.add_argument("--tune", action="store_true", help="every weight of every form, instead of the chosen ones")
    p.add_argument("--only", nargs="+", help="of the rows, those whose name has one of these parts, and CUT")
    p.add_argument("--out", default="out/bench_sdpo", help="folder for the runs")
    return p.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
