"""Simulated feedback: responses from a model, and judgments or preferences from a judge. Four verbs, files in and out:

  sample   instructions -> outputs               from a model directory (--model) or an API (--api)
  judge    outputs -> judged responses           for train_cut.py
  prefer   pairs, or n outputs each -> preferences      for train_ppo.py; or two files -> a win rate
  refine   judged responses -> better outputs    rewritten with the judgment in the prompt (ILF)

  python simulate.py --model out/cut-0 --prompt "Say what 15 less 4 is."      one typed prompt (sample is the default)
  python simulate.py sample --model out/sft-0-corrects --data ask.json --outputs 4 --temperature 1 --out four.jsonl
  python simulate.py prefer --data four.jsonl --by simulated --noise 0.25 --out preferences.jsonl
  python simulate.py judge --data outputs.jsonl --by api --api URL --api-model NAME --out judged.jsonl

Who judges (--by): `reference` knows the right answer and compares word by word; `simulated` stands in for AlpacaFarm's
pool of API annotators, offline, with set accuracy and biases; `api` asks any OpenAI-compatible server; `model` asks a
checkpoint of ours, prompted or fine-tuned (train_sft.py --recipe judge). The order of the file is: judges that know the
truth; sampling; the API client; API judges and the 13 annotators; preferences with noise; the verbs.
"""
import argparse
import concurrent.futures
import datetime
import email.utils
import hashlib
import json
import math
import os
import random
import re
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from tqdm import tqdm

from data import (FORMATS, JUDGE_SYSTEM, JUDGE_USER, JUDGES, InputError, Tokenizer, World, corrected, count_errors, in_range, print0, run_main, write_json, fill_template, join, pad, prompt_ids, read_instructions,
                  read_judged, read_outputs, read_pairs, chunks, units, write_json_lines)
from model import (DTYPES, LLaMA, RewardModel, barrier, gather_lists, generate, rank, read_config, setup_device, share)


# ----------------------------------------------------------------------------------------------------------------------
# The judge that knows the truth


def mean_and_se(values):
    """Mean and its standard error (sample standard deviation, ddof 1, over sqrt n)."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_responses(model, tokenizer, records, form, *, max_new_tokens, temperature, seed, n=1, top_p=1.0, top_k=0,
            batch_size=512, numbers=None, label="sampling"):
    """Answers every record: a list with n texts for each, the same on all ranks and for any number of ranks. `numbers`
    are the records' numbers in their file (default 0, 1, 2, ...): randomness belongs to the number, so that a file can
    be done in parts."""
    numbers = range(len(records)) if numbers is None else numbers
    rows = share(list(range(len(records))))
    prompts = [prompt_ids(tokenizer, records[i], form) for i in rows]
    with tqdm(total=n * len(rows), desc=label, disable=rank() > 0 or not label, leave=False, unit="response",
              delay=1) as bar:
        ids = generate(model, prompts, max_new_tokens, tokenizer.eos, n=n, temperature=temperature, top_p=top_p,
                       top_k=top_k, seed=seed, rows=[numbers[i] for i in rows], batch_size=batch_size,
                       progress=bar.update) if rows else []
    texts = dict(gather_lists(zip(rows, [[tokenizer.decode_response(y) for y in ys] for ys in ids])))
    return [texts[i] for i in range(len(records))]


@torch.no_grad()
def reward_scores(model, sequences, batch_size=64, label=None):
    """A reward model's scores of lists of ids, prompt + response: one float each, the same on all ranks."""
    mine = sorted(share(range(len(sequences))), key=lambda i: len(sequences[i]))      # like lengths together
    device, found = model.score.weight.device, {}
    with tqdm(total=len(mine), desc=label, disable=rank() > 0 or not label, leave=False, unit="response", delay=1) as bar:
        for part in chunks(mine, batch_size) if mine else []:
            found.update(zip(part, model(*pad([sequences[i] for i in part], device)).tolist()))
            bar.update(len(part))
    found = dict(gather_lists(found.items()))
    return [found[i] for i in range(len(sequences))]


def score_texts(directory, records, texts, form=None, dtype="float32", device="cpu", batch_size=64, most=None):
    """The scores that the reward model in `directory` gives to lists of texts, one list for each record. A text counts
    as ended, EOS is scored with it, unless it has `most` tokens: there it was cut off."""
    tokenizer, form = Tokenizer.from_pretrained(directory), model_format(directory, form)
    model = RewardModel.from_pretrained(directory, DTYPES[dtype], device)
    sequences = [prompt_ids(tokenizer, {**r, "reward_token": None}, form) + tokenizer.encode_response(text)[:most]
                 for r, mine in zip(records, texts) for text in mine]
    flat = iter(reward_scores(model, sequences, batch_size, "scoring"))
    return [[next(flat) for _ in mine] for mine in texts]


# ----------------------------------------------------------------------------------------------------------------------
# The API client: chat completions at any OpenAI-compatible address, to be left alone overnight

# US dollars per million tokens (prompt, completion), with the month that the price is from: check yours, --price
# overrides. Names match exactly: a "gpt-4o" priced as "gpt-4" would be off by ten.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60, "2024-07"), "gpt-4o": (2.50, 10.00, "2024-10"), "gpt-4": (30.00, 60.00, "2023-06"),
    "gpt-4-turbo": (10.00, 30.00, "2024-04"), "gpt-3.5-turbo": (0.50, 1.50, "2024-01"),
}
HUMAN_PRICE = 0.30           # dollars for one pair compared by a crowd worker (AlpacaFarm section 3.4)
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}    # worth another try
FOR_ALL = {401, 402, 403, 404}       # wrong key, no credit, no access, no such model or address: no call can succeed


class Answer(NamedTuple):
    text: str | None         # None: failed, for this reason
    reason: str = ""


def estimate_tokens(text):
    """A rough count for estimates: four characters to a token."""
    return len(text) // 4 + 1


class Cache:
    """Answers that have been paid for: a JSONL file that each is appended to, and flushed, as it comes. The key is a
    hash of everything that decides the answer. A line torn by a crash is skipped, its answer asked for again."""

    def __init__(self, path):
        self.path, self.answers, self.file = Path(path), {}, None
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):    # not at U+2028
                try:
                    entry = json.loads(line)
                    self.answers[entry["key"]] = entry["text"]
                except (ValueError, KeyError, TypeError):
                    continue

    @staticmethod
    def key(*parts):
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def add(self, key, text):
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
            self.file = open(self.path, "a", encoding="utf-8")
            self.file.write("\n" if torn else "")
        self.answers[key] = text
        self.file.write(json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n")
        self.file.flush()


class Client:
    """Sends chat completions, a bounded number at once, and keeps every answer in a Cache: a second run, or one after a
    crash, pays only for what is missing. Failures are never stored. The key is read from the environment by the caller
    and shown nowhere: it is cut out of every message. Each thread stores its answer before it asks again, so that a
    crash costs `at_once` answers at most."""

    def __init__(self, base_url, cache, key="", at_once=32, timeout=120.0, tries=8, price=None, max_cost=math.inf):
        self.url, self.key, self.cache = base_url.rstrip("/") + "/chat/completions", key.strip(), cache
        self.at_once, self.timeout, self.tries, self.price, self.max_cost = at_once, timeout, tries, price, max_cost
        self.lock, self.local = threading.Condition(), threading.local()
        self.stop, self.fatal = threading.Event(), ""
        self.reserved = []                                                  # dollars of the calls under way, at most
        self.stats = {"calls": 0, "answered": 0, "from_cache": 0, "retries": {}, "unanswered": {}, "prompt_tokens": 0,
                      "completion_tokens": 0, "cost": 0.0}
        if not re.fullmatch(r"[!-~]*", self.key):                           # http.client's own complaint would show it
            raise InputError("the API key has a space or a character outside ASCII in it: it was not copied whole")
        if max_cost < math.inf and price is None:
            raise InputError("--max-cost needs to know prices: give --price PROMPT COMPLETION (dollars per 1M tokens)")

    def cost(self, prompt_tokens, completion_tokens):
        return (prompt_tokens * self.price[0] + completion_tokens * self.price[1]) / 1e6 if self.price else 0.0

    def missing(self, payloads):
        """The payloads that are not in the cache, each once: {key: payload}."""
        keyed = {Cache.key(self.url, p): p for p in payloads}
        return {k: p for k, p in keyed.items() if k not in self.cache.answers}

    def estimate(self, payloads):
        """(calls, prompt tokens, most completion tokens, most dollars) of what would be sent."""
        todo = self.missing(payloads).values()
        prompt = sum(estimate_tokens(m["content"]) + 4 for p in todo for m in p["messages"])
        completion = sum(p["max_tokens"] for p in todo)
        return len(todo), prompt, completion, self.cost(prompt, completion)

    def complete(self, payloads, label="asking", whole=False):
        """Answers to all payloads, in order, each an Answer. Raises InputError for a fault that no call can escape,
        after keeping what has come in."""
        keys = [Cache.key(self.url, p) for p in payloads]
        todo = self.missing(payloads)
        self.stats["from_cache"] += len(set(keys)) - len(todo)
        failures = {}
        with tqdm(total=len(todo), desc=label, delay=1) as bar, \
                concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            futures = {pool.submit(self._ask, k, payload, whole): k for k, payload in todo.items()}
            try:
                for future in concurrent.futures.as_completed(futures):
                    answer = future.result()
                    if answer.text is None:
                        failures[futures[future]] = answer
                    bar.update()
            except BaseException:                                           # Ctrl-C: let go of the waiting threads
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self.fatal:
            kept = len(todo.keys() & self.cache.answers.keys())
            raise InputError(f"{self.url}: {self.fatal} ({kept} answers of this run are kept in {self.cache.path})")
        for answer in failures.values():
            kind = answer.reason.split(":")[0]
            self.stats["unanswered"][kind] = self.stats["unanswered"].get(kind, 0) + 1
        return [Answer(self.cache.answers[k]) if k in self.cache.answers else failures[k] for k in keys]

    def _ask(self, key, payload, whole):
        """One payload, tried until it is answered (and stored) or hopeless. Runs in a thread."""
        seen = []
        for attempt in range(self.tries):
            if refusal := self._reserve(payload):
                return Answer(None, f"not sent: {refusal}")
            try:
                answer, fault, wait = self._once(payload, whole)
                if answer is not None and answer.text is not None:
                    with self.lock:
                        self.cache.add(key, answer.text)
            finally:
                with self.lock:
                    self.reserved.remove(self._most(payload))
                    self.lock.notify_all()
            if answer is not None:
                return answer
            seen.append(fault)
            if attempt + 1 < self.tries:
                with self.lock:
                    self.stats["retries"][fault] = self.stats["retries"].get(fault, 0) + 1
                # Exponential backoff with jitter, or what the server asks for: never less than it says.
                self.stop.wait(max(wait, min(60.0, 0.5 * 2 ** attempt) * random.uniform(0.5, 1.0)))
        if set(seen) == {"dropped connection"} and not self.stats["answered"]:
            self.fatal = f"no connection in {self.tries} tries, and none before: is the address right?"
            self.stop.set()
        return Answer(None, f"gave up: {self.tries} tries ended in {', '.join(sorted(set(seen)))}")

    def _most(self, payload):
        """Dollars that one call can cost: a token has one byte at least, and a message a few tokens around it."""
        prompt = sum(len(m["content"].encode("utf-8", "replace")) + 16 for m in payload["messages"])
        return self.cost(prompt, payload["max_tokens"])

    def _reserve(self, payload):
        """Sets aside what a call can cost; returns why it must not be sent, or "". What the calls under way leave of
        their share is known only when they end, so it waits for them before it refuses."""
        most = self._most(payload)
        with self.lock:
            while self.reserved and self.stats["cost"] + sum(self.reserved) + most > self.max_cost:
                self.lock.wait()
            if self.stop.is_set():
                return "stopped"
            if self.stats["cost"] + most > self.max_cost:
                return f"--max-cost {self.max_cost} could be passed"
            self.reserved.append(most)
            self.stats["calls"] += 1
        return ""

    def _once(self, payload, whole):
        """One request: (Answer, "", 0) when that settles it, else (None, kind of fault, seconds the server wants)."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()                         # one a thread: connections stay open
            self.local.session.auth = self._sign
        try:
            r = self.local.session.post(self.url, json=payload, timeout=(10, self.timeout))
        except requests.Timeout as error:
            if not isinstance(error, requests.ConnectTimeout):              # the server may answer later, and charge it
                self._charge(self._most(payload))
            return None, "time-out", 0.0
        except requests.RequestException:
            return None, "dropped connection", 0.0
        if r.status_code != 200:
            said = re.sub(r"\s+", " ", self._hide(r.text))[:300]
            if r.status_code in FOR_ALL or r.status_code == 429 and "insufficient_quota" in r.text:
                self.fatal = f"HTTP {r.status_code}: {said}"
                self.stop.set()
                return Answer(None, self.fatal), "", 0.0
            if r.status_code in TRANSIENT:
                return None, f"HTTP {r.status_code}", retry_after(r.headers.get("Retry-After"))
            return Answer(None, f"HTTP {r.status_code}: {said}"), "", 0.0
        try:
            body = r.json()
            text, usage = body["choices"][0]["message"]["content"] or "", body.get("usage") or {}
            text = text.encode("utf-8", "replace").decode()                 # half an emoji cannot be written
            prompt = usage.get("prompt_tokens") or sum(estimate_tokens(m["content"]) for m in payload["messages"])
            completion = usage.get("completion_tokens") or estimate_tokens(text)
            cost = self.cost(prompt, completion)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            self._charge(self._most(payload))
            return None, "malformed answer", 0.0
        self._charge(cost, prompt, completion, answered=bool(text.strip()))      # an empty one is charged too
        if whole and body["choices"][0].get("finish_reason") == "length":
            return Answer(None, f"cut off: the answer has more than {payload['max_tokens']} tokens"), "", 0.0
        return (Answer(text), "", 0.0) if text.strip() else (None, "empty answer", 0.0)

    def _charge(self, cost, prompt=0, completion=0, answered=False):
        with self.lock:
            self.stats["answered"] += answered
            self.stats["prompt_tokens"] += prompt
            self.stats["completion_tokens"] += completion
            self.stats["cost"] += cost

    def _sign(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _hide(self, text):
        return text.replace(self.key, "[key]") if self.key else text


def retry_after(value):
    """Seconds that a Retry-After header asks for (a number or a date), at most ten minutes; 0 if it says nothing."""
    try:
        seconds = float(value)
    except TypeError:
        return 0.0
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(value)
            seconds = (then - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(600.0, max(0.0, seconds)) if math.isfinite(seconds) else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of the API judges. Texts go in by fill_template and into messages of their own role, so no output can pose as
# another field or close a message.

REFINE_USER = ("Instruction:\n{instruction}\n\nAn earlier answer:\n{output}\n\n"
               "What a reviewer said of it:\n{judgment}\n\n"
               "Write the answer anew so that the reviewer would have nothing to object to. Give only the answer.")


def read_judgment(text):
    """A judge's reply as a judgment: None where it calls the answer perfect and says nothing else (models like to do so
    in a whole sentence, which the published CUT data counts as criticism)."""
    said = text.strip().strip("\"'*.! ").lower()
    return None if re.fullmatch(r"((the|this) (response|answer) is |it is |it's )?perfect", said) else text.strip()


def whole_instruction(record):
    extra = record.get("input") or ""
    return f"{record['instruction']}\n\n{extra}" if extra else record["instruction"]


def chat(model, user, system="", **settings):
    """The payload of one chat completion."""
    messages = [{"role": "system", "content": system}] if system else []
    return {"model": model, "messages": [*messages, {"role": "user", "content": user}], **settings}


class Annotator(NamedTuple):
    """One prompted annotator of the pool. `slot` is which of the three models it runs on."""
    name: str
    slot: str
    style: str           # how it answers: word, list (one line a pair) or json (with a reason first)
    pairs: int           # pairs in one prompt
    persona: str = ""
    example: bool = False        # a worked example comes first


CAREFUL = "You value correctness above all: a fluent answer with a false statement loses."
ELEGANT = "You are widely read, enjoy full and well-built prose, and notice every slip of grammar."
HASTY = "You are in a hurry, like short answers and lists, and when in doubt you take the first."
FRIENDLY = "You like an answer that is warm and easy to follow."
TERSE = "You like an answer that says what was asked and stops."

# AlpacaFarm's variation in our own words: 5 + 4 + 4 annotators on three models, 6 of 13 with several pairs a prompt.
ANNOTATORS = [
    Annotator("strong-1", "strong", "json", 4, example=True), Annotator("strong-2", "strong", "list", 5, ELEGANT, True),
    Annotator("strong-3", "strong", "list", 5, example=True), Annotator("strong-4", "strong", "word", 1, CAREFUL, True),
    Annotator("strong-5", "strong", "list", 5, HASTY, True),
    Annotator("medium-1", "medium", "word", 1, example=True), Annotator("medium-2", "medium", "json", 1, CAREFUL),
    Annotator("medium-3", "medium", "word", 1, FRIENDLY, True), Annotator("medium-4", "medium", "word", 1),
    Annotator("basic-1", "basic", "list", 4, example=True), Annotator("basic-2", "basic", "word", 1, TERSE, True),
    Annotator("basic-3", "basic", "list", 5, FRIENDLY, True), Annotator("basic-4", "basic", "word", 1),
]
SINGLE = [Annotator("single", "strong", "json", 1, CAREFUL)]               # one low-variance judge

# style: (what it is told, pattern of "(a) is better", of "(b) is better", the answer in its example, tokens a pair)
STYLES = {
    "word": ("Answer with one line and nothing else: `Output (a)` or `Output (b)`.",
             r"Output \(a\)", r"Output \(b\)", "Output (b)", 20),
    "list": ("Answer with one line for each pair, in order: `Output (a)` or `Output (b)`. Write nothing else.",
             r"(?m)^ ?Output \(a\)", r"(?m)^ ?Output \(b\)", "Output (b)", 20),
    "json": ('Answer with one line of JSON for each pair, in order: '
             '{"reason": "a few words", "a_is_better": true or false}',
             r'"a_is_better"\s*:\s*true', r'"a_is_better"\s*:\s*false',
             '{"reason": "(a) is wrong: 2 plus 2 is 4", "a_is_better": false}', 80),
}
PAIR = "Pair {number}\nInstruction:\n{instruction}\n\nOutput (a):\n{a}\n\nOutput (b):\n{b}\n"
DUMMY = {"instruction": "1+1=", "output_1": "2", "output_2": "3"}          # fills up the last prompt of several pairs


def find_labels(text, first, second):
    """All matches of two patterns, in order: 1 for `first`, 2 for `second`. The text is never stripped: a pattern may
    need the line break in front of it."""
    return [1 if m["one"] is not None else 2
            for m in re.finditer(f"(?P<one>{first})|(?P<two>{second})".replace("(?m)", ""), text, re.M)]


def annotator_prompt(annotator, pairs, model):
    """The chat payload that asks an annotator about its pairs (records with output_1, output_2, in the order shown)."""
    told, _, _, answer, tokens = STYLES[annotator.style]
    system = " ".join(filter(None, ["You compare two outputs for the same instruction and say which is better.",
                                    annotator.persona, told]))
    if annotator.example:
        system += ("\n\nAn example:\n" + fill_template(PAIR, number="1", instruction="What is 2 plus 2?", a="It is 5.",
                                                  b="4") + f"\n{answer}")
    shown = [fill_template(PAIR, number=str(i), instruction=whole_instruction(r), a=r["output_1"], b=r["output_2"])
             for i, r in enumerate(pairs, 1)]
    return chat(model, "\n".join(shown), system, temperature=1.0, max_tokens=tokens * annotator.pairs)


def group_prompts(shown, who, models, seed):
    """Pairs and their annotators -> [(annotator, indices of its pairs)], payloads: one prompt for each group."""
    groups = []
    for annotator in dict.fromkeys(who):                                    # in order of appearance
        mine = [i for i, a in enumerate(who) if a == annotator]
        random.Random(f"shuffle{annotator.name}{seed}").shuffle(mine)
        groups += [(annotator, mine[k:k + annotator.pairs]) for k in range(0, len(mine), annotator.pairs)]
    return groups, [annotator_prompt(a, [shown[i] for i in part] + [DUMMY] * (a.pairs - len(part)), models[a.slot])
                    for a, part in groups]


def ask_annotators(client, models, seed):
    """Returns annotate(shown, who) for `prefer`, answered by an API: pairs in the order shown and their annotators ->
    (labels 1, 2 or None, reasons for None). A reply with another number of labels than pairs loses all of them."""
    def annotate(shown, who):
        groups, payloads = group_prompts(shown, who, models, seed)
        labels, reasons = [None] * len(shown), [""] * len(shown)
        for (annotator, part), answer in zip(groups, client.complete(payloads, "annotating")):
            _, first, second, _, _ = STYLES[annotator.style]
            found = find_labels(answer.text, first, second) if answer.text is not None else []
            for k, i in enumerate(part):
                if len(found) == annotator.pairs:
                    labels[i] = found[k]
                else:
                    reasons[i] = answer.reason or f"not understood: {len(found)} labels for {annotator.pairs} pairs"
        return labels, reasons
    return annotate


def preference_from_logprobs(logp_1, logp_2):
    """Of a judge that names its choice in one token: 2 - p(1) / (p(1) + p(2)), so preference - 1 = P(output 2 better).
    A token outside the reported ones counts as -inf; both outside is no answer (None)."""
    if max(logp_1, logp_2) == -math.inf:
        return None
    return 2 - 1 / (1 + math.exp(min(700.0, logp_2 - logp_1)))


# ----------------------------------------------------------------------------------------------------------------------
# Preferences: who annotates, noise, order, and the simulated annotators


class Simulated(NamedTuple):
    """A stand-in for an API annotator in the built-in world: picks the answer with fewer errors with probability
    `accuracy`, its log-odds shifted by `length` for an answer that is longer by five words or more and by `position`
    for the one shown first."""
    name: str
    accuracy: float = 1.0
    length: float = 0.0
    position: float = 0.0

    def choose(self, pair, rng):
        """1 or 2 for a pair in the order shown."""
        errors = count_errors(pair["output_2"], pair["reference"]) - count_errors(pair["output_1"], pair["reference"])
        longer = len(units(pair["output_1"])) - len(units(pair["output_2"]))
        accuracy = min(max(self.accuracy, 1e-9), 1 - 1e-9)
        odds = (errors > 0) - (errors < 0)
        odds = odds * math.log(accuracy / (1 - accuracy)) + self.length * max(-1, min(1, longer / 5)) + self.position
        return 1 if rng.random() < 1 / (1 + math.exp(-odds)) else 2


def simulated_pool(accuracy=None, length=0.0, position=0.0):
    """The 13 of ANNOTATORS, offline: the strong agree with the truth more often than the basic, whose eyes length and
    position catch more. With `accuracy` given, all 13 have that accuracy and those biases."""
    if accuracy is not None:
        return [Simulated(a.name, accuracy, length, position) for a in ANNOTATORS]
    kinds = {"strong": (0.95, 0.2, 0.1), "medium": (0.85, 0.4, 0.3), "basic": (0.75, 0.6, 0.5)}
    return [Simulated(a.name, *kinds[a.slot]) for a in ANNOTATORS]


def ask_simulated(seed):
    """Returns annotate(shown, who) for `prefer`, answered by Simulated annotators."""
    def annotate(shown, who):
        return [a.choose(r, random.Random(f"{a.name}{r['instruction']}{r['output_1']}{r['output_2']}{seed}"))
                for r, a in zip(shown, who)], [""] * len(shown)
    return annotate


def pair_up(records, seed):
    """Records with n outputs -> one pair an instruction: equal texts dropped, a random text against its partner in a
    random derangement, which is any other text with equal chance. Records with fewer than two texts are left out."""
    pairs, seen, alike = [], set(), 0
    for r in records:
        texts, asked = list(dict.fromkeys(r["output"])), (r["instruction"], r.get("input") or "")
        if len(texts) < 2:
            alike += 1
        elif asked not in seen:
            seen.add(asked)
            a, b = random.Random(f"pair{''.join(asked)}{seed}").sample(texts, 2)
            pairs.append({**{k: v for k, v in r.items() if k != "output"}, "output_1": a, "output_2": b})
    print(f"{len(pairs)} pairs from {len(records)} records; left out {alike} whose outputs are all alike and "
          f"{len(records) - alike - len(pairs)} with an instruction that came before")
    return pairs


def distinct(pairs):
    """Each pair once."""
    kept = {(r["instruction"], r.get("input") or "", r["output_1"], r["output_2"]): r for r in pairs}
    if len(kept) < len(pairs):
        print(f"left out {len(pairs) - len(kept)} pairs that are there twice")
    return list(kept.values())


def draw(pairs, pool, noise, seed):
    """Decides, before anyone is asked, who annotates which pair, which labels are coins, and the order shown.

    Returns (labels: those that need no asking, None for the others; asked: [(index, annotator, switched, pair shown)]).
    All draws are seeded by the instruction's text (never by hash(), which differs between processes): an instruction
    gets the same annotator, order and coin for every model that is compared on it."""
    labels, asked = [None] * len(pairs), []
    for i, r in enumerate(pairs):
        text = r["instruction"] + (r.get("input") or "")
        who = random.Random(f"annotator{text}{seed}").choice(pool)
        weights = [1 - 2 * noise, noise, noise]                             # a fair coin with probability 2 * noise
        coin, = random.Random(f"noisy_preference{text}{seed}").choices([None, 1, 2], weights) if noise else [None]
        switched, = random.Random(f"is_switched_outputs{text}{seed}").choices([False, True])
        if r["output_1"] == r["output_2"]:
            labels[i] = (1.5, "equal texts")
        elif coin is not None:
            labels[i] = (coin, "noise")
        else:
            shown = {**r, "output_1": r["output_2"], "output_2": r["output_1"]} if switched else r
            asked.append((i, who, switched, shown))
    return labels, asked


def prefer(pairs, pool, annotate, noise=0.0, seed=0):
    """Pairs -> (labelled pairs, failed pairs), as AlpacaFarm does it (section 3.2): duplicates are dropped; annotator,
    noise and order are drawn (a pair whose label is a coin is never sent, so it costs nothing); the rest is asked; the
    order is undone by 3 - label. Equal texts are a tie, 1.5. What failed is never a label."""
    pairs = distinct(pairs)
    labels, asked = draw(pairs, pool, noise, seed)
    found, reasons = annotate([shown for *_, shown in asked], [who for _, who, _, _ in asked])
    failed = []
    for (i, who, switched, _), label, reason in zip(asked, found, reasons):
        if label is None:
            failed.append({**pairs[i], "annotator": who.name, "reason": reason})
        else:
            labels[i] = (3 - label if switched else label, who.name)
    switched = {i: s for i, _, s, _ in asked}
    return [{**r, "preference": label[0], "annotator": label[1], "switched": switched.get(i, False)}
            for i, (r, label) in enumerate(zip(pairs, labels)) if label is not None], failed


def built_in_preferences(model, seed, noise, device):
    """The file of the built-in world's preferences, made when it is not there: of four answers of the SFT model in the
    directory `model` to each of 30,000 instructions, two different ones, unless they have equally many errors (a tie).
    The one with fewer is preferred, except that 2 * noise of the labels are coins: AlpacaFarm's noise, which flips a
    quarter of them at 0.25."""
    path = Path(f"out/world-{seed}", f"preferences-{noise}.jsonl")
    if path.is_file():
        return path
    tokenizer, policy = Tokenizer.from_pretrained(model), LLaMA.from_pretrained(model, device=device)
    records = World(seed).instructions("train", 30000, "preferences")
    texts = sample_responses(policy, tokenizer, records, "short", max_new_tokens=32, temperature=1.0, seed=seed, n=4,
                             label="sampling pairs")
    keep = ("id", "instruction", "input", "reference")
    pairs = pair_up([{**{k: r[k] for k in keep}, "output": [y for y in ys if y.strip()]}
                     for r, ys in zip(records, texts)], seed)
    pairs = [r for r in pairs if len({count_errors(r[k], r["reference"]) for k in ("output_1", "output_2")}) > 1]
    labelled, _ = prefer(pairs, simulated_pool(accuracy=1.0), ask_simulated(seed), noise, seed)
    if rank() == 0:
        write_json_lines(path, labelled)
    barrier()                                                               # the others wait until the file is there
    print0(f"{path}: {len(labelled)} pairs of different answers to {len(records)} instructions")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# The verbs


def model_format(directory, form=None):
    """The prompt format of a model directory: as given, or as its config.json records."""
    form = form or read_config(directory, quiet=True)[1].get("prompt_format")
    if form is None:
        raise InputError(f"{directory}/config.json does not record a prompt format: give --format, one of "
                         f"{', '.join(FORMATS)}")
    return form


def conditioned(directory, records):
    """The records with the control token that the model in `directory` was trained to be asked with, if it was."""
    token = read_config(directory, quiet=True)[1].get("reward_token")
    return records if token is None else [{**r, "reward_token": token} for r in records]


def make_client(args, models=()):
    """The client that the flags describe. Of several models the highest prices count, so that --max-cost holds."""
    known = [PRICES[m][:2] if m in PRICES else None for m in models or [args.api_model]]
    price = tuple(args.price) if args.price else None if None in known else tuple(map(max, zip(*known)))
    return Client(args.api, Cache(args.cache or f"{args.out}.cache.jsonl"), os.environ.get(args.key_env, ""),
                  args.at_once, args.timeout, args.tries, price, math.inf if args.max_cost is None else args.max_cost)


def answers(args, asks, n=1, system="", label="sampling", whole=False):
    """Answers to asks (records with instruction and input) by --api or --model: a list of n Answers each (None after a
    dry run), and the client (None for a model). They are kept as they come: a rerun goes on where it stopped. Of an
    API's answers that were cut off, `whole` ones are failures."""
    if args.api:
        client = make_client(args)
        payloads = [chat(args.api_model, whole_instruction(r), system, temperature=args.temperature, top_p=args.top_p,
                         max_tokens=args.max_new_tokens, seed=1000 * args.seed + j) for r in asks for j in range(n)]
        if args.dry_run:
            return dry_run(client, payloads, len(asks)), client
        found = client.complete(payloads, label, whole)
        return [found[n * i:n * (i + 1)] for i in range(len(asks))], client
    if not args.model:
        raise InputError("who answers? give --model DIR, or --api URL and --api-model NAME")
    device = setup_device(args.device)
    tokenizer, form = Tokenizer.from_pretrained(args.model), model_format(args.model, args.format)
    cache = Cache(args.cache or f"{args.out}.cache.jsonl") if args.out else Cache(os.devnull)
    weights = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in Path(args.model).glob("*model*"))
    settings = [weights, form, system, n, args.temperature, args.top_p, args.top_k, args.max_new_tokens, args.seed]
    asks = conditioned(args.model, asks)
    asks = [{**r, "instruction": f"{system}\n\n{r['instruction']}" if system else r["instruction"]} for r in asks]
    keys = [Cache.key(settings, i, whole_instruction(r)) for i, r in enumerate(asks)]
    todo = [i for i, k in enumerate(keys) if k not in cache.answers]
    barrier()                                                    # no rank writes before all have read
    model = LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device) if todo else None
    with tqdm(total=len(todo), desc=label, disable=rank() > 0, delay=1, unit="record") as bar:
        for part in chunks(todo, max(1, 4 * args.batch_size // n)):
            texts = sample_responses(model, tokenizer, [asks[i] for i in part], form, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, seed=args.seed, n=n, top_p=args.top_p, top_k=args.top_k,
                            batch_size=args.batch_size, numbers=part, label=None)
            for i, ys in zip(part, texts):
                cache.answers[keys[i]] = ys
                if rank() == 0 and args.out:
                    cache.add(keys[i], ys)
            bar.update(len(part))
    return [[Answer(y) for y in cache.answers[k]] for k in keys], None


def dry_run(client, payloads, examples, free=0):
    """Prints what sending these payloads would cost at most, and returns None. `free` examples need no call."""
    calls, prompt, completion, cost = client.estimate(payloads)
    print(f"{examples + free} examples: {free} need no call, {len(payloads) - calls} prompts are in the cache, {calls} "
          f"calls to send; about {prompt} prompt tokens, at most {completion} completion tokens")
    if client.price is None:
        print("cost unknown: give --price PROMPT COMPLETION, in dollars per million tokens")
        return
    print(f"at ${client.price[0]} and ${client.price[1]} per million tokens: at most ${cost:.2f}, "
          f"${1000 * cost / max(1, examples + free):.2f} per 1,000 examples")


def price_table(per_pair, human=HUMAN_PRICE):
    """What pairs cost when people or a judge at per_pair dollars compares them. With 25 % noise half of the labels are
    coins that nobody is asked for. With AlpacaFarm's pool at $0.012 a pair: 25, 50 and 46 times (its paper says 45)."""
    rows = [("1,000 pairs, without noise", 1000, 1000), ("1,000 pairs, noise 0.25", 1000, 500),
            ("AlpacaFarm: 9,691 training pairs, noise 0.25, and 805 for evaluation", 9691 + 805, 9691 / 2 + 805)]
    return "\n".join(f"{name:<70} people ${pairs * human:8,.2f}   judge ${asked * per_pair:8,.4f}   "
                     f"{pairs * human / (asked * per_pair):,.0f} times" for name, pairs, asked in rows)


def finish(args, records, failed, client=None, **more):
    """Writes the records, the failed ones apart with their reasons, and the figures of the run; prints a summary."""
    if rank():
        return 0
    write_json_lines(args.out, records)
    failed_path = Path(f"{args.out}.failed.jsonl")
    failed_path.unlink(missing_ok=True)
    if failed:
        write_json_lines(failed_path, failed)
    reasons = {}
    for r in failed:
        kind = r["reason"].split(":")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    stats = {"records": len(records), "failed": len(failed), "failed_by_reason": reasons, **more}
    if client:
        stats.update(client.stats, cost_per_1000=1000 * client.stats["cost"] / max(1, len(records)))
    write_json(f"{args.out}.stats.json", stats)
    print(f"{args.out}: {len(records)} records" + (f", {len(failed)} failed ({failed_path})" if failed else ""))
    print(json.dumps(stats))
    return 0


def sort_out(records, found):
    """One Answer each -> [(record, text)] of those that have one, and the failed records with their reasons."""
    pairs = [(r, a) for r, (a,) in zip(records, found)]
    return ([(r, a.text) for r, a in pairs if (a.text or "").strip()],
            [{**r, "reason": a.reason or "empty answer"} for r, a in pairs if not (a.text or "").strip()])


def sample(args):
    if bool(args.prompt) == bool(args.data) or bool(args.data) != bool(args.out):
        raise InputError("give either --prompt TEXT, or --data FILE and --out FILE")
    records = read_instructions(args.data) if args.data else [{"instruction": args.prompt, "input": ""}]
    if bool(args.best_of) != bool(args.reward):
        raise InputError("--best-of N and --reward DIR, the reward model that chooses, belong together")
    if args.prompt and args.api:
        args.cache = args.cache or os.devnull
    found, client = answers(args, records, args.best_of or args.outputs)
    if found is None:
        return 0
    done, failed, empty = [], [], 0
    for r, mine in zip(records, found):
        texts = [a.text for a in mine]
        empty += sum(text is not None and not text.strip() for text in texts)
        if None in texts or not "".join(texts).strip():
            failed.append({**r, "reason": next((a.reason for a in mine if a.text is None), "empty answer")})
        else:
            done.append({**r, "output": texts if len(texts) > 1 else texts[0],
                         "generator": args.api_model or args.model})
    if args.best_of:
        device = setup_device(args.device)
        texts = [r["output"] if args.best_of > 1 else [r["output"]] for r in done]
        for r, mine, scores in zip(done, texts, score_texts(args.reward, done, texts, dtype=args.dtype, device=device,
                                                            batch_size=args.batch_size, most=args.max_new_tokens)):
            reward, k = max((s, -i) for i, s in enumerate(scores) if mine[i].strip())       # the first, if equal
            r.update(output=mine[-k], reward=reward, generator=f"{r['generator']}, best of {args.best_of}")
    if args.prompt:
        outputs = [r["output"] if isinstance(r["output"], list) else [r["output"]] for r in done]
        print0("\n".join([text for mine in outputs for text in mine] + [f"failed: {r['reason']}" for r in failed]))
        return 0
    return finish(args, done, failed, client, empty=empty)


def check_by(args):
    """--by api needs an API, --by model a model; both may be given: --by decides."""
    if not (args.api if args.by == "api" else args.model):
        needs = "--api URL and --api-model NAME" if args.by == "api" else "--model DIR"
        raise InputError(f"--by {args.by} needs {needs}")
    args.api = args.api if args.by == "api" else None


def judge(args):
    if args.by in ("reference", "points"):
        style = JUDGES["points" if args.by == "points" else "corrects"]
        records = read_outputs(args.data, reference=True)
        return finish(args, [{**r, "judgment": style(r["output"], r["reference"])} for r in records], [])
    check_by(args)
    records = read_outputs(args.data)
    asks = [{"instruction": fill_template(JUDGE_USER, instruction=whole_instruction(r), output=r["output"]), "input": ""}
            for r in records]
    found, client = answers(args, asks, system=JUDGE_SYSTEM, label="judging", whole=True)
    if found is None:
        return 0
    done, failed = sort_out(records, found)
    done = [{**r, "judgment": read_judgment(text)} for r, text in done]
    good = sum(r["judgment"] is None for r in done)
    return finish(args, done, failed, client, perfect=good, criticized=len(done) - good)


def refine(args):
    records = [r for r in read_judged(args.data) if r["judgment"] is not None]
    if args.by == "reference":
        for i, r in enumerate(records):
            if not isinstance(r.get("reference"), str):
                raise InputError(f"{args.data}: judged response {i} has no key 'reference', the right answer that "
                                 "--by reference takes corrections from; use --by model or --by api")
        return finish(args, [refined(r, corrected(r["output"], r["reference"])) for r in records], [])
    check_by(args)
    asks = [{"instruction": fill_template(REFINE_USER, instruction=whole_instruction(r), output=r["output"],
                                    judgment=r["judgment"]), "input": ""} for r in records]
    found, client = answers(args, asks, label="refining", whole=True)
    if found is None:
        return 0
    done, failed = sort_out(records, found)
    return finish(args, [refined(r, text.strip()) for r, text in done], failed, client)


def refined(record, output):
    """A judged record after its refinement: a demonstration (ILF-MLE), and with `rejected` a pair (ILF-DPO)."""
    return {**record, "judgment": None, "rejected": record["output"], "was_judged": record["judgment"],
            "output": output}


def pairs_of(args):
    """The pairs that `prefer` is about: of two files, of one with several outputs each, or given as they are."""
    if not args.against:
        records = read_pairs(args.data)
        return pair_up(records, args.seed) if "output" in records[0] else records
    first = {(r["instruction"], r.get("input") or ""): r["output"] for r in read_outputs(args.against)}
    mine = [(r, first.get((r["instruction"], r.get("input") or ""))) for r in read_outputs(args.data)]
    pairs = [{**r, "output_1": baseline, "output_2": r["output"]} for r, baseline in mine if baseline is not None]
    print(f"{len(pairs)} of {len(mine)} instructions of {args.data} are in {args.against}")
    return pairs


def prefer_verb(args):
    pairs, client = pairs_of(args), None
    if args.by == "api":
        if not args.api:
            raise InputError("--by api needs --api URL and --api-model NAME")
        models = dict.fromkeys(("strong", "medium", "basic"), args.api_model)
        for given in args.models:
            slot, _, name = given.partition("=")
            if slot not in models or not name:
                raise InputError(f"--models {given}: expected strong=NAME, medium=NAME or basic=NAME")
            models[slot] = name
        pool = SINGLE if args.single else ANNOTATORS
        client = make_client(args, [models[a.slot] for a in pool])
        annotate = ask_annotators(client, models, args.seed)
        if args.dry_run:
            pairs = distinct(pairs)
            _, asked = draw(pairs, pool, args.noise, args.seed)
            shown, who = [r for *_, r in asked], [annotator for _, annotator, _, _ in asked]
            _, payloads = group_prompts(shown, who, models, args.seed)
            dry_run(client, payloads, len(asked), free=len(pairs) - len(asked))
            if client.price and payloads and client.estimate(payloads)[3]:
                print(price_table(client.estimate(payloads)[3] / len(asked)))
            return 0
    else:
        missing = [i for i, r in enumerate(pairs) if not isinstance(r.get("reference"), str)]
        if missing:
            raise InputError(f"{args.data}: pair {missing[0]} has no key 'reference', the right answer, which --by "
                             f"{args.by} compares with; use --by api for texts without one")
        truth = args.by == "reference"
        pool = simulated_pool(1.0 if truth else args.accuracy, args.length_bias, args.position_bias)
        pool, annotate = (pool[:1] if args.single else pool), ask_simulated(args.seed)
    labelled, failed = prefer(pairs, pool, annotate, args.noise, args.seed)
    coins = sum(r["annotator"] == "noise" for r in labelled)
    understood = sum(r["annotator"] not in ("noise", "equal texts") for r in labelled)
    misread = sum(r["reason"].startswith("not understood") for r in failed)
    more = {"coins": coins, "ties": sum(r["preference"] == 1.5 for r in labelled),
            "parse_rate": understood / max(1, understood + misread)}
    if args.against and labelled:
        more["win_rate"], more["win_rate_se"] = mean_and_se([r["preference"] - 1 for r in labelled])
    return finish(args, labelled, failed, client, **more)


VERBS = {"sample": sample, "judge": judge, "prefer": prefer_verb, "refine": refine}


def parse(argv):
    """sub-commands share three groups of flags; without a sub-command it is `sample`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] not in [[v] for v in VERBS] + [["-h"], ["--help"]]:
        argv = ["sample", *argv]
    answer, api, files = (argparse.ArgumentParser(add_help=False) for _ in range(3))
    files.add_argument("--data", help="JSON or JSONL to read")
    files.add_argument("--out", help="JSONL to write; beside it .failed.jsonl, .stats.json and .cache.jsonl")
    files.add_argument("--seed", type=in_range(int, 0), default=0, help="of every random choice")
    api.add_argument("--api", help="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    api.add_argument("--api-model", help="the model's name there")
    api.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable with the key, if there is one")
    api.add_argument("--at-once", type=in_range(int, 1), default=32, help="calls under way at a time")
    api.add_argument("--timeout", type=in_range(float, 0.001), default=120.0, help="seconds to wait for an answer")
    api.add_argument("--tries", type=in_range(int, 1), default=8, help="times that a call is sent before it is given up")
    api.add_argument("--price", type=in_range(float, 0), nargs=2, metavar=("PROMPT", "COMPLETION"),
                     help="dollars per 1M tokens")
    api.add_argument("--max-cost", type=in_range(float, 0), help="dollars that this run does not pass")
    api.add_argument("--dry-run", action="store_true", help="print calls, tokens and cost, and send nothing")
    api.add_argument("--cache", help="JSONL of answers paid for (default: OUT.cache.jsonl)")
    answer.add_argument("--model", help="model directory in Hugging Face layout")
    answer.add_argument("--format", choices=FORMATS, help="its prompt format (default: what its config.json records)")
    answer.add_argument("--temperature", type=in_range(float, 0), help="0 is greedy (default 0.7; 1 with --best-of)")
    answer.add_argument("--top-p", type=in_range(float, 0, 1), default=1.0, help="only likeliest tokens with this mass")
    answer.add_argument("--top-k", type=in_range(int, 0), default=0, help="only this many likeliest tokens (0: all)")
    answer.add_argument("--max-new-tokens", type=in_range(int, 1), default=300, help="an answer is cut off here")
    answer.add_argument("--batch-size", type=in_range(int, 1), default=64, help="answers side by side: what fits")
    answer.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    answer.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(dest="verb", required=True)
    v = verbs.add_parser("sample", parents=[files, api, answer], help="instructions -> outputs")
    v.add_argument("--prompt", help="one instruction, answered on the terminal")
    v.add_argument("--outputs", type=in_range(int, 1), default=1, help="outputs for each instruction")
    v.add_argument("--best-of", type=in_range(int, 1), help="draw this many and keep the best by --reward")
    v.add_argument("--reward", help="directory of the reward model that says which is best")
    v = verbs.add_parser("judge", parents=[files, api, answer], help="outputs -> judged responses")
    v.add_argument("--by", choices=("reference", "points", "api", "model"), default="reference", help="who judges")
    v.set_defaults(temperature=0.0)                                         # one opinion, not a sample of them
    v = verbs.add_parser("refine", parents=[files, api, answer], help="judged responses -> better outputs")
    v.add_argument("--by", choices=("model", "api", "reference"), help="who rewrites (default: api if --api is given)")
    v = verbs.add_parser("prefer", parents=[files, api], help="pairs or several outputs -> preferences")
    v.add_argument("--by", choices=("simulated", "reference", "api"), default="simulated", help="who compares")
    v.add_argument("--against", help="outputs of a baseline, output_1 of every pair: prints the win rate of --data")
    v.add_argument("--single", action="store_true", help="one annotator in place of the pool of 13")
    v.add_argument("--models", nargs="*", default=[], help="strong=NAME medium=NAME basic=NAME (default: --api-model)")
    v.add_argument("--noise", type=in_range(float, 0, 0.5), default=0.0, help="labels flipped (AlpacaFarm: 0.25)")
    v.add_argument("--accuracy", type=in_range(float, 0, 1), help="of all simulated annotators (default: 0.75 to 0.95)")
    v.add_argument("--length-bias", type=float, default=0.0, help="log-odds for the longer output, with --accuracy")
    v.add_argument("--position-bias", type=float, default=0.0, help="log-odds for the first shown, with --accuracy")
    args = p.parse_args(argv)
    if args.out and Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file")
    if args.verb != "sample" and not (args.data and args.out):
        raise InputError(f"{args.verb} needs --data FILE and --out FILE")
    if getattr(args, "temperature", 0) is None:
        args.temperature = 1.0 if getattr(args, "best_of", None) else 0.7
    if args.verb == "refine":
        args.by = args.by or ("api" if args.api else "model")
    if args.api and not args.api_model:
        raise InputError("--api needs --api-model, the model's name on that server")
    return args


def main(argv=None):
    args = parse(argv)
    return VERBS[args.verb](args)


if __name__ == "__main__":
    run_main(main)
