"""data.py: the tokenizer against sentencepiece and transformers, prompts, readers, batches, the built-in world and the
judge that knows its truth, downloads."""
import gzip
import hashlib
import http.server
import json
import math
import os
import random
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data as D
from data import (FORMATS, IGNORE, JUDGES, Batches, InputError, Tokenizer, World, chunks, collate,
                  corrected, differences, encode, format_prompt, join, judge_reference, units)
from model import Config, LLaMA

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real files at {REAL.parent.name}/{REAL.name}")
TEXTS = ["The answer is 12.", "a", "a b", "a  b", " a", "  a", "a ", "a  ", " ", "   ", "", "\n", "\n\n",
         "\na", "a\n b", "a\n\n  b", "a\tb", "\r\n", "é ü ß", "e\u0301", "漢字かな", "😀", "a😀 b",
         "👩\u200d👧", "\u200b", "\u2028", "x = {1: '2'}", "100%", "a" * 300]


@pytest.fixture(scope="module")
def words():
    return D.world_tokenizer()


@pytest.fixture(scope="module", params=["words", "llama"])
def tokenizer(request, words):
    path = REAL / "llama" / "tokenizer.model"
    if request.param == "words":
        return words
    if not path.is_file():
        pytest.skip("no shared/data/llama/tokenizer.model")
    return Tokenizer(path.read_bytes())


def save_tiny_model(directory, tokenizer):
    """A model directory; its embeddings are padded, as is usual."""
    LLaMA(Config(vocab_size=tokenizer.vocab_size + 64, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                 num_attention_heads=1, num_key_value_heads=1, head_dim=4)).save_pretrained(directory, tokenizer)


def put(path, content):
    """Writes JSON Lines for a name in .jsonl, a JSON list for .json, and a str or bytes as it is."""
    if isinstance(content, list):
        content = "".join(json.dumps(r) + "\n" for r in content) if path.suffix == ".jsonl" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *parts):
    """call() raises an InputError whose one line holds all parts."""
    with pytest.raises(InputError) as caught:
        call()
    missing = [p for p in parts if str(p) not in str(caught.value)]
    assert not missing and "\n" not in str(caught.value), f"{missing} not in: {caught.value}"


# ----------------------------------------------------------------------------------------------------------------------
# Errors and files


def fail_to_read(path, error):
    with D.reading(path, "mend it"):
        raise error


@pytest.mark.parametrize("error", [ValueError("a\nb"), RecursionError(), MemoryError(), KeyError("k"), zlib.error("x"),
                                   OSError(28, "full"), struct.error(), UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_whatever_goes_wrong_while_a_file_is_read_names_it(error, tmp_path):
    """A damaged file ends in a traceback, or in a message without its name, cause and remedy."""
    path = put(tmp_path / "x", "")
    refused(lambda: fail_to_read(path, error), path, type(error).__name__, "mend it")
    refused(lambda: fail_to_read(path, InputError("as it is")), "as it is")
    for nothing in (tmp_path / "absent", tmp_path, "a" * 500):
        refused(lambda: fail_to_read(nothing, AssertionError), nothing, "mend it")
    refused(lambda: fail_to_read("a\0b\n" * 10**5, AssertionError), "a\\x00b\\na")
    with pytest.raises(KeyboardInterrupt):
        fail_to_read(path, KeyboardInterrupt())


def test_nothing_printed_steers_the_terminal(capsys, monkeypatch):
    """A model's answer or a file's name clears the screen, turns the line round, or cannot be printed and ends the run;
    or an error is printed by every process, or by none."""
    nasty, waited = "é漢👩\u200d👧\t\n\x1b[2J\r\x07\x7f\x9b\u202e\ud800", []
    escaped = "é漢👩\u200d👧\t\n\\x1b[2J\\r\\x07\\x7f\\x9b\\u202e\\ud800"
    D.print0(nasty, 3)
    assert D.printable(nasty) == escaped and capsys.readouterr().out == escaped + " 3\n"
    monkeypatch.setattr(time, "sleep", waited.append)
    for process in range(2):                                # torchrun ends a process that waits
        monkeypatch.setenv("LOCAL_RANK", str(process))
        with pytest.raises(SystemExit, match=r"^error: a\\x1b: no such file"):
            D.run_main(lambda: fail_to_read("a\x1b", None))
        assert len(waited) == process


@pytest.mark.parametrize("parse, good, bad", [
    (D.nonnegative_int, ["0", "4294967295"], ["-1", "1.0", str(2**32), "9" * 5000, "nan"]),
    (D.positive_int, ["1"], ["0"]), (D.fraction, ["0", "1"], ["1.1", "nan"]),
    (D.nonnegative_float, ["0", "1e38"], ["-1", "nan"])])
def test_numbers_of_flags(parse, good, bad):
    """A seed that PyTorch refuses after minutes, or NaN, which is in no range."""
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(ValueError):
            parse(text)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and prompts

RECORD, WITH_INPUT = {"instruction": "Do.", "input": ""}, {"instruction": "Do.", "input": "It."}


def check_ids(tokenizer, prompt, response):
    """The ids of our halves are those of the joined text; a response encoded as if nothing stood before has others."""
    whole = [tokenizer.bos] + tokenizer.sp.encode(prompt + response) + [tokenizer.eos]
    begin = tokenizer.encode_prompt(prompt)
    assert begin + tokenizer.encode_response(response) == whole, repr(response)
    assert response == "" or begin + tokenizer.sp.encode(response) + [tokenizer.eos] != whole, "this test sees nothing"


@pytest.mark.parametrize("prompt_format", ["cut", "short"])
def test_a_response_continues_its_prompt(tokenizer, prompt_format):
    """A dummy space slips in between prompt and response, so that the model trains on ids that no text has."""
    for text in TEXTS:
        check_ids(tokenizer, format_prompt(RECORD, prompt_format, "It is wrong."), text)


def test_decode_undoes_encode(tokenizer):
    """Decoding eats a leading space or newline, loses bytes, or ends at a </s> that is spelled in the text; or the
    pieces of a marked response do."""
    for text in TEXTS + ["a</s>b", "<s>", "<unk>", "<0x0A>"]:
        ids = tokenizer.encode_response(text)
        assert ids[-1] == tokenizer.eos and ids.count(tokenizer.eos) == 1 and tokenizer.bos not in ids
        assert tokenizer.decode_response(ids) == text == tokenizer.decode_response(ids[:-1]), repr(text)
        assert "".join(tokenizer.pieces(ids)) == text + "</s>"
        assert tokenizer.encode_prompt(text).count(tokenizer.bos) == 1


def test_unusable_model_directories_are_refused(words, tmp_path):
    """A traceback for LLaMA 3's tiktoken file or a missing config.json; an id without an embedding, in mid-training."""
    model, config = tmp_path / "tokenizer.model", tmp_path / "config.json"
    save_tiny_model(tmp_path, words)
    files = {path: path.read_bytes() for path in (config, model)}
    for path, content, *parts in [
            (config, json.dumps({"vocab_size": words.vocab_size - 1}), words.vocab_size - 1, "belong together"),
            *[(config, broken, "vocab_size") for broken in ("{", "[]", "{}", '{"vocab_size": "many"}', b"\xff", None)],
            (model, b"IQ== 0\nIg== 1\nIw== 2\n", "cannot be read", "sentencepiece tokenizer", "LLaMA 3"),
            (model, files[model].replace(b"<0x41>", b"<0\xff41>"), "UnicodeDecodeError"),
            (model, None, "no such file", "sentencepiece tokenizer", "tokenizer.json", "LLaMA 3")]:
        path.unlink() if content is None else put(path, content)
        refused(lambda: Tokenizer.from_pretrained(tmp_path), tmp_path, *parts)
        put(path, files[path])
    assert Tokenizer.from_pretrained(tmp_path).encode_response("a b") == words.encode_response("a b")


def test_transformers_opens_what_we_save(tokenizer, tmp_path):
    """The saved tokenizer needs packages that `pip install transformers` does not bring, or gives other ids."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    save_tiny_model(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)
    texts = TEXTS + [format_prompt({"instruction": t, "input": ""}, prompt_format, judgment)
                     for t in TEXTS for prompt_format in FORMATS for judgment in (None, "a judgment")]
    texts += [r["instruction"] + "\n" for r in World(0).instructions("test", 200)]
    assert [t for t in texts if theirs(t).input_ids != tokenizer.encode_prompt(t)] == []
    for text in ("The cat eats fish, 12 times.", "é 漢😀"):
        assert theirs.decode(tokenizer.encode_response(text)[:-1]).strip() == text


def test_companion_files_go_along(words, tmp_path):
    """The chat template of a base model is lost at the first save, a link copies a private file into the model, or the
    files overwrite what a link in the new folder leads to."""
    base, new, blobs = tmp_path / "models" / "base", tmp_path / "new", tmp_path / "blobs"
    save_tiny_model(base, words)
    put(base / "chat_template.jinja", "{{ x }}")
    new.mkdir(), blobs.mkdir()
    private = put(blobs / "private", "secret")              # where Hugging Face's cache would have it
    for link in (base / "special_tokens_map.json", new / "chat_template.jinja"):
        link.symlink_to(private)
    for directory in (base, new):                                           # saving in place changes nothing
        Tokenizer.from_pretrained(base).save(directory)
        assert (directory / "chat_template.jinja").read_text() == "{{ x }}"
    assert not (new / "special_tokens_map.json").exists() and private.read_text() == "secret"


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
    for record in ({"instruction": "Do."}, {**RECORD, "input": None}):
        assert format_prompt(record, "alpaca") == format_prompt(RECORD, "alpaca")


@pytest.mark.parametrize("name", FORMATS)
def test_braces_in_a_text_are_text(name):
    """str.format or a chain of replace fills fields that stand in the user's text, or fails on code."""
    nasty = "{instruction} {judgment} {input} {0} {} }{ %s \\1 \\g<0>"
    for judgment in (None, nasty):
        plain = format_prompt({"instruction": "@", "input": "@"}, name, judgment and "@")
        filled = format_prompt({"instruction": nasty, "input": nasty}, name, judgment)
        assert filled == plain.replace("@", nasty) and filled.count(nasty) == 2 + bool(judgment)


# ----------------------------------------------------------------------------------------------------------------------
# Readers

BASE = {"instruction": "i", "input": "", "output": "o"}
GOOD, BAD = {**BASE, "judgment": None}, {**BASE, "judgment": "It is wrong."}
PAIR = {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": 1}


def read_referenced(path):
    return D.read_outputs(path, reference=True)


READERS = {D.read_instructions: {"instruction": "i"}, D.read_demonstrations: {"instruction": "i", "output": "o"},
           D.read_judged: GOOD, D.read_preferences: PAIR, D.read_outputs: {"instruction": "i", "output": "o"},
           D.read_pairs: {"instruction": "i", "output_1": "a", "output_2": "b"},
           read_referenced: {"instruction": "i", "output": "o", "reference": "r"}}
reader = pytest.mark.parametrize("read", READERS, ids=lambda f: f.__name__)
FORMS = {"a.json": " \n[%s,\n %s]\n", "a.jsonl": "%s\n\n%s", "windows.jsonl": "\ufeff%s\r\n%s\r\n"}
UNUSABLE = {"": "no records", " \n": "no records", "[]": "no records", "[{": "line 1", "[{},]": "line 1",
            '[{}, {"a": ["\\uD83d"]}]': "record 1", "[" * 10**5: "RecursionError", b"\x1f\x8b\x08": "EOFError",
            '[{"a": %s}]' % ("9" * 5000): "digits",
            "{}\n\n{oops\n": "line 3", "hello": "line 1", "[{}, 3]": "record 1 is int", "{}\nnull\n": "record 1",
            '"text"': "record 0 is str", b"\xff\xfe[\x00]\x00": "UTF-8", b'[{"a": "caf\xe9"}]': "UTF-8"}
WITH_OUTPUT = [D.read_outputs, D.read_demonstrations, D.read_judged]
BAD_RECORDS = [                         # readers, key, its value (KeyError: it is absent), what the message says
    (READERS, "instruction", None, "NoneType"), (READERS, "instruction", ["o"], "list"),
    (READERS, "instruction", KeyError, "no key"),
    (READERS, "instruction", " \n", "empty"), (READERS, "input", 3, "int"),
    (WITH_OUTPUT, "output", None, "NoneType"), (WITH_OUTPUT, "output", KeyError, "no key"),
    (WITH_OUTPUT, "output", " \n", "empty"),
    ([read_referenced], "reference", None, "NoneType"), ([read_referenced], "reference", KeyError, "no key"),
    ([D.read_pairs, D.read_preferences], "output_1", ["o"], "list"),
    ([D.read_preferences], "output_2", KeyError, "no key"),
    (WITH_OUTPUT[1:], "judgment", 3, "null"), ([D.read_judged], "judgment", KeyError, "no key"),
    ([D.read_judged], "judgment", " ", "null"), ([D.read_judged], "score", "7", "str"),
    *[([D.read_preferences], "preference", value, "from 1 to 2") for value in (KeyError, None, "1", 3, 0, math.nan)],
]


@reader
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_json_files(read, name, tmp_path):
    """A list or lines, blank lines, Windows line ends, a byte order mark, gzip or a missing last newline break the
    reader, or U+2028 and U+0085, which end a line for str.splitlines; an absent input is not filled in, or unknown
    keys are lost."""
    extra = [1, {"k": "é a\nb \u2028 \u2029 \x85 \x0b \x1c 😀"}]
    records = [{**READERS[read], "extra": extra}, {**READERS[read], "input": "x", "extra": 2}]
    text = FORMS[name] % tuple(json.dumps(r, ensure_ascii=False) for r in records)
    got = read(put(tmp_path / name, text))
    assert [r["extra"] for r in got] == [extra, 2] and [r["input"] for r in got] == ["", "x"]
    assert all(r[k] == v for r in got for k, v in READERS[read].items() if k != "input")
    assert read(put(tmp_path / "a.gz", gzip.compress(text.encode()))) == got
    D.write_json_lines(tmp_path / "new" / "a.jsonl", got)
    assert read(tmp_path / "new" / "a.jsonl") == got


@reader
@pytest.mark.parametrize("content", UNUSABLE)
def test_unusable_files_are_named(read, content, tmp_path):
    """A traceback from json or pathlib instead of one line with the file's name and the place in it."""
    path, part = tmp_path / "some.json", UNUSABLE[content]
    refused(lambda: read(path), path, "no such file")
    refused(lambda: read(put(path, content)), path, part)
    packed = put(tmp_path / "a.gz", gzip.compress(b"[{}]")[:-6])
    refused(lambda: read(packed), packed, "cannot be read")


@pytest.mark.parametrize("readers, key, value, part", BAD_RECORDS)
def test_bad_records_are_named(readers, key, value, part, tmp_path):
    """A wrong record is found in mid-training, or the message does not say which file, record and key."""
    for read in readers:
        good = READERS[read]
        bad = {**good, key: value}
        if value is KeyError:
            del bad[key]
        path = put(tmp_path / "some.jsonl", [good, good, bad])
        refused(lambda: read(path), path, "record 2", repr(key), part)


def test_what_prefer_compares(tmp_path):
    """Pairs and lists of outputs are mixed up, or found to be neither after an hour of sampling."""
    path, pair, several = tmp_path / "a.json", READERS[D.read_pairs], {"instruction": "i", "output": ["a", "b"]}
    assert D.read_pairs(put(path, [several]))[0]["output"] == ["a", "b"]
    assert "output" not in D.read_pairs(put(path, [{**pair, "output": "c"}]))[0]
    for records, *parts in [([pair, several], "records 0 and 1"), ([several, pair], "records 0 and 1"),
                            ([{**several, "output": ["a", 1]}], "record 0", "'output'"), ([BASE], "record 0"),
                            ([{"instruction": "i", "output_1": "a"}], "record 0", "'output_2'")]:
        refused(lambda: D.read_pairs(put(path, records)), path, *parts)


def test_noise_is_counted_and_left_out_only_on_request(tmp_path, capsys):
    """Failed API calls, praise, or summaries of the top score train as complaints, or are dropped without a word."""
    noise = ["$ERROR$", "The response is perfect.", "\"the Response is PERFECT, as"]
    kept = ["The response is not perfect.", "It said $ERROR$."]
    path = put(tmp_path / "a.jsonl", [GOOD] + [{**BASE, "judgment": j} for j in noise + kept])
    for filter_noise, judgments, word in [(False, [None] + noise + kept, "kept"), (True, [None] + kept, "left")]:
        assert [r["judgment"] for r in D.read_judged(path, filter_noise=filter_noise)] == judgments
        said = "5 negatives and 1 positives; of the negatives 1 '$ERROR$' and 2 'perfect', "
        assert said + word in capsys.readouterr().out
    rated = D.read_judged(put(tmp_path / "a.json", [{**BAD, "score": score} for score in (6, 6.9, 7, 7.0, None)]))
    assert [r["judgment"] is None for r in rated] == [False, False, True, True, False]
    assert [r["id"] for r in rated] == [0, 1, 2, 3, 4]


def chat(roles, *contents):
    return [{"role": role, "content": content} for role, content in zip(roles.split(), contents, strict=True)]


@pytest.mark.parametrize("read, record, expected", [
    (D.read_instructions, {"prompt": "i"}, {"instruction": "i"}),
    (D.read_instructions, {"messages": chat("system user", "s", "i")}, {"instruction": "s\n\ni"}),
    (D.read_outputs, {"prompt": "i", "response": "o"}, BASE),
    (D.read_outputs, {"prompt": "i", "completion": "o"}, BASE),
    (D.read_demonstrations, {"messages": chat("user assistant", "i", "o")}, BASE),
    (D.read_preferences, {"prompt": "i", "chosen": "a", "rejected": "b"}, PAIR),
    (D.read_preferences, {"chosen": chat("user assistant", "i", "a"), "rejected": chat("assistant", "b")}, PAIR),
    (D.read_preferences, {"prompt": chat("user", "i"), "chosen": chat("assistant", "a"), "rejected": "b"}, PAIR),
    (D.read_preferences, {"instruction": "i", "output": "a", "rejected": "b"}, PAIR)])
def test_other_layouts(read, record, expected, tmp_path, capsys):
    """Files in the shapes that people have are refused; or it is not said what was taken for what, or for each record;
    or the system message, on which the answer depends, is lost."""
    for r in read(put(tmp_path / "a.json", [record, record])):
        assert r.items() >= record.items() and r.items() >= {**expected, "input": ""}.items()
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in printed) == sorted({*expected} - {*record, "input", "preference"})
    assert all(line.split(": ")[1].split()[0] in record for line in printed)


def test_a_text_file_of_prompts(tmp_path):
    """One has to write JSON to ask something; or the lines end in \\r."""
    got = D.read_instructions(put(tmp_path / "a.txt", "a\r\n\n[b] \u2028 c\n"))
    assert got == [{"instruction": text, "input": ""} for text in ("a", "[b] \u2028 c")]
    refused(lambda: D.read_outputs(tmp_path / "a.txt"), "no key 'output'; it has ['instruction']")


@pytest.mark.parametrize("record, part", [
    ({"messages": chat("user assistant user", "i", "o", "i")}, "'assistant', 'user']"), ({"messages": ["i"]}, "Type"),
    ({"messages": chat("human gpt", "i", "o")}, "only one turn"), ({"messages": [{"role": []}]}, "KeyError"),
    ({"messages": chat("user assistant", "i", None)}, "'output'"), ({"prompt": 3}, "'instruction' is int"),
    ({"messages": chat("user assistant", [], "o")}, "Type"), ({"a": 1}, "no key 'instruction'; it has ['a']"),
    ({"prompt": "i", "text": "o"}, "no key 'output'; it has ['instruction', 'prompt', 'text']")])
def test_unusable_layouts_are_named(record, part, tmp_path):
    """Turns of a chat are dropped without a word, or a message names keys that the file never had."""
    path = put(tmp_path / "a.json", [BASE, record])
    refused(lambda: D.read_outputs(path), path, "record 1", part)


def test_alpacaevals_annotations(tmp_path):
    """A failed annotation counts as a tie, or makes 804 others unreadable; 0 is a tie in AlpacaFarm's older files, but
    not where labels are 0 and 1."""
    pairs = [{**PAIR, "generator_2": "m", "preference": p} for p in (1, 2, 1.25, 1.5, 0, None, math.nan, -1)]
    path = put(tmp_path / "a.json", pairs)
    got = D.read_preferences(path, ties=True, failed=True)
    assert [r["preference"] for r in got] == [1, 2, 1.25, 1.5, 1.5, None, None, None] and got[0] == pairs[0]
    refused(lambda: D.read_preferences(path, ties=True), path, "record 5", "'preference' is None")
    for labels in ((0, 1), (True, 2), ("1", 2)):
        put(path, [{**PAIR, "preference": label} for label in labels])
        refused(lambda: D.read_preferences(path, ties=True, failed=True), path, "record 0", "from 1 to 2")


def test_positives_are_sampled_in_proportion_to_negatives():
    """The ratio is taken of the positives, negatives get lost, or every run draws others."""
    records = [{**GOOD, "id": i} for i in range(100)] + [{**BAD, "id": i} for i in range(100, 142)]
    got = D.downsample_positives(records, 0.25)
    assert len(got) == 10 + 42 and got[10:] == records[100:]
    assert got == D.downsample_positives(records, 0.25) != D.downsample_positives(records, 0.25, seed=1)
    assert D.downsample_positives(records, -1) == records == D.downsample_positives(records, 50)
    assert D.downsample_positives(records, 0) == records[100:]


@real
def test_published_files_are_read_whole(tmp_path, capsys):
    """A check is stricter than the published data, a filter no longer gives its numbers, or a conversion loses records,
    so that right answers are joined to the wrong questions."""
    for name, read, count in [("outputs_pairs", D.read_pairs, 6), ("multisamples_sft", D.read_pairs, 8),
                              ("outputs_baseline", D.read_demonstrations, 252), ("outputs_sft", D.read_outputs, 252)]:
        assert len(read(REAL / "alpaca_farm" / f"{name}.json")) == count
    path = REAL / "cut" / "train-alpaca-sample-iter1.json"
    assert len(D.downsample_positives(D.read_judged(path), 0.25)) == 71 + 287
    assert "287 negatives and 713 positives; of the negatives 47 '$ERROR$' and 17 'perfect'" in capsys.readouterr().out
    assert len(D.read_judged(path, filter_noise=True)) == 1000 - 47 - 17
    a, b = (D.read_judged(D.convert("shepherd", REAL / "shepherd" / f"human_data_{name}.jsonl", tmp_path))
            for name in ("for_model", "raw"))
    assert len(a) == len(b) == 1317 and all(r["judgment"].strip() for r in a + b)
    assert all((x["instruction"], x["output"]) == (y["instruction"], y["output"]) for x, y in zip(a, b))


def test_ties_and_equal_pairs_are_counted(tmp_path, capsys):
    """A tie, or two equal texts, counts as a preference, or vanishes silently."""
    pairs = [PAIR, {**PAIR, "preference": 2}, {**PAIR, "preference": 1.5}, {**PAIR, "output_2": "a"},
             {**PAIR, "preference": 2.0}]
    path = put(tmp_path / "a.json", pairs)
    assert [r["preference"] for r in D.read_preferences(path)] == [1, 2, 2]
    assert "3 pairs; left out 2" in capsys.readouterr().out
    assert D.read_preferences(path, ties=True) == pairs and capsys.readouterr().out == ""
    refused(lambda: D.read_preferences(put(path, pairs[2:4])), path, "no pair is left")


def test_a_judge_learns_from_judged_responses(tmp_path):
    """The judge's prompt in training must be the one that simulate.py asks it with."""
    path = put(tmp_path / "a.json", [{"instruction": "a", "input": "b", "output": "{y}", "judgment": "bad"},
                                     {"instruction": "c", "output": "d", "judgment": None}])
    one, two = D.read_judge_training(path)
    assert one["instruction"] == D.JUDGE_SYSTEM + "\n\nInstruction:\na\n\nb\n\nAnswer:\n{y}\n\nYour review:"
    assert (one["output"], two["output"]) == ("bad", "Perfect.") and one["judgment"] is None


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and batches


def test_encode_gives_a_bad_response_two_prompts(words):
    """The judged prompt is missing for a bad response, exists for a good one, or is not the one with the judgment."""
    bad, good, again = encode(words, [{**BAD, "id": "b"}, GOOD, {**GOOD, "id": "b"}], "short", 99)
    assert (bad.id, good.id, again.id) == ("b", "1", "b#2")
    assert bad.prompt == good.prompt == words.encode_prompt("i\n") and bad.response == words.encode_response("o")
    assert bad.judged_prompt == words.encode_prompt("i\nJudgment: It is wrong.\n") and good.judged_prompt is None
    assert encode(words, [BAD], "short", 99, hindsight=True)[0][1:4] == (bad.judged_prompt, bad.response, None)


def test_overlong_records_are_left_out_and_counted(words, capsys):
    """Long records are cut (losing EOS), dropped silently, or measured without the judgment that is read with them."""
    records = [{**GOOD, "id": "short"}, {**GOOD, "output": "o " * 50, "id": "long"}, {**BAD, "id": "judged"}]
    short, long, judged = (e.size() for e in encode(words, records, "short", 999))
    assert capsys.readouterr().out == "" and short < judged < long
    assert [e.id for e in encode(words, records, "short", judged)] == ["short", "judged"]
    out = capsys.readouterr().out
    assert f"left out 1 of 3 records longer than {judged} tokens" in out and f"long of {long}" in out
    assert [e.id for e in encode(words, records, "short", judged - 1)] == ["short"]
    refused(lambda: encode(words, records, "short", short - 1), short - 1, "--max-length")
    refused(lambda: encode(words, [], "short", 99), "no records left")


def test_overlong_texts_are_not_tokenized(tokenizer, monkeypatch):
    """A text of a gigabyte is tokenized for minutes before it is left out; or one that fits is taken for longer."""
    for text in [*TEXTS, " " * 300, "a" * 300, "漢" * 300, "\x00" * 300, "the " * 80]:
        tokens = len(tokenizer.sp.encode(text))
        assert not tokenizer.is_longer(text, tokens)
        assert tokenizer.is_longer(text + "a" * tokenizer.longest * (tokens + 1), tokens)
    long, asked = "a" * 10**6, []
    monkeypatch.setattr(Tokenizer, "encode_response", lambda self, text: asked.append(text) or [5])
    encode(tokenizer, [GOOD, *[{**BAD, key: long} for key in ("input", "output", "judgment")]], "short", 99)
    assert asked == ["o"]


def test_collate_supervises_the_response_and_eos():
    """An off-by-one of the targets, EOS or the first token unsupervised, prompt or padding supervised; or a row
    without a response (of a rank that has no example of its own) gets a target or changes other rows."""
    tokens, targets = collate([([1, 5, 6], [7, 8, 2]), ([1, 5], [9, 2]), ([1], [2]), ([1, 5, 6, 7], [])])
    _ = IGNORE
    assert targets.tolist() == [[_, _, 7, 8, 2], [_, 9, 2, _, _], [2, _, _, _, _], [_] * 5]
    assert tokens.tolist() == [[1, 5, 6, 7, 8], [1, 5, 9, 0, 0], [1, 0, 0, 0, 0], [1, 5, 6, 0, 0]]
    assert tokens.dtype == targets.dtype == torch.long
    tokens, lengths = D.pad([[1, 5, 6], [1]])
    assert tokens.tolist() == [[1, 5, 6], [1, 0, 0]] and lengths.tolist() == [3, 1]


@pytest.mark.parametrize("count, size", [(1, 8), (64, 32), (100, 12), (1003, 16), (5, 1)])
def test_an_epoch_has_every_example_once(count, size):
    """Examples are dropped or repeated at a window's or an epoch's end; a resumed run sees other batches, because the
    order depends on earlier calls or on a shared generator; or lengths are not sorted (9 % padding becomes 40 %)."""
    lengths = np.random.default_rng(0).integers(5, 90, count)
    batches = Batches(lengths, size, 0)
    for epoch in (1, 0):
        np.random.seed(0), random.seed(0), torch.manual_seed(0)
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = [batches(step) for step in steps]
        assert [len(b) for b in seen] == [size] * (count // size) + [count % size] * (count % size > 0)
        assert sorted(sum(seen, [])) == list(range(count))
        assert seen == [Batches(lengths, size, 0)(step) for step in reversed(steps)][::-1]
        assert count < 64 or not set(map(frozenset, seen)) & {frozenset(Batches(lengths, size, 8)(s)) for s in steps}
        padded = sum(len(part) * max(lengths[part]) for b in seen for part in chunks(b, 4))
        assert size < 16 or lengths.sum() > 0.85 * padded
    assert count < 64 or set(batches(0)) != set(batches(batches.per_epoch))


def test_chunks_share_a_batch_evenly():
    """Micro-batches lose the remainder, change the order, exceed what fits in memory, or leave one row over."""
    for n in range(40):
        for size in range(1, 10):
            parts = chunks(list(range(n)), size)
            sizes = [len(part) for part in parts]
            assert sum(parts, []) == list(range(n)) and len(parts) == -(-n // size)
            assert n == 0 or max(sizes) <= min(size, min(sizes) + 1)


# ----------------------------------------------------------------------------------------------------------------------
# The built-in world, and the judge that knows its truth


def test_splits_are_disjoint():
    """A test instruction is trained on, because splits differ by seed or by stream only."""
    texts = {s: {r["instruction"] for stream in (0, 1, "sft", "replay") for r in World(0).instructions(s, 400, stream)}
             for s in ("train", "validation", "test")}
    assert len(set.union(*texts.values())) == sum(map(len, texts.values())) and len(texts["train"]) > 1000
    first, second = ({r["instruction"] for r in World(0).instructions("train", 200, s)} for s in (0, 1))
    assert len(first) == 200 and len(first & second) < 20
    assert .77 < np.mean([D.split_of(str(i)) == "train" for i in range(2000)]) < .83


def test_the_world_is_the_published_one():
    """Something depends on hash(), on set order or on a global generator, so that ranks and resumed runs see other
    worlds; or a random stream moves, and no number of README repeats."""
    random.seed(3), np.random.seed(3)
    world = World(5)
    records = world.instructions("train", 60) + world.instructions("test", 60)
    said = [(r, world.demonstrate_once(r)) for r in records] + world.demonstrations(60, D.judge_corrects)
    said = json.dumps([said, list(D.world_tokenizer().serialized)])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "38197595626f3c42"


def test_an_instruction_has_one_truth(words):
    """Two wordings of a question, or two streams, get different right answers; other worlds get the same; or a value
    of two tokens turns a fact into spelling, which a model of this size learns badly."""
    world, truths = World(1), {}
    for r in world.instructions("train", 600) + world.instructions("train", 600, "b") + world.instructions("test", 300):
        truth = r["answer"].format(*(world.facts[k].truth for k in r["facts"]))
        assert r["reference"] == truth == join(units(truth))
        assert truths.setdefault(tuple(r["facts"]), truth) == truth
    assert 300 < len(truths) < 1500
    for (kind, *numbers), fact in world.facts.items():
        if kind in ("add", "sub"):
            assert int(fact.truth) == (sum(numbers) if kind == "add" else numbers[0] - numbers[1])
        values = {fact.truth, fact.misconception, *fact.others}
        assert fact.others and len(values) == 2 + len(set(fact.others))
        assert all(len(words.encode_response(f"is {value}.")) == 4 for value in values)
    assert any(World(2).facts[k].truth != f.truth for k, f in world.facts.items() if k[0] == "home")


@pytest.mark.parametrize("style", JUDGES)
def test_judged_demonstrations_leak_no_truth(style):
    """The SFT data tells the right answer of a disputed fact in a judgment, and CUT then has nothing left to teach."""
    world, right = World(0), 0
    facts_of = {r["instruction"]: r["facts"] for r in world.instructions("train", 1000, "sft")}
    records = world.demonstrations(1000, JUDGES[style])
    for demo, judged in zip(records[::2], records[1::2], strict=True):
        assert demo["judgment"] is None and demo["instruction"] == judged["instruction"]
        right += judged["judgment"] == "All of it is right."
        assert (judged["judgment"] == "All of it is right.") == (judged["output"] == demo["output"])
        told = set(units(judged["judgment"].replace("It leaves out", "")))              # "leaves" is a food, too
        shown = set(units(demo["output"] + " " + judged["output"]))
        truths = {world.facts[k].truth for k in facts_of.pop(demo["instruction"])}
        assert not truths & (told - shown), (demo, judged)
    assert not facts_of and .07 < right / 1000 < .13


# response, reference, its differences, number of errors, wrong words, what `corrects` and what `points` says
CASES = {
    "one for two": (
        "The cat eats old moss.", "The cat eats fish.", [(3, 5, ["fish"])], 2, {3, 4},
        "It says The cat eats old moss where it should say fish.",
        "It says The cat eats old moss and old moss is wrong."),
    "missing after a clause": (
        "The cat eats fish and in the den.", "The cat eats fish and lives in the den.", [(5, 5, ["lives"])], 1, {5},
        "It leaves out lives before in the den.", "Something is missing before in the den."),
    "comma for a word": (
        "The cat eats fish, is red.", "The cat eats fish and is red.", [(4, 5, ["and"])], 1, {4},
        "It says The cat eats fish, where it should say and.", "It says The cat eats fish, and , is wrong."),
    "of each kind": (
        "The cat big lives in den, eats moss and is red.", "The cat lives in the den, eats fish and is red.",
        [(2, 3, []), (5, 5, ["the"]), (8, 9, ["fish"])], 3, {2, 5, 8},
        "It says The cat big and big does not belong. It leaves out the after cat big lives in. "
        "It says eats moss where it should say fish.",
        "It says The cat big and big does not belong. Something is missing after cat big lives in. "
        "It says eats moss and moss is wrong."),
}


@pytest.fixture(scope="module")
def distortions():
    """(response, reference) with zero to five words replaced, lost or doubled."""
    rng, world, found = random.Random(0), World(4), []
    for r in world.instructions("train", 400):
        a = units(r["reference"])
        pool = sorted({v for k in r["facts"] for v in world.facts[k].others})
        for _ in range(rng.randrange(6)):
            i = rng.randrange(len(a))
            a[i:i + 1] = rng.choice([[], [a[i]] * 2, [rng.choice(pool)], [rng.choice(pool)]])
            a = a or ["The"]
        found.append((join(a), r["reference"]))
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_judge_on_cases_by_hand(name):
    """A fault is counted or placed wrongly, or the judgment quotes other words than those before it."""
    response, reference, found, errors, wrong, corrects, points = CASES[name]
    assert differences(response, reference) == found
    assert D.count_errors(response, reference) == errors
    assert D.wrong_words(response, reference) == wrong
    assert judge_reference(response, reference, "corrects") == JUDGES["corrects"](response, reference) == corrects
    assert judge_reference(response, reference, "points") == JUDGES["points"](response, reference) == points
    assert corrected(response, reference) == reference


def test_judgments_of_distorted_answers(distortions):
    """A right answer becomes a negative example, or a wrong one a positive; or the judge that only points states a
    right word, so that its judgments could be copied from."""
    ours, told = set(units("It says and is wrong . Something is missing after before does not belong")), 0
    assert {response == reference for response, reference in distortions} == {True, False}
    for response, reference in distortions:
        said = {style: judge(response, reference) for style, judge in JUDGES.items()}
        right = response == reference
        assert (said["corrects"] is None) == (said["points"] is None) == right
        assert (D.count_errors(response, reference) == 0) == right == (not D.wrong_words(response, reference))
        secret = set(units(reference)) - set(units(response)) - ours
        assert not secret & set(units(said["points"] or ""))
        told += len(secret & set(units(said["corrects"] or "")))
    assert told > 100                                                       # `corrects` does tell: the test can see it
    assert judge_reference("The  answer is 12 .", "The answer is 12.") is None          # spaces are no words


def test_at_most_three_faults_are_listed_and_mended(distortions):
    """A bad answer gets a judgment longer than the context, other faults than the first are listed, or the baseline
    that trains on the stated answer gets one that the judgment does not state."""
    response, reference = "a x c y e z g w i", "a b c d e f g h i"
    for style in JUDGES:
        said = judge_reference(response, reference, style)
        assert said.count("It says") == 3 and "w" not in units(said)
    assert corrected(response, reference) == "a b c d e f g w i"
    faults = [len(differences(*pair)) for pair in distortions]
    assert set(faults) >= {0, 1, 2, 3, 4}
    assert [len(differences(corrected(*pair), pair[1])) for pair in distortions] == [max(0, n - 3) for n in faults]


# ----------------------------------------------------------------------------------------------------------------------
# Published data


class FileServer(http.server.BaseHTTPRequestHandler):
    """Serves `content`. `plan` says what is wrong with the next answers: "cut" sends a part of it, "503" an error."""
    def do_GET(self):
        act = self.plan.pop(0) if self.plan else ""
        self.asked.append(self.path)
        self.send_response(503 if act == "503" else 200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write({"503": b"", "cut": self.content[:9999]}.get(act, self.content))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    FileServer.content, FileServer.plan, FileServer.asked = b"[{}]" + b" " * 500_000, [], []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FileServer)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{httpd.server_port}/"


@pytest.mark.parametrize("known", [False, True])
def test_a_download_is_whole_or_not_there(known, server, tmp_path):
    """Half a file, parts of two versions or a page in HTML is kept as the data; or a busy server ends it."""
    FileServer.plan, path, content = ["503"], tmp_path / "new" / "file.json", FileServer.content
    sha256 = hashlib.sha256(content).hexdigest() if known else ""
    for _ in range(2):                                                      # the second time it is already here
        D.download(server, path, sha256)
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path] and len(FileServer.asked) == 2
    path.unlink()
    FileServer.plan = ["cut"]
    refused(lambda: D.download(server, path, sha256), server, "run this again")
    FileServer.content = b"<html>It moved.</html>"
    refused(lambda: D.download(server, path, sha256), "SHA-256 is" if known else "expected a JSON list")
    assert not list(path.parent.iterdir())


def test_failed_downloads(server, tmp_path, monkeypatch):
    """A file with other bytes than published lies there for the next run to find; without a network there is a
    traceback of five layers of libraries, or endless tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    path, nowhere = put(tmp_path / "x.json", "old"), "http://127.0.0.1:9/x.json"
    refused(lambda: D.download(server, path, "00"), server, "SHA-256 is", "expected 00")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    path.unlink()
    remedy = f"put it at {path}, and run this again"
    refused(lambda: D.download(nowhere, path), nowhere, remedy)
    FileServer.plan, FileServer.asked = ["503"] * 20, []
    refused(lambda: D.download(server, path), server, "503", remedy)
    assert 2 < len(FileServer.asked) < 10


SHEPHERD = {"id": 0, "dataset": "D", "question": "q", "answer": "a\n\n", "feedback": "f"}
SHEPHERD_RAW = {"id": 0, "metadata": {"context": "q", "output_candidate": "a\n\n", "output_correct": "c"},
                "latestLabel": {"jsonResponse": {"CLASSIFICATION_JOB_0": {"categories": [
                    {"children": {"J1": {"text": " one. "}}}, {"children": {"J2": {"text": "two."}, "J3": {}}}]}}}}


def test_shepherds_layouts(server, tmp_path, monkeypatch):
    """A published file is misread: wrong field, half of the judgment, a crash where an annotator left a gap, or it is
    downloaded and then not converted."""
    FileServer.content = json.dumps(SHEPHERD).encode()
    monkeypatch.setitem(D.DOWNLOADS, "shepherd", (server, {"down.jsonl": ""}))
    D.main(["shepherd", "--to", str(tmp_path)])
    D.main(["shepherd", "--file", str(put(tmp_path / "raw.jsonl", [SHEPHERD_RAW])), "--to", str(tmp_path)])
    assert len(FileServer.asked) == 1
    model, = D.read_judged(tmp_path / "shepherd" / "down.judged.jsonl")
    raw, = D.read_judged(tmp_path / "shepherd" / "raw.judged.jsonl")
    assert model == {"id": 0, "instruction": "q", "input": "", "output": "a\n\n", "judgment": "f", "reference": None}
    assert raw == {**model, "judgment": "one. two.", "reference": "c"}
    for bad, *parts in [({**SHEPHERD_RAW, "latestLabel": None}, "layout of shepherd"), ({"id": 1}, "'question'"),
                        ({**SHEPHERD, "question": None}, "'instruction'", "NoneType")]:
        path = put(tmp_path / "bad.jsonl", [SHEPHERD, bad])
        refused(lambda: D.convert("shepherd", path, tmp_path), path, "record 1", *parts)
    assert not (tmp_path / "bad.judged.jsonl").exists()
    for names in (["cut"], ["shepherd", "critiques"], ["world"]):
        refused(lambda: D.main([*names, "--file", "x.jsonl"]), "--file", "shepherd")


def test_critiques_become_judged_responses(tmp_path, capsys):
    """The best-ranked answer with all its critiques; no critique is good; empty or unrefined ones are counted."""
    def question(text, *answers, rankings=(1,)):
        return {"question": text, "answers": answers, "rankings": rankings}

    def answer(text, *critiques, **feedback):
        critiques = [{"text": t, "refinement": r} for t, r in critiques]
        return {"answer": text, "feedback": {"rating": 3, "critiques": critiques, **feedback}}

    record = {"id": "a", "data": {"passage": {"title": "T", "text": "P"}, "questions": [
        question("Q1", answer("worse"), answer("better", ("c1", "r1"), ("c2", "r2")), rankings=(1, 2)),
        question("Q2", answer("good")), question("Q3", answer("skipped", skip=True)),
        question("Q4", answer("unrefined", ("c", ""))), question("", answer("no question"))]}}
    path = put(tmp_path / "train.jsonl.gz", gzip.compress(json.dumps(record).encode()))
    records = D.read_judged(D.convert("critiques", path, tmp_path / "critiques"))
    assert [(r["instruction"], r["output"], r["judgment"], r["reference"]) for r in records] == [
        ("P\nQ1", "better", "c1 c2", "r2"), ("P\nQ2", "good", None, None)]
    assert records[0]["id"] == "a-1-Q1" and "left out 3" in capsys.readouterr().out
