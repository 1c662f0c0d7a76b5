"""From text to token ids: tokenizer, prompt formats, readers, batches, and the built-in world.

One judged record on its way (format `short`; CUT's own format only has longer headers):

  {"instruction": "Say what 7 plus 5 is.", "input": "", "output": "The answer is 13.",
   "judgment": "It says The answer is 13 where it should say 12."}

  prompt         <s> Say what 7 plus 5 is. \\n                                                        (x)
  judged prompt  <s> Say what 7 plus 5 is. \\n Judgment: It says The answer is 13 where it ... \\n     (x, j-)
  response       The answer is 13 . </s>                                                              (y, EOS included)

  tokens   <s>  Say  what ...  \\n   The    answer is  13  .          inputs of the network
  targets   .    .    .   ...  The  answer  is     13  .   </s>       what follows each; prompt positions are IGNORE

File formats are JSON lists or JSON Lines; unknown keys are kept. judgment null means that nothing is wrong. Published
data can be downloaded:

  python data.py alpacafarm cut shepherd critiques --to data
"""
import argparse
import codecs
import contextlib
import difflib
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import sentencepiece
import torch
import torch.distributed as dist
from tqdm import tqdm


IGNORE = -100      # the target of positions that no loss looks at (prompt and padding)


# ----------------------------------------------------------------------------------------------------------------------
# Errors, files and flags, shared by all scripts


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, where and what to do about it. The scripts
    print it as one line; any other exception is a bug of ours and keeps its traceback."""


def print0(*args):
    """print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, flush=True)


def run_main(main):
    """What a script does when it is launched: main(), and one line for a mistake in its input. Under torchrun a process
    leaves at once when all ranks are done: in the interpreter's own shutdown, gloo's threads can end in the wrong
    order and abort a run that has succeeded."""
    try:
        code = main()
    except InputError as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def in_range(kind, low, high=math.inf):
    """A type for argparse: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low}{f' to {high}' if high < math.inf else ' up'}"
    return parse


positive_int, nonnegative_int = in_range(int, 1), in_range(int, 0)
nonnegative_float, fraction = in_range(float, 0), in_range(float, 0, 1)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path` that takes its name at the end, if all went well: a reader, or a run that
    resumes after a crash, finds the old file or the new one and never half of one."""
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """A sentencepiece model. BOS and EOS are added here and nowhere else. There is no pad token: batches carry masks,
    so what stands in the padding never matters."""

    def __init__(self, serialized, source="tokenizer"):
        self.serialized, self.files = serialized, {}
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(serialized)
        except RuntimeError:
            raise InputError(f"{source}: not a sentencepiece model (LLaMA 3's has tiktoken's format): "
                             "use LLaMA, LLaMA 2 or another checkpoint with a sentencepiece tokenizer") from None
        self.bos, self.eos, self.vocab_size = self.sp.bos_id(), self.sp.eos_id(), self.sp.vocab_size()
        if min(self.bos, self.eos) < 0:
            raise InputError(f"{source}: the tokenizer has no BOS or no EOS piece; both are needed")
        # sentencepiece puts a space in front of every text. A response continues its prompt, so it must not get one:
        # we encode newline + response and drop what belongs to the newline. The ids equal those of the joined text.
        self.newline = self.sp.encode("\n")

    @classmethod
    def from_pretrained(cls, directory):
        """The tokenizer of a model directory, checked against its config.json: before any weights are read."""
        path = Path(directory) / "tokenizer.model"
        if not path.is_file():
            other = " (its tokenizer.json is of another kind)" if (path.parent / "tokenizer.json").is_file() else ""
            raise InputError(f"{path}: no sentencepiece tokenizer here{other}: LLaMA and LLaMA 2 checkpoints have one, "
                             "LLaMA 3's do not")
        tokenizer = cls(path.read_bytes(), path)
        tokenizer.check(json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))["vocab_size"], directory)
        tokenizer.files = {p.name: p.read_bytes() for p in map(Path(directory).joinpath, (
            "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
            "chat_template.jinja", "generation_config.json")) if p.is_file()}
        return tokenizer

    @classmethod
    def train(cls, texts, vocab_size):
        """Trains a small BPE tokenizer of LLaMA's kind (byte fallback, spaces kept) in memory."""
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=out, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=1.0, num_threads=1, minloglevel=2)
        return cls(out.getvalue())

    def check(self, vocab_size, source):
        """The model must have a row of embeddings for every id that this tokenizer can give; else InputError."""
        if self.vocab_size > vocab_size:
            raise InputError(f"{source}: the tokenizer has {self.vocab_size} pieces, the model's vocabulary only "
                             f"{vocab_size}: they do not belong together")

    def save(self, directory):
        """Writes tokenizer.model and, for transformers and vLLM, the same as tokenizer.json with its config; one that
        came with such files (they may hold a chat template) keeps its own."""
        d, piece, special = Path(directory), self.sp.id_to_piece, (self.bos, self.eos, self.sp.unk_id())
        (d / "tokenizer.model").write_bytes(self.serialized)
        for name, content in self.files.items():
            (d / name).write_bytes(content)
        if "tokenizer_config.json" in self.files:
            return
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  **dict(zip(("bos_token", "eos_token", "unk_token"), map(piece, special)))}
        (d / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (d / "tokenizer.json").write_text(json.dumps(self._as_json(), ensure_ascii=False) + "\n", encoding="utf-8")

    def _as_json(self):
        """This BPE model in the layout of the `tokenizers` library: pieces, merges in order of their rank, and rules
        that put one space in front, write spaces as sentencepiece does, and fall back to bytes."""
        ids = range(self.vocab_size)
        vocab = {self.sp.id_to_piece(i): i for i in ids}
        merges = []
        for piece, i in vocab.items():
            if not (self.sp.is_control(i) or self.sp.is_byte(i) or self.sp.is_unknown(i)):
                halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
                merges += [(-self.sp.get_score(i), vocab[a], vocab[b], a, b) for a, b in halves
                           if a in vocab and b in vocab]
        bos, space = self.sp.id_to_piece(self.bos), "\u2581"
        with_bos = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        return {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": self.sp.id_to_piece(i), "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False, "special": True}
                             for i in ids if self.sp.is_control(i) or self.sp.is_unknown(i)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space}]},
            "pre_tokenizer": None,
            "post_processor": {"type": "TemplateProcessing", "single": with_bos,
                               "pair": [*with_bos, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                      "byte_fallback": True, "vocab": vocab, "merges": [[a, b] for *_, a, b in sorted(merges)]},
        }

    def encode_prompt(self, text, control=None):
        """Ids of a prompt, BOS first; then, if given, control token 0 to 7, which stands for how good the answer is to
        be. Control tokens are the pieces of the bytes F8 to FF, which occur in no UTF-8 text: every LLaMA tokenizer has
        them, no text encodes to them, and the vocabulary stays as it is."""
        piece = [] if control is None else [self.sp.piece_to_id(f"<0x{0xF8 + control:02X}>")]
        if piece == [self.sp.unk_id()]:
            raise InputError("this tokenizer has no byte pieces, which control tokens are: use a LLaMA tokenizer")
        return [self.bos] + piece + self.sp.encode(text)

    def encode_response(self, text):
        """Ids of a response, EOS included: a model that never sees EOS supervised never stops."""
        return self.sp.encode("\n" + text)[len(self.newline):] + [self.eos]

    def decode_response(self, ids):
        """Text of generated ids, without EOS. The newline in front keeps sentencepiece from eating a leading space."""
        return self.sp.decode(self.newline + [i for i in ids if i != self.eos])[1:]

    def pieces(self, ids):
        """The text of each id on its own, for marking tokens; joined they are the text. A character of several byte
        pieces stands at the last of them; EOS is </s>."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([int(piece[3:5], 16)])) if self.sp.is_byte(i) else piece.replace("\u2581", " ")
                for i, piece in zip(ids, map(self.sp.id_to_piece, ids))]


# ----------------------------------------------------------------------------------------------------------------------
# Prompt formats. They are constants of published checkpoints: a model answers best in the format it was trained with.

_ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
           "\n\n### Instruction:\n{instruction}\n\n### Response:")
_ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                 "Write a response that appropriately completes the request."
                 "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")
_JUDGED = ("Below is an instruction that describes a task. Write a response to the instruction and the response should "
           "match the corresponding judgment.\n\n### Instruction:\n{instruction}\n\n### Judgment:\n{judgment}"
           "\n\n### Response:")

FORMATS = {
    # name: (plain, with input (None: the input follows the instruction on a new line), with judgment)
    "cut": (_ALPACA + "\n", None, _JUDGED + "\n"),
    "alpaca": (_ALPACA, _ALPACA_INPUT, _JUDGED),                            # AlpacaFarm: no newline at the end
    "short": ("{instruction}\n", None, "{instruction}\nJudgment: {judgment}\n"),        # the built-in world
}


def format_prompt(record, form, judgment=None):
    """The prompt of a record in a named format; with a judgment, the one that tells it in advance (x, j-)."""
    plain, with_input, judged = FORMATS[form]
    instruction, extra = record["instruction"], record.get("input") or ""
    template = plain if judgment is None else judged
    if extra and judgment is None and with_input:
        template = with_input
    elif extra:
        instruction = f"{instruction}\n{extra}"
    return fill_template(template, instruction=instruction, input=extra, judgment=judgment)


def prompt_ids(tokenizer, record, form, judgment=None):
    """The ids of a record's prompt, after the control token `reward_token` if the record has one (0 is the best)."""
    control = record.get("reward_token")
    if control is not None and control not in range(8):
        raise InputError(f"record {record.get('id', '')}: 'reward_token' is {control!r}, expected 0 to 7")
    return tokenizer.encode_prompt(format_prompt(record, form, judgment), control)


def fill_template(template, **fields):
    """The template with its {fields} replaced. It is cut at its fields once, so whatever a text contains, braces and
    names of other fields included, stays text; str.replace one after the other would let a text capture the next."""
    parts = re.split(r"\{(\w+)\}", template)                                # text, field, text, field, ..., text
    return "".join(fields[part] if i % 2 else part for i, part in enumerate(parts))


# The prompt of a judge, an API model or one of ours (CUT section 5, in our words).
JUDGE_SYSTEM = ("You review answers to instructions. If the answer is flawless, reply with the one word Perfect. "
                "Otherwise say precisely what is wrong with it: name each fault, quote the place, and add no praise.")
JUDGE_USER = "Instruction:\n{instruction}\n\nAnswer:\n{output}\n\nYour review:"


# ----------------------------------------------------------------------------------------------------------------------
# Readers


def read_json(path, empty=False):
    """A JSON list of objects or JSON Lines -> list of dicts. No record at all is an error, unless `empty`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError):
        raise InputError(f"{path}: not a whole gzip file: download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}): save it as UTF-8") from None
    try:
        if text.lstrip()[:1] == "[":
            records = json.loads(text)
        else:
            records = []
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    try:
                        records.append(json.loads(line))
                    except ValueError as error:
                        raise InputError(f"{path}: line {number} is not JSON ({error}); the file must be a JSON list "
                                         "or have one JSON object a line") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    for i, r in enumerate(records):
        if not isinstance(r, dict):
            raise InputError(f"{path}: record {i} is {type(r).__name__}, not an object with keys")
    if not records and not empty:
        raise InputError(f"{path}: holds no records")
    return records


def write_json_lines(path, records):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


def _check(path, i, record, **kinds):
    """Checks the types of a record's keys; kinds: key -> types, or (types, default) for a key that may be absent."""
    for key, kind in kinds.items():
        if key not in record:
            raise InputError(f"{path}: record {i} has no key {key!r}; it has {sorted(record)}")
        if not isinstance(record[key], kind):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kind)
            raise InputError(f"{path}: record {i}: {key!r} is {type(record[key]).__name__}, expected {names}")
    for key in ("instruction", "output"):
        if key in kinds and isinstance(record[key], str) and not record[key].strip():
            raise InputError(f"{path}: record {i}: {key!r} is empty; leave such records out")
    for key in kinds:
        if isinstance(record[key], str) and re.search("[\ud800-\udfff]", record[key]):
            raise InputError(f"{path}: record {i}: {key!r} has half a surrogate pair: mend or drop it")


_TEXT, _MAYBE = (str,), (str, type(None))


def read_instructions(path, reference=False):
    """instruction, input (optional); with `reference`, also the right answer under that key."""
    records = [{"input": "", **r} for r in read_json(path)]
    for i, r in enumerate(records):
        _check(path, i, r, instruction=_TEXT, input=_MAYBE, **({"reference": _TEXT} if reference else {}))
    return records


def read_outputs(path, reference=False):
    """instruction, input (optional), output (a text); with `reference`, also the right answer under that key."""
    records = [{"input": "", **r} for r in read_json(path)]
    for i, r in enumerate(records):
        _check(path, i, r, instruction=_TEXT, input=_MAYBE, output=_TEXT, **({"reference": _TEXT} if reference else {}))
    return records


def read_pairs(path):
    """What `simulate.py prefer` compares: instruction, input (optional), and either output_1 and output_2 or a list of
    texts `output`."""
    records = [{"input": "", **r} for r in read_json(path)]
    for i, r in enumerate(records):
        several = "output" in r and "output_1" not in r
        _check(path, i, r, instruction=_TEXT, input=_MAYBE)
        _check(path, i, r, **({"output": (list,)} if several else {"output_1": _TEXT, "output_2": _TEXT}))
        if several and not all(isinstance(text, str) for text in r["output"]):
            raise InputError(f"{path}: record {i}: 'output' is a list of {len(r['output'])}, expected texts only")
        if several != ("output" in records[0] and "output_1" not in records[0]):
            raise InputError(f"{path}: records 0 and {i} differ: one is a pair, the other a list of outputs")
        if not several:
            r.pop("output", None)
    return records


def read_preferences(path, ties=False):
    """AlpacaFarm's pairs: instruction, input, output_1, output_2, preference: 1 or 2, 1.5 a tie, or between (a judge's
    probability that output_2 is better, plus 1). Ties and pairs of equal texts say nothing about which is better: they
    are left out and counted, unless `ties`. What `simulate.py refine` wrote is pairs too: `output` against `rejected`
    (ILF-DPO)."""
    records, left_out = [], 0
    for i, r in enumerate({"input": "", **r} for r in read_json(path)):
        if "rejected" in r and "output_1" not in r:
            _check(path, i, r, output=_TEXT, rejected=_TEXT)
            r.update(output_1=r["output"], output_2=r["rejected"], preference=1)
        _check(path, i, r, instruction=_TEXT, input=_MAYBE, output_1=_TEXT, output_2=_TEXT, preference=(int, float))
        if not 1 <= r["preference"] <= 2:
            raise InputError(f"{path}: record {i}: 'preference' is {r['preference']}, expected 1, 2 or between; "
                             "1.5 is a tie (older files write 0 for it: replace it)")
        if not ties and (r["preference"] == 1.5 or r["output_1"] == r["output_2"]):
            left_out += 1
        else:
            records.append(r)
    if left_out:
        print0(f"{path}: {len(records)} pairs; left out {left_out} ties and pairs of equal texts")
    if not records:
        raise InputError(f"{path}: no pair is left")
    return records


def read_demonstrations(path):
    """instruction, input (optional), output; a judgment, if there is one, becomes part of the prompt (Hindsight)."""
    records = [{"input": "", "judgment": None, **r} for r in read_json(path)]
    for i, r in enumerate(records):
        _check(path, i, r, instruction=_TEXT, output=_TEXT, input=_MAYBE, judgment=_MAYBE)
    return records


def read_judged(path, filter_noise=False):
    """Judged responses: CUT's files (instruction, input, output, judgment or null), either of Shepherd's two published
    JSONL files, the critiques of summaries (.jsonl.gz), or anything of the first form. A record with score >= 7, the
    top of the 7-point scale of those critiques, counts as good, as in the released code.

    Prints what it found. filter_noise leaves out two kinds of bad labels: `$ERROR$` (a failed call stored as a
    judgment) and bad responses whose judgment opens by calling them perfect."""
    records, top_rated = [], 0
    for i, r in _flatten_critiques(path, read_json(path)):
        if "feedback" in r and "answer" in r:                               # Shepherd, human_data_for_model.jsonl
            _check(path, i, r, question=_TEXT, answer=_TEXT, feedback=_TEXT)
            r = {**r, "instruction": r["question"], "output": r["answer"], "judgment": r["feedback"]}
        elif "latestLabel" in r:                                            # Shepherd, human_data_raw.jsonl
            r = _read_shepherd_raw(path, i, r)
        r = {"input": "", **r}
        _check(path, i, r, instruction=_TEXT, input=_MAYBE, output=_TEXT, judgment=_MAYBE)
        if r["judgment"] is not None and not r["judgment"].strip():
            raise InputError(f"{path}: record {i}: 'judgment' is an empty text; write null if nothing is wrong")
        score = r.get("score")
        if score is not None and not isinstance(score, (int, float)):
            raise InputError(f"{path}: record {i}: 'score' is {type(score).__name__}, expected a number or null")
        if score is not None and score >= 7 and r["judgment"] is not None:
            r["judgment"], top_rated = None, top_rated + 1
        r.setdefault("id", i)
        records.append(r)
    if top_rated:
        print0(f"{path}: {top_rated} judged records have score >= 7, the top of a 7-point scale, and count as good")
    negatives = [r for r in records if r["judgment"] is not None]
    errors = [r for r in negatives if r["judgment"].strip() == "$ERROR$"]
    perfect = [r for r in negatives if r["judgment"].lower().lstrip(" \"'").startswith("the response is perfect")]
    print0(f"{path}: {len(negatives)} negatives and {len(records) - len(negatives)} positives; of the negatives "
          f"{len(errors)} '$ERROR$' and {len(perfect)} 'perfect', "
          f"{'left out' if filter_noise else 'kept (--filter-noise leaves them out)'}")
    if filter_noise:
        noise = {id(r) for r in errors + perfect}
        records = [r for r in records if id(r) not in noise]
    return records


def _flatten_critiques(path, records):
    """Yields (index, record). A record of the summarization critiques (Saunders et al. 2022) holds a passage with
    several questions; each becomes one judged response, as CUT converted them: the best-ranked answer, the critiques of
    it as judgment, none as good, the last refinement as reference. Empty, skipped and unrefined ones are counted."""
    left_out = 0
    for i, r in enumerate(records):
        if not (isinstance(r.get("data"), dict) and "questions" in r["data"]):
            yield i, r
            continue
        try:
            passage = r["data"]["passage"]["text"]
            for q in r["data"]["questions"]:
                best = max(range(len(q["answers"])), key=lambda k: q["rankings"][k])
                answer, feedback = q["answers"][best]["answer"], q["answers"][best]["feedback"]
                critiques = feedback["critiques"]
                reference = critiques[-1]["refinement"] if critiques else None
                if feedback.get("skip") or not (q["question"] and answer.strip()) or critiques and not reference:
                    left_out += 1
                    continue
                yield i, {"id": f"{r.get('id', i)}-{len(passage)}-{q['question']}", "instruction":
                          f"{passage}\n{q['question']}", "output": answer, "reference": reference,
                          "judgment": " ".join(c["text"] for c in critiques) or None}
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"{path}: record {i} is not in the layout of the critiques: {error!r}") from None
    if left_out:
        print0(f"{path}: left out {left_out} answers that are empty, skipped by the labeler or without a refinement")


def _read_shepherd_raw(path, i, r):
    """Shepherd's annotation dump: the judgment is spread over the error types that the annotator chose."""
    try:
        meta, label = r["metadata"], r["latestLabel"]["jsonResponse"]
        texts = [child["text"].strip() for category in label["CLASSIFICATION_JOB_0"]["categories"]
                 for child in category["children"].values() if "text" in child]
        return {**r, "instruction": meta["context"], "output": meta["output_candidate"], "judgment": " ".join(texts),
                "reference": meta.get("output_correct")}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: record {i} is not in the layout of Shepherd's raw file: {error!r}") from None


def read_judge_training(path):
    """Judged responses as demonstrations for a model that is to judge: the prompt of simulate.py's judges -> judgment,
    or Perfect. (train_sft.py --recipe judge)"""
    return [{"id": r["id"], "instruction": f"{JUDGE_SYSTEM}\n\n" + fill_template(JUDGE_USER, instruction=r["instruction"] + (
             f"\n\n{r['input']}" if r.get("input") else ""), output=r["output"]), "input": "", "judgment": None,
             "output": r["judgment"] or "Perfect."} for r in read_judged(path, filter_noise=True)]


def chosen_and_rejected(record):
    """The two texts of a preference record, the preferred one first."""
    first, second = record["output_1"], record["output_2"]
    return (first, second) if record["preference"] < 1.5 else (second, first)


def read_feedme(path):
    """Binary FeedME (AlpacaFarm section 4.2): the preferred output of every pair, as a demonstration."""
    return [{**r, "output": chosen_and_rejected(r)[0], "judgment": None} for r in read_preferences(path)]


def read_conditioning(path):
    """Binary reward conditioning (AlpacaFarm section 4.3): both outputs of every pair as demonstrations, the preferred
    one after control token 0, the other after 1. Answers are later asked for with 0."""
    return [{**r, "id": f"{r.get('id', i)}-{k}", "output": text, "judgment": None, "reward_token": k}
            for i, r in enumerate(read_preferences(path)) for k, text in enumerate(chosen_and_rejected(r))]


def read_forward(path):
    """Forward Prediction (CUT's baseline): learn to give every response, good or bad, and to judge it."""
    return [{**r, "judgment": None} for r in read_judged(path, filter_noise=True)] + read_judge_training(path)


def downsample_positives(records, ratio, seed=42):
    """Keeps int(ratio * number of negatives) of the positives, drawn once; all of them if there are fewer. ratio < 0
    keeps all. (The ratio is to the negatives: 0.25 is one positive for four negatives, as published.)"""
    positives = [r for r in records if r["judgment"] is None]
    keep = int(ratio * (len(records) - len(positives)))
    if ratio < 0 or keep >= len(positives):
        return list(records)
    kept = {id(r) for r in random.Random(seed).sample(positives, keep)}
    return [r for r in records if r["judgment"] is not None or id(r) in kept]


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and batches


class Example(NamedTuple):
    """Token ids of one record. judged is the prompt (x, j-), or None where nothing is wrong with the response."""
    id: str
    prompt: list
    response: list
    judged: list | None = None

    def size(self):
        """Tokens that the network reads for it."""
        return len(self.response) + max(len(self.prompt), len(self.judged or []))


def encode(tokenizer, records, form, max_length, hindsight=False):
    """Records -> Examples; over-long ones are left out, counted and printed (cutting them would cost either the
    instruction or EOS). With hindsight the judgment, if any, becomes part of the one prompt: (x, j-) -> y."""
    if not records:
        raise InputError("there is no record to train on: none is left after the recipe or the filters")
    examples, too_long, names = [], [], set()
    for i, r in enumerate(records):
        judgment = r.get("judgment")
        prompt = prompt_ids(tokenizer, r, form, judgment if hindsight else None)
        judged = None
        if judgment is not None and not hindsight:
            judged = prompt_ids(tokenizer, r, form, judgment)
        name = str(r.get("id", i))
        name = name if name not in names else f"{name}#{i}"                 # ids of joined files may repeat
        names.add(name)
        e = Example(name, prompt, tokenizer.encode_response(r["output"]), judged)
        (examples if e.size() <= max_length else too_long).append(e)
    if too_long:
        print0(f"left out {len(too_long)} of {len(records)} records longer than {max_length} tokens, the longest with "
              f"{max(e.size() for e in too_long)} (ids {', '.join(e.id for e in too_long[:5])} ...): see --max-length")
    if not examples:
        raise InputError(f"no record fits in {max_length} tokens: raise --max-length")
    return examples


def collate(rows, device="cpu"):
    """rows of (prompt ids, response ids) -> tokens (B, T), targets (B, T), padded on the right.

    targets[b, t] is the token after tokens[b, t] where that token belongs to the response (EOS too), else IGNORE. The
    first response token is predicted at the prompt's last position."""
    T = max(len(p) + len(y) for p, y in rows) - 1
    tokens = torch.zeros(len(rows), T, dtype=torch.long)
    targets = torch.full((len(rows), T), IGNORE)
    for b, (p, y) in enumerate(rows):
        tokens[b, :len(p) + len(y) - 1] = torch.tensor((p + y)[:-1])
        targets[b, len(p) - 1:len(p) + len(y) - 1] = torch.tensor(y, dtype=torch.long)
    return tokens.to(device), targets.to(device)


def pad(sequences, device="cpu"):
    """Lists of ids -> tokens (B, T) padded on the right, lengths (B,)."""
    lengths = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for i, s in enumerate(sequences):
        tokens[i, :len(s)] = torch.tensor(s)
    return tokens.to(device), lengths.to(device)


WINDOW, PIECES = 16, 4       # batches whose examples are sorted together; pieces of like length that make up a batch


class Batches:
    """The batch of every step, as a pure function of (lengths, batch_size, seed, step): no state, so a resumed run
    sees what an undisturbed one would have seen, and the batch does not depend on how many ranks share it.

    Length-aware: an epoch is a permutation; within windows of it examples are sorted by length and cut into pieces of
    batch_size / 4, the pieces are shuffled, and 4 in a row make a batch. So each batch mixes lengths (and with them
    kinds of examples), yet most of its rows find neighbours to be padded with. The last batch of an epoch may be
    smaller; nothing is dropped."""

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.per_epoch = -(-len(self.lengths) // batch_size)
        self._epoch = None

    def __call__(self, step):
        """Indices of the examples of this step, longest first."""
        epoch, i = divmod(step, self.per_epoch)
        if self._epoch != epoch:                                            # a cache, not a state
            rng = np.random.default_rng([self.seed, epoch])
            order, piece = rng.permutation(len(self.lengths)), max(1, self.batch_size // PIECES)
            windows = []
            for start in range(0, len(order), WINDOW * self.batch_size):
                w = order[start:start + WINDOW * self.batch_size]
                w = w[np.argsort(self.lengths[w], kind="stable")]
                pieces = [w[j:j + piece] for j in range(0, len(w), piece)]
                windows += [pieces[j] for j in rng.permutation(len(pieces))]
            self._epoch, self._order = epoch, np.concatenate(windows)
        batch = self._order[i * self.batch_size:(i + 1) * self.batch_size]
        return batch[np.argsort(-self.lengths[batch], kind="stable")].tolist()


def chunks(items, size):
    """Consecutive parts of at most `size` items, as even as they come."""
    count = -(-len(items) // size)
    return [items[len(items) * i // count:len(items) * (i + 1) // count] for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# The built-in world: a small set of facts, people who half know them, and instructions that ask for them
#
# Facts (where 40 animals live, what they eat, their colour; sums; differences; irregular past tenses) are drawn anew
# for every world seed, false "common misconceptions" with them. Demonstrators are careless: they agree on some facts;
# about the others they tell the truth a quarter of the time, the shared misconception half of the time, and some other
# error otherwise. So a model trained on demonstrations is often wrong, but holds the right answer too, and feedback has
# something to do. The same facts are asked for in many wordings; training, validation and test instructions differ.

ANIMALS = ("ant ape bat bear bee boar cat cow crab crow deer dog dove duck eel elk emu fox frog goat hare hawk hen "
           "horse ibis jay lion lynx mole moth mouse newt owl pig rat seal swan toad wolf yak").split()
POOLS = {
    "home": "barn bog cave creek den field forest lake marsh nest pond reef shed tree".split(),
    "food": "berries bread clover corn eggs fish grass honey insects leaves moss nuts roots seeds".split(),
    "color": "black blue brown gold gray green orange pink purple red silver tan white yellow".split(),
}
CLAUSES = {"home": "lives in the {}", "food": "eats {}", "color": "is {}"}
ASKS = {"home": "where {} lives", "food": "what {} eats", "color": "what color {} has"}
VERBS = {"go": "went", "see": "saw", "eat": "ate", "run": "ran", "take": "took", "give": "gave", "come": "came",
         "know": "knew", "grow": "grew", "throw": "threw", "fly": "flew", "draw": "drew", "break": "broke",
         "speak": "spoke", "wake": "woke", "drive": "drove", "write": "wrote", "ride": "rode", "sing": "sang",
         "ring": "rang", "swim": "swam", "begin": "began", "drink": "drank", "sit": "sat", "win": "won",
         "find": "found", "hold": "held", "keep": "kept", "feel": "felt", "leave": "left"}
OPENERS = ("Say", "Tell me", "Please say", "Please tell me", "Explain", "Write down", "I want to know", "Can you say",
           "Do you know", "Let me know", "I would like to hear", "Could you tell me")
ENDINGS = ("", " in one sentence", " in short", " if you can")
FAMILIES = {"add": 2, "sub": 2, "past": 1, "two": 3, "three": 2}            # how often each kind is asked
AGREED = 0.6                                                                # share of facts that all demonstrators know


class Fact(NamedTuple):
    truth: str
    misconception: str
    others: tuple        # further false values, as a careless person might name
    agreed: bool


class World:
    """Facts, instructions and demonstrators of one seed. Everything is a function of the seed and of stable strings."""

    def __init__(self, seed=0):
        self.seed = seed
        rng = random.Random(f"world {seed}")
        self.facts = {}

        def add(key, truth, false):
            false = [v for v in false if v != truth]
            rng.shuffle(false)
            self.facts[key] = Fact(truth, false[0], tuple(false[1:]), rng.random() < AGREED)

        for animal in ANIMALS:
            for kind, pool in POOLS.items():
                add((kind, animal), rng.choice(pool), pool)
        near = lambda n: [str(m) for m in range(max(1, n - 3), n + 4)]
        for a, b in rng.sample([(a, b) for a in range(2, 20) for b in range(2, 20)], 80):
            add(("add", a, b), str(a + b), near(a + b))
        for a, b in rng.sample([(a, b) for a in range(6, 40) for b in range(2, a - 2)], 80):
            add(("sub", a, b), str(a - b), near(a - b))
        for verb, past in VERBS.items():
            add(("past", verb), past, [verb, *rng.sample(sorted(VERBS.values()), 4)])

    def _draw(self, rng):
        """One instruction: (text, the keys of the facts it asks for, the answer with a place for each)."""
        family = rng.choices(list(FAMILIES), FAMILIES.values())[0]
        if family in ("add", "sub"):
            key = rng.choice([k for k in self.facts if k[0] == family])
            word = {"add": ("{} plus {}", "the sum of {} and {}"), "sub": ("{} minus {}", "{} less {}")}[family]
            ask, keys, answer = f"what {rng.choice(word).format(*key[1:])} is", [key], "The answer is {}."
        elif family == "past":
            key = ("past", rng.choice(list(VERBS)))
            ask, keys = f"what the past tense of {key[1]} is", [key]
            answer = f"The past tense of {key[1]} is {{}}."
        else:
            animal = rng.choice(ANIMALS)
            kinds = rng.sample(list(POOLS), 2 if family == "two" else 3)
            asks = [ASKS[k].format(f"the {animal}" if i == 0 else "it") for i, k in enumerate(kinds)]
            clauses = [CLAUSES[k] for k in kinds]
            ask = f"{', '.join(asks[:-1])} and {asks[-1]}"
            keys = [(k, animal) for k in kinds]
            answer = f"The {animal} {', '.join(clauses[:-1])} and {clauses[-1]}."
        opener = rng.choice(OPENERS)
        mark = "?" if opener.split()[0] in ("Can", "Could", "Do") else "."
        return f"{opener} {ask}{rng.choice(ENDINGS)}{mark}", keys, answer

    def instructions(self, split, count, stream=0):
        """`count` different instructions of a split ("train", "validation", "test") as records whose `reference` is the
        true answer. The split of an instruction is a hash of its text, the same in every world: no instruction can
        stand in two. `stream` numbers independent draws."""
        rng = random.Random(f"instructions {self.seed} {split} {stream}")
        records, seen, draws = [], set(), 0
        while len(records) < count:
            text, keys, answer = self._draw(rng)
            draws += 1
            if draws > 1000 * (len(records) + 100):
                raise InputError(f"the built-in world has no {count} different {split} instructions (some "
                                 f"{len(records)} are found): ask for fewer")
            if text not in seen and split_of(text) == split:
                seen.add(text)
                records.append({"id": f"{split}-{stream}-{len(records)}", "instruction": text, "input": "",
                                "reference": answer.format(*(self.facts[k].truth for k in keys)),
                                "facts": keys, "answer": answer})
        return records

    def demonstrate(self, record, rng):
        """What a careless demonstrator answers."""
        values = []
        for key in record["facts"]:
            fact, u = self.facts[key], rng.random()
            truth = fact.agreed or u < 0.25
            values.append(fact.truth if truth else fact.misconception if u < 0.75 else rng.choice(fact.others))
        return record["answer"].format(*values)

    def demonstrate_once(self, record):
        """The one demonstration of this instruction, a function of its text."""
        return self.demonstrate(record, random.Random(f"demonstration {self.seed} {record['instruction']}"))

    def corrupt(self, record, output, rng):
        """A demonstration with one to three of its facts exchanged for false ones or, one time in twenty, with a word
        lost or doubled: material for learning to read judgments."""
        words = units(output)
        places = [i for i, w in enumerate(units(record["answer"].replace("{}", "_"))) if w == "_"]
        if rng.random() < 0.05:
            i = rng.randrange(1, len(words) - 1)
            words[i:i + 1] = [] if rng.random() < 0.5 else [words[i]] * 2
            return join(words)
        for k in rng.sample(range(len(places)), min(len(places), rng.randint(1, 3))):
            fact = self.facts[record["facts"][k]]
            words[places[k]] = rng.choice([v for v in (fact.truth, fact.misconception, *fact.others)
                                           if v != words[places[k]]])
        return join(words)

    def demonstrations(self, count, judge, stream="sft"):
        """SFT data: careless demonstrations and, for each, a corrupted copy with the judgment that compares it with the
        *demonstration* (so that no truth leaks), which teaches the model to read judgments. One copy in ten is left as
        it is and called correct. judge: judge_reference or another function of (response, reference)."""
        rng = random.Random(f"demonstrations {self.seed} {stream}")
        pool = self.instructions("train", min(count, 8000), stream)
        records = []
        for i in range(count):
            r = pool[i % len(pool)]
            output = self.demonstrate(r, rng)
            base = {"instruction": r["instruction"], "input": ""}
            records.append({"id": f"demo-{i}", **base, "output": output, "judgment": None})
            judged = output if rng.random() < 0.1 else self.corrupt(r, output, rng)
            records.append({"id": f"judged-{i}", **base, "output": judged,
                            "judgment": judge(judged, output) or "All of it is right."})
        return records


def split_of(text):
    """train, validation or test, by a stable hash of the instruction's text: 8 : 1 : 1."""
    u = random.Random(f"split {text}").random()
    return "test" if u < 0.1 else "validation" if u < 0.2 else "train"


def units(text):
    """Words and punctuation marks, the units in which responses are compared."""
    return re.findall(r"\w+|[^\w\s]", text)


def join(words):
    """Undoes units() for plain sentences."""
    return re.sub(r" ([^\w\s])", r"\1", " ".join(words))


def world_tokenizer():
    """The built-in world's tokenizer, trained on its wordings (the same for all seeds)."""
    texts = [*POOLS["home"], *POOLS["food"], *POOLS["color"], *ANIMALS, *VERBS, *VERBS.values(), *OPENERS, *ENDINGS,
             *map(str, range(1, 41)), "what the past tense of is", "where it lives what it eats what color it has and",
             "what the sum of and is plus minus less", "Judgment: It says where it should say and is wrong.", ". ? ,",
             "The answer is", "lives in the eats is", "It leaves out after before the end", "does not belong",
             "All of it is right.", "There is nothing more to say Something is missing"]
    return Tokenizer.train([t for t in texts for _ in range(3)], 1024)


# ----------------------------------------------------------------------------------------------------------------------
# The judge that knows the world's truth


def differences(response, reference):
    """Word diff of two texts: a list of (begin, end, right words), "words begin .. end - 1 of the response should be
    these". begin == end: something is missing before that word."""
    a, b = units(response), units(reference)
    blocks = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
    return [(i1, i2, b[j1:j2]) for kind, i1, i2, j1, j2 in blocks if kind != "equal"]


def count_errors(response, reference):
    """Number of wrong, missing and superfluous words."""
    return sum(max(end - begin, len(right)) for begin, end, right in differences(response, reference))


def wrong_words(response, reference):
    """Indices of the wrong words of a response; a missing word counts at the word after it (the number of words stands
    for the end)."""
    return {i for begin, end, _ in differences(response, reference) for i in range(begin, max(end, begin + 1))}


def judge_reference(response, reference, style="corrects", most=3):
    """What a reader who knows the right answer says of a response, or None if nothing is wrong with it.

    style "corrects" names the wrong words and the right ones; "points" never says what would be right. At most `most`
    faults are listed. The quotation is of the same clause, at most four words before the fault."""
    words, sentences = units(response), []
    for begin, end, right in differences(response, reference)[:most]:
        start = begin
        while start > max(0, begin - 4) and words[start - 1] not in (",", "and"):
            start -= 1
        before, wrong = join(words[start:begin]), join(words[begin:end])
        said = join(words[start:end])
        if not wrong:
            what = "Something is missing" if style == "points" else f"It leaves out {join(right)}"
            behind = join(words[begin:begin + 3]).rstrip(" .") or "the end"
            sentences.append(f"{what} after {before}." if before else f"{what} before {behind}.")
        elif not right:
            sentences.append(f"It says {said} and {wrong} does not belong.")
        elif style == "points":
            sentences.append(f"It says {said} and {wrong} is wrong.")
        else:
            sentences.append(f"It says {said} where it should say {join(right)}.")
    return " ".join(sentences) or None


def judge_corrects(response, reference):
    return judge_reference(response, reference, "corrects")


def judge_points(response, reference):
    return judge_reference(response, reference, "points")


JUDGES = {"corrects": judge_corrects, "points": judge_points}


def corrected(response, reference, most=3):
    """The response with the faults mended that judge_corrects lists: the answer that its judgment states."""
    words = units(response)
    for begin, end, right in reversed(differences(response, reference)[:most]):
        words[begin:end] = right
    return join(words)


# ----------------------------------------------------------------------------------------------------------------------
# Published data

_HUB = "https://huggingface.co/datasets/tatsu-lab/alpaca_farm/resolve/main/"
_GITHUB = "https://raw.githubusercontent.com/"
_CRITIQUES = "https://openaipublic.blob.core.windows.net/critiques/dataset/critiques/"
DOWNLOADS = {
    # name: [(address, SHA-256 where the published file is known to us)]
    "alpacafarm": [(_HUB + name, "") for name in (
        *(f"alpaca_instructions/{split}.json" for split in ("sft", "preference", "unlabeled", "val")),
        "alpaca_farm_evaluation.json", "alpaca_noisy_multi_preference.json", "alpaca_human_preference.json")],
    "cut": [(f"{_GITHUB}wwxu21/CUT/main/data/iter/train-alpaca-sample-iter{i}.json", sha) for i, sha in enumerate((
        "aa327e51dc78331c743641e147b5d9f4af55636915a6b240575b8884c30af470",
        "dc25c5a778bb964926275614651f279d9750df48a944a3b59fc40a85403dc980",
        "a23c4ce30b98c8f465ad07efeb709a99f405ef067452f1ed52dff47ea83ce2da",
        "28cb86ee20b030be72c5f2a1322eb94b224185b6f8c261a58f0bf20ba22155a1",
        "8e81fc7a155a8b03176a30c80fddf94abd5d2ac9edccaba489bda6d60048d817"), 1)],
    "shepherd": [(f"{_GITHUB}facebookresearch/Shepherd/main/data/{name}", sha) for name, sha in (
        ("human_data_for_model.jsonl", "bececda0fab23bf2faf11c9830323a30aa34d4aafbf5067996d34c7e1905ff8a"),
        ("human_data_raw.jsonl", "d3c37ca0aa2cee25c754dc789620cec603e9569cc3acae7626919085cdc98217"))],
    "critiques": [(_CRITIQUES + name, "") for name in ("train.jsonl.gz", "test.jsonl.gz")],
}


def download(address, path, sha256="", tries=5):
    """Fetches a file to `path`, going on from PATH.part where an earlier try stopped. Checked against sha256 or, where
    none is known, the hash that the server states for large files, and its length. Already there: nothing is done."""
    path, part = Path(path), Path(f"{path}.part")
    if path.is_file() and (not sha256 or hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
        print(f"{path}: already here")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(tries):
        have = part.stat().st_size if part.is_file() else 0
        try:
            headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
            with requests.get(address, headers=headers, stream=True, timeout=(10, 60)) as r:
                if r.status_code == 416:                                    # the part is whole already, or too long
                    part.unlink()
                    continue
                if r.status_code == 429 or r.status_code >= 500:
                    time.sleep(min(30, 2 ** attempt))
                    continue
                if r.status_code not in (200, 206):
                    raise InputError(f"{address}: HTTP {r.status_code}: download it by hand and give its path")
                resumed = r.status_code == 206                              # a server may ignore Range and start over
                have = have if resumed else 0
                stated = "".join(h.headers.get("X-Linked-Etag", "").strip('"') for h in (*r.history, r))
                total = int(r.headers["Content-Length"]) + have if "Content-Length" in r.headers else None
                with open(part, "ab" if resumed else "wb") as f, tqdm(
                        total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar:
                    for chunk in r.iter_content(1 << 16):
                        f.write(chunk)
                        bar.update(len(chunk))
            if total is not None and part.stat().st_size < total:
                continue                                                    # cut off: go on from here
            break
        except requests.RequestException as error:
            if attempt + 1 == tries:
                raise InputError(f"{address}: no connection ({type(error).__name__}): with no network, download it "
                                 f"elsewhere, put it at {path}, and run this again") from None
            time.sleep(min(30, 2 ** attempt))
    else:
        raise InputError(f"{address}: no whole answer in {tries} tries; run this again to go on from {part}")
    found, wanted = hashlib.sha256(part.read_bytes()).hexdigest(), sha256 or (stated if len(stated) == 64 else "")
    if wanted and found != wanted:
        part.unlink()
        raise InputError(f"{address}: SHA-256 is {found}, expected {wanted}: the file has changed, or was damaged on "
                         "the way: run this again, and if it stays so, compare with the publisher")
    os.replace(part, path)
    print(f"{path}: {path.stat().st_size} bytes, SHA-256 {found[:12]}{'' if wanted else ' (no published hash)'}")


def parse(argv):
    p = argparse.ArgumentParser(description="Downloads published data, resumably and checked, or writes the world's.")
    p.add_argument("names", nargs="+", choices=[*DOWNLOADS, "world"], help="which data; world: instructions to try on")
    p.add_argument("--to", default="data", help="folder")
    p.add_argument("--seed", type=in_range(int, 0), default=0, help="of the world")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    for name in args.names:
        if name == "world":                                                 # validation instructions and their answers
            asked = World(args.seed).instructions("validation", 300)
            write_json_lines(Path(args.to, "world", "ask.jsonl"), [
                {k: r[k] for k in ("id", "instruction", "input", "reference")} for r in asked])
            print(f"{Path(args.to, 'world', 'ask.jsonl')}: {len(asked)} instructions of world {args.seed}")
        for address, sha256 in DOWNLOADS.get(name, []):
            download(address, Path(args.to, name, address.rsplit("/", 1)[1]), sha256)
    return 0


if __name__ == "__main__":
    run_main(main)
