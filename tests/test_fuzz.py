"""Damaged and hostile files: a reader answers each in time, with an InputError or with what the file says."""
import dataclasses
import gzip
import json
import random
import signal

import pytest
import torch

import data as D
import model as M
from data import InputError, write_json
from model import Config, LLaMA, Run

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
COUNT = 300                                                                 # mutations of a file, of each kind
CONFIG = Config(vocab_size=1090, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=4, initializer_range=.5)
ODD = [None, True, False, -1, 0, 1, 3, 2**20, 2**31, 2**64, 10**4000, 1e308, .5, float("nan"), float("inf"), "", "7",
       "\x1b[2J", "../x", "/etc/passwd", "a\n", "\ud800", [], {}, [[]], [1], {"a": None}, [{"role": "user"}]]


class Hangs(BaseException):
    """Not an Exception, which a reader may catch."""


def hangs(number, frame):
    raise Hangs


def damaged(content, rng):
    """Bytes with one to three faults: a bit changed, a piece lost, doubled, turned round or overwritten."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        i = rng.randrange(1 + min(len(content), rng.choice([10, 400, 10**9])))       # headers more often
        piece = content[i:i + rng.choice([1, 1, 4, 50, 10**6])]
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece[:1]) + piece[1:]
        content = content[:i] + rng.choice([
            flipped, flipped, rng.randbytes(len(piece)), bytes(len(piece)), piece[::-1], piece * 2, b"", b"[" * 10**5,
            b"9" * 5000, b'"', b"}{", b"-1", b"\xff\n"]) + content[i + len(piece):]
    return content


def places(value):
    """All (container, key) of a JSON value."""
    found = []
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def edited(content, rng):
    """JSON with one to three values deleted, or replaced by odd ones or by those of other keys."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = places(value) or [([0], 0)]
        (container, key), (other, place) = rng.choice(found), rng.choice(found)
        if rng.random() < .15:
            del container[key]
        else:
            container[key] = json.loads(json.dumps(rng.choice([*ODD, other[place], other[place]])))
    return json.dumps(value).encode()


def relabelled(content, rng):
    """A safetensors file whose header is edited, and keeps its length where possible."""
    size = int.from_bytes(content[:8], "little")
    header = edited(content[8:8 + size], rng).ljust(size)
    return len(header).to_bytes(8, "little") + header + content[8 + size:]


def fuzz(path, read, check, *mutations):
    """Damages a file again and again. read() either raises InputError, or check(what it gives, the bytes) holds."""
    rng, whole, accepted = random.Random(path.name), path.read_bytes(), 0
    before = signal.signal(signal.SIGALRM, hangs)
    for i in range(COUNT * len(mutations)):
        content = mutations[i % len(mutations)](whole, rng)
        path.write_bytes(content)
        signal.alarm(5)
        try:
            got = read()
            check(got, content)
            accepted += 1
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) <= 1000, error
        except (Exception, Hangs) as error:
            raise AssertionError(f"mutation {i} of {path}, {len(content)} bytes: {content[:500]}") from error
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    path.write_bytes(whole)
    check(read(), whole)
    assert accepted < i


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model directory with an adapter."""
    directory = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    model = LLaMA(CONFIG)
    model.save_pretrained(directory, D.world_tokenizer(), extra={"prompt_format": "short", "run": {"seed": 0}})
    M.add_lora(model, 2, 4)
    for layer in M.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    M.save_adapter(model, directory / "adapter", directory)
    return directory


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]
BASE = {"instruction": "i", "input": "", "output": "o", "judgment": "It is wrong.", "score": 6, "id": "a"}
PAIRS = [{"instruction": "i", "output_1": "a", "output_2": "b", "preference": 2},
         {"chosen": CHAT, "rejected": CHAT[2:]}, {"prompt": "i", "chosen": "a", "rejected": "b"}]
CATEGORIES = [{"children": {"J1": {"text": "one"}}}, {"children": {"J2": {}}}]
SHEPHERD = [{"id": 0, "question": "q", "answer": "a", "feedback": "f"},
            {"metadata": {"context": "q", "output_candidate": "a", "output_correct": "c"},
             "latestLabel": {"jsonResponse": {"CLASSIFICATION_JOB_0": {"categories": CATEGORIES}}}}]
ANSWER = {"answer": "a", "feedback": {"critiques": [{"text": "t", "refinement": "r"}]}}
CRITIQUES = [{"id": "a", "data": {"passage": {"text": "P"}, "questions": [
    {"question": "Q", "answers": [ANSWER, ANSWER], "rankings": [1, 2]}]}}]


def read_shepherd(path):
    return D.read_judged(D.convert("shepherd", path, path.parent / "new"))


def read_critiques(path):
    return D.read_judged(D.convert("critiques", path, path.parent / "new"))


UNTRAINED = {                                                               # what is read, but not trained on as it is
    D.read_instructions: [BASE, {"prompt": "i"}, {"messages": CHAT}], D.read_outputs: [BASE, {"messages": CHAT}],
    D.read_preferences: [*PAIRS, {**BASE, "rejected": "b"}],
    D.read_pairs: [{"instruction": "i", "output": ["a", "b"]}] * 2,
}
READ = {
    **UNTRAINED, D.read_demonstrations: [BASE, {"prompt": "i", "completion": "o"}],
    D.read_judged: [BASE, {**BASE, "judgment": None}], D.read_judge_training: [BASE, BASE], D.read_forward: [BASE],
    D.read_feedme: PAIRS, D.read_conditioning: PAIRS, read_shepherd: SHEPHERD, read_critiques: CRITIQUES,
}


@pytest.mark.parametrize("read", READ, ids=lambda f: f.__name__)
def test_records(read, tmp_path):
    """A traceback, or a record that breaks what trains on it."""
    words = D.world_tokenizer()

    def check(records, content):
        assert records
        for r in records:
            D.format_prompt(r, "alpaca").encode("utf-8")
            assert read is not D.read_preferences or 1 <= r["preference"] <= 2
        if read not in UNTRAINED:
            D.encode(words, records, "cut", 10**4)

    for name, separator, mutations in (("a.json", ", ", [damaged, edited]), ("a.jsonl", "\n", [damaged])):
        path, text = tmp_path / name, separator.join(map(json.dumps, READ[read]))
        path.write_text(f"[{text}]" if name == "a.json" else text)
        fuzz(path, lambda: read(path), check, *mutations)


def equal(a, b):
    """Whether two values are equal; NaN equals itself."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.), b.nan_to_num(7.))
    return a == b if not isinstance(a, dict) else a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def must_equal(expected):
    def check(got, content):
        assert equal(got, expected)
    return check


def test_gzip(tmp_path):
    """A damaged archive gives other records."""
    path, records = tmp_path / "a.gz", [{**BASE, "id": i} for i in range(20)]
    path.write_bytes(gzip.compress(json.dumps(records).encode()))
    fuzz(path, lambda: D.read_json(path), must_equal(records), damaged)


def test_configurations(home):
    """Another network than config.json describes, one that takes all memory, or values of the wrong kind."""
    whole = LLaMA.from_pretrained(home).state_dict()

    def read():
        D.Tokenizer.from_pretrained(home)
        return LLaMA.from_pretrained(home)

    def check(model, content):
        raw = json.loads(content)
        for field in dataclasses.fields(Config):
            value = getattr(model.config, field.name)
            stated = (raw.get("rope_parameters") or raw if field.name == "rope_theta" else raw).get(field.name)
            assert type(value) is field.type and (stated is None or type(stated) is not str and stated == value)
        tied = {"lm_head.weight": model.model.embed_tokens.weight} if model.config.tie_word_embeddings else {}
        assert raw.get("prompt_format") in (None, *D.FORMATS) and equal(model.state_dict(), {**whole, **tied})
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 1090)

    fuzz(home / "config.json", read, check, damaged, edited)


def stated(content):
    """What the published package reads of a safetensors file. We ignore its metadata, and take 0.0 and false for 0."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    header.pop("__metadata__", None)
    for entry in header.values():
        entry.update({key: [int(n) for n in entry[key]] for key in ("shape", "data_offsets")})
    header = json.dumps(header).encode()
    package = pytest.importorskip("safetensors.torch")
    return package.load(len(header).to_bytes(8, "little") + header + content[8 + size:])


def test_safetensors(home):
    """Tensors that the published package refuses or reads otherwise: after a gap, on each other's bytes, in front."""
    path = home / "model.safetensors"
    for read in (lambda: M.read_safetensors(path), lambda: LLaMA.from_pretrained(home).state_dict()):
        fuzz(path, read, lambda got, content: must_equal(stated(content))(got, content), damaged, relabelled)


@pytest.mark.parametrize("shards", [1, 2])
def test_pickles_and_indexes(home, shards, tmp_path):
    """PyTorch compares no checksums: weights of a damaged file, or of a file elsewhere that an index names."""
    state, shard_of = LLaMA.from_pretrained(home).state_dict(), {}
    for i in range(shards):
        shard = "pytorch_model.bin" if shards == 1 else f"shard-{i}.bin"
        names = list(state)[i::shards]
        torch.save({name: state[name] for name in names}, tmp_path / shard)
        shard_of.update(dict.fromkeys(names, shard))
    (tmp_path / "config.json").write_bytes((home / "config.json").read_bytes())
    index = tmp_path / "pytorch_model.bin.index.json"
    write_json(index, {"metadata": {"total_size": 1}, "weight_map": shard_of})
    path, mutations = (tmp_path / shard, [damaged]) if shards == 1 else (index, [damaged, edited])
    fuzz(path, lambda: LLaMA.from_pretrained(tmp_path).state_dict(), must_equal(state), *mutations)


def test_tokenizers(home, tmp_path):
    """A tokenizer that loads and then cannot encode, decode or be saved: invalid UTF-8 in a piece."""
    def check(tokenizer, content):
        for text in ("Say it.\n", "", " é漢😀", "\n"):
            ids = tokenizer.encode_prompt(text) + tokenizer.encode_response(text)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert tokenizer.decode_response(ids) + "".join(tokenizer.pieces(ids)) + str(tokenizer.is_longer(text, 1))
        tokenizer.save(tmp_path)
        assert (tmp_path / "tokenizer.model").read_bytes() == content

    fuzz(home / "tokenizer.model", lambda: D.Tokenizer.from_pretrained(home), check, damaged)


def test_adapters(home):
    """An adapter of another function, rank or scale than its files say; memory for a rank that no file has."""
    path, weights = home / "adapter" / "adapter_config.json", home / "adapter" / "adapter_model.safetensors"

    def read():
        model = LLaMA.from_pretrained(home)
        M.load_adapter(model, home / "adapter")
        return model

    def check(model, content):
        raw = json.loads(path.read_text())
        trained = {f"base_model.model.{name}": p for name, p in M.trained_weights(model).items()}
        assert equal(trained, stated(weights.read_bytes()))
        for name, layer in M.lora_layers(model).items():
            assert layer.scale == raw["lora_alpha"] / raw["r"] and name.rsplit(".")[-1] in raw["target_modules"]
        assert not any(raw.get(key) for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "lora_bias"))
        model(torch.tensor([[1, 2, 3]]))

    fuzz(path, read, check, damaged, edited)
    fuzz(weights, read, check, damaged, relabelled)


def test_resuming(home, tmp_path):
    """A damaged resume.pt ends in a traceback, or continues from other weights or moments."""
    def state(run):
        return {"model": run.model.state_dict(), "moments": run.optimizer.state_dict()["state"], "state": run.state}

    def run(resume):
        model = LLaMA.from_pretrained(home)
        return Run(model, M.make_optimizer(model), tmp_path, {"lr": 1e-3}, 1.0, 10, resume)

    first = run(False)
    for p in first.model.parameters():
        p.grad = torch.ones_like(p)
    first.optimizer.step()
    first.save()
    fuzz(tmp_path / "resume.pt", lambda: state(run(True)), must_equal(state(first)), damaged)
