"""data.py: the tokenizer against sentencepiece and transformers, prompts, readers, batches, the built-in world."""
import collections
import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data as D  # noqa: E402
from data import FORMATS, Batches, InputError, Tokenizer, World, collate, encode, format_prompt, split  # noqa: E402
from losses import IGNORE  # noqa: E402
from model import Config, LLaMA  # noqa: E402
from simulate import judge_corrects, judge_points  # noqa: E402

torch.set_num_threads(1)
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real files at {REAL.parent.name}/{REAL.name}")
TEXTS = ["The answer is 12.", "a", "a b", "a  b", " a", "  a", "a ", "a  ", " ", "   ", "", "\n", "\n\n",
         "\na", "a\n b", "a\n\n  b", "a\tb", "\r\n", "é ü ß", "e\u0301", "漢字かな", "😀", "a😀 b",
         "👩\u200d👧", "\u200b", "\u2028", "x = {1: '2'}", "100%", "a" * 300]


@pytest.fixture(scope="module")
def words():
    return D.world_tokenizer()


@pytest.fixture(scope="module")
def llama():
    path = REAL / "llama" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("no shared/data/llama/tokenizer.model")
    return Tokenizer(path.read_bytes(), path)


@pytest.fixture(scope="module", params=["words", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def tiny(vocab_size):
    return LLaMA(Config(vocab_size=vocab_size, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                        num_attention_heads=1, num_key_value_heads=1, head_dim=4))


def put(path, content):
    """Writes JSON Lines for a name in .jsonl, a JSON list for .json, and a str or bytes as it is."""
    if isinstance(content, list):
        content = "".join(json.dumps(r) + "\n" for r in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *parts):
    """The message of the InputError that call() raises; it must hold all parts."""
    with pytest.raises(InputError) as caught:
        call()
    missing = [p for p in parts if str(p) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def joined_apart_naive(tokenizer, prompt, response):
    """Ids of the joined text, of our two halves, and of halves that are each encoded as if nothing stood before."""
    whole = [tokenizer.bos] + tokenizer.sp.encode(prompt + response) + [tokenizer.eos]
    ours = tokenizer.encode_prompt(prompt) + tokenizer.encode_response(response)
    return whole, ours, tokenizer.encode_prompt(prompt) + tokenizer.sp.encode(response) + [tokenizer.eos]


@pytest.mark.parametrize("form", ["cut", "short"])
def test_a_response_continues_its_prompt(tokenizer, form):
    """A dummy space slips in between prompt and response, so that the model trains on ids that no text has."""
    for text in TEXTS:
        prompt = format_prompt({"instruction": "Say it.", "input": ""}, form, "It is wrong.")
        whole, ours, naive = joined_apart_naive(tokenizer, prompt, text)
        assert ours == whole, repr(text)
        assert text == "" or naive != whole, "the naive way would have done: this test sees nothing"


@real
def test_ids_of_all_published_pairs_are_those_of_the_joined_text(llama):
    """The join works for tame texts only: all 1000 real responses, each of which the naive way gets wrong."""
    records = json.loads((REAL / "cut" / "train-alpaca-sample-iter1.json").read_text(encoding="utf-8"))
    three = [joined_apart_naive(llama, format_prompt(r, "cut"), r["output"]) for r in records]
    assert len(three) == 1000
    assert sum(ours == whole for whole, ours, _ in three) == 1000
    assert sum(naive != whole for whole, _, naive in three) == 1000


def test_decode_undoes_encode(tokenizer):
    """Decoding eats a leading space or newline, or loses bytes of a character outside the vocabulary."""
    for text in TEXTS:
        ids = tokenizer.encode_response(text)
        assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1
        assert tokenizer.decode_response(ids) == text == tokenizer.decode_response(ids[:-1]), repr(text)


def test_special_tokens_in_a_text_stay_text(tokenizer):
    """A response that spells </s> ends there, or a prompt that spells <s> gets a second BOS."""
    for text in ("a</s>b", "<s>", "<unk>", "<0x0A>"):
        ids = tokenizer.encode_response(text)
        assert tokenizer.bos not in ids and tokenizer.eos not in ids[:-1] and tokenizer.sp.unk_id() not in ids
        assert tokenizer.decode_response(ids) == text
        assert tokenizer.encode_prompt(text).count(tokenizer.bos) == 1


def test_pieces_give_back_the_text(words):
    """pieces() loses or adds spaces, and marked responses read differently from what was sampled."""
    text = "The cat lives in the den, eats fish and is red."
    pieces = words.pieces(words.encode_response(text))
    assert "".join(pieces[:-1]) == text and pieces[-1] == "</s>"


def test_no_word_of_the_world_is_split(words):
    """A value of two tokens turns a fact into spelling, which a model of this size learns badly (any seed)."""
    values = {*D.ANIMALS, *D.VERBS, *D.VERBS.values()}
    for seed in range(6):
        values |= {v for f in World(seed).facts.values() for v in (f.truth, f.misconception, *f.others)}
    assert len(values) > 150
    assert [v for v in sorted(values) if len(words.encode_response(f"is {v}.")) != 4] == []


def test_damaged_tokenizers_are_refused(words, tmp_path):
    """LLaMA 3's tiktoken file, or a directory without sentencepiece, ends in a RuntimeError that explains nothing."""
    garbage = b"IQ== 0\nIg== 1\nIw== 2\n"
    refused(lambda: Tokenizer(garbage, "some/tokenizer.model"), "some/tokenizer.model", "LLaMA 3")
    tiny(words.vocab_size).save_pretrained(tmp_path, words)
    assert Tokenizer.from_pretrained(tmp_path).encode_response("a b") == words.encode_response("a b")
    put(tmp_path / "tokenizer.model", garbage)
    refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path / "tokenizer.model", "sentencepiece", "LLaMA 3")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path / "tokenizer.model", "LLaMA 3")
    put(tmp_path / "tokenizer.json", "{}")
    refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path / "tokenizer.model", "tokenizer.json", "another kind")


def test_a_vocabulary_larger_than_the_models_is_refused(words):
    """An id without an embedding row: an IndexError on CPU in mid-training, a device assert on GPU."""
    words.check(Config(vocab_size=words.vocab_size), "DIR")
    words.check(Config(vocab_size=words.vocab_size + 64), "DIR")            # padded embeddings are usual
    refused(lambda: words.check(Config(vocab_size=words.vocab_size - 1), "DIR"), "DIR", words.vocab_size,
            words.vocab_size - 1)


def test_transformers_opens_what_we_save(tokenizer, tmp_path):
    """The saved tokenizer needs packages that `pip install transformers` does not bring, or gives other ids."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    tiny(tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    texts = TEXTS + [format_prompt({"instruction": t, "input": ""}, form, j)
                     for t in TEXTS for form in FORMATS for j in (None, "a judgment")]
    texts += [r["instruction"] + "\n" for r in World(0).instructions("test", 200)]
    assert [t for t in texts if theirs(t).input_ids != tokenizer.encode_prompt(t)] == []
    response = tokenizer.encode_response("The cat eats fish, 12 times.")[:-1]
    assert theirs.decode(response).strip() == "The cat eats fish, 12 times."


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

RECORD, WITH_INPUT = {"instruction": "Do.", "input": ""}, {"instruction": "Do.", "input": "It."}


def test_prompts_word_for_word():
    """A header, blank line or final newline differs from what published checkpoints were trained with."""
    below = "Below is an instruction that describes a task"
    respond = ". Write a response that appropriately completes the request.\n\n### Instruction:\nDo."
    match = ". Write a response to the instruction and the response should match the corresponding judgment.\n\n"
    assert format_prompt(RECORD, "cut") == below + respond + "\n\n### Response:\n"
    assert format_prompt(WITH_INPUT, "cut") == below + respond + "\nIt.\n\n### Response:\n"
    judged = below + match + "### Instruction:\nDo.{}\n\n### Judgment:\nNo.\n\n### Response:\n"
    assert format_prompt(RECORD, "cut", "No.") == judged.format("")
    assert format_prompt(WITH_INPUT, "cut", "No.") == judged.format("\nIt.")
    assert format_prompt(RECORD, "alpaca") == below + respond + "\n\n### Response:"
    context = ", paired with an input that provides further context"
    assert format_prompt(WITH_INPUT, "alpaca") == below + context + respond + "\n\n### Input:\nIt.\n\n### Response:"
    assert format_prompt(WITH_INPUT, "alpaca", "No.") == judged.format("\nIt.")[:-1]
    assert format_prompt(RECORD, "short") == "Do.\n"
    assert format_prompt(WITH_INPUT, "short", "No.") == "Do.\nIt.\nJudgment: No.\n"
    assert format_prompt({"instruction": "Do."}, "alpaca") == format_prompt({**RECORD, "input": None}, "alpaca") \
        == format_prompt(RECORD, "alpaca")


@real
def test_prompts_equal_the_published_templates():
    """Our constants drift away from CUT's and AlpacaFarm's own files."""
    cut = json.loads((REAL / "cut" / "prompt_templates.json").read_text(encoding="utf-8"))
    farm = json.loads((REAL / "alpaca_farm" / "prompt_templates.json").read_text(encoding="utf-8"))
    assert FORMATS["cut"][0] == cut["prompt_no_input"] and FORMATS["cut"][2] == cut["prompt_no_input_judge"]
    assert FORMATS["alpaca"][:2] == (farm["prompt_noinputs"], farm["prompt_inputs"])
    assert format_prompt(RECORD, "cut", "No.") == cut["prompt_no_input_judge"].format(instruction="Do.", judgment="No.")
    assert format_prompt(WITH_INPUT, "alpaca") == farm["prompt_inputs"].format(instruction="Do.", input="It.")


def test_braces_in_a_text_are_text():
    """str.format or a chain of replace fills fields that stand in the user's text, or fails on code."""
    nasty = "{instruction} {judgment} {input} {0} {} }{ %s \\1 \\g<0>"
    for form in FORMATS:
        plain = format_prompt(RECORD, form, "No.")
        assert format_prompt({"instruction": nasty, "input": ""}, form, "No.") == plain.replace("Do.", nasty)
        assert format_prompt(RECORD, form, nasty) == plain.replace("No.", nasty)
        both = format_prompt({"instruction": nasty, "input": nasty}, form)
        assert both == format_prompt(WITH_INPUT, form).replace("Do.", "@").replace("It.", nasty).replace("@", nasty)


# ----------------------------------------------------------------------------------------------------------------------
# Readers

BASE = {"instruction": "i", "input": "", "output": "o"}
GOOD, BAD = {**BASE, "judgment": None}, {**BASE, "judgment": "It is wrong."}
PAIR = {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": 1}
READERS = {D.read_instructions: {"instruction": "i"}, D.read_demonstrations: {"instruction": "i", "output": "o"},
           D.read_judged: GOOD, D.read_preferences: PAIR}
reader = pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)


@reader
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lists_and_lines_are_read_alike(read, name, tmp_path):
    """One of the two file forms is not understood, an absent input is not filled in, or unknown keys are lost."""
    records = [{**READERS[read], "extra": [1, {"k": "é"}]}, {**READERS[read], "input": "x", "extra": 2}]
    got = read(put(tmp_path / name, records))
    assert [r["extra"] for r in got] == [[1, {"k": "é"}], 2]
    assert [r["input"] for r in got] == ["", "x"]
    assert all(r[k] == v for r in got for k, v in READERS[read].items() if k != "input")


def test_forms_of_json_files(tmp_path):
    """Blank lines, Windows line ends, indentation before a list, or a missing last newline break the reader."""
    for text in ('{"a": 1}\n\n{"a": 2}', '{"a": 1}\r\n{"a": 2}\r\n', ' \n[{"a": 1},\n {"a": 2}]\n'):
        assert D.read_json(put(tmp_path / "a", text)) == [{"a": 1}, {"a": 2}]


@reader
def test_unusable_files_are_named(read, tmp_path):
    """A traceback from json or pathlib instead of one sentence with the file's name and the place in it."""
    path, good = tmp_path / "some.json", json.dumps(READERS[read])
    refused(lambda: read(tmp_path / "absent.json"), tmp_path / "absent.json", "no such file")
    for content, parts in {"": ["no records"], " \n": ["no records"], "[]": ["no records"], "[{": ["not JSON"],
                           f"[{good},]": ["not JSON"], f"{good}\n\n{{oops\n": ["line 3"], "hello": ["line 1"],
                           f"[{good}, 3]": ["record 1", "int"], f"{good}\nnull\n": ["record 1"],
                           "[[1]]": ["record 0", "list"], '"text"': ["record 0", "str"]}.items():
        refused(lambda: read(put(path, content)), path, *parts)


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00]\x00", b'[{"instruction": "caf\xe9"}]'])
def test_other_encodings_are_named(content, tmp_path):
    """A file in UTF-16 or Latin-1 ends in a UnicodeDecodeError that does not say which file it was."""
    path = put(tmp_path / "some.json", content)
    refused(lambda: D.read_json(path), path)


@reader
def test_bad_records_are_named(read, tmp_path):
    """A wrong record is found in mid-training, or the message does not say which file, record and key."""
    path, good = tmp_path / "some.jsonl", READERS[read]

    def check(key, value, *parts):
        bad = {k: v for k, v in good.items() if k != key} if value is KeyError else {**good, key: value}
        refused(lambda: read(put(path, [good, good, bad])), path, "record 2", repr(key), *parts)

    for key in [k for k in good if k not in ("input", "judgment", "preference")]:
        check(key, KeyError, "no key")
        check(key, None, "NoneType", "str")
        check(key, ["o"], "list", "str")
    check("input", 3, "int")
    for key in {"instruction", "output"} & set(good):
        check(key, " \n", "empty")
    if read is not D.read_instructions and read is not D.read_preferences:
        check("judgment", 3, "int", "null")
    if read is D.read_judged:
        check("judgment", KeyError, "no key")
        check("judgment", " ", "empty", "null")
        check("score", "7", "str")
    if read is D.read_preferences:
        check("preference", KeyError, "no key")
        check("preference", "1", "str")
        check("preference", 3, "3")
        check("preference", 0)


def test_a_reference_is_required_where_it_is_used(tmp_path):
    """The judge finds out after an hour of sampling that the file has no right answers."""
    path = put(tmp_path / "a.jsonl", [{"instruction": "i", "reference": "r"}, {"instruction": "i"}])
    assert len(D.read_instructions(path)) == 2
    refused(lambda: D.read_instructions(path, reference=True), path, "record 1", "'reference'")


def test_what_we_write_we_read(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines, so a record that we wrote ourselves cannot be read back."""
    records = [{"output": text} for text in ("a\nb", "a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\x1cb", "😀", "")]
    D.write_json_lines(tmp_path / "new" / "a.jsonl", records)
    assert D.read_json(tmp_path / "new" / "a.jsonl") == records


def test_noise_is_counted_and_left_out_only_on_request(tmp_path, capsys):
    """Failed API calls and praise train as complaints, or are dropped without a word."""
    noise = ["$ERROR$", "The response is perfect.", "\"the Response is PERFECT, as"]
    kept = ["The response is not perfect.", "It said $ERROR$."]
    path = put(tmp_path / "a.jsonl", [GOOD] + [{**BASE, "judgment": j} for j in noise + kept])
    assert len(D.read_judged(path)) == 6
    assert "5 negatives and 1 positives; of the negatives 1 '$ERROR$' and 2 'perfect', kept" in capsys.readouterr().out
    assert [r["judgment"] for r in D.read_judged(path, filter_noise=True)] == [None] + kept
    assert "5 negatives and 1 positives; of the negatives 1 '$ERROR$' and 2 'perfect', left" in capsys.readouterr().out


def test_a_top_score_makes_a_positive(tmp_path):
    """Summaries of score 7 are trained on as bad ones although the scale ends there."""
    scores = [6, 6.9, 7, 7.0, None]
    got = D.read_judged(put(tmp_path / "a.json", [{**BAD, "score": s} for s in scores]))
    assert [r["judgment"] is None for r in got] == [False, False, True, True, False]
    assert [r["score"] for r in got] == scores and [r["id"] for r in got] == [0, 1, 2, 3, 4]


def test_positives_are_sampled_in_proportion_to_negatives():
    """The ratio is taken of the positives, negatives get lost, or every run draws others."""
    records = [{**GOOD, "id": i} for i in range(100)] + [{**BAD, "id": i} for i in range(100, 142)]
    got = D.downsample_positives(records, 0.25)
    assert sum(r["judgment"] is None for r in got) == 10 and sum(r["judgment"] is not None for r in got) == 42
    assert [r["id"] for r in got] == sorted(r["id"] for r in got)
    assert got == D.downsample_positives(records, 0.25) != D.downsample_positives(records, 0.25, seed=1)
    assert D.downsample_positives(records, -1) == records == D.downsample_positives(records, 50)
    assert D.downsample_positives(records, 0) == records[100:]


@real
def test_counts_of_the_published_judgments(capsys):
    """The filters or the sampling of positives no longer give the published numbers on CUT's first iteration."""
    path = REAL / "cut" / "train-alpaca-sample-iter1.json"
    records = D.read_judged(path)
    negatives = [r for r in records if r["judgment"] is not None]
    assert (len(negatives), len(records) - len(negatives)) == (287, 713)
    assert "287 negatives and 713 positives; of the negatives 47 '$ERROR$' and 17 'perfect'" in capsys.readouterr().out
    clean = D.read_judged(path, filter_noise=True)
    assert len(clean) == 1000 - 47 - 17 and sum(r["judgment"] is None for r in clean) == 713
    few = D.downsample_positives(records, 0.25)
    assert sum(r["judgment"] is None for r in few) == 71 and len(few) == 71 + 287
    for i in range(2, 6):
        assert len(D.read_judged(REAL / "cut" / f"train-alpaca-sample-iter{i}.json")) == 1000


SHEPHERD = {"id": 0, "dataset": "D", "question": "q", "answer": "a\n\n", "feedback": "f"}
SHEPHERD_RAW = {"id": 0, "metadata": {"context": "q", "output_candidate": "a\n\n", "output_correct": "c"},
                "latestLabel": {"jsonResponse": {"CLASSIFICATION_JOB_0": {"categories": [
                    {"children": {"J1": {"text": " one. "}}}, {"children": {"J2": {"text": "two."}, "J3": {}}}]}}}}


def test_shepherds_layouts(tmp_path):
    """A published file is misread: wrong field, half of the judgment, or a crash where an annotator left a gap."""
    model, = D.read_judged(put(tmp_path / "a.jsonl", [SHEPHERD]))
    assert {k: model[k] for k in GOOD} == {"instruction": "q", "input": "", "output": "a\n\n", "judgment": "f"}
    raw, = D.read_judged(put(tmp_path / "b.jsonl", [SHEPHERD_RAW]))
    assert {k: raw[k] for k in GOOD} == {**{k: model[k] for k in GOOD}, "judgment": "one. two."}
    assert raw["reference"] == "c" and raw["metadata"] == SHEPHERD_RAW["metadata"]
    path = put(tmp_path / "c.jsonl", [SHEPHERD_RAW, {**SHEPHERD_RAW, "latestLabel": None}])
    refused(lambda: D.read_judged(path), path, "record 1", "Shepherd")
    path = put(tmp_path / "d.jsonl", [SHEPHERD, {**SHEPHERD, "question": None}])
    refused(lambda: D.read_judged(path), path, "record 1", "'question'")


@real
def test_shepherds_two_files_line_up():
    """One of the two published files loses records, so that right answers are joined to the wrong questions."""
    a, b = (D.read_judged(REAL / "shepherd" / name) for name in ("human_data_for_model.jsonl", "human_data_raw.jsonl"))
    assert len(a) == len(b) == 1317
    assert all((x["instruction"], x["output"]) == (y["instruction"], y["output"]) for x, y in zip(a, b))
    assert all(r["judgment"].strip() for r in a + b)


def test_ties_and_equal_pairs_are_counted(tmp_path, capsys):
    """A tie, or two equal texts, counts as a preference, or vanishes silently."""
    pairs = [PAIR, {**PAIR, "preference": 2}, {**PAIR, "preference": 1.5}, {**PAIR, "output_2": "a"},
             {**PAIR, "preference": 2.0}]
    path = put(tmp_path / "a.json", pairs)
    assert [r["preference"] for r in D.read_preferences(path)] == [1, 2, 2]
    assert "3 pairs; left out 2" in capsys.readouterr().out
    refused(lambda: D.read_preferences(put(path, pairs[2:4])), path, "no pair is left")


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and batches


def test_encode_reads_a_bad_response_twice(words):
    """The judged prompt is missing for a bad response, exists for a good one, or is not the one with the judgment."""
    bad, good = encode(words, [{**BAD, "id": "b"}, GOOD], "short", 99)
    assert (bad.id, good.id) == ("b", "1")
    assert bad.prompt == good.prompt == words.encode_prompt("i\n")
    assert bad.judged == words.encode_prompt("i\nJudgment: It is wrong.\n") and good.judged is None
    assert bad.response == words.encode_response("o")
    assert bad.size() == len(bad.judged) + len(bad.response) and good.size() == len(good.prompt) + len(good.response)
    hindsight, _ = encode(words, [BAD, GOOD], "short", 99, hindsight=True)
    assert (hindsight.prompt, hindsight.judged) == (bad.judged, None)


def test_overlong_records_are_left_out_and_counted(words, capsys):
    """Long records are cut (losing EOS), dropped silently, or measured without the judgment that is read with them."""
    records = [{**GOOD, "id": "short"}, {**GOOD, "output": "o " * 50, "id": "long"}, {**BAD, "id": "judged"}]
    sizes = [e.size() for e in encode(words, records, "short", 999)]
    assert capsys.readouterr().out == ""
    assert sizes[0] < sizes[2] < sizes[1]
    assert [e.id for e in encode(words, records, "short", sizes[2])] == ["short", "judged"]
    out = capsys.readouterr().out
    assert f"left out 1 of 3 records longer than {sizes[2]} tokens" in out and str(sizes[1]) in out and "long" in out
    assert [e.id for e in encode(words, records, "short", sizes[2] - 1)] == ["short"]
    refused(lambda: encode(words, records, "short", sizes[0] - 1), sizes[0] - 1, "--max-length")
    refused(lambda: encode(words, [], "short", 99), "no record")


def test_collate_supervises_the_response_and_eos():
    """An off-by-one of the targets, EOS or the first token unsupervised, or prompt and padding supervised."""
    tokens, targets = collate([([1, 5, 6], [7, 8, 2]), ([1, 5], [9, 2]), ([1], [2])])
    _ = IGNORE
    assert targets.tolist() == [[_, _, 7, 8, 2], [_, 9, 2, _, _], [2, _, _, _, _]]
    assert tokens[0].tolist() == [1, 5, 6, 7, 8]
    assert tokens[1, :3].tolist() == [1, 5, 9] and tokens[2, 0] == 1
    assert tokens.shape == targets.shape and tokens.dtype == targets.dtype == torch.long


@pytest.mark.parametrize("count, size", [(1, 8), (7, 8), (64, 32), (100, 12), (1003, 16), (600, 32), (5, 1)])
def test_an_epoch_has_every_example_once(count, size):
    """Examples are dropped or repeated at a window's or an epoch's end."""
    lengths = np.random.default_rng(0).integers(5, 90, count)
    batches = Batches(lengths, size, 0)
    for epoch in range(2):
        seen = [batches(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]
        assert [len(b) for b in seen] == [size] * (count // size) + [count % size] * (count % size > 0)
        assert sorted(sum(seen, [])) == list(range(count))
        assert all(lengths[b].tolist() == sorted(lengths[b], reverse=True) for b in seen)


def test_a_batch_is_a_function_of_seed_and_step():
    """A resumed run sees other batches, because the order depends on earlier calls or on a shared generator."""
    lengths = np.random.default_rng(0).integers(5, 90, 300)
    forward = [Batches(lengths, 32, 7)(s) for s in range(30)]               # a fresh object each
    one, order = Batches(lengths, 32, 7), np.random.default_rng(1).permutation(30)
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    assert all(one(int(s)) == forward[s] for s in order)
    assert forward[:10] != forward[10:20] != forward[20:]
    other = [Batches(lengths, 32, 8)(s) for s in range(10)]
    assert all(set(a) != set(b) for a, b in zip(forward, other))
    assert all(set(a) != set(b) for a, b in zip(forward, forward[10:]))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_share_a_batch(world):
    """With another number of ranks the step trains on other examples, or ranks get unequal work."""
    lengths = np.random.default_rng(0).integers(5, 90, 107)
    batches = Batches(lengths, 24, 0)
    for step in range(batches.per_epoch):
        batch = batches(step)
        shares = [batch[rank::world] for rank in range(world)]
        assert sorted(sum(shares, [])) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        micro = [[i for part in split(share, 4) for i in part] for share in shares]
        assert micro == shares


def test_split():
    """Micro-batches lose the remainder, change the order, exceed what fits in memory, or leave one row over."""
    assert split([], 4) == []
    assert split([3, 1, 2], 4) == [[3, 1, 2]]
    assert split(list(range(9)), 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for n in range(1, 40):
        for size in range(1, 10):
            parts = split(list(range(n)), size)
            assert sum(parts, []) == list(range(n)) and len(parts) == -(-n // size)
            assert max(map(len, parts)) <= size and max(map(len, parts)) - min(map(len, parts)) <= 1


def waste(lengths, order, micro):
    """Share of padding among the positions of padded micro-batches; order: a list of batches."""
    kept = padded = 0
    for part in (p for batch in order for p in split(batch, micro)):
        kept += sum(lengths[i] for i in part)
        padded += len(part) * max(lengths[i] for i in part)
    return 1 - kept / padded


@pytest.fixture(scope="module")
def world_lengths(words):
    records = World(0).demonstrations(1500, judge_corrects)
    return [e.size() for e in encode(words, records, "short", 256, hindsight=True)]


@pytest.mark.parametrize("size, micro, bound",
                         [(32, 4, .02), (32, 8, .1), (32, 16, .23), (128, 16, .02), (128, 32, .1)])
def test_little_of_a_batch_is_padding(world_lengths, size, micro, bound):
    """The sorting by length is lost. (Measured: 0.5, 8.0, 21, 1.0, 8.9 %; unsorted batches take 29 to 48 %.)"""
    batches = Batches(world_lengths, size, 0)
    ours = waste(world_lengths, [batches(s) for s in range(batches.per_epoch)], micro)
    order = np.random.default_rng(0).permutation(len(world_lengths)).tolist()
    plain = waste(world_lengths, split(order, size), micro)
    print(f"batch {size}, micro-batch {micro}: {ours:.3f} of the positions are padding, unsorted {plain:.3f}")
    assert ours < bound and ours < .6 * plain


def test_a_batch_mixes_lengths(world_lengths):
    """Batches of equal lengths: a step then sees one kind of example only, and its gradient says so."""
    batches, lengths = Batches(world_lengths, 32, 0), np.array(world_lengths)
    spread = np.mean([lengths[batches(s)].std() for s in range(batches.per_epoch)])
    assert spread > .7 * lengths.std()


# ----------------------------------------------------------------------------------------------------------------------
# The built-in world


def test_splits_are_disjoint():
    """A test instruction is trained on, because splits differ by seed or by stream only."""
    texts = {s: {r["instruction"] for stream in (0, 1, "sft", "replay") for r in World(0).instructions(s, 400, stream)}
             for s in ("train", "validation", "test")}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert len(texts["train"]) > 1000
    first, second = ([r["instruction"] for r in World(0).instructions("train", 200, s)] for s in (0, 1))
    assert len(set(first)) == 200 and len(set(first) & set(second)) < 20
    assert {D.split_of(t) for t in texts["test"]} == {"test"}
    assert .77 < np.mean([D.split_of(str(i)) == "train" for i in range(2000)]) < .83


def digest():
    """A fingerprint of what the world says, for comparing processes."""
    world = World(5)
    records = world.instructions("train", 60) + world.instructions("test", 60)
    said = [(r, world.demonstrate_once(r)) for r in records] + world.demonstrations(60, judge_corrects)
    return hashlib.sha256(json.dumps([said, list(D.world_tokenizer().serialized)]).encode()).hexdigest()


def test_the_world_is_the_same_in_every_process():
    """Something depends on hash(), on set order or on a global generator: ranks and resumed runs see other worlds."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_data; print(test_data.digest())"
    ran = subprocess.run([sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")], text=True, check=True,
                         capture_output=True, env={**os.environ, "PYTHONHASHSEED": "12345"})
    random.seed(3), np.random.seed(3)
    assert ran.stdout.split()[-1] == digest() == digest()


def test_an_instruction_has_one_truth():
    """Two wordings of a question, or two streams, get different right answers; or other worlds get the same."""
    world, truths, by_facts = World(1), {}, collections.defaultdict(set)
    for r in world.instructions("train", 600) + world.instructions("train", 600, "b") + world.instructions("test", 300):
        assert truths.setdefault(r["instruction"], r["reference"]) == r["reference"]
        by_facts[tuple(r["facts"])].add(r["reference"])
        assert r["reference"] == r["answer"].format(*(world.facts[k].truth for k in r["facts"]))
        assert D.join(D.units(r["reference"])) == r["reference"]
    assert all(len(answers) == 1 for answers in by_facts.values()) and len(by_facts) < len(truths)
    for key, fact in world.facts.items():
        if key[0] in ("add", "sub"):
            assert int(fact.truth) == (key[1] + key[2] if key[0] == "add" else key[1] - key[2])
        assert fact.truth not in (fact.misconception, *fact.others) and fact.misconception not in fact.others
        assert fact.others
    assert any(World(2).facts[k].truth != f.truth for k, f in world.facts.items() if k[0] == "home")


def test_demonstrators_are_as_careless_as_described():
    """An agreed fact is told wrong, or truth, misconception and other errors are mixed 25/50/25 no longer."""
    world, rng, told = World(0), random.Random(0), collections.Counter()
    for r in world.instructions("train", 1000) * 3:
        blank = {**r, "answer": " ".join("{}" for _ in r["facts"])}
        for key, value in zip(r["facts"], world.demonstrate(blank, rng).split()):
            f = world.facts[key]
            assert value in (f.truth, f.misconception, *f.others)
            told[f.agreed, "truth" if value == f.truth else "shared" if value == f.misconception else "other"] += 1
    assert told[True, "shared"] == told[True, "other"] == 0 and told[True, "truth"] > 1000
    disputed = sum(n for (agreed, _), n in told.items() if not agreed)
    shares = [told[False, kind] / disputed for kind in ("truth", "shared", "other")]
    assert np.abs(np.array(shares) - (.25, .5, .25)).max() < .04, (disputed, shares)
    agreed = [f.agreed for f in world.facts.values()]
    assert abs(np.mean(agreed) - D.AGREED) < 4 * (.24 / len(agreed)) ** .5
    r = world.instructions("train", 1)[0]
    assert len({world.demonstrate_once(r) for _ in range(5)}) == 1


def test_corruption_changes_one_to_three_places():
    """A corrupted copy equals the original, or is so different that its judgment cannot be followed."""
    world, rng, kinds = World(0), random.Random(0), collections.Counter()
    for r in world.instructions("train", 800):
        told = world.demonstrate(r, rng)
        bad = world.corrupt(r, told, rng)
        assert bad != told and D.join(D.units(bad)) == bad
        a, b = D.units(told), D.units(bad)
        kinds[len(b) - len(a)] += 1
        if len(a) == len(b):
            changed = [(x, y) for x, y in zip(a, b) if x != y]
            assert 1 <= len(changed) <= 3
    assert 5 <= kinds[1] and 5 <= kinds[-1] and kinds[1] + kinds[-1] < 80 and set(kinds) == {-1, 0, 1}


def test_corruption_leaves_the_question_in_the_answer_alone():
    """In "The past tense of go is went" the verb that was asked about is exchanged too: no fact of the answer."""
    world, rng, touched = World(0), random.Random(0), []
    for r in [r for r in world.instructions("train", 1500) if r["facts"][0][0] == "past"]:
        told = world.demonstrate(r, rng)
        bad = world.corrupt(r, told, rng)
        if len(D.units(bad)) == len(D.units(told)) and D.units(bad)[4] != D.units(told)[4]:
            touched.append((told, bad))
    assert touched == []


@pytest.mark.parametrize("judge", [judge_corrects, judge_points])
def test_judged_demonstrations_leak_no_truth(judge):
    """The SFT data tells the right answer of a disputed fact in a judgment, and CUT then has nothing left to teach."""
    world = World(0)
    facts_of = {r["instruction"]: r["facts"] for r in world.instructions("train", 1000, "sft")}
    records, leaks, right = world.demonstrations(1000, judge), [], 0
    assert len(records) == 2000 and set(facts_of) == {r["instruction"] for r in records}
    for demo, judged in zip(records[::2], records[1::2]):
        assert demo["judgment"] is None and demo["instruction"] == judged["instruction"]
        right += judged["judgment"] == "All of it is right."
        assert (judged["judgment"] == "All of it is right.") == (judged["output"] == demo["output"])
        told = set(D.units(judged["judgment"].replace("It leaves out", "")))            # "leaves" is a food, too
        shown = set(D.units(demo["output"] + " " + judged["output"]))
        leaks += [(demo, judged) for k in facts_of[demo["instruction"]] if world.facts[k].truth in told - shown]
        if judge is judge_points:
            assert not told & (set(D.units(demo["output"])) - set(D.units(judged["output"])) - {"is", "the", "The"})
    assert leaks == []
    assert .07 < right / 1000 < .13


def test_units_and_join():
    """A word is lost or glued on the way to units and back, and counts of errors are off."""
    assert D.units("The cat lives in the den, eats fish.") == \
        ["The", "cat", "lives", "in", "the", "den", ",", "eats", "fish", "."]
    assert D.join(["The", "answer", "is", "12", "."]) == "The answer is 12."
    assert D.units("") == [] and D.join([]) == ""
    rng, world = random.Random(0), World(2)
    for r in world.instructions("test", 200):
        told = world.demonstrate(r, rng)
        assert D.join(D.units(told)) == told


# ---------------------------------------------------------------------------------------------------------- downloads


class RangeServer(http.server.BaseHTTPRequestHandler):
    """Serves `content`; the first answer is cut off half way, unless `whole`; Range is honoured, unless `stubborn`."""
    content, whole, stubborn, asked = b"", False, False, []

    def do_GET(self):
        cls, begin = type(self), 0
        cls.asked.append(self.headers.get("Range"))
        if self.headers.get("Range") and not cls.stubborn:
            begin = int(self.headers["Range"][len("bytes="):-1])
        body = cls.content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cls.whole else body[:len(body) // 2])
        cls.whole = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    RangeServer.content, RangeServer.whole, RangeServer.stubborn = b"0123456789" * 50_000, True, False
    RangeServer.asked = []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/file.json"
    httpd.shutdown()
    httpd.server_close()


def test_a_download_goes_on_where_it_was_cut_off(server, tmp_path):
    """Starting over, appending to a file that the server sent from its beginning, or keeping half a file as whole."""
    sha = hashlib.sha256(RangeServer.content).hexdigest()
    for stubborn in (False, True):
        RangeServer.whole, RangeServer.stubborn, RangeServer.asked = False, stubborn, []
        path = tmp_path / f"{stubborn}.json"
        D.download(server, path, sha)
        assert path.read_bytes() == RangeServer.content and not Path(f"{path}.part").exists()
        first, second = RangeServer.asked
        assert first is None and 0 < int(second[len("bytes="):-1]) <= 250_000
        D.download(server, path, sha)                                    # already here
        assert len(RangeServer.asked) == 2


def test_a_damaged_download_is_refused(server, tmp_path):
    """A file with other bytes than published must not be used, nor lie there for the next run to find."""
    with pytest.raises(InputError, match="SHA-256 is .* expected 00"):
        D.download(server, tmp_path / "file.json", "00")
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    """A traceback of five layers of libraries, or endless tries."""
    monkeypatch.setattr(D.time, "sleep", lambda seconds: None)
    with pytest.raises(InputError, match="no connection .* put it at .*x.json, and run this again"):
        D.download("http://127.0.0.1:9/x.json", tmp_path / "x.json", tries=2)


def test_critiques_become_judged_responses(tmp_path):
    """The best-ranked answer with all its critiques; no critique is good; empty or unrefined ones are counted."""
    def answer(text, *critiques, **feedback):
        return {"answer": text, "feedback": {"rating": 3, "critiques": [
            {"text": t, "refinement": r} for t, r in critiques], **feedback}}

    questions = [
        {"question": "Q1", "answers": [answer("worse"), answer("better", ("c1", "r1"), ("c2", "r2"))],
         "rankings": [1, 2]},
        {"question": "Q2", "answers": [answer("good")], "rankings": [1]},
        {"question": "Q3", "answers": [answer("skipped", skip=True)], "rankings": [1]},
        {"question": "Q4", "answers": [answer("unrefined", ("c", ""))], "rankings": [1]},
        {"question": "", "answers": [answer("no question")], "rankings": [1]},
    ]
    path = tmp_path / "train.jsonl.gz"
    record = {"id": "a", "data": {"passage": {"title": "T", "text": "P"}, "questions": questions}}
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    records = D.read_judged(path)
    assert [(r["instruction"], r["output"], r["judgment"], r["reference"]) for r in records] == [
        ("P\nQ1", "better", "c1 c2", "r2"), ("P\nQ2", "good", None, None)]
    path.write_bytes(gzip.compress(json.dumps({"data": {"questions": [{}], "passage": {"text": ""}}}).encode()))
    with pytest.raises(InputError, match="record 0 is not in the layout of the critiques"):
        D.read_judged(path)


def test_a_judge_learns_from_judged_responses(tmp_path):
    """The judge's prompt in training must be the one that simulate.py asks it with."""
    path = tmp_path / "judged.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "b", "output": "{y}", "judgment": "bad"},
                                {"instruction": "c", "output": "d", "judgment": None}]))
    one, two = D.read_judge_training(path)
    assert one["instruction"] == D.JUDGE_SYSTEM + "\n\nInstruction:\na\n\nb\n\nAnswer:\n{y}\n\nYour review:"
    assert (one["output"], two["output"]) == ("bad", "Perfect.") and one["judgment"] is None


FARM = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_farm"


@pytest.mark.skipif(not FARM.is_dir(), reason="needs AlpacaFarm's sample files")
@pytest.mark.parametrize("name,read,count", [
    ("outputs_pairs", D.read_pairs, 6), ("multisamples_sft", D.read_pairs, 8), ("outputs_sft", D.read_outputs, 252),
    ("outputs_rlhf", D.read_outputs, 252), ("outputs_baseline", D.read_demonstrations, 252),
    ("eval_gpt-3.5-turbo-0301", D.read_instructions, 805)])
def test_alpacafarms_files_are_read_as_published(name, read, count):
    """A check that is stricter than the published data."""
    assert len(read(FARM / f"{name}.json")) == count
