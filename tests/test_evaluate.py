"""Metrics of evaluate.py against numbers worked out by hand or published, and the benchmark that compares methods."""
import argparse
import csv
import html.parser
import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from data import InputError, Tokenizer, World, read_json, units, world_tokenizer, write_json, write_json_lines
from evaluate import (
    agreement, best_of_n, best_of_n_kl, bias, detection, exact_match, fit_logistic, labels_by_pair, leaderboard_row,
    length_controlled, mark, paired_test, prefers_first, prefers_longer, rank_correlations, read_annotations,
    token_words, variance, win_rate)
from model import Config, LLaMA, RewardModel
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


PUBLISHED = [
    (80, 160, 10, 34.0, 2.934355), (135, 115, 1, 53.984064, 3.145897), (77, 165, 10, 32.539683, 2.889692),
    (119, 131, 1, 47.609562, 3.152349), (328, 469, 8, 41.242236, 1.727181)]


@pytest.mark.parametrize("wins, losses, ties, rate, error", PUBLISHED)
def test_published_win_rates(wins, losses, ties, rate, error):
    """Ties are dropped or count a whole, wins and losses are swapped, or the error differs from AlpacaEval's."""
    ours = [0] * wins + [2] * losses + [1] * ties
    theirs = [1] * (wins + losses + ties)
    assert [100 * x for x in win_rate(ours, theirs)] == pytest.approx([rate, error], abs=1e-6)
    assert 100 * win_rate(theirs, ours)[0] == pytest.approx(100 - rate)


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
# AlpacaEval's win rates, length control and leaderboards

ALPACA_EVAL = SHARED / "alpaca_eval" / "annotations.json"


def annotation(i, preference, length_1=10, length_2=10, model="ours", **more):
    return {"instruction": f"ask {i}", "output_1": "x" * length_1, "output_2": "y" * length_2, "generator_1": "base",
            "generator_2": model, "preference": preference, **more}


def row_of(tmp_path, annotations):
    """The leaderboard row of annotations that were written to a file."""
    write_json(tmp_path / "annotations.json", annotations)
    (name, rows), = read_annotations(tmp_path / "annotations.json").items()
    return leaderboard_row(name, rows)


@pytest.mark.parametrize("wins, losses, ties, rate, error", PUBLISHED)
def test_leaderboard_row_of_published_counts(tmp_path, wins, losses, ties, rate, error):
    """Vector 9.11 through a file: a tie as 0 or 1.5, or a failed annotation, is counted as the other, or as a loss."""
    rows = [2] * wins + [1] * losses + [1.5] * (ties // 2) + [0] * (ties - ties // 2) + [None] * 3
    row = row_of(tmp_path, [annotation(i, p) for i, p in enumerate(rows)])
    assert (row["win_rate"], row["standard_error"]) == pytest.approx((rate, error), abs=1e-6)
    assert [row[k] for k in ("n_wins", "n_wins_base", "n_draws", "n_failed")] == [wins, losses, ties, 3]
    assert row["n_total"] == wins + losses + ties and row["discrete_win_rate"] == pytest.approx(rate, abs=1e-6)
    assert row["low"] < rate < row["high"] and row["high"] - row["low"] == pytest.approx(3.92 * error, rel=0.15)


def test_swapped_outputs_mirror_the_row(tmp_path, monkeypatch):
    """Swaps and ties, exhaustively: after a swap wins are losses, rates 100 - rates; ties and failures stay."""
    monkeypatch.setattr(evaluate, "bootstrap", lambda *_: (0, 0))
    for preferences in itertools.product([1, 1.2, 1.5, 2, 0, None], repeat=2):
        if preferences == (None, None):
            with pytest.raises(InputError, match="all of its 2 annotations failed"):
                row_of(tmp_path, [annotation(i, p) for i, p in enumerate(preferences)])
            continue
        mirrored = [p if p in (0, None) else 3 - p for p in preferences]
        row = row_of(tmp_path, [annotation(i, p, 10 + 5 * i, 12) for i, p in enumerate(preferences)])
        other = row_of(tmp_path, [annotation(i, p, 12, 10 + 5 * i) for i, p in enumerate(mirrored)])
        for key in ("win_rate", "discrete_win_rate", "length_controlled_winrate"):
            assert row[key] + other[key] == pytest.approx(100, abs=1e-6), (key, preferences)
        assert (row["n_wins"], row["n_wins_base"]) == (other["n_wins_base"], other["n_wins"])
        assert [row[k] for k in ("standard_error", "n_draws", "n_failed")] == pytest.approx(
            [other[k] for k in ("standard_error", "n_draws", "n_failed")])


@pytest.mark.parametrize("preference", [0.5, 2.1, -1, "2x", [1]])
def test_a_preference_that_is_none(tmp_path, preference):
    """A score of another scale, or text, is averaged in."""
    write_json(tmp_path / "bad.json", [annotation(0, 1), annotation(1, preference)])
    with pytest.raises(InputError, match="bad.json"):
        read_annotations(tmp_path / "bad.json")


def public_models(tmp_path):
    """The six public models: (leaderboard's row, annotation file with texts of the published lengths)."""
    if not ALPACA_EVAL.is_file():
        pytest.skip("needs AlpacaEval's published annotations")
    models = []
    for model in json.loads(ALPACA_EVAL.read_text(encoding="utf-8")):
        rows = []
        for r in model["rows"]:
            rows.append(annotation(r["i"], r["preference"], r["length_1"], r["length_2"], model["model"]))
        path = tmp_path / f"{model['model']}.json"
        write_json(path, rows)
        models.append((model["leaderboard"], path))
    return models


def test_win_rates_of_alpacaevals_leaderboard(tmp_path, capsys):
    """A rate of discrete wins, a standard error with ddof 0, lost ties, or a length term with the other sign would
    differ from the public table: 1e-6, and 4 points for length control without instruction difficulty."""
    models = public_models(tmp_path)
    start = time.process_time()
    evaluate.main(["leaderboard", *[str(path) for _, path in models], "--out", str(tmp_path / "board")])
    assert time.process_time() - start < 2 * len(models)
    printed = capsys.readouterr().out
    assert "ridge" in printed and "--difficulty" in printed
    rows = {r["name"]: r for r in json.loads((tmp_path / "board" / "leaderboard.json").read_text())}
    table = {r[""]: r for r in csv.DictReader((tmp_path / "board" / "leaderboard.csv").open())}
    for public, path in models:
        row = rows[path.stem]
        assert row["win_rate"] == pytest.approx(float(public["win_rate"]), abs=1e-6)
        assert row["standard_error"] == pytest.approx(float(public["standard_error"]), abs=1e-6)
        assert row["n_total"] == int(public["n_total"]) and row["n_total"] + row["n_missing"] == 805
        assert abs(row["length_controlled_winrate"] - float(public["length_controlled_winrate"])) < 4, path.stem
        assert float(table[path.stem]["win_rate"]) == row["win_rate"] and table[path.stem]["mode"] == "community"
    assert rows["gpt4_1106_preview"]["length_controlled_winrate"] == 50


def test_length_controlled_prediction(monkeypatch):
    """Vector 9.16: D with the other sign, std with ddof 0, a length term left in the prediction, or difficulty
    standardized. (The scores are those that its coefficients predict, and without penalty the fit finds them again.)"""
    monkeypatch.setattr(evaluate, "RIDGE", 0)
    delta, gamma = np.array([100 - 150, 200 - 180, 300 - 500, 400 - 350]), np.array([-1, 0, .5, 2])
    fitted = np.array([.361442, .339349, .805215, .638558])
    assert length_controlled(fitted, delta, gamma) == pytest.approx((47.532809, 11.236679), abs=1e-3)


def test_logistic_fit_against_its_gradient():
    """A wrong Hessian, a diverging step, or a penalty on the wrong coefficient: the gradient has to vanish, also where
    all are wins, few rows decide, or features are large."""
    rng = np.random.default_rng(0)
    for scale, share in itertools.product([0.01, 1, 9], [0, 0.03, 0.5, 1]):
        x = np.stack([np.tanh(scale * rng.normal(size=40)), scale * rng.normal(size=40), np.ones(40)], axis=1)
        y, w = (rng.random(40) < share).astype(float), rng.random(40)
        penalty = np.array([10, 1e-6, 1e-6])
        beta = fit_logistic(x, y, w, penalty)
        gradient = x.T @ (w * (1 / (1 + np.exp(-x @ beta)) - y)) + 2 * penalty * beta
        assert abs(gradient).max() < 1e-6


def test_regularizing_rows_count_a_tenth():
    """Rows of the prompted baseline get the model's phi, full weight, or are ignored."""
    rng = np.random.default_rng(1)
    scores, delta, zeros = rng.random(200), rng.normal(size=200) * 100, np.zeros(200)
    gamed = np.stack([rng.normal(size=50) - 1, np.zeros(50), rng.random(50)], axis=1)
    features = np.concatenate([np.tanh(delta / delta.std(ddof=1)), np.tanh(gamed[:, 0])])
    design = np.stack([features, np.arange(250) < 200], axis=1)
    weights = np.array([1.0] * 200 + [0.1] * 50)
    theta, phi = fit_logistic(design, np.append(scores, gamed[:, 2]), weights, np.array([1e-6, 1e-6]))
    rate, _ = length_controlled(scores, delta, zeros, gamed)
    assert rate == pytest.approx(100 / (1 + np.exp(-phi)), abs=1e-6)
    assert abs(rate - length_controlled(scores, delta, zeros)[0]) > 1e-3


def test_difficulty_files(tmp_path, capsys):
    """AlpacaEval's df_gamed.csv and instruction_difficulty.csv are not told apart, or joined by another row number."""
    rng = np.random.default_rng(2)
    rows = [annotation(i, 1 + rng.random(), 50, 60 + i) for i in range(40)]
    write_json(tmp_path / "a.json", rows)
    gamed = [f"{rng.random()},{rng.normal()},{i / 20 - 1},{i},m,False" for i in range(40)]
    (tmp_path / "gamed.csv").write_text("\n".join(["preference,std_delta_len,instruction_difficulty,index,model,"
                                                   "not_gamed_baseline", *gamed, *gamed]))
    (tmp_path / "difficulty.csv").write_text("\n".join([",instruction_difficulty",
                                                        *[f"{i},{i / 20 - 1}" for i in range(40)]]))
    found = {}
    for name in ("gamed", "difficulty"):
        evaluate.main(["leaderboard", str(tmp_path / "a.json"), "--difficulty", str(tmp_path / f"{name}.csv"), "--out",
                       str(tmp_path)])
        assert "ridge" not in capsys.readouterr().out
        found[name], = read_json(tmp_path / "leaderboard.json")
    scores, delta = np.array([r["preference"] - 1 for r in rows]), np.array([-10.0 - i for i in range(40)])
    difficulty = np.arange(40) / 20 - 1
    more = np.array([[float(g.split(",")[k]) for k in (1, 2, 0)] for g in gamed + gamed])
    for name, regularizer in (("gamed", more), ("difficulty", evaluate.NO_ROWS)):
        expected = length_controlled(scores, delta, difficulty, regularizer)
        assert (found[name]["length_controlled_winrate"], found[name]["lc_standard_error"]) == pytest.approx(expected)
    (tmp_path / "difficulty.csv").write_text(",instruction_difficulty\n0,1\n")
    with pytest.raises(InputError, match="difficulty.csv"):
        evaluate.main(["leaderboard", str(tmp_path / "a.json"), "--difficulty", str(tmp_path / "difficulty.csv")])


def test_paired_test_by_hand():
    """Instructions are paired by position, failures count as losses, or the models' errors are added as independent."""
    ours = [annotation(i, None, score=s) for i, s in enumerate([1, 0.5, 1, math.nan, 0])]
    theirs = [annotation(i, None, score=s) for i, s in reversed(list(enumerate([0, 0.5, 0, 1, math.nan, 1])))]
    test = paired_test(ours, theirs)                                        # of 100, 0 and 100
    assert test["difference"] == pytest.approx(200 / 3) and test["difference_se"] == pytest.approx(100 / 3)
    assert test["p"] == pytest.approx(0.0455, abs=1e-4)                     # two standard errors
    assert paired_test(ours, ours) == {"difference": 0, "difference_se": 0, "p": 1}
    assert paired_test(ours, [annotation("else", None, score=1)]) == {}


def test_rank_correlations_by_hand():
    """Ties get ranks in the order of the file, or discordant pairs count as nothing."""
    table = np.array([[1.0, 1], [2, 3], [3, 2], [4, 4]])
    assert rank_correlations(table) == pytest.approx((0.8, 2 / 3))          # 5 pairs agree, 1 does not
    assert rank_correlations(table * [1, -1]) == pytest.approx((-0.8, -2 / 3))
    tied = np.array([[1.0, 1], [2, 2], [2, 3]])                             # ranks 1, 2.5, 2.5 and 1, 2, 3
    assert rank_correlations(tied) == pytest.approx((math.sqrt(0.75), 2 / math.sqrt(6)))
    assert all(math.isnan(value) for value in rank_correlations(np.array([[1.0, 2], [1, 3]])))


def test_leaderboard_of_files_and_runs(tmp_path, capsys):
    """A model's missing instructions, its data sets or a run's row are lost; or ranks are joined by position."""
    write_json(tmp_path / "a.json", [annotation(i, 2, model="a", dataset="xy"[i % 2]) for i in range(4)])
    write_json_lines(tmp_path / "b.jsonl", [annotation(i, 1 + i % 2, model="b") for i in range(3)])
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "results.json", {"rounds": [{"win_rate": 0.1, "win_rate_se": 0.2}, {"win_rate": 0.6,
                                                                                        "win_rate_se": 0.05}]})
    (tmp_path / "truth.csv").write_text(",win_rate\nb,70\nother,60\na,50\n")
    evaluate.main(["leaderboard", *[str(tmp_path / name) for name in ("b.jsonl", "a.json", "run")], "--out",
                   str(tmp_path), "--rank-with", str(tmp_path / "truth.csv")])
    a, from_run, b = read_json(tmp_path / "leaderboard.json")
    assert (a["name"], from_run["name"], b["name"]) == ("a", str(run), "b")
    assert a["win_rate"] == 100 and [(d["name"].strip(), d["n_total"]) for d in a["datasets"]] == [("x", 2), ("y", 2)]
    assert b["n_missing"] == 1 and a["n_missing"] == 0 and b["difference"] == pytest.approx(-200 / 3)
    assert (from_run["win_rate"], from_run["standard_error"]) == (60, 5)
    out = capsys.readouterr().out
    assert "Spearman" in out and "2 models by win_rate: -1.000" in out
    with pytest.raises(InputError, match="nowhere: no such run folder"):
        evaluate.main(["report", str(tmp_path / "nowhere")])
    for other in ("leaderboard.csv", "leaderboard.json"):                   # ours: the run has no controlled win rate
        with pytest.raises(InputError, match=f"{other}: "):
            evaluate.main(["leaderboard", str(run), "--rank-with", str(tmp_path / other), "--column",
                           "length_controlled_winrate"])


# ----------------------------------------------------------------------------------------------------------------------
# Models: comparing, decoders, perplexity


@pytest.fixture
def home(tmp_path, tokenizer, monkeypatch):
    """A folder with out/sft, out/cut (untrained policies, cut the newest) and out/reward; few instructions, short."""
    config = Config(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    for seed, (name, kind) in enumerate([("sft", LLaMA), ("cut", LLaMA), ("reward", RewardModel)]):
        torch.manual_seed(seed)
        run = {"model": "out/sft", "data": "", "seed": 5}
        kind(config).save_pretrained(tmp_path / "out" / name, tokenizer, {"prompt_format": "short", "run": run})
        os.utime(tmp_path / "out" / name / "config.json", (seed, seed))
    instructions = World.instructions
    monkeypatch.setattr(World, "instructions", lambda self, split, count, *_: instructions(self, split, 12))
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_newest_run_is_the_default(home, capsys):
    """A reward model, a stopped run or a run on other data is taken, or it is not said which run is meant."""
    evaluate.main([])
    assert "out/cut is the newest run" in capsys.readouterr().out
    (home / "out" / "cut" / "resume.pt").touch()
    evaluate.main([])
    assert "out/sft: 12 test instructions of world 5" in capsys.readouterr().out
    with pytest.raises(InputError, match="out/reward .a reward model"):
        evaluate.main(["--model", "out/reward"])
    shutil.rmtree(home / "out")
    with pytest.raises(InputError, match="train_cut.py"):
        evaluate.main([])
    with pytest.raises(SystemExit):
        evaluate.main(["leaderbord"])
    assert "'leaderboard'" in capsys.readouterr().err


def test_compare_by_default(home, capsys):
    """From a checkpoint to its row without a key: cut against the model that it was trained from, in its world."""
    evaluate.main(["compare"])
    out = capsys.readouterr().out
    row, = read_json(home / "out" / "compare" / "leaderboard.json")
    assert row["name"] == "cut" and row["n_total"] == 12 and row["n_failed"] == row["n_missing"] == 0
    rows = read_json(home / "out" / "compare" / "cut.annotations.json")
    assert {(r["generator_1"], r["generator_2"]) for r in rows} == {("sft", "cut")}
    assert [r["reference"] for r in rows] == [r["reference"] for r in World(5).instructions("test", 12)]
    text = (home / "out" / "compare" / "cut.outputs.json").read_text()
    for r, a in zip(json.loads(text), rows):                                # a JSON list, as AlpacaEval wants it
        assert (r["generator"], r["output"], r["instruction"]) == ("cut", a["output_2"], a["instruction"])
    assert not any(isinstance(v, (list, dict)) for r in json.loads(text) + rows for v in r.values())
    assert 100 * np.mean([r["preference"] - 1 for r in rows]) == pytest.approx(row["win_rate"])
    assert f"{row['win_rate']:#.4g}" in out and "out/cut" in out


def test_compare_files_with_failures_and_missing_rows(home, monkeypatch):
    """Failures or missing outputs are dropped in silence, or counted as losses; the model answers another file."""
    base = [{"instruction": f"i{i}", "input": "", "output": f"base {i}", "generator": "base"} for i in range(6)]
    ours = [{"instruction": f"i{i}", "output": f"ours {i}"} for i in (5, 1, 2, 3, 9)]
    write_json(home / "base.json", base)
    write_json(home / "ours.json", ours)
    monkeypatch.setattr(evaluate, "compare_pairs", lambda args, pairs: (
        [{**r, "preference": 2, "annotator": "a", "switched": False} for r in pairs if r["instruction"] < "i3"],
        [{**r, "reason": "no"} for r in pairs if r["instruction"] >= "i3"], None))
    evaluate.main(["compare", "--model", "ours.json", "out/cut", "--against", "base.json", "--out", "to"])
    rows = {r["name"]: r for r in read_json(home / "to" / "leaderboard.json")}
    keys = ("n_wins", "n_total", "n_failed", "n_missing", "win_rate")
    assert [rows["ours"][k] for k in keys] == [2, 2, 2, 3, 100]             # missing: i0, i4 and i9, of one side only
    assert [rows["cut"][k] for k in keys] == [3, 3, 3, 1, 100]
    failed = [r for r in read_json(home / "to" / "ours.annotations.json") if r["preference"] is None]
    assert [r["instruction"] for r in failed] == ["i3", "i5"] and failed[0]["output_1"] == "base 3"
    asked = [r["instruction"] for r in read_json(home / "to" / "cut.annotations.json")]
    assert asked == sorted(asked), "failures in their places, since --difficulty goes by position"
    (home / "twin").mkdir()
    write_json(home / "twin" / "ours.json", ours[:2])
    evaluate.main(["compare", "--model", "ours.json", "twin/ours.json", "--against", "base.json", "--out", "two"])
    assert {r["name"]: r["n_total"] for r in read_json(home / "two" / "leaderboard.json")} == {"ours-1": 2, "ours-2": 1}
    monkeypatch.setattr(evaluate, "compare_pairs", lambda args, pairs: (
        [{**pairs[0], "preference": 1.5, "annotator": "equal texts"}], [{**pairs[1], "reason": "no"}], None))
    assert evaluate.main(["compare", "--model", "ours.json", "--against", "base.json", "--out", "none"]) == 1
    write_json(home / "else.json", [{"instruction": "z", "output": "y"}])
    with pytest.raises(InputError, match="no instruction in common"):
        evaluate.main(["compare", "--model", "else.json", "--against", "base.json"])


def test_decoders_by_one_set_of_samples(home, capsys):
    """Tokens of best-of-n are not n times those of a sample, or the choice ignores the reward model."""
    evaluate.main(["decoders", "--samples", "3", "--reward", "out/reward"])
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["greedy", "best of 1", "best of 2", "best of 3"]
    tokens, rewards = ([float(line[k]) for line in lines[1:]] for k in (1, 2))
    assert [t / tokens[0] for t in tokens] == pytest.approx([1, 2, 3], abs=0.02) and rewards == sorted(rewards)


def test_perplexity(home, tokenizer, capsys):
    """EOS is left out, padding or the prompt is counted, or the mean is one over records."""
    records = [{"instruction": "Say a.", "input": "", "output": text} for text in ("The cat.", "The answer is 12.")]
    write_json_lines("two.jsonl", records)
    evaluate.main(["score", "--model", "out/cut", "--data", "two.jsonl", "--out", "scored.jsonl"])
    model, nll, total = LLaMA.from_pretrained("out/cut"), [], 0
    for r in records:
        prompt = evaluate.prompt_ids(tokenizer, r, "short")
        ids = torch.tensor(prompt + tokenizer.encode_response(r["output"]))
        logp = model(ids[None, :-1])[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]][len(prompt) - 1:]
        nll.append(-logp.sum().item())
        total += len(logp)
        assert read_json("scored.jsonl")[len(nll) - 1]["perplexity"] == pytest.approx(math.exp(nll[-1] / len(logp)))
    printed = float(capsys.readouterr().out.split()[-1])
    assert printed == pytest.approx(math.exp(sum(nll) / total), rel=1e-5)
    with pytest.raises(InputError, match="--reward DIR or --model DIR"):
        evaluate.main(["score", "--data", "two.jsonl"])


# ----------------------------------------------------------------------------------------------------------------------
# The report

ATTACK = "</span><script>alert(1)</script> & \"quoted\" 'text' </style>{style}"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: tags, <data> values by their text, and all text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.numbers, self.text, self.value, self.open = [], [], "", None, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag == "meta" else [tag]
        self.value = dict(attrs).get("value") if tag == "data" else None

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        self.text += data
        if self.value is not None:
            self.numbers.append((self.value, data))
            self.value = None


def write_run(folder, steps=300):
    """A run folder of train_cut.py, with texts that attack the page."""
    folder.mkdir(parents=True)
    write_json_lines(folder / "metrics.jsonl", [{"step": i, "loss": 1 / (i + 1), "kl": None, "grad_norm": 0.5,
                                                 "flagged": 0.25} for i in range(steps)])
    rounds = [{"exact_match": 0.4567891, "errors": 1, "win_rate": 0.6123, "win_rate_se": 0.0117, "precision": 0.9876}]
    write_json(folder / "results.json", {"sft": {"exact_match": 0.2}, "rounds": rounds, "seconds": 5.5})
    flags = {"id": "a", "instruction": ATTACK, "input": "", "judgment": ATTACK, "output": "The <b>cat</b>.",
             "reference": "The <b>dog</b>.", "tokens": ["The", " <b>", "cat", "</b>", ".", "</s>"],
             "log_ratio": [0.0, -0.1, 2.5, 0.0, 0.0, 0.01], "flags": [False, False, True, False, False, False]}
    write_json_lines(folder / "flags-0.jsonl", [flags, {"id": "old", "flags": [True]}])
    write_json_lines(folder / "flags-after.jsonl", [{**flags, "log_ratio": [0.0, -0.1, 0.7, 0.0, 0.0, 0.01]}])
    return folder


def test_report(tmp_path, monkeypatch, capsys):
    """A text becomes markup, a number differs from its file's, the network is asked, or marks are at other tokens."""
    monkeypatch.chdir(tmp_path)
    run, other = write_run(tmp_path / "out" / "a<i>b"), write_run(tmp_path / "out" / "other", steps=3)
    write_json(tmp_path / "n.json", [annotation(i, 1 + i % 2 * 0.77, model=ATTACK) for i in range(9)])
    evaluate.main(["report", str(run)])
    assert f"report in {run / 'report.html'}" in capsys.readouterr().out
    evaluate.main(["report", str(run), str(other), "n.json"])
    for path in (run / "report.html", tmp_path / "out" / "report.html"):
        page = Page(path)
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "link", "img", "iframe", "i>b"} and not page.open[1:]
        assert not any(value and ("//" in value or key.startswith("on")) for _, attrs in page.tags
                       for key, value in attrs.items())
        assert page.text.count(ATTACK) >= 2 and "<b>" in page.text and "a<i>b" in page.text
        known = {0.25, 0.5, 1 / 300, 0.4567891, 1.0, 0.6123, 0.9876, 100 * 0.6123, 100 * 0.0117}
        if path.parent != run:
            row = leaderboard_row("n", read_annotations("n.json")[ATTACK])
            known |= {1 / 3, *[row[key] for key in evaluate.COLUMNS if row.get(key) is not None]}
        assert {value for value, _ in page.numbers} == set(map(str, known))
        assert all(text in (value, f"{float(value):#.4g}") for value, text in page.numbers)
        tokens = [attrs for tag, attrs in page.tags if tag == "span" and "title" in attrs]
        before, after = tokens[:6], tokens[6:12]
        assert [t["title"] for t in before] == ["+0.000", "-0.100", "+2.500", "+0.000", "+0.000", "+0.010"]
        assert before[2]["class"] == "up flag wrong" and before[1]["class"] == "down" and after[2]["title"] == "+0.700"
    with pytest.raises(InputError, match="not a run folder"):
        evaluate.main(["report", str(tmp_path)])


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.slow
def test_report_in_a_browser(tmp_path):
    """The page writes errors to the console, or is wider than a phone."""
    run = write_run(tmp_path / "run")
    evaluate.main(["report", str(run)])
    page = (run / "report.html").read_text()
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    (run / "report.html").write_text(page.replace("</body>", probe))
    ran = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900",
                          "--enable-logging=stderr", "--dump-dom", f"file://{run}/report.html"], capture_output=True,
                         text=True, timeout=120)
    assert "CONSOLE" not in ran.stderr
    assert int(re.search("<title>(.*?)</title>", ran.stdout)[1]) <= 500     # the narrowest window that it has


def test_a_long_run_makes_a_small_report(tmp_path):
    """10,000 steps are drawn one by one: above 2 MB, or above 3 s."""
    run = write_run(tmp_path / "run", steps=0)
    names = ("loss", "reward", "kl", "clip_fraction", "entropy", "grad_norm", "lr", "length")
    write_json_lines(run / "metrics.jsonl", [{"step": i, **{name: math.sin(i + len(name)) for name in names}}
                                             for i in range(10000)])
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 10000, "lo')                                   # what a kill has torn
    start = time.process_time()
    evaluate.main(["report", str(run)])
    assert time.process_time() - start < 3 and (run / "report.html").stat().st_size < 2e6


@pytest.mark.slow
def test_a_hundred_thousand_annotations(tmp_path):
    """124 models of 805 instructions take longer than 20 s or more than 1 GB."""
    rng = np.random.default_rng(0)
    for m in range(124):
        lengths = rng.integers(1, 3000, 805).tolist()
        write_json_lines(tmp_path / f"{m}.json", [annotation(i, 1 + rng.random(), 1500, length, f"model {m}")
                                                  for i, length in enumerate(lengths)])
    code = ("import resource, sys, evaluate; evaluate.main(['leaderboard', *sys.argv[1:]]); "
            "usage = resource.getrusage(resource.RUSAGE_SELF); print('used', usage.ru_utime, usage.ru_maxrss)")
    ran = subprocess.run([sys.executable, "-c", code, *map(str, tmp_path.glob("*.json"))], capture_output=True,
                         text=True, cwd=Path(evaluate.__file__).parent, check=True)
    _, seconds, kilobytes = ran.stdout.split("\n")[-2].split()
    assert float(seconds) < 20 and float(kilobytes) < 1e6


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
        return argparse.Namespace(wait=lambda: 0)

    monkeypatch.setattr(bench.subprocess, "Popen", run)
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
