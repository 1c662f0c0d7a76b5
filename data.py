"""From text to token ids: tokenizer, prompt formats, readers, batches, and the built-in world.

One judged record on its way (prompt format `short`; CUT's own format only has longer headers):

  {"instruction": "Say what 7 plus 5 is.", "input": "", "output": "The answer is 13.",
   "judgment": "It says The answer is 13 where it should say 12."}

  prompt         <s> Say what 7 plus 5 is. \\n                                                        (x)
  judged prompt  <s> Say what 7 plus 5 is. \\n Judgment: It says The answer is 13 where it ... \\n     (x, j-)
  response       The answer is 13 . </s>                                                              (y, EOS included)

  tokens   <s>  Say  what ...  \\n   The    answer is  13  .          inputs of the network
  targets   .    .    .   ...  The  answer  is     13  .   </s>       what follows each; prompt positions are IGNORE

File formats are JSON lists or JSON Lines; unknown keys are kept. A judgment of null means that nothing is wrong.
Published data is downloaded and, where its layout is another one, converted:

  python data.py alpacafarm cut shepherd critiques --to data
  python data.py shepherd --file human_data_raw.jsonl --to data        a file that you already have
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
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import requests
import sentencepiece
import torch
import torch.distributed as dist
from requests.adapters import HTTPAdapter, Retry
from torch.nn.utils.rnn import pad_sequence


IGNORE = -100      # target of the positions that no loss looks at (prompt and padding)


# ----------------------------------------------------------------------------------------------------------------------
# Errors and files


class InputError(ValueError):
    """Invalid user input: a file, a record or a flag. The message is one line that names it and the remedy. Scripts
    print only that line; any other exception is a bug of ours and keeps its traceback."""

    def __init__(self, message):
        super().__init__(printable(message).replace("\n", "\\n")[:1000])      # whatever a file's name or content is


@contextlib.contextmanager
def reading(path, remedy="give another file, or download it again"):
    """Context in which a file of the user is read. Whatever goes wrong in it, from a missing file to a RecursionError,
    becomes an InputError of one line: file, cause, remedy. So no reader has to foresee how a file can be damaged."""
    try:
        if not Path(path).is_file():                        # a directory, or a pipe, which could be waited for
            raise InputError(f"{path}: no such file: {remedy}")
        yield
    except InputError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path}: cannot be read ({cause[:150]}): {remedy}") from error


# What steers a terminal: control characters, but for newline and tab, and marks that turn the direction of the text.
# Unpaired surrogates cannot be printed at all.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """The text with control characters as escapes, such as \\x1b: what a model, a server or a file name says must not
    steer the terminal."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def print0(*args):
    """print() of printable texts on rank 0, nothing on the others."""
    if os.environ.get("RANK", "0") == "0":
        print(*map(printable, args), flush=True)


def same_command(*more):
    """The command that started this program, with further flags, for a user to repeat."""
    launcher = "torchrun ..." if "RANK" in os.environ else "python"
    return f"{launcher} {shlex.join([*sys.argv, *(flag for flag in more if flag not in sys.argv)])}"


def run_main(main, *more):
    """Entry point of every script: runs main() and exits with its return value. An InputError, a file that cannot be
    written and Ctrl-C end in one line; after Ctrl-C, the same command with the flags `more` goes on."""
    try:
        code = main()
    except KeyboardInterrupt:
        print0(f"\nstopped: what was saved is kept, go on with {same_command(*more)}")
        sys.exit(130)
    except (InputError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Mostly, rank 0 has failed in the same way and has said so, and torchrun ends this process while it waits.
            time.sleep(5)
        sys.exit(printable(f"error: {error}"))
    except RuntimeError as error:
        if not dist.is_initialized() or "imed out" not in str(error):
            raise
        sys.exit(f"error: rank {dist.get_rank()} has waited too long for another one, which hangs or is gone: see what "
                 f"that one printed last; go on with {same_command(*more)}")
    if dist.is_initialized():
        # torchrun's processes skip the interpreter's shutdown: there gloo's threads can end in the wrong order and
        # abort a run that has succeeded. The barrier lets every rank finish its work first.
        dist.barrier()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def in_range(kind, low, high=math.inf):
    """An argparse type: an int or float between low and high, both included."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or kind is int and value >= 2**32:       # a seed that every generator takes
            raise ValueError
        return value
    limits = f"from {low} up" if high == math.inf else f"from {low} to {high}"
    parse.__name__ = f"{kind.__name__} {limits}"            # which argparse prints: "invalid int from 1 up value"
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the docstring as it is written, and with the defaults of the flags that have one."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", []) or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


positive_int, nonnegative_int = in_range(int, 1), in_range(int, 0)
nonnegative_float, fraction = in_range(float, 0), in_range(float, 0, 1)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, which is renamed to `path` if the block succeeds. A reader, or a run that
    resumes after a crash, finds the old file or the new one, never a partial one."""
    temporary = Path(f"{path}.tmp-{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                # RuntimeError: torch.save's, where the disk is full
        cause = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be written ({cause}): make room, or choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes one indented JSON value."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_lines(path, records):
    """Writes JSON Lines, one record a line; makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

# What Hugging Face keeps beside tokenizer.model. It may hold a chat template, so it goes along into models we save.
COMPANIONS = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja", "generation_config.json")
SPACE = "\u2581"      # sentencepiece's sign for a space


class Tokenizer:
    """A sentencepiece model. BOS and EOS are added here and nowhere else. There is no pad token: losses skip padding by
    IGNORE, so the ids in padded positions never matter."""

    def __init__(self, serialized):
        self.serialized = serialized
        self.directory = None                               # where the companion files are
        self.sp = sentencepiece.SentencePieceProcessor()
        self.sp.LoadFromSerializedProto(serialized)
        self.bos = self.sp.bos_id()
        self.eos = self.sp.eos_id()
        self.vocab_size = self.sp.vocab_size()
        if min(self.bos, self.eos) < 0:
            raise ValueError("the tokenizer has no BOS or no EOS piece; both are needed")
        # Characters of the longest token. Without byte pieces, one token stands for any number of unknown characters.
        longest = max(len(self.sp.id_to_piece(i)) for i in range(self.vocab_size))
        self.longest = longest if any(map(self.sp.is_byte, range(self.vocab_size))) else math.inf
        # sentencepiece puts a space in front of every text. A response continues its prompt, so it must not get one:
        # we encode newline + response and drop what belongs to the newline. The ids equal those of the joined text.
        self.newline = self.sp.encode("\n")

    @classmethod
    def from_pretrained(cls, directory):
        """The tokenizer of a model directory. The model must have an embedding for every id, so config.json is checked
        too, before any weights are read."""
        directory = Path(directory)
        path, config = directory / "tokenizer.model", directory / "config.json"
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory (python train_cut.py makes the built-in models)")
        with reading(path, "use a checkpoint with a sentencepiece tokenizer, such as LLaMA's or LLaMA 2's; LLaMA 3's "
                           "and tokenizer.json are of other formats"):
            tokenizer = cls(path.read_bytes())
        tokenizer.directory = directory
        with reading(config, "a model directory needs the config.json of its model, with vocab_size"):
            rows = json.loads(config.read_bytes())["vocab_size"]
            fits = tokenizer.vocab_size <= rows
        if not fits:
            raise InputError(f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces, the model's vocabulary "
                             f"only {rows}: they do not belong together")
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

    def save(self, directory):
        """Writes tokenizer.model and what transformers and vLLM need beside it: the companion files of the directory
        that it came from, else our own."""
        directory, files = Path(directory), {"tokenizer.model": self.serialized}
        if self.directory:
            home = self.directory.resolve()
            # A link may lead to the directory itself or to the blobs of Hugging Face's cache, not elsewhere.
            trusted = (home, home.parent.parent / "blobs" if home.parent.name == "snapshots" else home)
            for name in COMPANIONS:
                source = (home / name).resolve()
                if source.is_file() and source.parent in trusted:
                    files[name] = source.read_bytes()
        for name, content in files.items():
            with atomic_write(directory / name) as temporary:
                temporary.write_bytes(content)
        if "tokenizer_config.json" in files:
            return
        write_json(directory / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.sp.id_to_piece(self.bos),
            "eos_token": self.sp.id_to_piece(self.eos),
            "unk_token": self.sp.id_to_piece(self.sp.unk_id()),
        })
        write_json_lines(directory / "tokenizer.json", [self._as_json()])

    def _as_json(self):
        """This BPE model in the layout of the `tokenizers` library, because transformers 5 gives other ids when it
        converts tokenizer.model itself."""
        vocab = {self.sp.id_to_piece(i): i for i in range(self.vocab_size)}
        special, merges = [], []
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for piece, i in vocab.items():
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                special.append({"id": i, "content": piece, "special": True, **plain})
            elif not self.sp.is_byte(i):
                # Any two pieces that join to this one are a merge. Better scores, then lower ids, merge first.
                for k in range(1, len(piece)):
                    left, right = piece[:k], piece[k:]
                    if left in vocab and right in vocab:
                        merges.append((-self.sp.get_score(i), vocab[left], vocab[right], left, right))
        bos = self.sp.id_to_piece(self.bos)
        with_bos = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        return {
            "version": "1.0",
            "added_tokens": special,
            # Encoding: one space in front, spaces as sentencepiece writes them, BOS before the ids.
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
            "model": {"type": "BPE", "unk_token": self.sp.id_to_piece(self.sp.unk_id()), "fuse_unk": True,
                      "byte_fallback": True, "vocab": vocab, "merges": [merge[-2:] for merge in sorted(merges)]},
            "post_processor": {
                "type": "TemplateProcessing", "single": with_bos,
                "pair": [*with_bos, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}}},
            # Decoding: the way back.
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        }

    def encode_prompt(self, text, control=None):
        """Prompt ids: BOS, the control token if one is given, the text.

        Control tokens 0 to 7 stand for how good the answer is to be (0 is best). They are the pieces of the bytes F8 to
        FF, which occur in no UTF-8 text: every LLaMA tokenizer has them, no text encodes to them, and the vocabulary
        keeps its size."""
        ids = [self.bos]
        if control is not None:
            ids.append(self.sp.piece_to_id(f"<0x{0xF8 + control:02X}>"))
            if ids[1] == self.sp.unk_id():
                raise InputError("this tokenizer has no byte pieces, which control tokens are: use a LLaMA tokenizer")
        return ids + self.sp.encode(text)

    def is_longer(self, text, count):
        """Whether a text has certainly more than `count` tokens, told from its characters: no token has more of them
        than the longest piece. (Normalizing may take characters away, and puts a space in front.)"""
        most = count * self.longest + 1
        return len(text) > most and len(self.sp.normalize(text)) > most

    def encode_response(self, text):
        """Response ids, EOS included: a model that never sees EOS supervised never stops."""
        return self.sp.encode("\n" + text)[len(self.newline):] + [self.eos]

    def decode_response(self, ids):
        """Text of generated ids, without EOS. The newline keeps sentencepiece from dropping a leading space."""
        ids = [i for i in ids if i != self.eos and i < self.vocab_size]     # a model's vocabulary may be larger
        return self.sp.decode(self.newline + ids)[1:]

    def pieces(self, ids):
        """Text of each id on its own, for marking tokens; joined they are the text. A character of several byte pieces
        stands at the last of them; EOS is </s>."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = []
        for i in ids:
            piece = self.sp.id_to_piece(i)
            if self.sp.is_byte(i):                          # such as <0x0A>
                texts.append(decoder.decode(bytes([int(piece[3:5], 16)])))
            else:
                texts.append(piece.replace(SPACE, " "))
        return texts


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

# SDPO's teacher. Not CUT's prompt: that one asks for the response that the judgment describes, this one for a better.
_ADVICE = ("Below is an instruction that describes a task, with advice from a review of a weaker attempt at it."
           "\n\n### Instruction:\n{instruction}\n\n### Advice:\n{judgment}\n\nWrite the best possible response to the "
           "instruction, without the faults that the advice names.\n\n### Response:")

ADVICE = "-advice"     # the format's name ends in this where its judged prompt is advice
FORMATS = {
    # name: (plain, with input (None: the input follows the instruction on a new line), with judgment)
    "cut": (_ALPACA + "\n", None, _JUDGED + "\n"),
    "alpaca": (_ALPACA, _ALPACA_INPUT, _JUDGED),                            # AlpacaFarm: no newline at the end
    "short": ("{instruction}\n", None, "{instruction}\nJudgment: {judgment}\n"),        # the built-in world
    "cut-advice": (_ALPACA + "\n", None, _ADVICE + "\n"),
    "alpaca-advice": (_ALPACA, _ALPACA_INPUT, _ADVICE),
    "short-advice": ("{instruction}\n", None, "{instruction}\nAdvice: {judgment}\n"),
}

# The prompt of a judge, an API model or one of ours (after CUT's, in our words).
JUDGE_SYSTEM = ("You review answers to instructions. If the answer is flawless, reply with the one word Perfect. "
                "Otherwise say precisely what is wrong with it: name each fault, quote the place, and add no praise.")
JUDGE_USER = "Instruction:\n{instruction}\n\nAnswer:\n{output}\n\nYour review:"


def fill_template(template, **fields):
    """Replaces the {fields} of a template. Braces and field names inside a field's text stay text: the template is cut
    at its fields once, where a chain of str.replace would fill in what the user's text contains."""
    parts = re.split(r"\{(\w+)\}", template)                # text, field, text, field, ..., text
    return "".join(fields[part] if i % 2 else part for i, part in enumerate(parts))


def format_prompt(record, prompt_format, judgment=None):
    """The prompt of a record: x or, with a judgment, (x, j-)."""
    plain, with_input, judged = FORMATS[prompt_format]
    instruction, extra = record["instruction"], record.get("input") or ""
    template = plain if judgment is None else judged
    if extra and judgment is None and with_input:
        template = with_input
    elif extra:
        instruction = f"{instruction}\n{extra}"
    return fill_template(template, instruction=instruction, input=extra, judgment=judgment)


def prompt_ids(tokenizer, record, prompt_format, judgment=None):
    """Ids of a record's prompt, with the control token `reward_token` if the record has one."""
    control = record.get("reward_token")
    if control is not None and control not in range(8):
        raise InputError(f"record {record.get('id', '')}: 'reward_token' is {control!r}, expected 0 to 7")
    return tokenizer.encode_prompt(format_prompt(record, prompt_format, judgment), control)


# ----------------------------------------------------------------------------------------------------------------------
# Readers: file -> list of records (dicts), checked here so that nothing after them has to


def read_json(path, empty=False):
    """Reads a JSON list of objects, JSON Lines or, in a file named .txt, an instruction a line; also gzipped. A file
    without records is an error, unless `empty`."""
    path = Path(path)
    with reading(path, "expected a JSON list, or a JSON object a line, in UTF-8"):
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
        if ".txt" in path.suffixes:
            records = [{"instruction": line.strip()} for line in text.split("\n") if line.strip()]
        else:
            if not text.lstrip().startswith("["):           # lines: with commas between them, errors tell the line
                text = "[" + re.sub(r"\n\s*", r",\g<0>", text.strip()) + "]"
            records = json.loads(text)
        surrogates = re.search(r"\\u[dD]", text)
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"{path}: record {i} is {type(record).__name__}, not an object with keys")
        if surrogates:                                      # UTF-8, and so no file of ours, can hold an unpaired one
            with reading(path, f"record {i}: mend it or leave it out"):
                json.dumps(record, ensure_ascii=False).encode("utf-8")
    if not records and not empty:
        raise InputError(f"{path}: holds no records")
    return records


# Our keys, and those of other common layouts that stand for them: each a text, or a chat (a list of messages).
ALIASES = {
    "instruction": ("messages", "chosen", "prompt"),
    "output": ("messages", "response", "completion"),
    "output_1": ("chosen", "output"),
    "output_2": ("rejected",),
}


def instruction_and_answer(key, value):
    """What the key of another layout holds: (instruction, answer), None for what it does not. In a chat of one turn, a
    system message stands above the instruction; several turns are a ValueError."""
    if not isinstance(value, list):
        return (value, None) if key == "prompt" else (None, value)
    roles, texts = [m["role"] for m in value], [m["content"] for m in value]
    if not re.fullmatch("(system )?(user )?(assistant )?", "".join(f"{role} " for role in roles)):
        raise ValueError(f"{key!r} has the roles {roles}; only one turn is supported: system, user, assistant")
    answer = texts.pop() if "assistant" in roles else None
    return "\n\n".join(texts) or None, answer


def fill_in(path, records, name):
    """Gives records that lack the key `name` what stands for it in other layouts, and prints what that was."""
    taken = {}
    for i, record in enumerate(records):
        for key in ALIASES[name] if name not in record else ():
            with reading(path, f"record {i}"):
                value = instruction_and_answer(key, record.get(key))[name != "instruction"]
            if value is not None:
                taken[key] = record[name] = value
                break
    if taken:
        print0(f"{path}: {' or '.join(taken)} is taken for {name}")


def check_record(path, i, record, *keys):
    """Checks that the keys of record i hold texts, and returns the record with absent optional keys filled in.

    "key" must be a text, "key|null" a text or null, "key?" may also be absent (then it is null; input is empty)."""
    original = record
    for key in keys:
        name = key.removesuffix("?").removesuffix("|null")
        if key.endswith("?"):
            record = {name: "" if name == "input" else None, **record}
        if name not in record:
            raise InputError(f"{path}: record {i} has no key {name!r}; it has {sorted(original)}")
        value = record[name]
        if value is None and key != name:
            continue
        if not isinstance(value, str):
            raise InputError(f"{path}: record {i}: {name!r} is {type(value).__name__}, expected a text (str)"
                             + (" or null" if key != name else ""))
        if name in ("instruction", "output") and not value.strip():
            raise InputError(f"{path}: record {i}: {name!r} is empty; leave such records out")
    return record


def read_records(path, *keys):
    """Records whose keys, written as in check_record, are texts; each may have a name of ALIASES instead."""
    records = read_json(path)
    for name in [name for name in ALIASES if name in keys]:
        fill_in(path, records, name)
    return [check_record(path, i, record, *keys) for i, record in enumerate(records)]


def read_instructions(path):
    """instruction, input (optional)."""
    return read_records(path, "instruction", "input?")


def read_outputs(path, reference=False):
    """instruction, input (optional), output; with `reference`, also the right answer under that key."""
    more = ["reference"] if reference else []
    return read_records(path, "instruction", "input?", "output", *more)


def read_demonstrations(path):
    """instruction, input (optional), output, judgment (optional: it becomes part of the prompt, Hindsight)."""
    return read_records(path, "instruction", "input?", "output", "judgment?")


def read_pairs(path):
    """What `simulate.py prefer` compares: instruction, input (optional), and either output_1 and output_2 or a list of
    texts `output`."""
    records = read_records(path, "instruction", "input?")
    for i, r in enumerate(records):
        if ("output_1" in r) != ("output_1" in records[0]):
            raise InputError(f"{path}: records 0 and {i} differ: one is a pair, the other a list of outputs")
        if "output_1" in r or "output" not in r:
            check_record(path, i, r, "output_1", "output_2")
            r.pop("output", None)
        elif not (isinstance(r["output"], list) and all(isinstance(text, str) for text in r["output"])):
            raise InputError(f"{path}: record {i}: 'output' is not a list of texts")
    return records


def read_preferences(path, ties=False, failed=False):
    """Preference pairs in AlpacaFarm's layout: instruction, input, output_1, output_2, preference (1, 2, or between: a
    judge's probability that output_2 is better, plus 1; 1.5 is a tie, for which older files write 0). Ties and pairs of
    equal texts carry no preference: they are left out and counted, unless `ties`. With `failed`, records that the
    annotator failed at (AlpacaEval writes null, NaN or -1) are kept, with preference None.

    Where a record says which text is `rejected`, the other one is `chosen` (the usual layout for DPO) or `output` (what
    `simulate.py refine` writes, ILF-DPO)."""
    pairs = read_records(path, "instruction", "input?", "output_1", "output_2")
    zero_is_tie = any(r.get("preference") == 2 for r in pairs)              # else labels may be 0 and 1
    records, left_out = [], 0
    for i, r in enumerate(pairs):
        preference = r.get("preference", 1 if "rejected" in r else None)
        if preference == 0 and zero_is_tie:
            preference = 1.5
        if failed and (preference in (None, -1) or preference != preference):
            preference = None
        elif type(preference) not in (int, float) or not 1 <= preference <= 2:
            raise InputError(f"{path}: record {i}: 'preference' is {preference!r}, expected a number from 1 to 2; "
                             "1.5 is a tie")
        r["preference"] = preference
        if not ties and (preference == 1.5 or r["output_1"] == r["output_2"]):
            left_out += 1
        else:
            records.append(r)
    if left_out:
        print0(f"{path}: {len(records)} pairs; left out {left_out} ties and pairs of equal texts")
    if not records:
        raise InputError(f"{path}: no pair is left")
    return records


def read_judged(path, filter_noise=False):
    """Judged responses in CUT's layout: instruction, input (optional), output, judgment or null (convert() writes
    Shepherd's files and the critiques so). A record with score >= 7, the top of a 7-point scale, counts as good, as in
    CUT's code.

    Prints what it found. filter_noise leaves out two kinds of bad labels: `$ERROR$` (a failed call stored as a
    judgment) and bad responses whose judgment opens by calling them perfect."""
    records = read_records(path, "instruction", "input?", "output", "judgment|null")
    top_rated = 0
    for i, r in enumerate(records):
        r.setdefault("id", i)
        score = r.get("score") or 0
        if not isinstance(score, (int, float)):
            raise InputError(f"{path}: record {i}: 'score' is {type(score).__name__}, expected a number or null")
        if r["judgment"] is None:
            continue
        if not r["judgment"].strip():
            raise InputError(f"{path}: record {i}: 'judgment' is an empty text; write null if nothing is wrong")
        if score >= 7:
            r["judgment"] = None
            top_rated += 1
    if top_rated:
        print0(f"{path}: {top_rated} judged records have score >= 7, the top of a 7-point scale, and count as good")

    negatives = sum(r["judgment"] is not None for r in records)
    noise = [noise_of(r["judgment"] or "") for r in records]
    done = "left out" if filter_noise else "kept (--filter-noise leaves them out)"
    print0(f"{path}: {negatives} negatives and {len(records) - negatives} positives; of the negatives "
           f"{noise.count('error')} '$ERROR$' and {noise.count('perfect')} 'perfect', {done}")
    if filter_noise:
        records = [r for r, kind in zip(records, noise) if not kind]
    return records


def noise_of(judgment):
    """The kind of a judgment that is a bad label: "error" (a failed call), "perfect" (it opens with praise) or ""."""
    if judgment.strip() == "$ERROR$":
        return "error"
    if judgment.lower().lstrip(" \"'").startswith("the response is perfect"):
        return "perfect"
    return ""


def read_judge_training(path):
    """Judged responses as demonstrations for a model that is to judge: the prompt of simulate.py's judges -> judgment,
    or Perfect. (train_sft.py --recipe judge)"""
    records = []
    for r in read_judged(path, filter_noise=True):
        instruction = r["instruction"] + (f"\n\n{r['input']}" if r["input"] else "")
        question = fill_template(JUDGE_USER, instruction=instruction, output=r["output"])
        records.append({"id": r["id"], "instruction": f"{JUDGE_SYSTEM}\n\n{question}", "input": "", "judgment": None,
                        "output": r["judgment"] or "Perfect."})
    return records


def chosen_and_rejected(record):
    """The two texts of a preference record, the preferred one first."""
    first, second = record["output_1"], record["output_2"]
    return (first, second) if record["preference"] < 1.5 else (second, first)


def read_feedme(path):
    """Binary FeedME (AlpacaFarm): the preferred output of every pair, as a demonstration."""
    return [{**r, "output": chosen_and_rejected(r)[0], "judgment": None} for r in read_preferences(path)]


def read_conditioning(path):
    """Binary reward conditioning (AlpacaFarm): both outputs of every pair as demonstrations, the preferred
    one after control token 0, the other after 1. Answers are later asked for with 0."""
    records = []
    for i, r in enumerate(read_preferences(path)):
        for token, text in enumerate(chosen_and_rejected(r)):
            name = f"{r.get('id', i)}-{token}"
            records.append({**r, "id": name, "output": text, "judgment": None, "reward_token": token})
    return records


def read_forward(path):
    """Forward Prediction (CUT's baseline): learn to give every response, good or bad, and to judge it."""
    responses = [{**r, "judgment": None} for r in read_judged(path, filter_noise=True)]
    return responses + read_judge_training(path)


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
    """Token ids of one record: prompt x, response y, and the prompt (x, j-), or None if nothing is wrong with y. Of bad
    responses the record is kept, too."""
    id: str
    prompt: list
    response: list
    judged_prompt: list | None = None
    record: dict | None = None

    def size(self):
        """Tokens of the longest sequence that the network reads for it."""
        return len(self.response) + max(len(self.prompt), len(self.judged_prompt or []))


def encode(tokenizer, records, prompt_format, max_length, hindsight=False):
    """Records -> Examples. Over-long ones are left out, counted and printed: cutting them would lose the instruction or
    EOS. With hindsight the judgment, if any, becomes part of the one prompt: (x, j-) -> y."""
    if not records:
        raise InputError("no records left to train on after filtering")
    examples, too_long, names = [], [], set()
    for i, r in enumerate(records):
        judgment, name = r.get("judgment"), str(r.get("id", i))
        if tokenizer.is_longer(format_prompt(r, prompt_format, judgment) + r["output"], max_length):
            too_long.append(name)                           # its tokens would take time and memory for nothing
            continue
        prompt = prompt_ids(tokenizer, r, prompt_format, judgment if hindsight else None)
        judged = None
        if judgment is not None and not hindsight:
            judged = prompt_ids(tokenizer, r, prompt_format, judgment)
        if name in names:                                   # ids of joined files may repeat
            name = f"{name}#{i}"
        names.add(name)
        example = Example(name, prompt, tokenizer.encode_response(r["output"]), judged, r if judged else None)
        if example.size() <= max_length:
            examples.append(example)
        else:
            too_long.append(f"{name} of {example.size()}")
    if too_long:
        print0(f"left out {len(too_long)} of {len(records)} records longer than {max_length} tokens (ids "
               f"{', '.join(too_long[:5])} ...): see --max-length")
    if not examples:
        raise InputError(f"no record fits in {max_length} tokens: raise --max-length")
    return examples


def collate(rows, device="cpu"):
    """rows of (prompt ids, response ids) -> tokens (B, T), targets (B, T), padded on the right.

    targets[b, t] is the token after tokens[b, t] where that token belongs to the response (EOS too), else IGNORE. The
    first response token is predicted at the prompt's last position. An empty response has no target: a rank that has no
    example of its own still takes part in a step with such a row."""
    tokens, targets = [], []
    for prompt, response in rows:
        tokens.append(torch.tensor((prompt + response)[:-1]))
        targets.append(torch.tensor([IGNORE] * (len(prompt) - 1) + response))
    tokens = pad_sequence(tokens, batch_first=True)                                  # (B, T)
    targets = pad_sequence(targets, batch_first=True, padding_value=IGNORE)          # (B, T)
    return tokens.to(device), targets.to(device)


def pad(sequences, device="cpu"):
    """Lists of ids -> tokens (B, T) padded on the right, lengths (B,)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    tokens = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    return tokens.to(device), lengths.to(device)


WINDOW = 16      # batches whose examples are sorted by length together
PIECES = 4       # pieces of like length that make up a batch


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
        self._epoch = self._order = None                    # a cache of the last epoch, not a state

    def __call__(self, step):
        """Indices of the examples of this step, longest first."""
        epoch, i = divmod(step, self.per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        batch = self._order[i * self.batch_size:(i + 1) * self.batch_size]
        return batch[np.argsort(-self.lengths[batch], kind="stable")].tolist()

    def _shuffle(self, epoch):
        """Order of the examples in an epoch: batches are cut from it one after the other."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        window, piece = WINDOW * self.batch_size, max(1, self.batch_size // PIECES)
        shuffled = []
        for start in range(0, len(order), window):
            rows = order[start:start + window]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            pieces = [rows[j:j + piece] for j in range(0, len(rows), piece)]
            shuffled += [pieces[j] for j in rng.permutation(len(pieces))]
        return np.concatenate(shuffled)


def chunks(items, size):
    """Consecutive parts of at most `size` items, as even as possible."""
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
PAST_TENSES = (
    "go/went see/saw eat/ate run/ran take/took give/gave come/came know/knew grow/grew throw/threw fly/flew "
    "draw/drew break/broke speak/spoke wake/woke drive/drove write/wrote ride/rode sing/sang ring/rang "
    "swim/swam begin/began drink/drank sit/sat win/won find/found hold/held keep/kept feel/felt leave/left")
VERBS = dict(pair.split("/") for pair in PAST_TENSES.split())      # {"go": "went", ...}
OPENERS = ("Say", "Tell me", "Please say", "Please tell me", "Explain", "Write down", "I want to know", "Can you say",
           "Do you know", "Let me know", "I would like to hear", "Could you tell me")
ENDINGS = ("", " in one sentence", " in short", " if you can")
ARITHMETIC = {"add": ("{} plus {}", "the sum of {} and {}"), "sub": ("{} minus {}", "{} less {}")}
FAMILIES = {"add": 2, "sub": 2, "past": 1, "two": 3, "three": 2}            # how often each kind is asked
AGREED = 0.6                                                                # fraction of facts that all know


class Fact(NamedTuple):
    truth: str
    misconception: str
    others: tuple        # further false values that a careless person might name
    agreed: bool         # all demonstrators know the truth


class World:
    """Facts, instructions and demonstrators of one seed. Everything is a function of the seed and of stable strings."""

    def __init__(self, seed=0):
        self.seed = seed
        self.facts = {}      # key -> Fact; a key is ("home", animal), ("add", a, b), ("past", verb), ...
        rng = random.Random(f"world {seed}")

        def add(key, truth, candidates):
            false = [value for value in candidates if value != truth]
            rng.shuffle(false)
            self.facts[key] = Fact(truth, false[0], tuple(false[1:]), rng.random() < AGREED)

        def near(number):
            return [str(n) for n in range(max(1, number - 3), number + 4)]

        for animal in ANIMALS:
            for kind, pool in POOLS.items():
                add((kind, animal), rng.choice(pool), pool)
        sums = [(a, b) for a in range(2, 20) for b in range(2, 20)]
        for a, b in rng.sample(sums, 80):
            add(("add", a, b), str(a + b), near(a + b))
        subtractions = [(a, b) for a in range(6, 40) for b in range(2, a - 2)]
        for a, b in rng.sample(subtractions, 80):
            add(("sub", a, b), str(a - b), near(a - b))
        for verb, past in VERBS.items():
            add(("past", verb), past, [verb, *rng.sample(sorted(VERBS.values()), 4)])

    def _draw(self, rng):
        """One instruction: (text, keys of the facts it asks for, the answer with a place {} for each)."""
        family = rng.choices(list(FAMILIES), FAMILIES.values())[0]
        if family in ARITHMETIC:
            key = rng.choice([key for key in self.facts if key[0] == family])
            wording = rng.choice(ARITHMETIC[family]).format(*key[1:])
            ask, keys, answer = f"what {wording} is", [key], "The answer is {}."
        elif family == "past":
            verb = rng.choice(list(VERBS))
            keys = [("past", verb)]
            ask, answer = f"what the past tense of {verb} is", f"The past tense of {verb} is {{}}."
        else:
            animal = rng.choice(ANIMALS)
            kinds = rng.sample(list(POOLS), 2 if family == "two" else 3)
            keys = [(kind, animal) for kind in kinds]
            names = [f"the {animal}", "it", "it"]
            asks = [ASKS[kind].format(name) for kind, name in zip(kinds, names)]
            clauses = [CLAUSES[kind] for kind in kinds]
            ask = f"{', '.join(asks[:-1])} and {asks[-1]}"
            answer = f"The {animal} {', '.join(clauses[:-1])} and {clauses[-1]}."
        opener, ending = rng.choice(OPENERS), rng.choice(ENDINGS)
        mark = "?" if opener.split()[0] in ("Can", "Could", "Do") else "."
        return f"{opener} {ask}{ending}{mark}", keys, answer

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
                raise InputError(f"the built-in world has only about {len(records)} different {split} instructions, "
                                 f"not {count}: ask for fewer")
            if text in seen or split_of(text) != split:
                continue
            seen.add(text)
            truths = [self.facts[key].truth for key in keys]
            records.append({"id": f"{split}-{stream}-{len(records)}", "instruction": text, "input": "",
                            "reference": answer.format(*truths), "facts": keys, "answer": answer})
        return records

    def demonstrate(self, record, rng):
        """What a careless demonstrator answers."""
        values = []
        for key in record["facts"]:
            fact, u = self.facts[key], rng.random()
            if fact.agreed or u < 0.25:
                values.append(fact.truth)
            elif u < 0.75:
                values.append(fact.misconception)
            else:
                values.append(rng.choice(fact.others))
        return record["answer"].format(*values)

    def demonstrate_once(self, record):
        """The one demonstration of this instruction, a function of its text."""
        return self.demonstrate(record, random.Random(f"demonstration {self.seed} {record['instruction']}"))

    def corrupt(self, record, output, rng):
        """A demonstration with one to three of its values replaced by other ones or, one time in twenty, with a word
        lost or doubled: material for learning to read judgments."""
        words = units(output)
        if rng.random() < 0.05:
            i = rng.randrange(1, len(words) - 1)
            words[i:i + 1] = [] if rng.random() < 0.5 else [words[i]] * 2
            return join(words)
        template = units(record["answer"].replace("{}", "_"))
        places = [i for i, word in enumerate(template) if word == "_"]
        count = min(len(places), rng.randint(1, 3))
        for k in rng.sample(range(len(places)), count):
            i, fact = places[k], self.facts[record["facts"][k]]
            values = (fact.truth, fact.misconception, *fact.others)
            words[i] = rng.choice([value for value in values if value != words[i]])
        return join(words)

    def demonstrations(self, count, judge, stream="sft", advice=False):
        """SFT data: careless demonstrations and, for each, a corrupted copy with the judgment that compares it with the
        *demonstration* (so that no truth leaks), which teaches the model to read judgments. One copy in ten is left as
        it is and called correct. judge: one of JUDGES, a function of (response, reference). With advice, the judgment
        goes with the demonstration, not the copy: what SDPO's teacher is asked for."""
        rng = random.Random(f"demonstrations {self.seed} {stream}")
        pool = self.instructions("train", min(count, 8000), stream)
        records = []
        for i in range(count):
            asked = pool[i % len(pool)]
            shown = {"instruction": asked["instruction"], "input": ""}
            output = self.demonstrate(asked, rng)
            records.append({"id": f"demo-{i}", **shown, "output": output, "judgment": None})
            copy = output if rng.random() < 0.1 else self.corrupt(asked, output, rng)
            judgment = judge(copy, output) or "All of it is right."
            records.append({"id": f"judged-{i}", **shown, "output": output if advice else copy, "judgment": judgment})
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
    texts = [*sum(POOLS.values(), []), *ANIMALS, *VERBS, *VERBS.values(), *OPENERS, *ENDINGS, *map(str, range(1, 41)),
             "what the past tense of is", "where it lives what it eats what color it has and",
             "what the sum of and is plus minus less", "Judgment: It says where it should say and is wrong.", ". ? ,",
             "The answer is", "lives in the eats is", "It leaves out after before the end", "does not belong",
             "All of it is right.", "There is nothing more to say Something is missing"]
    return Tokenizer.train([text for text in texts for _ in range(3)], 1024)


# ----------------------------------------------------------------------------------------------------------------------
# The judge that knows the world's truth

MOST_FAULTS = 3      # that a judgment lists: the first ones


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
    wrong = set()
    for begin, end, _ in differences(response, reference):
        wrong.update(range(begin, max(end, begin + 1)))
    return wrong


def judge_reference(response, reference, style="corrects"):
    """What a reader who knows the right answer says of a response, or None if nothing is wrong with it.

    style "corrects" names the wrong words and the right ones; "points" never says what would be right. At most
    MOST_FAULTS are listed. The quotation is of the same clause, at most four words before the fault."""
    words, sentences = units(response), []
    for begin, end, right in differences(response, reference)[:MOST_FAULTS]:
        start = begin                                       # of the quotation
        while start > max(0, begin - 4) and words[start - 1] not in (",", "and"):
            start -= 1
        before, wrong = join(words[start:begin]), join(words[begin:end])
        quoted = join(words[start:end])
        if not wrong:
            missing = "Something is missing" if style == "points" else f"It leaves out {join(right)}"
            after = join(words[begin:begin + 3]).rstrip(" .") or "the end"
            sentences.append(f"{missing} after {before}." if before else f"{missing} before {after}.")
        elif not right:
            sentences.append(f"It says {quoted} and {wrong} does not belong.")
        elif style == "points":
            sentences.append(f"It says {quoted} and {wrong} is wrong.")
        else:
            sentences.append(f"It says {quoted} where it should say {join(right)}.")
    return " ".join(sentences) or None


def judge_corrects(response, reference):
    """A judgment that states what would be right."""
    return judge_reference(response, reference, "corrects")


def judge_points(response, reference):
    """A judgment that only points at what is wrong."""
    return judge_reference(response, reference, "points")


JUDGES = {"corrects": judge_corrects, "points": judge_points}


def corrected(response, reference):
    """The response with the faults mended that judge_corrects lists: the answer that its judgment states."""
    words = units(response)
    for begin, end, right in reversed(differences(response, reference)[:MOST_FAULTS]):
        words[begin:end] = right
    return join(words)


# ----------------------------------------------------------------------------------------------------------------------
# Published data

DOWNLOADS = {
    # name: (address of the folder, {file: SHA-256 where we know it})
    "alpacafarm": ("https://huggingface.co/datasets/tatsu-lab/alpaca_farm/resolve/main/", {
        "alpaca_instructions/sft.json": "",
        "alpaca_instructions/preference.json": "",
        "alpaca_instructions/unlabeled.json": "",
        "alpaca_instructions/val.json": "",
        "alpaca_farm_evaluation.json": "",
        "alpaca_noisy_multi_preference.json": "",
        "alpaca_human_preference.json": "",
    }),
    "cut": ("https://raw.githubusercontent.com/wwxu21/CUT/main/data/iter/", {
        "train-alpaca-sample-iter1.json": "aa327e51dc78331c743641e147b5d9f4af55636915a6b240575b8884c30af470",
        "train-alpaca-sample-iter2.json": "dc25c5a778bb964926275614651f279d9750df48a944a3b59fc40a85403dc980",
        "train-alpaca-sample-iter3.json": "a23c4ce30b98c8f465ad07efeb709a99f405ef067452f1ed52dff47ea83ce2da",
        "train-alpaca-sample-iter4.json": "28cb86ee20b030be72c5f2a1322eb94b224185b6f8c261a58f0bf20ba22155a1",
        "train-alpaca-sample-iter5.json": "8e81fc7a155a8b03176a30c80fddf94abd5d2ac9edccaba489bda6d60048d817",
    }),
    "shepherd": ("https://raw.githubusercontent.com/facebookresearch/Shepherd/main/data/", {
        "human_data_for_model.jsonl": "bececda0fab23bf2faf11c9830323a30aa34d4aafbf5067996d34c7e1905ff8a",
        "human_data_raw.jsonl": "d3c37ca0aa2cee25c754dc789620cec603e9569cc3acae7626919085cdc98217",
    }),
    "critiques": ("https://openaipublic.blob.core.windows.net/critiques/dataset/critiques/", {
        "train.jsonl.gz": "",
        "test.jsonl.gz": "",
    }),
}


def download(address, path, sha256=""):
    """Downloads a JSON file to `path`, whole and checked or not at all: its length, and its SHA-256 or, where none is
    known, that it is JSON. It always starts at the beginning: parts could be of two versions of the file."""
    path = Path(path)
    if path.is_file() and sha256 in ("", hashlib.sha256(path.read_bytes()).hexdigest()):
        print0(f"{path}: already here")
        return
    print0(f"{path}: from {address}")
    session = requests.Session()
    patient = HTTPAdapter(max_retries=Retry(5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504)))
    session.mount("http://", patient)
    session.mount("https://", patient)
    try:
        answer = session.get(address, headers={"Accept-Encoding": "identity"}, timeout=(10, 60))
        answer.raise_for_status()
        if len(answer.content) < int(answer.headers.get("Content-Length", 0)):
            raise requests.ConnectionError("the body was cut off")
    except requests.RequestException as error:
        raise InputError(f"{address}: {error}: run this again; with no network, download it elsewhere, put it at "
                         f"{path}, and run this again") from None
    found = hashlib.sha256(answer.content).hexdigest()
    if sha256 and found != sha256:
        raise InputError(f"{address}: SHA-256 is {found}, expected {sha256}: the file was damaged on the way or has "
                         "changed: run this again, and if it stays so, compare with the publisher")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(answer.content)
        if not sha256:
            read_json(temporary)
    print0(f"{path}: {len(answer.content)} bytes, SHA-256 {found[:12]}{'' if sha256 else ' (no published hash)'}")


def shepherd_records(record):
    """Shepherd's two files, one record -> one judged response. In human_data_raw.jsonl the judgment is spread over the
    error types that the annotator chose."""
    if "latestLabel" not in record:                         # human_data_for_model.jsonl
        yield {"id": record["id"], "instruction": record["question"], "output": record["answer"],
               "judgment": record["feedback"], "reference": None}
        return
    task = record["metadata"]
    label = record["latestLabel"]["jsonResponse"]["CLASSIFICATION_JOB_0"]
    texts = []
    for category in label["categories"]:
        texts += [child["text"].strip() for child in category["children"].values() if "text" in child]
    yield {"id": record["id"], "instruction": task["context"], "output": task["output_candidate"],
           "judgment": " ".join(texts), "reference": task.get("output_correct")}


def critique_records(record):
    """The summarization critiques (Saunders et al. 2022), a passage with several questions -> a judged response each,
    as CUT converted them: the best-ranked answer, the critiques of it as judgment, none as good, the last refinement as
    reference. None stands for one left out: empty, skipped by the labeler, or without a refinement."""
    passage = record["data"]["passage"]["text"]
    for question in record["data"]["questions"]:
        text, rankings = question["question"], question["rankings"]
        best = max(range(len(question["answers"])), key=lambda k: rankings[k])
        answer, feedback = question["answers"][best]["answer"], question["answers"][best]["feedback"]
        critiques = feedback["critiques"]
        reference = critiques[-1]["refinement"] if critiques else None
        unrefined = critiques and not reference
        if feedback.get("skip") or not text or not answer.strip() or unrefined:
            yield None
        else:
            yield {"id": f"{record['id']}-{len(passage)}-{text}", "instruction": f"{passage}\n{text}", "output": answer,
                   "judgment": " ".join(c["text"] for c in critiques) or None, "reference": reference}


CONVERTERS = {"shepherd": shepherd_records, "critiques": critique_records}


def convert(name, source, folder):
    """Writes a published file of another layout as judged responses (instruction, input, output, judgment, reference,
    id) to FOLDER/NAME.judged.jsonl, which read_judged reads. The original stays as it is. Returns the new path."""
    source = Path(source)
    path = Path(folder, source.name.split(".")[0] + ".judged.jsonl")
    records, left_out = [], 0
    for i, original in enumerate(read_json(source)):
        with reading(source, f"record {i} is not in the layout of {name}"):
            converted = list(CONVERTERS[name]({"id": i, **original}))
        left_out += converted.count(None)
        for record in filter(None, converted):
            records.append(check_record(source, i, record, "instruction", "input?", "output", "judgment|null"))
    write_json_lines(path, records)
    print0(f"{path}: {len(records)} judged responses; left out {left_out} that are empty, skipped by the labeler or "
          "without a refinement")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    p = argparse.ArgumentParser(description="Downloads published data and converts it, or writes the built-in world's.")
    p.add_argument("names", nargs="+", choices=[*DOWNLOADS, "world"], help="which data; world: instructions to try on")
    p.add_argument("--to", default="data", help="folder")
    p.add_argument("--file", help="convert this file of shepherd or critiques instead of downloading")
    p.add_argument("--seed", type=nonnegative_int, default=0, help="seed of the built-in world")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if args.file and args.names not in (["shepherd"], ["critiques"]):
        raise InputError("--file is a file of shepherd or of critiques: name one of the two, and nothing else")
    for name in args.names:
        folder = Path(args.to, name)
        if name == "world":                                 # validation instructions and their answers
            path, keys = folder / "ask.jsonl", ("id", "instruction", "input", "reference")
            asked = World(args.seed).instructions("validation", 300)
            write_json_lines(path, [{key: r[key] for key in keys} for r in asked])
            print0(f"{path}: {len(asked)} instructions of world {args.seed}")
        elif args.file:
            convert(name, args.file, folder)
        else:
            address, files = DOWNLOADS[name]
            for file, sha256 in files.items():
                path = folder / Path(file).name
                download(address + file, path, sha256)
                if name in CONVERTERS:
                    convert(name, path, folder)
    return 0


if __name__ == "__main__":
    run_main(main)
