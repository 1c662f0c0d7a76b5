"""The judge that knows the truth (simulate.py), and the measures (evaluate.py) against numbers worked out by hand."""
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Tokenizer, World, join, units, world_tokenizer  # noqa: E402
from evaluate import (agreement, bias, detection, exact_match, gap_closed, labels_of, mark, mean_and_se,  # noqa: E402
                      prefers, token_words, variance, win_rate)
from simulate import JUDGES, corrected, count_errors, differences, judge_reference, wrong_words  # noqa: E402

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA = SHARED / "llama" / "tokenizer.model"
TRUE = "The cat lives in the den, eats fish and is red."
# response, reference, its differences, number of errors, wrong words, what `corrects` and what `points` says
CASES = {
    "replaced": (
        "The answer is 13.", "The answer is 12.", [(3, 4, ["12"])], 1, {3},
        "It says The answer is 13 where it should say 12.", "It says The answer is 13 and 13 is wrong."),
    "replaced at the start": (
        "A cat is red.", "The cat is red.", [(0, 1, ["The"])], 1, {0},
        "It says A where it should say The.", "It says A and A is wrong."),
    "two for one": (
        "The cat eats fish.", "The cat eats old moss.", [(3, 4, ["old", "moss"])], 2, {3},
        "It says The cat eats fish where it should say old moss.", "It says The cat eats fish and fish is wrong."),
    "one for two": (
        "The cat eats old moss.", "The cat eats fish.", [(3, 5, ["fish"])], 2, {3, 4},
        "It says The cat eats old moss where it should say fish.",
        "It says The cat eats old moss and old moss is wrong."),
    "missing": (
        "The cat lives in the and is red.", "The cat lives in the den and is red.", [(5, 5, ["den"])], 1, {5},
        "It leaves out den after cat lives in the.", "Something is missing after cat lives in the."),
    "missing at the start": (
        "answer is 12.", "The answer is 12.", [(0, 0, ["The"])], 1, {0},
        "It leaves out The before answer is 12.", "Something is missing before answer is 12."),
    "missing after a clause": (
        "The cat eats fish and in the den.", "The cat eats fish and lives in the den.", [(5, 5, ["lives"])], 1, {5},
        "It leaves out lives before in the den.", "Something is missing before in the den."),
    "missing at the very end": (
        "The answer is", "The answer is 12", [(3, 3, ["12"])], 1, {3},
        "It leaves out 12 after The answer is.", "Something is missing after The answer is."),
    "no full stop": (
        "The answer is 12", "The answer is 12.", [(4, 4, ["."])], 1, {4},
        "It leaves out . after The answer is 12.", "Something is missing after The answer is 12."),
    "doubled": (
        "The cat lives in the den den.", "The cat lives in the den.", [(6, 7, [])], 1, {6},
        "It says lives in the den den and den does not belong.",
        "It says lives in the den den and den does not belong."),
    "more after the end": (
        "The answer is 12. 12", "The answer is 12.", [(5, 6, [])], 1, {5},
        "It says answer is 12. 12 and 12 does not belong.", "It says answer is 12. 12 and 12 does not belong."),
    "comma for a word": (
        "The cat eats fish, is red.", "The cat eats fish and is red.", [(4, 5, ["and"])], 1, {4},
        "It says The cat eats fish, where it should say and.", "It says The cat eats fish, and , is wrong."),
    "several": (
        "The cat lives in the bog, eats moss and is gray.", TRUE,
        [(5, 6, ["den"]), (8, 9, ["fish"]), (11, 12, ["red"])], 3, {5, 8, 11},
        "It says cat lives in the bog where it should say den. It says eats moss where it should say fish. "
        "It says is gray where it should say red.",
        "It says cat lives in the bog and bog is wrong. It says eats moss and moss is wrong. "
        "It says is gray and gray is wrong."),
    "of each kind": (
        "The cat big lives in den, eats moss and is red.", TRUE,
        [(2, 3, []), (5, 5, ["the"]), (8, 9, ["fish"])], 3, {2, 5, 8},
        "It says The cat big and big does not belong. It leaves out the after cat big lives in. "
        "It says eats moss where it should say fish.",
        "It says The cat big and big does not belong. Something is missing after cat big lives in. "
        "It says eats moss and moss is wrong."),
}


@pytest.fixture(scope="module")
def words():
    return world_tokenizer()


def distortions(count=400):
    """(response, reference) with zero to five words replaced, lost or doubled."""
    rng, world = random.Random(0), World(4)
    for r in world.instructions("train", count):
        a = units(r["reference"])
        pool = sorted({v for k in r["facts"] for v in world.facts[k].others})
        for _ in range(rng.randrange(6)):
            i = rng.randrange(len(a))
            a[i:i + 1] = rng.choice([[], [a[i]] * 2, [rng.choice(pool)], [rng.choice(pool)]])
            a = a or ["The"]
        yield join(a), r["reference"]


@pytest.mark.parametrize("name", CASES)
def test_the_judge_on_cases_by_hand(name):
    """A fault is counted or placed wrongly, or the judgment quotes other words than those before it."""
    response, reference, found, errors, wrong, corrects, points = CASES[name]
    assert differences(response, reference) == found
    assert count_errors(response, reference) == errors
    assert wrong_words(response, reference) == wrong
    assert judge_reference(response, reference, "corrects") == JUDGES["corrects"](response, reference) == corrects
    assert judge_reference(response, reference, "points") == JUDGES["points"](response, reference) == points
    assert corrected(response, reference) == reference


def test_nothing_is_said_of_a_right_answer():
    """A right answer becomes a negative example, or a wrong one a positive."""
    seen = set()
    for response, reference in distortions():
        for judge in JUDGES.values():
            assert (judge(response, reference) is None) == (response == reference)
        right = response == reference
        assert (count_errors(response, reference) == 0) == right == (not wrong_words(response, reference))
        seen.add(response == reference)
    assert seen == {True, False}
    assert judge_reference("The  answer is 12 .", "The answer is 12.") is None      # spaces are no words


def test_points_never_tells():
    """The judge that only points states a right word, so that its judgments could be copied from."""
    ours = set(units("It says and is wrong . Something is missing after before does not belong"))
    told = 0
    for response, reference in [*distortions(), *(case[:2] for case in CASES.values())]:
        judgment = set(units(judge_reference(response, reference, "points") or ""))
        assert not judgment & (set(units(reference)) - set(units(response)) - ours)
        told += any(word in units(judge_reference(response, reference) or "")
                    for word in set(units(reference)) - set(units(response)) - ours)
    assert told > 100                                                       # `corrects` does tell: the test can see it


def test_correcting_mends_what_is_listed():
    """The baseline that trains on the stated answer gets one that the judgment does not state, or a garbled one."""
    counts = set()
    for response, reference in distortions():
        faults = len(differences(response, reference))
        counts.add(faults)
        assert (corrected(response, reference) == reference) == (faults <= 3)
        assert len(differences(corrected(response, reference), reference)) == max(0, faults - 3)
        assert corrected(response, reference, most=9) == reference
    assert counts >= {0, 1, 2, 3, 4}


def test_at_most_three_faults_are_listed():
    """A bad answer gets a judgment longer than the context, or the first faults are not the ones that are listed."""
    response, reference = "a x c y e z g w i", "a b c d e f g h i"
    for style in JUDGES:
        said = judge_reference(response, reference, style)
        assert said.count("It says") == 3 and "w" not in units(said)
        assert judge_reference(response, reference, style, most=1) == said.split(". ")[0] + "."
    assert corrected(response, reference) == "a b c d e f g w i"


def test_quotations_are_short_and_of_one_clause():
    """A quotation reaches into the clause before, where the same words stand about another fact."""
    for response, reference in distortions():
        words, faults = units(response), differences(response, reference)
        for begin, end, _ in faults:
            said = judge_reference(response, reference, "points", most=len(faults)) or ""
            before = words[max(0, begin - 4):begin]
            while {",", "and"} & set(before):
                before.pop(0)
            assert len(before) <= 4
            if end > begin:
                assert f"It says {join(before + words[begin:end])} and " in said
            elif before:
                assert f"Something is missing after {join(before)}." in said
            else:
                behind = join(words[begin:begin + 3]).rstrip(" .") or "the end"
                assert f"Something is missing before {behind}." in said


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def test_mean_and_standard_error():
    """ddof 0 in place of 1, a missing square root, or a division by zero for one value."""
    mean, se = mean_and_se([1, 2, 3, 4])
    assert mean == 2.5 and se == pytest.approx(math.sqrt(5 / 3 / 4))
    assert mean_and_se([0.25]) == (0.25, 0)


@pytest.mark.parametrize("wins, losses, draws, rate, error", [
    (80, 160, 10, 34.0, 2.934355), (135, 115, 1, 53.984064, 3.145897), (77, 165, 10, 32.539683, 2.889692),
    (119, 131, 1, 47.609562, 3.152349), (328, 469, 8, 41.242236, 1.727181)])
def test_published_win_rates(wins, losses, draws, rate, error):
    """Ties are dropped or count a whole, wins and losses are swapped, or the error differs from AlpacaEval's."""
    ours, theirs = [0] * wins + [2] * losses + [1] * draws, [1] * (wins + losses + draws)
    assert [100 * x for x in win_rate(ours, theirs)] == pytest.approx([rate, error], abs=1e-6)
    assert 100 * win_rate(theirs, ours)[0] == pytest.approx(100 - rate)


def test_exact_match_and_gap():
    """An answer with errors counts as exact, or the gap is measured from the wrong end or round."""
    assert exact_match([0, 1, 0, 3]) == 0.5
    rounds = [{"exact_match": 0.9}, {"exact_match": 0.7}]
    assert gap_closed({"sft": {"exact_match": 0.4}, "rounds": rounds}) == pytest.approx(0.5)


def test_tokens_find_their_words():
    """A word of several pieces, a punctuation mark or EOS is counted at its neighbour."""
    pieces = ["The", " ans", "wer", " is", " 1", "2", ".", "</s>"]
    assert token_words(pieces) == [0, 1, 1, 2, 3, 3, 4, 5]
    assert token_words(["a", ",", " b", " ", "c", "</s>"])[:3] == [0, 1, 2]
    assert token_words(["</s>"]) == [0]


@pytest.mark.parametrize("text", [TRUE, "The answer is 12.",
                                  "The rater lives in the newtoad, eats 1234 and is Catfish."])
def test_tokens_of_the_world_find_their_words(words, text):
    """Words outside the vocabulary shift all that follow by their number of pieces."""
    pieces = words.pieces(words.encode_response(text))
    found = token_words(pieces)
    for k, word in enumerate(units(text)):
        assert "".join(p for p, w in zip(pieces, found) if w == k).strip() == word
    assert found[-1] == len(units(text)) and found == sorted(found)


@pytest.mark.parametrize("text, expected", [
    ("a  b c", {"a": 0, " b": 1, " c": 2}), ("a\nb.", {"a": 0, "b": 1, ".": 2}), ("a é b", {"a": 0, " b": 2}),
    ("a 😀 b", {"a": 0, " b": 2})])
@pytest.mark.parametrize("name", ["words", "llama"])
def test_odd_spaces_and_bytes_keep_their_place(words, name, text, expected):
    """A lone space counts as EOS, and a byte piece as the six letters of its name, which shifts the words after it."""
    if name == "llama" and not LLAMA.is_file():
        pytest.skip("no shared/data/llama/tokenizer.model")
    tokenizer = words if name == "words" else Tokenizer(LLAMA.read_bytes())
    ids = tokenizer.encode_response(text)
    found = token_words(tokenizer.pieces(ids))
    names = [tokenizer.sp.id_to_piece(i).replace("\u2581", " ") for i in ids]
    assert {p: w for p, w in zip(names, found) if p in expected} == expected
    assert found[-1] == len(units(text)) and len(units(text)) not in found[:-1]


def test_detection_by_hand(words):
    """Precision and recall are swapped, count tokens in place of words, or a missing word where nobody looks."""
    judged = [
        # wrong are word 5 (before it "den" is missing) and the end, 8, where the full stop is missing
        {"id": 7, "output": "The cat lives in the and eats fish",
         "reference": "The cat lives in the den and eats fish."},
        # wrong is word 3, of several pieces
        {"id": "z", "output": "The answer is rater.", "reference": "The answer is 12."},
        {"id": "good", "output": "The answer is 12.", "reference": "The answer is 12."}]

    def flags(record, *chosen):
        pieces = words.pieces(words.encode_response(record["output"]))
        return torch.tensor([w in chosen for w in token_words(pieces)])

    pieces = int(flags(judged[1], 3).sum())
    assert pieces > 1 and len(flags(judged[0])) == 9
    tokens = 9 + 5 + pieces
    # found: the missing word, not the end; "rater"; and by mistake "cat"
    got = detection(words, {"7": flags(judged[0], 1, 5), "z": flags(judged[1], 3)}, judged)
    assert got == {"precision": 2 / 3, "recall": 2 / 3, "flagged": (2 + pieces) / tokens}
    got = detection(words, {"7": flags(judged[0], 8), "z": flags(judged[1])}, judged)
    assert got == {"precision": 1, "recall": 1 / 3, "flagged": 1 / tokens}
    one = flags(judged[1], 3)
    one[one.nonzero()[1:]] = False                                          # one piece of the word is enough
    got = detection(words, {"z": one}, judged)
    assert got == {"precision": 1, "recall": 1, "flagged": 1 / (4 + pieces + 1)}
    assert detection(words, {}, judged) == {"precision": 0, "recall": 0, "flagged": 0}
    assert detection(words, {"good": flags(judged[2], 2)}, judged) == {"precision": 0, "recall": 0, "flagged": 1 / 6}


def test_marked_text():
    """Brackets enclose the space before a word, or come in empty pairs; or EOS shows although nothing flagged it."""
    pieces = ["The", " ans", "wer", " is", " 13", ".", "</s>"]
    assert mark(pieces, [False] * 7) == "The answer is 13."
    assert mark(pieces, [False, False, True, False, True, True, False]) == "The ans[wer] is [13][.]"
    assert mark(pieces, [True] + [False] * 5 + [True]) == "[The] answer is 13.[</s>]"
    every = mark(pieces, [True] * 7)
    assert re.sub(r"[\[\]]", "", every) == "The answer is 13.</s>" and every.count("[") == every.count("]") == 7


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs AlpacaEval's published annotations")
def test_win_rates_are_those_of_alpacaevals_leaderboard():
    """A rate of discrete wins, a standard error with ddof 0, or ties lost, would differ from the public table."""
    for model in json.loads((SHARED / "alpaca_eval" / "annotations.json").read_text(encoding="utf-8")):
        scores = [r["preference"] - 1 for r in model["rows"] if r["preference"] is not None]
        mean, se = mean_and_se(scores)
        assert 100 * mean == pytest.approx(float(model["leaderboard"]["win_rate"]), abs=1e-6)
        assert 100 * se == pytest.approx(float(model["leaderboard"]["standard_error"]), abs=1e-6)


def preference(instruction, a, b, label, **more):
    return {"instruction": instruction, "input": "", "output_1": a, "output_2": b, "preference": label, **more}


def test_the_meter_by_hand():
    """Agreement, variance and bias by their definitions, ties in a vote counting half, order of storage not at all."""
    one = labels_of([preference("x", "a", "b", 1), preference("x", "b", "a", 2), preference("y", "a", "b", 2)])
    assert one == {("x", "", "a", "b"): [1, 1], ("y", "", "a", "b"): [2]}
    people = {"p": [1, 1, 2, 1], "q": [2, 2, 1, 1], "r": [2, 2, 2, 2]}
    judge = {"p": [1], "q": [2], "r": [1], "s": [1]}
    # p: leaving out a 1 leaves {1, 1, 2} or, the 2, {1, 1, 1}: always 1. q: a 2 out leaves 1, a 1 out leaves 2: half.
    assert agreement(judge, people)[0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert bias(judge, people)[0] == pytest.approx((0 + 0.5 + 1) / 3)
    # p: a 1 against {1, 2, 1}: right, thrice; the 2 against {1, 1, 1}: wrong. q: each against a majority of others.
    assert variance(people)[0] == pytest.approx((0.25 + 1 + 0) / 3)
    assert variance({"p": [1, 2]})[0] == 1 and variance({"p": [1, 1, 2]})[0] == pytest.approx((0.5 + 0.5 + 1) / 3)
    long = "x" * 40
    records = [preference("a", "s", long, 2, switched=False), preference("b", long, "s", 2, switched=True),
               preference("c", long, "s", 1, switched=True), preference("d", "s", "ss", 1, switched=False),
               preference("e", "s", "ss", 1, switched=False, annotator="noise")]
    assert prefers(records, "length")[0] == pytest.approx(2 / 3)
    assert prefers(records, "position")[0] == pytest.approx(2 / 4)          # b and d took the first shown
