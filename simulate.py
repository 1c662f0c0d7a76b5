"""Simulated feedback: responses from a model, and judgments or preferences from a judge (AlpacaFarm).

Four verbs read and write JSON files:

  instructions --sample--> outputs --judge--> judged responses -------------> train_cut.py
                              |                    '--refine--> rewritten --> train_sft.py, train_ppo.py dpo (ILF)
                              |--prefer (n outputs each)--> preferences ----> train_ppo.py
                              '--prefer --against baseline--> win rate

  python simulate.py --model out/cut-0 --prompt "Say what color the frog has."      one prompt (default verb: sample)
  python simulate.py --tree 4 4 --prompt "Say what color the frog has."             TreeBoN in the built-in world
  python simulate.py sample --model out/sft-0-corrects --data ask.jsonl --outputs 4 --temperature 1 --out four.jsonl
  python simulate.py prefer --data four.jsonl --by simulated --noise 0.25 --out preferences.jsonl
  python simulate.py judge --by api --api http://localhost:8000/v1 --api-model NAME --data outputs.jsonl --out j.jsonl

The judge (--by): `reference` compares with the right answer word by word; `simulated` stands in for AlpacaFarm's
pool of API annotators, offline, with given accuracy and biases; `api` asks an OpenAI-compatible server; `model` asks
a model directory, prompted or fine-tuned (train_sft.py --recipe judge; prefer: --judge-model, or --judge-reward).

Next to OUT (JSON Lines, or a JSON list if its name ends in .json) stand OUT.failed.jsonl (records without an answer,
with the reason), OUT.stats.json (of all runs: what they cost), and OUT.cache.jsonl (every answer as it came, and what
every call used: a rerun only asks for what is missing). The exit code is 1 if nothing succeeded, 130 after Ctrl-C.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from requests.adapters import HTTPAdapter, MaxRetryError, Retry
from tqdm import tqdm

from data import (
    FORMATS, JUDGES, JUDGE_SYSTEM, JUDGE_USER, HelpFormatter, InputError, Tokenizer, World, chunks, collate,
    corrected, count_errors, fill_template, fraction, in_range, nonnegative_float, nonnegative_int, pad,
    positive_int, print0, prompt_ids, read_instructions, read_judged, read_outputs, read_pairs, run_main, units,
    write_json, write_json_lines)
from model import (
    DTYPES, LLaMA, RewardModel, barrier, decode, gather_lists, generate, prefill, rank, read_config, read_logp,
    setup_device, share, world_size)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and scoring


def progress_bar(total, label):
    """A progress bar on rank 0, shown after a second; none without a label."""
    hidden = rank() > 0 or not label
    return tqdm(total=total, desc=label, disable=hidden, leave=False, unit="response", delay=1)


def sample_responses(model, tokenizer, records, prompt_format, *, n=1, numbers=None, label="sampling", **sampling):
    """Samples n responses to every record: a list of n texts each, on all ranks. sampling: see model.generate.

    `numbers` are the records' numbers in their file (default 0, 1, 2, ...). The random numbers depend on them and
    on the seed alone, so a file can be sampled in parts, and on any number of ranks."""
    numbers = range(len(records)) if numbers is None else numbers
    local = share(range(len(records)))                         # this rank's records
    prompts = [prompt_ids(tokenizer, records[i], prompt_format) for i in local]
    with progress_bar(n * len(local), label) as bar:
        responses = generate(model, prompts, eos=tokenizer.eos, n=n, rows=[numbers[i] for i in local],
                             progress=bar.update, **sampling)
    texts = {}
    for i, samples in zip(local, responses):
        texts[i] = [tokenizer.decode_response(ids) for ids in samples]
    texts = dict(gather_lists(texts.items()))
    return [texts[i] for i in range(len(records))]


@torch.no_grad()
def reward_scores(model, sequences, batch_size=64, label=None):
    """A reward model's scores of token sequences (prompt + response): a list of floats, on all ranks."""
    local = share(range(len(sequences)))
    by_length = sorted(local, key=lambda i: len(sequences[i]))           # similar lengths together: little padding
    device = model.score.weight.device
    scores = {}
    with progress_bar(len(local), label) as bar:
        for part in chunks(by_length, batch_size):
            tokens, lengths = pad([sequences[i] for i in part], device)
            scores.update(zip(part, model(tokens, lengths).tolist()))
            bar.update(len(part))
    scores = dict(gather_lists(scores.items()))
    return [scores[i] for i in range(len(sequences))]


def score_texts(directory, records, texts, prompt_format=None, dtype="float32", device="cpu", batch_size=64, most=None):
    """Scores of the reward model in `directory` for lists of texts: one list of floats for each record.

    EOS is scored with every text, except one of `most` tokens: that one was truncated."""
    tokenizer = Tokenizer.from_pretrained(directory)
    prompt_format = model_format(directory, prompt_format, reward=True)
    model = RewardModel.from_pretrained(directory, DTYPES[dtype], device)
    sequences = []
    for record, record_texts in zip(records, texts):
        prompt = prompt_ids(tokenizer, {**record, "reward_token": None}, prompt_format)
        for text in record_texts:
            sequences.append(prompt + tokenizer.encode_response(text)[:most])
    scores = iter(reward_scores(model, sequences, batch_size, "scoring"))
    return [list(itertools.islice(scores, len(record_texts))) for record_texts in texts]


@torch.no_grad()
def response_logp(model, rows, device, batch_size=64):
    """Log-probabilities of responses: rows of (prompt, response), token ids -> a list of (n,), n response tokens."""
    logp = []
    for part in chunks(rows, batch_size):
        logp += model(*collate(part, device)).cpu().split([len(response) for _, response in part])
    return logp


def model_format(directory, prompt_format=None, reward=False):
    """The prompt format of a model directory: the one given, or the one recorded in its config.json."""
    raw = read_config(directory, quiet=True)[1]
    if not reward and "SequenceClassification" in str(raw.get("architectures")):
        raise InputError(f"{directory} is a reward model, which scores texts and writes none: give it to --reward")
    prompt_format = prompt_format or raw.get("prompt_format")
    if prompt_format is None:
        raise InputError(f"{directory}/config.json does not record a prompt format: give --format, one of "
                         f"{', '.join(FORMATS)}")
    return prompt_format


def newest_run():
    """The newest finished run of the built-in world in out/ that trained a policy."""
    runs = []
    for path in Path("out").glob("*/config.json"):
        config = path.read_text(encoding="utf-8", errors="replace")
        finished = not path.with_name("resume.pt").exists()
        if finished and '"LlamaForCausalLM"' in config and '"data": ""' in config:
            runs.append((path.stat().st_mtime, str(path.parent)))
    if not runs:
        raise InputError("no finished run of the built-in world in out/: start with `python train_cut.py`, or give "
                         "--model DIR")
    print0(f"{max(runs)[1]} is the newest run in out/")
    return max(runs)[1]


def conditioned(directory, records):
    """The records with the control token that the model in `directory` was trained with, if there is one."""
    token = read_config(directory, quiet=True)[1].get("reward_token")
    if token is None:
        return records
    return [{**record, "reward_token": token} for record in records]


# ----------------------------------------------------------------------------------------------------------------------
# TreeBoN (arXiv 2410.16033): best-of-n on a tree, which a DPO model prunes while it grows


@torch.no_grad()
def grow_tree(dpo, shape, model, prompts, u, eos, choose, progress=None):
    """The decoder of TreeBoN: the leaves of a tree for each prompt, from which the reward model is to choose.

    Every prompt has n slots. A layer samples steps / layers tokens in each; then the `keep` branches with the highest
    partial rewards stay, and get `children` slots each: no more tokens than best-of-n samples, which is a tree of one
    layer. A finished branch that was kept stays for good in its first slot; its other slots are empty.

    dpo: the model that was trained by DPO from `model`, its reference. shape: (layers, children, keep). u (B * n,
    steps): the slots' random numbers. Returns B * n lists of ids, empty for an empty slot."""
    (layers, children, keep), n, steps = shape, len(u) // len(prompts), u.shape[1]
    cache, hidden = prefill(model, prompts, steps, n)
    dpo_cache, dpo_hidden = prefill(dpo, prompts, steps, n)
    ids, scores = {slot: [] for slot in range(len(u))}, u.new_zeros(len(u))
    for layer in range(layers):
        begin, end = steps * layer // layers, steps * (layer + 1) // layers
        slots, logp = cache.rows.tolist(), torch.zeros_like(u[:, begin:end])
        segments = decode(model, cache, hidden, u[:, begin:end], eos, choose, logp=logp)
        for slot, segment in zip(slots, segments):
            ids[slot] = ids[slot] + segment
        if end == steps:
            break
        scores[slots] += partial_rewards(dpo, dpo_cache, dpo_hidden, segments, logp[slots], begin)
        parents = prune(ids, set(slots), scores.tolist(), n, children, keep, eos)
        ids = {slot: ids[parent] for slot, parent in parents.items()}
        scores[list(parents)] = scores[list(parents.values())]
        growing = {slot: parent for slot, parent in parents.items() if ids[slot][-1] != eos}
        if not growing:
            break
        last = torch.tensor([ids[slot][-1:] for slot in growing], device=u.device)
        hidden, dpo_hidden = branch_out(model, cache, growing, last), branch_out(dpo, dpo_cache, growing, last)
    if progress:
        progress(len(u))
    return [ids.get(slot, []) for slot in range(len(u))]


def partial_rewards(dpo, cache, hidden, segments, logp, begin):
    """DPO's implicit reward of each row's new tokens: the sum over k of log(p_dpo(y_k) / p(y_k)) / (k + 1), where k
    counts from the start of the response. (beta changes no ranking.) logp (rows, steps): log p(y_k). -> (rows,)"""
    tokens, lengths = pad(segments, hidden.device)                        # (rows, T), (rows,)
    k = torch.arange(tokens.shape[1], device=hidden.device)
    ratio = read_logp(dpo, cache, hidden, tokens) - logp[:, :len(k)]      # (rows, T)
    ratio = ratio * (k < lengths.unsqueeze(1))                            # not the padding after EOS
    return (ratio / (begin + k + 1)).sum(dim=1)


def prune(ids, grown, scores, n, children, keep, eos):
    """Keeps the best branches of each prompt, in their order: {slot in the next layer: the parent's slot in this one}.
    ids: of the branches by slot, n slots a prompt. grown: the slots of this layer; other branches finished before."""
    parents = {}
    for prompt, slots in itertools.groupby(ids, key=lambda slot: slot // n):
        # First those that finished earlier, which stay. Rounded: equal branches may differ in the last digits.
        best = sorted(slots, key=lambda slot: (slot in grown, -round(scores[slot], 4)))[:keep]
        for place, parent in enumerate(sorted(best)):
            for child in range(1 if ids[parent][-1] == eos else children):
                parents[n * prompt + place * children + child] = parent
    return parents


def branch_out(model, cache, parents, last):
    """Gives every child a copy of its parent's row ({child: parent}) and reads the parent's last token (rows, 1)
    -> hidden (rows, D), which predicts the child's first token."""
    row = {slot: i for i, slot in enumerate(cache.rows.tolist())}         # decode removes finished rows
    cache.select([row[parent] for parent in parents.values()])
    cache.rows = torch.tensor(list(parents), device=last.device)
    return model.model(last, cache)[:, -1]


def make_built_in(args):
    """Makes those of the built-in world's models that are not there or not finished. train_ppo.py does it, in a process
    of its own because it imports this file."""
    script = Path(__file__).with_name("train_ppo.py")
    for stage in ("dpo", "reward"):
        out = Path(f"out/{stage}-{args.seed}")
        finished = (out / "config.json").is_file() and not (out / "resume.pt").is_file()
        if Path(getattr(args, stage)) == out and not finished:
            flags = [stage, "--seed", str(args.seed), "--device", args.device, "--resume"]
            if world_size() > 1 or subprocess.run([sys.executable, script, *flags]).returncode:
                raise InputError(f"{out} is not finished: make it with python {script} {stage} --seed {args.seed}")


# ----------------------------------------------------------------------------------------------------------------------
# API client: chat completions from an OpenAI-compatible server

RETRIED = {408, 409, 425, 429, 500, 502, 503, 520, 522, 529}                  # overload or a passing fault
FATAL = ("HTTP 401", "HTTP 402", "HTTP 403", "HTTP 404")        # wrong key, no credit, no access, no such address
NO_CREDIT = "insufficient_quota"     # what a 429 says that stands for an account without credit
CHARGED = {*range(200, 300), 504, 524}         # a gateway has given up waiting: the server behind it may charge
REFUSED = {"prompt_tokens": 0, "completion_tokens": 0}
MOST_BYTES = 10_000_000              # of an answer
MOST_FAILURES = 20                   # failed calls, before the first answer, that end a run
PAUSE = 0.25                         # seconds before a call is sent again, doubled each time


class Answer(NamedTuple):
    text: str | None = None      # None: the call failed
    reason: str = ""             # of the failure
    truncated: bool = False      # at max_tokens
    usage: dict | None = None    # tokens that were charged; None: unknown


class Cache:
    """Answers by key and the tokens of all calls, appended to a JSON Lines file as they come.

    Every entry begins with its line break, so a line that a crash has torn never touches the next one. Lines that are
    no entries are skipped when the file is read."""

    def __init__(self, args):
        args.cache = args.cache or (f"{args.out}.cache.jsonl" if args.out else os.devnull)
        self.path, self.answers, self.used = Path(args.cache), {}, Counter()
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.split("\n"):                                    # splitlines() would also split at U+2028
            with contextlib.suppress(Exception):
                entry = json.loads(line)
                self._remember(entry.pop("key"), Answer(**{**entry, "usage": read_usage(entry)}))

    @staticmethod
    def key(*parts):
        """A hash of everything that decides the answer."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _remember(self, key, answer):
        if isinstance(answer.text, (str, list)):
            self.answers[key] = answer
        if answer.usage:
            self.used.update(calls=1, **answer.usage)

    def add(self, key, answer):
        self._remember(key, answer)
        entry = {name: value for name, value in answer._asdict().items() if value}
        self.append("\n" + json.dumps({"key": key, **entry}, ensure_ascii=False))

    def append(self, text=""):
        """Writes to the file. Without a text, finds out that it can be written before anything is paid."""
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)


class Client:
    """Sends chat completions, --at-once at a time, and stores the answers as they come.

    Each call has a daemon thread, and all else happens in the caller's: a crash loses at most the calls in flight, and
    Ctrl-C waits for none of them. The key is sent to --api only and is removed from every text."""

    def __init__(self, args):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("every process would ask, and pay: ask an API without torchrun")
        if not (args.api and args.api_model):
            raise InputError("an API needs --api URL and --api-model NAME, the model's name on that server")
        if not re.match("https?://[^/]", args.api):
            raise InputError(f"--api {args.api}: a URL begins with http:// or https:// and the name of a server")
        if args.max_cost < math.inf and args.price is None:
            raise InputError("--max-cost needs --price PROMPT COMPLETION, in dollars per million tokens")
        self.url = args.api.rstrip("/") + "/chat/completions"
        self.at_once, self.timeout, self.tries, self.dry_run = args.at_once, args.timeout, args.tries, args.dry_run
        self.price, self.max_cost = args.price, args.max_cost
        self.key = os.environ.get(args.key_env, "").strip()
        if not re.fullmatch("[!-~]*", self.key):                          # http.client's own error would show it
            raise InputError(f"the API key in {args.key_env} contains a space or a non-ASCII character: copy it again")
        self.cache, self.from_cache, self.failed, self.answered = Cache(args), 0, {}, False
        self.flying, self.replies = {}, queue.SimpleQueue()         # {key: the most tokens} of the calls in flight
        self.session = requests.Session()
        self.session.mount(self.url, HTTPAdapter(pool_maxsize=args.at_once))
        self.session.auth = self._authorize                               # also keeps ~/.netrc out

    def _authorize(self, request):
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _hide_key(self, text):
        return text.replace(self.key, "[key]") if len(self.key) > 7 and text else text     # else a word, such as "none"

    def cost(self, usage):
        """Dollars; 0 without --price."""
        prompt_price, completion_price = self.price or (0.0, 0.0)
        return (usage["prompt_tokens"] * prompt_price + usage["completion_tokens"] * completion_price) / 1e6

    @property
    def stats(self):
        """Calls, tokens and cost of all runs with this cache."""
        used = {name: self.cache.used[name] for name in ("calls", *REFUSED)}
        return {**used, "cost": self.cost(used), "from_cache": self.from_cache}

    def complete(self, payloads):
        """Answers to the payloads, in their order; equal payloads are sent once. Raises InputError for a fault that no
        call can escape, after storing what has come in."""
        keys = [Cache.key(self.url, payload) for payload in payloads]
        todo = {k: p for k, p in zip(keys, payloads) if k not in self.cache.answers}
        self.from_cache += len(set(keys)) - len(todo)
        if self.dry_run:
            self.print_estimate(todo.values())
            sys.exit(0)
        self.cache.append()
        self._ask(todo)
        return [self.cache.answers.get(key) or self.failed[key] for key in keys]

    def _ask(self, todo):
        """Sends {key: payload} and stores what comes."""
        patience = self.timeout
        try:
            for key, payload in tqdm(todo.items(), "calls", delay=1):
                most = Counter(prompt_tokens=prompt_bytes(payload), completion_tokens=payload["max_tokens"])
                while self.flying and (len(self.flying) >= self.at_once or self._over_budget(most)):
                    self._receive()
                if self._over_budget(most):
                    self.failed[key] = Answer(reason=f"not sent: --max-cost {self.max_cost} could be exceeded")
                    continue
                self.flying[key] = most
                threading.Thread(target=self._send, args=(key, payload), daemon=True).start()
            while self.flying:
                self._receive()
        except KeyboardInterrupt:
            patience = 1
            raise
        finally:
            end = time.monotonic() + patience
            with contextlib.suppress(queue.Empty, KeyboardInterrupt):      # a second Ctrl-C ends this wait
                while self.flying:
                    self._receive(max(0, end - time.monotonic()))
            for key, most in self.flying.items():
                self.cache.add(key, Answer(reason="interrupted", usage=most))

    def _over_budget(self, most):
        if self.max_cost == math.inf:
            return False
        return self.cost(sum(self.flying.values(), self.cache.used + most)) > self.max_cost

    def _receive(self, seconds=None):
        """Stores the next answer. What does not say what it used counts with the most that it can."""
        key, answer = self.replies.get(timeout=seconds)
        most = self.flying.pop(key)
        answer = answer._replace(text=self._hide_key(answer.text),
                                 reason=" ".join(self._hide_key(answer.reason).split())[:300],
                                 usage=most if answer.usage is None else answer.usage)
        self.cache.add(key, answer)
        if answer.text is None:
            self.failed[key] = answer
        self.answered |= answer.text is not None
        fatal = answer.reason.startswith(FATAL) or NO_CREDIT in answer.reason
        hopeless = len(self.failed) >= MOST_FAILURES and not self.answered and not self.from_cache
        if seconds is None and (fatal or hopeless):
            raise InputError(f"{self.url}: {answer.reason} ({len(self.failed)} calls failed; answers are kept in "
                             f"{self.cache.path})")

    def _send(self, key, payload):
        """Brings the Answer to a payload, after at most --tries tries. What may be charged is not sent again. Runs in a
        thread of its own."""
        for number in range(1, self.tries + 1):
            answer, pause = self._try(payload)
            if pause is None:
                break
            if number < self.tries:
                time.sleep(max(pause, min(60, PAUSE * 2 ** number) + random.random() * PAUSE))
        self.replies.put((key, answer))

    def _try(self, payload):
        """One request: (Answer, seconds to wait before the next, or None: there is none)."""
        usage, pause, text = None, None, ""
        try:
            status, after, text = within(self.timeout, self._post, payload)
            if status == 200:
                reply = json.loads(text)
                usage = read_usage(reply)
                return read_choice(payload, reply["choices"][0])._replace(usage=usage), None
            reason = f"HTTP {status}:"
            usage = None if status in CHARGED else REFUSED
            if status in RETRIED and NO_CREDIT not in text:
                pause = after
        except Exception as error:                            # whatever is not a complete, well-formed reply
            reason = f"{type(error).__name__}: {str(error) or 'no complete answer in time'}"
            if any(isinstance(cause, MaxRetryError) for cause in error.args):             # no connection: never sent
                usage, pause = REFUSED, 0
        return Answer(reason=f"{reason} {text}", usage=usage), pause

    def _post(self, payload):
        """Sends a payload: (status, seconds that the server asks to wait, body)."""
        with self.session.post(self.url, json=payload, timeout=(10, 2 * self.timeout), stream=True,
                               allow_redirects=False) as reply:
            body = b""
            for block in reply.iter_content(1 << 16):
                body += block
                if len(body) > MOST_BYTES:
                    raise ValueError(f"the answer is longer than {MOST_BYTES} bytes")
            pause = 0
            with contextlib.suppress(Exception):                          # absent or malformed
                pause = min(600, Retry().parse_retry_after(reply.headers["Retry-After"]))
            return reply.status_code, pause, body.decode("utf-8", "replace")

    def print_estimate(self, payloads):
        """Prints what sending the payloads would cost at most."""
        usage = {"prompt_tokens": sum(map(prompt_bytes, payloads)) // 4,                    # about 4 bytes per token
                 "completion_tokens": sum(payload["max_tokens"] for payload in payloads)}
        print0(f"{len(payloads)} calls to send, {self.from_cache} answers in the cache: about "
               f"{usage['prompt_tokens']} prompt tokens, at most {usage['completion_tokens']} completion tokens")
        cost = f"about ${self.cost(usage):.2f}" if self.price else "unknown without --price PROMPT COMPLETION"
        print0(f"cost: {cost}")


def within(seconds, function, *args):
    """function(*args), or TimeoutError after `seconds`. (A socket's timeout bounds each read: a server that sends a
    byte now and then would be waited for without end.)"""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
    threading.Thread(target=run, daemon=True).start()
    return future.result(seconds)


def read_usage(body):
    """The prompt_tokens and completion_tokens of a reply, or None unless it states both as plausible numbers."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = {name: usage.get(name) for name in REFUSED}
    valid = all(type(count) is int and 0 <= count < 1e9 for count in counts.values())
    return counts if valid else None


def read_choice(payload, choice):
    """The Answer in a reply's choice. Where log-probabilities were asked for, its text is {token: log-probability}."""
    if payload.get("logprobs"):
        if not choice.get("logprobs"):
            return Answer(reason="no log-probabilities: this server gives none")
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        return Answer(json.dumps({entry["token"]: float(entry["logprob"]) for entry in top}))
    text = choice["message"]["content"] or ""
    if not text.strip():
        return Answer(reason="empty answer")
    text = text.encode("utf-8", "replace").decode()                       # half a surrogate pair cannot be written
    return Answer(text, truncated=choice.get("finish_reason") == "length")


def prompt_bytes(payload):
    """Upper bound of the prompt's tokens: none is shorter than a byte, and 16 more frame each message."""
    return sum(len(message["content"].encode("utf-8", "replace")) + 16 for message in payload["messages"])


def chat(model, user, system="", **settings):
    """The payload of one chat completion."""
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"model": model, "messages": messages, **settings}


# ----------------------------------------------------------------------------------------------------------------------
# Prompts of the API judges. Every line of a text is quoted, so that no text can pose as another field of its prompt.

QUOTED = "Texts are quoted: `> ` begins each of their lines, and none of yours."
REFINE_USER = ("Instruction:\n{instruction}\n\nAn earlier answer:\n{output}\n\n"
               "What a reviewer said of it:\n{judgment}\n\n"
               "Write the answer anew so that the reviewer would have nothing to object to. Give only the answer.")


def quote(text):
    """The text with `> ` before every line."""
    return "\n".join("> " + line for line in text.splitlines() or [""])


def read_judgment(reply):
    """The judgment in a judge's reply, or None if it only calls the answer perfect, be it in a whole sentence (which
    the published CUT data counts as criticism)."""
    text = reply.strip().strip("\"'*.! ").lower()
    if re.fullmatch(r"((the|this) (response|answer) is |it is |it's )?perfect", text):
        return None
    return reply.strip()


def question(record):
    """(instruction, input): what makes two records the same question."""
    return record["instruction"], record.get("input") or ""


def whole_instruction(record):
    return "\n\n".join(filter(None, question(record)))


class Annotator(NamedTuple):
    """One prompted annotator of the pool."""
    name: str
    slot: str                    # which of the three models it runs on
    style: str                   # of its answers: a key of STYLES
    pairs: int                   # pairs in one prompt
    persona: str = ""
    example: bool = False        # a worked example comes first


class Style(NamedTuple):
    request: str                 # the answer format that the prompt asks for
    label: str                   # pattern of a line with a label: its group is for the first output or the second
    example: str                 # the answer in the worked example
    tokens: int                  # per pair
    names: str = "ab"            # of the two outputs
    settings: dict = {}          # of the call


CAREFUL = "You value correctness above all: a fluent answer with a false statement loses."
ELEGANT = "You are widely read, enjoy full and well-built prose, and notice every slip of grammar."
HASTY = "You are in a hurry, like short answers and lists, and when in doubt you take the first."
FRIENDLY = "You like an answer that is warm and easy to follow."
TERSE = "You like an answer that says what was asked and stops."

# AlpacaFarm's variation in our own words: 5 + 4 + 4 annotators on three models, 6 of 13 with several pairs per prompt.
ANNOTATORS = [
    Annotator("strong-1", "strong", "json", 4, example=True),
    Annotator("strong-2", "strong", "list", 5, ELEGANT, True),
    Annotator("strong-3", "strong", "list", 5, example=True),
    Annotator("strong-4", "strong", "word", 1, CAREFUL, True),
    Annotator("strong-5", "strong", "list", 5, HASTY, True),
    Annotator("medium-1", "medium", "word", 1, example=True),
    Annotator("medium-2", "medium", "json", 1, CAREFUL),
    Annotator("medium-3", "medium", "word", 1, FRIENDLY, True),
    Annotator("medium-4", "medium", "word", 1),
    Annotator("basic-1", "basic", "list", 4, example=True),
    Annotator("basic-2", "basic", "word", 1, TERSE, True),
    Annotator("basic-3", "basic", "list", 5, FRIENDLY, True),
    Annotator("basic-4", "basic", "word", 1),
]
PROMPTED = Annotator("model", "strong", "word", 1, CAREFUL)               # --judge-model
SINGLE = [Annotator("single", "strong", "json", 1, CAREFUL)]              # one low-variance judge
WEIGHTED = [Annotator("weighted", "strong", "letter", 1, CAREFUL)]        # as AlpacaEval 2's: probabilities of a letter

STYLES = {
    "word": Style("Answer with one line and nothing else: `Output (a)` or `Output (b)`.",
                  r"[ `]*Output \((?:(a)|b)\)[ `]*", "Output (b)", 20),
    "list": Style("Answer with one line for each pair, in order: `Output (a)` or `Output (b)`. Write nothing else.",
                  r"[ `]*Output \((?:(a)|b)\)[ `]*", "Output (b)", 20),
    "json": Style('Answer with one line of JSON for each pair, in order: '
                  '{"reason": "a few words", "a_is_better": true or false}',
                  r'\s*\{.*"a_is_better"\s*:\s*(?:(true)|false)\s*\}\s*',
                  '{"reason": "(a) is wrong: 2 plus 2 is 4", "a_is_better": false}', 80),
    "letter": Style("Answer with one letter and nothing else: `m` for output (m), `M` for output (M).", "", "M", 1,
                    "mM", {"logprobs": True, "top_logprobs": 5}),
}
PAIR = "Pair {number}\nInstruction:\n{instruction}\n\nOutput ({first}):\n{a}\n\nOutput ({second}):\n{b}\n"
EXAMPLE = {"instruction": "What is 2 plus 2?", "output_1": "It is 5.", "output_2": "4"}
DUMMY = {"instruction": "1+1=", "output_1": "2", "output_2": "3"}         # completes a prompt of several pairs


def show_pair(number, pair, names="ab"):
    return fill_template(PAIR, number=str(number), instruction=quote(whole_instruction(pair)), first=names[0],
                         second=names[1], a=quote(pair["output_1"]), b=quote(pair["output_2"]))


def annotator_prompt(annotator, pairs, model):
    """The chat payload that asks an annotator about its pairs (records with output_1 and output_2, in shown order)."""
    style = STYLES[annotator.style]
    task = "You compare two outputs for the same instruction and say which is better."
    system = " ".join(filter(None, [task, QUOTED, annotator.persona, style.request]))
    if annotator.example:
        system += f"\n\nAn example:\n{show_pair(1, EXAMPLE)}\n{style.example}"
    user = "\n".join(show_pair(number, pair, style.names) for number, pair in enumerate(pairs, 1))
    return chat(model, user, system, temperature=1.0, max_tokens=style.tokens * annotator.pairs, **style.settings)


def find_labels(text, style):
    """The labels in a reply, in order, 1 or 2 for each line that is one in the form asked for. For `letter`, the text
    is that of read_choice: 1 + P(second output is better)."""
    if style == "letter":
        logp = json.loads(text)
        preference = preference_from_logprobs(*[logp.get(name, -math.inf) for name in "mM"])
        return [] if preference is None else [preference]
    matches = [re.fullmatch(STYLES[style].label, line) for line in text.splitlines()]
    return [1 if match[1] else 2 for match in matches if match]


def group_prompts(annotators, seed):
    """Distributes pairs, given the annotator of each, to prompts: a list of (annotator, indices of its pairs)."""
    groups = []
    for annotator in dict.fromkeys(annotators):                            # each once, in order of appearance
        indices = [i for i, a in enumerate(annotators) if a == annotator]
        random.Random(f"shuffle{annotator.name}{seed}").shuffle(indices)
        for start in range(0, len(indices), annotator.pairs):
            groups.append((annotator, indices[start:start + annotator.pairs]))
    return groups


def ask_annotators(client, models, seed):
    """The `annotate` of prefer() that asks an API; `models` maps slots to model names. If a reply has not as many
    labels as pairs, none of them counts."""
    def annotate(pairs, annotators):
        groups = group_prompts(annotators, seed)
        payloads = []
        for annotator, indices in groups:
            shown = [pairs[i] for i in indices] + [DUMMY] * (annotator.pairs - len(indices))
            payloads.append(annotator_prompt(annotator, shown, models[annotator.slot]))

        results = [None] * len(pairs)
        for (annotator, indices), answer in zip(groups, client.complete(payloads)):
            labels, reason = find_labels(answer.text, annotator.style) if answer.text else [], answer.reason
            if len(labels) != annotator.pairs:
                reason = reason or f"not understood: {len(labels)} labels for {annotator.pairs} pairs"
                labels = [None] * annotator.pairs
            for i, label in zip(indices, labels):
                results[i] = (label, reason)
        return results
    return annotate


# ----------------------------------------------------------------------------------------------------------------------
# Preferences with noise (AlpacaFarm)


def mean_and_se(values):
    """Mean and its standard error: the sample standard deviation (ddof 1) over sqrt(n)."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / max(1, n - 1)
    return mean, math.sqrt(variance / n)


def preference_from_logprobs(logp_1, logp_2):
    """AlpacaEval's weighted preference, 1 + P(output 2 is better), of a judge that answers with one token.

    logp_1, logp_2: log-probabilities of the two possible tokens. A token that is not among the reported ones has -inf;
    None if both are missing."""
    if max(logp_1, logp_2) == -math.inf:
        return None
    return 2 - 1 / (1 + math.exp(min(700.0, logp_2 - logp_1)))


def pair_up(records, seed):
    """One pair per instruction from records with n outputs: two different texts, every ordered pair with the same
    probability. Records with fewer than two different texts are left out."""
    pairs, seen, alike = [], set(), 0
    for record in records:
        texts = list(dict.fromkeys(record["output"]))
        if len(texts) < 2:
            alike += 1
        elif question(record) not in seen:
            seen.add(question(record))
            rng = random.Random(f"pair{''.join(question(record))}{seed}")
            first, second = rng.sample(texts, 2)
            pair = {k: v for k, v in record.items() if k != "output"}
            pairs.append({**pair, "output_1": first, "output_2": second})
    print0(f"{len(pairs)} pairs from {len(records)} records; left out {alike} with equal outputs and "
          f"{len(records) - alike - len(pairs)} with a repeated instruction")
    return pairs


def distinct(pairs):
    """Each pair once."""
    kept = {(*question(r), r["output_1"], r["output_2"]): r for r in pairs}
    if len(kept) < len(pairs):
        print0(f"left out {len(pairs) - len(kept)} duplicate pairs")
    return list(kept.values())


UNASKED = ("noise", "equal texts")        # in place of an annotator: nobody was asked


def draw(pairs, pool, noise, seed):
    """Draws, before anyone is asked, each pair's annotator, its random label if there is one, and the order shown.

    Returns (labels, asked): labels are (preference, annotator name), or None for the pairs in `asked`, a list of
    (index, annotator, switched, pair as shown). The draws are seeded by the text of the instruction (never by hash(),
    which differs between processes): they are the same for all models that are compared on it."""
    labels, asked = [None] * len(pairs), []
    for i, pair in enumerate(pairs):
        text = "".join(question(pair))
        annotator = random.Random(f"annotator{text}{seed}").choice(pool)
        # A random label with probability 2 * noise: it flips a fraction `noise` of all labels.
        rng = random.Random(f"noisy_preference{text}{seed}")
        random_label, = rng.choices([None, 1, 2], [1 - 2 * noise, noise, noise])
        switched, = random.Random(f"is_switched_outputs{text}{seed}").choices([False, True])

        if pair["output_1"] == pair["output_2"]:
            labels[i] = (1.5, "equal texts")
        elif random_label is not None:
            labels[i] = (random_label, "noise")
        else:
            shown = {**pair, "output_1": pair["output_2"], "output_2": pair["output_1"]} if switched else pair
            asked.append((i, annotator, switched, shown))
    return labels, asked


def prefer(pairs, pool, annotate, noise=0.0, seed=0):
    """Labels pairs with preferences: (labelled pairs, failed pairs).

    annotate(pairs, annotators) sees the pairs in the order shown and returns a list of (label 1 or 2, "") or (None,
    reason of the failure); 3 - label undoes a switch. Random labels ask nobody, so they cost nothing. Equal texts are
    a tie, 1.5."""
    pairs = distinct(pairs)
    labels, asked = draw(pairs, pool, noise, seed)
    results = annotate([shown for *_, shown in asked], [annotator for _, annotator, *_ in asked])
    failed, switches = [], [False] * len(pairs)
    for (i, annotator, switched, _), (label, reason) in zip(asked, results):
        if label is None:
            failed.append({**pairs[i], "annotator": annotator.name, "reason": reason})
        else:
            labels[i] = (3 - label if switched else label, annotator.name)
            switches[i] = switched

    labelled = []
    for pair, label, switched in zip(pairs, labels, switches):
        if label is not None:
            labelled.append({**pair, "preference": label[0], "annotator": label[1], "switched": switched})
    return labelled, failed


# ----------------------------------------------------------------------------------------------------------------------
# Simulated annotators


class Simulated(NamedTuple):
    """A stand-in for an API annotator in the built-in world. It picks the answer with fewer errors with probability
    `accuracy`. Biases are added to the log-odds: `length` for an answer longer by five words or more (in proportion
    below), `position` for the one shown first."""
    name: str
    accuracy: float = 1.0
    length: float = 0.0
    position: float = 0.0

    def compare(self, pair, rng):
        """1 or 2 for a pair in the order shown."""
        first, second, reference = pair["output_1"], pair["output_2"], pair["reference"]
        fewer_errors = count_errors(second, reference) - count_errors(first, reference)
        longer = len(units(first)) - len(units(second))
        accuracy = min(max(self.accuracy, 1e-9), 1 - 1e-9)
        sign = (fewer_errors > 0) - (fewer_errors < 0)
        logit = sign * math.log(accuracy / (1 - accuracy)) + self.length * max(-1, min(1, longer / 5)) + self.position
        return 1 if rng.random() < 1 / (1 + math.exp(-logit)) else 2


def simulated_pool(accuracy=None, length=0.0, position=0.0):
    """The 13 of ANNOTATORS, offline: the stronger the model, the higher the accuracy and the smaller the biases. With
    `accuracy`, all 13 have this accuracy and these biases."""
    if accuracy is not None:
        return [Simulated(a.name, accuracy, length, position) for a in ANNOTATORS]
    slots = {"strong": (0.95, 0.2, 0.1), "medium": (0.85, 0.4, 0.3), "basic": (0.75, 0.6, 0.5)}
    return [Simulated(a.name, *slots[a.slot]) for a in ANNOTATORS]


def ask_simulated(seed):
    """The `annotate` of prefer() that asks Simulated annotators."""
    def annotate(pairs, annotators):
        results = []
        for pair, annotator in zip(pairs, annotators):
            rng = random.Random(f"{annotator.name}{pair['instruction']}{pair['output_1']}{pair['output_2']}{seed}")
            results.append((annotator.compare(pair, rng), ""))
        return results
    return annotate


def ask_model(args):
    """The `annotate` of prefer() that compares two scores: a reward model's, or the log-probabilities of the two labels
    that --judge-model can answer with. A pair is shown in one order, as to an API: it takes half the time of both, and
    `switched` lets a bias be measured."""
    def annotate(pairs, annotators):
        device = setup_device(args.device)
        if args.judge_reward:
            texts = [[pair["output_1"], pair["output_2"]] for pair in pairs]
            scores = score_texts(args.judge_reward, pairs, texts, args.judge_format, args.dtype, device,
                                 args.batch_size)
        else:
            scores = label_logp(args, pairs, device)
        labels = []
        for first, second in scores:
            label = 1.5 if first == second else 1 if first > second else 2
            labels.append((preference_from_logprobs(first, second) if args.weighted else label, ""))
        return labels
    return annotate


def label_logp(args, pairs, device):
    """Log-probabilities of the answers `Output (a)` and `Output (b)` by --judge-model: two floats for each pair."""
    tokenizer = Tokenizer.from_pretrained(args.judge_model)
    prompt_format = model_format(args.judge_model, args.judge_format)
    model = LLaMA.from_pretrained(args.judge_model, DTYPES[args.dtype], device)
    answers = [tokenizer.encode_response(f"Output ({name})") for name in "ab"]
    rows = []
    for pair in pairs:
        prompt = "\n\n".join(m["content"] for m in annotator_prompt(PROMPTED, [pair], "")["messages"])
        prompt = prompt_ids(tokenizer, {"instruction": prompt}, prompt_format)
        rows += [(prompt, answer) for answer in answers]
    logp = [tokens.sum().item() for tokens in response_logp(model, rows, device, args.batch_size)]
    return zip(logp[::2], logp[1::2])


def built_in_preferences(model_directory, seed, noise, device):
    """The file of the built-in world's preferences, made if it does not exist.

    The SFT model answers each of 30,000 instructions four times; two different answers make a pair, unless they have
    equally many errors. The one with fewer is preferred, but a fraction 2 * noise of the labels is random, which flips
    a fraction `noise` (AlpacaFarm: 0.25)."""
    path = Path(f"out/world-{seed}", f"preferences-{noise}-{Path(model_directory).name}.jsonl")
    if path.is_file():
        return path
    tokenizer = Tokenizer.from_pretrained(model_directory)
    model = LLaMA.from_pretrained(model_directory, device=device)
    records = World(seed).instructions("train", 30000, "preferences")
    texts = sample_responses(model, tokenizer, records, "short", max_new_tokens=32, temperature=1.0, seed=seed, n=4,
                             label="sampling pairs")
    answered = []
    for record, samples in zip(records, texts):
        answer = {key: record[key] for key in ("id", "instruction", "input", "reference")}
        answered.append({**answer, "output": [text for text in samples if text.strip()]})
    pairs = []
    for pair in pair_up(answered, seed):
        reference = pair["reference"]
        if count_errors(pair["output_1"], reference) != count_errors(pair["output_2"], reference):
            pairs.append(pair)
    labelled, _ = prefer(pairs, simulated_pool(accuracy=1.0), ask_simulated(seed), noise, seed)
    if rank() == 0:
        write_json_lines(path, labelled)
    barrier()                                                             # wait for rank 0 to write
    print0(f"{path}: {len(labelled)} pairs of different answers to {len(records)} instructions")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Verbs


def get_completions(args, records, n=1, template=None, system=""):
    """Asks --api or --model for n texts per record: (list of (record, texts), failed records with the reason, the
    client or None). The prompt is the record itself; with `template`, the template filled with it, and an API's
    truncated answer is a failure."""
    prompts, client = records, None
    if template:
        prompts, show = [], quote if args.by == "api" else str            # models of ours are trained without marks
        for record in records:
            prompt = fill_template(template, instruction=show(whole_instruction(record)), output=show(record["output"]),
                                   judgment=show(record.get("judgment") or ""))
            prompts.append({"instruction": prompt, "input": ""})
    if args.by == "api":
        client = Client(args)
        answers = api_completions(args, client, prompts, n, f"{system} {QUOTED}".strip() if template else system)
    else:
        answers = model_completions(args, prompts, n, system)

    done, failed = [], []
    for record in records:
        samples = list(itertools.islice(answers, n))
        reasons = [answer.reason for answer in samples if answer.text is None]
        texts = [answer.text or "" for answer in samples]
        if not "".join(texts).strip():
            reasons.append("empty answer")
        if template and samples[0].truncated:
            reasons.append(f"truncated: the answer has more than {args.max_new_tokens} tokens")
        if reasons:
            failed.append({**record, "reason": reasons[0]})
        else:
            done.append((record, texts))
    return done, failed, client


def api_completions(args, client, prompts, n, system):
    """An iterator over the Answers of an API, n for each prompt."""
    payloads = []
    for prompt in prompts:
        for k in range(n):
            payloads.append(chat(args.api_model, whole_instruction(prompt), system, seed=1000 * args.seed + k,
                                 temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens))
    return iter(client.complete(payloads))


def model_completions(args, prompts, n, system):
    """An iterator over the Answers of --model, n for each prompt. Samples are stored in parts: a rerun continues."""
    if not args.model:
        if args.verb != "sample":
            raise InputError("no model to ask: give --model DIR, or --api URL and --api-model NAME")
        args.model = newest_run()
    tokenizer, device = Tokenizer.from_pretrained(args.model), setup_device(args.device)
    prompt_format = model_format(args.model, args.format)
    records = conditioned(args.model, prompts)
    if system:
        records = [{**record, "instruction": f"{system}\n\n{record['instruction']}"} for record in records]
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed, "n": n,
               "top_p": args.top_p, "top_k": args.top_k}
    # A key is everything that decides the samples: weights, options, the prompt and its number.
    files, tree = sorted(Path(args.model).glob("*model*")), getattr(args, "tree", None) or []
    if tree:
        files += sorted(Path(args.dpo).glob("*model*"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files] + tree
    keys = [Cache.key(weights, prompt_format, options, i, question(record)) for i, record in enumerate(records)]
    cache = Cache(args)
    cache.append()
    todo = [i for i, key in enumerate(keys) if key not in cache.answers]
    barrier()                                                             # every rank has read the cache
    if todo:
        model = LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device)
        if tree:
            dpo = LLaMA.from_pretrained(args.dpo, DTYPES[args.dtype], device)
            if dpo.config.vocab_size != model.config.vocab_size:
                raise InputError(f"--dpo {args.dpo} has another vocabulary than --model {args.model}: give a model "
                                 "that was trained from it by DPO")
            options["decoder"] = functools.partial(grow_tree, dpo, tree)
    with progress_bar(n * len(todo), args.verb) as bar:
        for part in chunks(todo, max(1, 4 * args.batch_size // n)):
            texts = sample_responses(model, tokenizer, [records[i] for i in part], prompt_format, numbers=part,
                                     batch_size=args.batch_size, label=None, **options)
            for i, samples in zip(part, texts):
                cache.add(keys[i], Answer(samples))
            bar.update(n * len(part))
    return map(Answer, itertools.chain.from_iterable(cache.answers[key].text for key in keys))


def write_outputs(args, records, failed, client=None, **counts):
    """Writes OUT (a JSON list if its name ends in .json), OUT.failed.jsonl and OUT.stats.json, and prints the
    statistics. Returns the exit code: 1 if something failed and nobody answered."""
    failed_path = Path(f"{args.out}.failed.jsonl")
    reasons = Counter(record["reason"].split(":")[0] for record in failed)
    stats = {"records": len(records), "failed": len(failed), **counts, **(client.stats if client else {})}
    if rank() == 0:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write = write_json if args.out.endswith(".json") else write_json_lines
        write(args.out, records)
        failed_path.unlink(missing_ok=True)
        if failed:
            write_json_lines(failed_path, failed)
        write_json(f"{args.out}.stats.json", {**stats, "failed_by_reason": reasons})
    shown = [f"{name.replace('_', ' ')}: {value:.6g}" for name, value in [*stats.items(), *reasons.items()] if value]
    print0(f"{args.out}: {', '.join(shown)}" + (f" (see {failed_path})" if failed else ""))
    answered = [r for r in records if r.get("annotator") not in UNASKED and r.get("preference", 1) is not None]
    return int(bool(failed) and not answered)


def sample_command(args):
    records = read_instructions(args.data) if args.data else [{"instruction": args.prompt, "input": ""}]
    if args.tree:
        make_built_in(args)
    samples, failed, client = get_completions(args, records, args.best_of or args.outputs)
    generator = args.api_model if args.by == "api" else args.model
    if args.best_of:
        samples = keep_best(args, samples)
        generator += f", best of {args.best_of}" + f" on the tree {args.tree}" * bool(args.tree)
    if args.prompt:
        for _, texts in samples:
            print0("\n".join(texts))
        for record in failed:
            print0(f"failed: {record['reason']}")
        return len(failed)
    done = []
    for record, texts in samples:
        output = texts if len(texts) > 1 else texts[0]
        done.append({**record, "output": output, "generator": generator})
    return write_outputs(args, done, failed, client)


def keep_best(args, samples):
    """Best-of-n: of every record's texts the one that --reward scores highest (the first of equals), not empty."""
    scores = score_texts(args.reward, [record for record, _ in samples], [texts for _, texts in samples],
                         dtype=args.dtype, device=setup_device(args.device), batch_size=args.batch_size,
                         most=args.max_new_tokens)
    best = []
    for (record, texts), rewards in zip(samples, scores):
        reward, text = max(((r, t) for r, t in zip(rewards, texts) if t.strip()), key=lambda pair: pair[0])
        best.append(({**record, "reward": reward}, [text]))
    return best


def judge_command(args):
    if args.by in ("reference", "points"):
        judge = JUDGES["points" if args.by == "points" else "corrects"]
        records = read_outputs(args.data, reference=True)
        return write_outputs(args, [{**r, "judgment": judge(r["output"], r["reference"])} for r in records], [])
    replies, failed, client = get_completions(args, read_outputs(args.data), template=JUDGE_USER, system=JUDGE_SYSTEM)
    judged = [{**record, "judgment": read_judgment(reply)} for record, (reply,) in replies]
    perfect = sum(record["judgment"] is None for record in judged)
    return write_outputs(args, judged, failed, client, perfect=perfect, criticized=len(judged) - perfect)


def refine_command(args):
    records = [record for record in read_judged(args.data) if record["judgment"] is not None]
    if args.by == "reference":
        check_references(args, records, "judged response")
        return write_outputs(args, [refined(r, corrected(r["output"], r["reference"])) for r in records], [])
    replies, failed, client = get_completions(args, records, template=REFINE_USER)
    return write_outputs(args, [refined(record, reply.strip()) for record, (reply,) in replies], failed, client)


def refined(record, output):
    """A judged record with its refinement: a demonstration (ILF-MLE) and, with `rejected`, a pair (ILF-DPO)."""
    return {**record, "judgment": None, "rejected": record["output"], "was_judged": record["judgment"],
            "output": output}


def check_references(args, records, kind):
    for i, record in enumerate(records):
        if not isinstance(record.get("reference"), str):
            path = args.data if isinstance(args.data, str) else "the instructions"
            raise InputError(f"{path}: {kind} {i} has no key 'reference', the right answer that --by {args.by} "
                             "compares with; use another --by for texts without one")


def prefer_command(args):
    labelled, failed, client = compare_pairs(args, read_compared(args))
    annotated = Counter(pair["annotator"] for pair in labelled)
    understood = len(labelled) - sum(annotated[name] for name in UNASKED)
    misread = sum(pair["reason"].startswith("not understood") for pair in failed)
    counts = {"random_labels": annotated["noise"], "ties": annotated["equal texts"],
              "parse_rate": understood / max(1, understood + misread)}
    if args.against and labelled:
        counts["win_rate"], counts["win_rate_se"] = mean_and_se([r["preference"] - 1 for r in labelled])
    return write_outputs(args, labelled, failed, client, **counts)


def compare_pairs(args, pairs):
    """Asks the annotators of --by: (labelled pairs, failed pairs with the reason, the client or None).

    args: the flags of add_annotator_flags and --out. pairs: records with output_1 and output_2. A labelled pair has
    preference, from 1 (output_1 is better) to 2, annotator and switched."""
    client = None
    if args.weighted and args.by not in ("api", "model"):
        raise InputError("--weighted needs --by api or --by model: the others know no probabilities")
    if args.by == "api":
        client, pool = Client(args), WEIGHTED if args.weighted else ANNOTATORS
        annotate = ask_annotators(client, annotator_models(args), args.seed)
    elif args.by == "model":
        if bool(args.judge_model) == bool(args.judge_reward):
            raise InputError("--by model needs --judge-model DIR or --judge-reward DIR")
        pool, annotate = [PROMPTED._replace(name=args.judge_model or args.judge_reward)], ask_model(args)
    else:
        check_references(args, pairs, "pair")
        pool, annotate = simulated_pool(args.accuracy, args.length_bias, args.position_bias), ask_simulated(args.seed)
        if args.by == "reference":
            pool = [Simulated("reference")]
    if args.single:
        pool = SINGLE if pool is ANNOTATORS else pool[:1]
    return (*prefer(pairs, pool, annotate, args.noise, args.seed), client)


def read_compared(args):
    """The pairs to compare: with --against of two files; else of one, as they are or made of several outputs each."""
    if args.against:
        baseline = {question(r): r["output"] for r in read_outputs(args.against)}
        records = read_outputs(args.data)
        pairs = [{**r, "output_1": baseline[question(r)], "output_2": r["output"]} for r in records
                 if question(r) in baseline]
        print0(f"{len(pairs)} of {len(records)} instructions of {args.data} are in {args.against}")
    else:
        pairs = read_pairs(args.data)
        if "output" in pairs[0]:
            pairs = pair_up(pairs, args.seed)
    if not pairs:
        raise InputError(f"{args.data}: there is no pair to compare")
    return pairs


def annotator_models(args):
    """The model of each slot: --models, or --api-model."""
    models = dict.fromkeys(("strong", "medium", "basic"), args.api_model)
    for assignment in args.models:
        slot, _, name = assignment.partition("=")
        if slot not in models or not name:
            raise InputError(f"--models {assignment}: expected strong=NAME, medium=NAME or basic=NAME")
        models[slot] = name
    return models


COMMANDS = {"sample": sample_command, "judge": judge_command, "prefer": prefer_command, "refine": refine_command}


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def add_api_flags(p):
    """What it takes to ask: --seed, --api and the rest of an API's flags, --device, --dtype and --batch-size."""
    p.add_argument("--seed", type=nonnegative_int, default=0, help="of every random choice")
    p.add_argument("--cache", help="JSONL of stored answers (default: OUT.cache.jsonl)")
    p.add_argument("--api", help="base URL of an OpenAI-compatible server, such as http://localhost:8000/v1")
    p.add_argument("--api-model", help="the model's name there")
    p.add_argument("--key-env", default="OPENAI_API_KEY", help="environment variable that holds the key, if any")
    p.add_argument("--at-once", type=positive_int, default=32, help="calls in flight")
    p.add_argument("--timeout", type=in_range(float, 0.001), default=120.0, help="seconds that a try takes at most")
    p.add_argument("--tries", type=positive_int, default=8, help="times a call is sent before it fails")
    p.add_argument("--price", type=nonnegative_float, nargs=2, metavar=("PROMPT", "COMPLETION"),
                   help="dollars per 1M tokens")
    p.add_argument("--max-cost", type=nonnegative_float, default=math.inf,
                   help="dollars, at most, of all runs with this cache")
    p.add_argument("--dry-run", action="store_true", help="print calls, tokens and cost, and send nothing")
    p.add_argument("--batch-size", type=positive_int, default=64, help="responses sampled or scored in parallel")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best available)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")


def add_annotator_flags(p):
    """Adds to a parser the flags of compare_pairs: who compares two outputs, and how it is asked (add_api_flags)."""
    p.add_argument("--by", choices=("simulated", "reference", "api", "model"), default="simulated", help="who compares")
    p.add_argument("--judge-model", help="--by model: directory of the model that compares")
    p.add_argument("--judge-reward", help="--by model: directory of a reward model in its place")
    p.add_argument("--judge-format", choices=FORMATS, help="its prompt format (default: recorded in its config.json)")
    p.add_argument("--weighted", action="store_true",
                   help="--by api or model: the preference is 1 + P(output 2 is better), not 1 or 2")
    p.add_argument("--single", action="store_true", help="one annotator in place of the pool of 13")
    p.add_argument("--models", nargs="*", default=[],
                   help="strong=NAME medium=NAME basic=NAME (default: --api-model)")
    p.add_argument("--noise", type=in_range(float, 0, 0.5), default=0.0, help="labels flipped (AlpacaFarm: 0.25)")
    p.add_argument("--accuracy", type=fraction, help="of all simulated annotators (default: .75 to .95)")
    p.add_argument("--length-bias", type=float, default=0.0, help="log-odds for the longer output, with --accuracy")
    p.add_argument("--position-bias", type=float, default=0.0,
                   help="log-odds for the output shown first, with --accuracy")
    add_api_flags(p)


def parse(argv):
    """The command line; without a verb it is `sample`."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["sample", *argv]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    sample, judge, refine, prefer = [
        verbs.add_parser(verb, help=text, formatter_class=HelpFormatter) for verb, text in (
            ("sample", "instructions -> outputs"), ("judge", "outputs -> judged responses"),
            ("refine", "judged responses -> rewritten outputs"), ("prefer", "pairs or several outputs -> preferences"))]

    sample.add_argument("--prompt", help="one instruction, answered on the terminal")
    sample.add_argument("--outputs", type=positive_int, default=1, help="outputs for each instruction")
    sample.add_argument("--best-of", type=positive_int, help="sample this many and keep the best by --reward")
    sample.add_argument("--reward", help="directory of the reward model that says which is best")
    sample.add_argument("--tree", type=positive_int, nargs=2, metavar=("LAYERS", "CHILDREN"),
                        help="TreeBoN: best-of-n on a tree, which --dpo prunes (--best-of: 16). Without --model: the "
                        "built-in world's models, made if they are not there")
    sample.add_argument("--keep", type=positive_int, help="branches kept by a layer (default: --best-of / CHILDREN)")
    sample.add_argument("--dpo", help="directory of a model that was trained from --model by DPO")

    judge.add_argument("--by", choices=("reference", "points", "api", "model"), default="reference", help="who judges")

    refine.add_argument("--by", choices=("model", "api", "reference"),
                        help="who rewrites (default: api if --api is given)")

    prefer.add_argument("--against", help="a baseline's outputs, output_1 of every pair: prints the win rate of --data")
    add_annotator_flags(prefer)

    for p in (sample, judge, refine, prefer):
        p.add_argument("--data", help="JSON or JSONL to read")
        p.add_argument("--out", help="JSON Lines to write, or X.json: a JSON list")
        if p is not prefer:
            add_api_flags(p)

    for p in (sample, judge, refine):
        p.add_argument("--model", help="model directory in Hugging Face layout")
        p.add_argument("--format", choices=FORMATS, help="its prompt format (default: recorded in its config.json)")
        p.add_argument("--temperature", type=nonnegative_float, default=0.0 if p is judge else None,
                       help="0 is greedy (default: 0.7; 1 with --best-of; 0 for judge)")
        p.add_argument("--top-p", type=fraction, default=1.0, help="nucleus sampling: only this mass")
        p.add_argument("--top-k", type=nonnegative_int, default=0, help="only the k most likely tokens (0: all)")
        p.add_argument("--max-new-tokens", type=positive_int, default=300, help="longer answers are truncated")
    return check_args(parser.parse_args(argv))


def check_args(args):
    """Fills in the defaults that depend on other flags; raises InputError for flags that contradict each other."""
    if args.verb != "sample":
        if not (args.data and args.out):
            raise InputError(f"{args.verb} needs --data FILE and --out FILE")
    else:
        args.by = None
        if bool(args.prompt) == bool(args.data) or bool(args.data) != bool(args.out):
            raise InputError("give either --prompt TEXT, or --data FILE and --out FILE")
        if args.tree:
            check_tree(args)
        elif args.dpo or args.keep:
            raise InputError("--dpo and --keep prune a tree: give --tree LAYERS CHILDREN, too")
        if bool(args.best_of) != bool(args.reward):
            raise InputError("--best-of N and --reward DIR, the reward model that chooses, belong together")
    if args.out and Path(args.out).is_dir():
        raise InputError(f"--out {args.out} is a folder: give the name of a file")

    args.by = args.by or ("api" if args.api else "model")
    if args.verb != "prefer" and args.temperature is None:
        args.temperature = 1.0 if args.verb == "sample" and args.best_of else 0.7
    return args


def check_tree(args):
    """Fills in the defaults of --tree's other flags: without --model the built-in world's models."""
    args.best_of = args.best_of or 16
    if not (args.model or args.api):
        args.model, args.dpo = f"out/sft-{args.seed}-corrects", args.dpo or f"out/dpo-{args.seed}"
        args.reward = args.reward or f"out/reward-{args.seed}"
        args.max_new_tokens = min(16, args.max_new_tokens)                # its longest answer
    if args.api or not args.dpo:
        raise InputError("--tree needs --model DIR, not --api, and --dpo DIR, a model that was trained from it by DPO")
    layers, children = args.tree
    keep = args.keep or max(1, args.best_of // children)
    if keep * children > args.best_of or layers > args.max_new_tokens:
        raise InputError(f"--tree {layers} {children} does not fit: {keep} branches with {children} children into "
                         f"--best-of {args.best_of}, or {layers} layers into --max-new-tokens {args.max_new_tokens}")
    args.tree = [layers, children, keep]


def main(argv=None):
    args = parse(argv)
    return COMMANDS[args.verb](args)


if __name__ == "__main__":
    run_main(main)
