"""Metrics of evaluate.py against numbers worked out by hand or published, and the benchmark that compares methods."""
import importlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

import evaluate
from data import Tokenizer, read_json, units, world_tokenizer, write_json_lines
from evaluate import (agreement, best_of_n, best_of_n_kl, bias, detection, exact_match, labels_by_pair, mark,
                      prefers_first, prefers_longer, preference_from_logprobs, token_words, variance, win_rate)
from simulate import mean_and_se

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA = SHARED / "llama" / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


# ----------------------------------------------------------------------------------------------------------------------
# Exact match and win rates


def test_mean_and_standard_error():
    """ddof 0 in place of 1, a missing square root, or a division by zero for one value."""
    mean, se = mean_and_se([1, 2, 3, 4])
    assert mean == 2.5 and se == pytest.approx(math.sqrt(5 / 3 / 4))
    assert mean_and_se([0.25]) == (0.25, 0)


def test_exact_match():
    """A response with errors counts as exact."""
    assert exact_match([0, 1, 0, 3]) == 0.5


@pytest.mark.parametrize("wins, losses, ties, rate, error", [
    (80, 160, 10, 34.0, 2.934355), (135, 115, 1, 53.984064, 3.145897), (77, 165, 10, 32.539683, 2.889692),
    (119, 131, 1, 47.609562, 3.152349), (328, 469, 8, 41.242236, 1.727181)])
def test_published_win_rates(wins, losses, ties, rate, error):
    """Ties are dropped or count a whole, wins and losses are swapped, or the error differs from AlpacaEval's."""
    ours = [0] * wins + [2] * losses + [1] * ties
    theirs = [1] * (wins + losses + ties)
    assert [100 * x for x in win_rate(ours, theirs)] == pytest.approx([rate, error], abs=1e-6)
    assert 100 * win_rate(theirs, ours)[0] == pytest.approx(100 - rate)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs AlpacaEval's published annotations")
def test_win_rates_of_alpacaevals_leaderboard():
    """A rate of discrete wins, a standard error with ddof 0, or lost ties would differ from the public table."""
    for model in json.loads((SHARED / "alpaca_eval" / "annotations.json").read_text(encoding="utf-8")):
        scores = [r["preference"] - 1 for r in model["rows"] if r["preference"] is not None]
        mean, se = mean_and_se(scores)
        assert 100 * mean == pytest.approx(float(model["leaderboard"]["win_rate"]), abs=1e-6)
        assert 100 * se == pytest.approx(float(model["leaderboard"]["standard_error"]), abs=1e-6)


def test_preference_from_log_probabilities():
    """A preference runs the wrong way round, or a token outside the reported ones is taken for certainty."""
    p = preference_from_logprobs(-15.515626, -6.704e-7)
    assert p == pytest.approx(1.999999817, abs=1e-9) and 3 - p == pytest.approx(1.000000183, abs=1e-9)
    assert preference_from_logprobs(-math.inf, -math.inf) is None
    assert preference_from_logprobs(-0.1, -math.inf) == 1
    assert preference_from_logprobs(-math.inf, -9) == 2
    assert preference_from_logprobs(-1, -1) == 1.5 and preference_from_logprobs(-5000.0, 0) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Detection


def test_token_words_by_hand():
    """A word of several pieces, a punctuation mark or EOS is counted at its neighbour."""
    pieces = ["The", " ans", "wer", " is", " 1", "2", ".", "</s>"]
    assert token_words(pieces) == [0, 1, 1, 2, 3, 3, 4, 5]
    assert token_words(["a", ",", " b", " ", "c", "</s>"])[:3] == [0, 1, 2]
    assert token_words(["</s>"]) == [0]


@pytest.mark.parametrize("text", ["The cat lives in the den, eats fish and is red.", "The answer is 12.",
                                  "The rater lives in the newtoad, eats 1234 and is Catfish."])
def test_token_words_of_the_world(tokenizer, text):
    """Words outside the vocabulary shift all that follow by their number of pieces."""
    pieces = tokenizer.pieces(tokenizer.encode_response(text))
    words = token_words(pieces)
    for k, word in enumerate(units(text)):
        assert "".join(piece for piece, w in zip(pieces, words) if w == k).strip() == word
    assert words[-1] == len(units(text)) and words == sorted(words)


@pytest.mark.parametrize("text, expected", [
    ("a  b c", {"a": 0, " b": 1, " c": 2}), ("a\nb.", {"a": 0, "b": 1, ".": 2}), ("a é b", {"a": 0, " b": 2}),
    ("a 😀 b", {"a": 0, " b": 2})])
@pytest.mark.parametrize("name", ["world", "llama"])
def test_token_words_of_odd_spaces_and_bytes(tokenizer, name, text, expected):
    """A lone space counts as EOS, or a byte piece as the six letters of its name, which shifts the words after it."""
    if name == "llama" and not LLAMA.is_file():
        pytest.skip("no shared/data/llama/tokenizer.model")
    tokenizer = tokenizer if name == "world" else Tokenizer(LLAMA.read_bytes())
    ids = tokenizer.encode_response(text)
    words = token_words(tokenizer.pieces(ids))
    names = [tokenizer.sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    assert {piece: w for piece, w in zip(names, words) if piece in expected} == expected
    assert words[-1] == len(units(text)) and len(units(text)) not in words[:-1]


def test_detection_by_hand(tokenizer):
    """Precision and recall are swapped, count tokens in place of words, or look for a missing word elsewhere."""
    # wrong are word 5 (before it "den" is missing) and the end, 8, where the full stop is missing
    missing = {"id": 7, "output": "The cat lives in the and eats fish",
               "reference": "The cat lives in the den and eats fish."}
    # wrong is word 3, which has several pieces
    replaced = {"id": "z", "output": "The answer is rater.", "reference": "The answer is 12."}
    good = {"id": "good", "output": "The answer is 12.", "reference": "The answer is 12."}
    judged = [missing, replaced, good]

    def flags(record, *flagged_words):
        pieces = tokenizer.pieces(tokenizer.encode_response(record["output"]))
        return torch.tensor([word in flagged_words for word in token_words(pieces)])

    pieces = int(flags(replaced, 3).sum())
    assert pieces > 1 and len(flags(missing)) == 9
    tokens = 9 + 5 + pieces
    # hits: the missing word (not the end) and "rater"; "cat" is flagged by mistake
    rates = detection(tokenizer, {"7": flags(missing, 1, 5), "z": flags(replaced, 3)}, judged)
    assert rates == {"precision": 2 / 3, "recall": 2 / 3, "flagged": (2 + pieces) / tokens}
    rates = detection(tokenizer, {"7": flags(missing, 8), "z": flags(replaced)}, judged)
    assert rates == {"precision": 1, "recall": 1 / 3, "flagged": 1 / tokens}
    one_piece = flags(replaced, 3)
    one_piece[one_piece.nonzero()[1:]] = False
    rates = detection(tokenizer, {"z": one_piece}, judged)
    assert rates == {"precision": 1, "recall": 1, "flagged": 1 / (4 + pieces + 1)}
    assert detection(tokenizer, {}, judged) == {"precision": 0, "recall": 0, "flagged": 0}
    assert detection(tokenizer, {"good": flags(good, 2)}, judged) == {"precision": 0, "recall": 0, "flagged": 1 / 6}


def test_marked_text():
    """Brackets enclose the space before a word, or come in empty pairs; or EOS shows although nothing flagged it."""
    pieces = ["The", " ans", "wer", " is", " 13", ".", "</s>"]
    assert mark(pieces, [False] * 7) == "The answer is 13."
    assert mark(pieces, [False, False, True, False, True, True, False]) == "The ans[wer] is [13][.]"
    assert mark(pieces, [True] + [False] * 5 + [True]) == "[The] answer is 13.[</s>]"
    every = mark(pieces, [True] * 7)
    assert re.sub(r"[\[\]]", "", every) == "The answer is 13.</s>" and every.count("[") == every.count("]") == 7


# ----------------------------------------------------------------------------------------------------------------------
# Agreement of annotators


def preference(instruction, a, b, label, **more):
    return {"instruction": instruction, "input": "", "output_1": a, "output_2": b, "preference": label, **more}


def test_agreement_variance_and_bias_by_hand():
    """Ties in a vote do not count half, the order of the stored outputs matters, or an annotator votes for himself."""
    stored = [preference("x", "a", "b", 1), preference("x", "b", "a", 2), preference("y", "a", "b", 2)]
    assert labels_by_pair(stored) == {("x", "", "a", "b"): [1, 1], ("y", "", "a", "b"): [2]}
    humans = {"p": [1, 1, 2, 1], "q": [2, 2, 1, 1], "r": [2, 2, 2, 2]}
    judge = {"p": [1], "q": [2], "r": [1], "s": [1]}
    # p: without a 1 the vote is of {1, 1, 2}, without the 2 of {1, 1, 1}: always 1. q: without a 2 it is 1, without
    # a 1 it is 2: half.
    assert agreement(judge, humans)[0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert bias(judge, humans)[0] == pytest.approx((0 + 0.5 + 1) / 3)
    # p: each 1 agrees with {1, 2, 1}, the 2 not with {1, 1, 1}. q: each label differs from the vote of the others.
    assert variance(humans)[0] == pytest.approx((0.25 + 1 + 0) / 3)
    assert variance({"p": [1, 2]})[0] == 1 and variance({"p": [1, 1, 2]})[0] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert agreement({"s": [1]}, humans) is None and variance(judge) is None


def test_length_and_position_bias_by_hand():
    """Short differences count, a label is read in the stored and not in the shown order, or random labels count."""
    long = "x" * 40
    records = [preference("a", "s", long, 2, switched=False), preference("b", long, "s", 2, switched=True),
               preference("c", long, "s", 1, switched=True), preference("d", "s", "ss", 1, switched=False),
               preference("e", "s", "ss", 1, switched=False, annotator="noise")]
    assert prefers_longer(records)[0] == pytest.approx(2 / 3)
    assert prefers_first(records)[0] == pytest.approx(2 / 4)                # b and d
    assert prefers_longer(records[3:]) is None


def test_the_agreement_command(tmp_path, capsys):
    """Several files of one annotator are not joined, ties are dropped, or a bias without any label is printed."""
    first, second, truth = (tmp_path / name for name in ("first.jsonl", "second.jsonl", "truth.jsonl"))
    write_json_lines(first, [preference("x", "a", "b", 1), preference("y", "a", "b", 1.5)])
    write_json_lines(second, [preference("x", "a", "b", 2)])
    write_json_lines(truth, [preference("x", "a", "b", 1), preference("z", "a", "b", 1)])
    assert evaluate.main(["agreement", "--data", str(first), str(second), "--labels", str(truth)]) == 0
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["3 labels of 2 pairs", "variance 1.000 +- 0.000", f"1 pairs also in {truth}",
                     "agreement 0.500 +- 0.000", "bias 0.500 +- 0.000"]


def test_the_score_command(tmp_path, monkeypatch, capsys):
    """Scores are written to other records, or without what the records had."""
    monkeypatch.setattr(evaluate, "score_texts", lambda directory, records, texts, *_: [[len(t[0])] for t in texts])
    outputs, scored = tmp_path / "outputs.jsonl", tmp_path / "scored.jsonl"
    records = [{"id": i, "instruction": "x", "input": "", "output": "y" * i} for i in (1, 2, 3, 4)]
    write_json_lines(outputs, records)
    evaluate.main(["score", "--reward", "DIR", "--data", str(outputs), "--out", str(scored), "--device", "cpu"])
    assert f"{outputs}: 4 outputs, reward 2.500 +- 0.645" in capsys.readouterr().out
    assert read_json(scored) == [{**r, "reward": r["id"]} for r in records]


# ----------------------------------------------------------------------------------------------------------------------
# Best-of-n


@pytest.mark.parametrize("n, proxy, gold", [(1, .325, .375), (2, .633333, .5), (3, .8, .5), (4, .9, .4)])
def test_best_of_n(n, proxy, gold):
    """The best of the first n samples in place of the mean over all choices of n, or gold sorted by itself."""
    proxies, golds = [.1, .5, -.2, .9], [.2, .8, .1, .4]
    assert best_of_n(proxies, golds, n) == pytest.approx((proxy, gold), abs=2e-6)
    best = [max(chosen) for chosen in itertools.combinations(zip(proxies, golds), n)]
    counted = [sum(column) / len(best) for column in zip(*best)]
    assert best_of_n(proxies, golds, n) == pytest.approx(counted, abs=1e-12)


def test_kl_of_best_of_n():
    """ln n alone, or the second term with another sign."""
    for n, kl in ((1, 0), (2, .193147), (4, .636294), (16, 1.835089), (64, 3.174508), (1024, 5.932448)):
        assert best_of_n_kl(n) == pytest.approx(kl, abs=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The benchmark that compares methods


@pytest.fixture
def bench():
    return importlib.import_module("bench_methods")


def test_the_commands_of_compared_methods_parse(bench):
    """A script loses or renames a flag, and the comparison fails some hours after its start."""
    commands = [*bench.JUDGMENT_METHODS.values(), *bench.PREFERENCE_METHODS.values(), bench.NOISE_FREE_REWARD]
    assert len(commands) == 16
    for command in [f"{command} --resume" for command in commands] + [bench.WINNERS]:
        script, *flags = command.split()
        args = importlib.import_module(Path(script).stem).parse([*flags, "--seed", "3", "--out", "folder"])
        assert (args.seed, args.out) == (3, "folder"), command


def test_the_table_of_judgments_and_its_runs(bench, tmp_path, monkeypatch, capsys):
    """A finished run is repeated, a stopped one is taken for finished, or the gap is measured from the wrong round."""
    started = []

    def run(argv, **_):
        started.append(argv)
        out = Path(argv[argv.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        rounds = [{"exact_match": 0.9, "precision": 0.8, "recall": 0.6}, {"exact_match": 0.7}]
        (out / "results.json").write_text(json.dumps({"sft": {"exact_match": 0.4}, "rounds": rounds}))
        (out / "config.json").write_text("{}")
        (out / "resume.pt").unlink(missing_ok=True)

    monkeypatch.setattr(bench.subprocess, "run", run)
    argv = ["judgments", "--judge", "points", "--seeds", "3", "4", "--out", str(tmp_path)]
    bench.main(argv)
    table = capsys.readouterr().out
    assert "| SFT (start) | 0.400 | 0.400 | |\n" in table
    assert "| CUT | .900 .700 | .900 .700 | 0.50 +- 0.00 |\n" in table
    assert "detection before round 1: recall 0.600 0.600\n" in table and "states" not in table
    assert len(started) == 2 * 7 and len({a[a.index("--out") + 1] for a in started}) == 2 * 7

    started.clear()
    stopped = tmp_path / "judgments" / "test" / "points" / "4" / "CUT"
    (stopped / "resume.pt").touch()
    bench.main(argv)
    assert len(started) == 1 and str(stopped) in started[0] and "--resume" in started[0]
    assert capsys.readouterr().out == table
