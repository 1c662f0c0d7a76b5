"""TreeBoN against its definition, written out without caches, batches or tensors, and `simulate.py sample --tree`."""
import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import bench_tree  # noqa: E402
import data  # noqa: E402
import simulate  # noqa: E402
from conftest import finish, torchrun  # noqa: E402
from model import Config, LLaMA, RewardModel, generate, sample_token  # noqa: E402
from simulate import grow_tree, mean_and_se, partial_rewards, prune  # noqa: E402

EOS, STEPS, N = 3, 12, 8
PROMPTS = [[1, 5, 6], [1, 7], [1, 4, 8, 9, 2], [1], [1, 6, 6, 2]]


def talker(seed):
    """A small random model, unsure enough to finish after a few tokens or after many."""
    torch.manual_seed(seed)
    config = Config(vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, initializer_range=0.2)
    return LLaMA(config).double().eval()


@pytest.fixture(scope="module")
def model():
    return talker(1)


@pytest.fixture(scope="module")
def dpo():
    return talker(2)


@torch.no_grad()
def logp_of(model, prompt, ids):
    """log p of each id, from scratch."""
    logp = model(torch.tensor([prompt + ids]))[0].log_softmax(-1)
    return [logp[len(prompt) + k - 1, token].item() for k, token in enumerate(ids)]


def weighted_ratio(model, dpo, prompt, ids):
    """The sum over k of log(p_dpo(y_k) / p(y_k)) / (k + 1), from scratch."""
    ratios = np.subtract(logp_of(dpo, prompt, ids), logp_of(model, prompt, ids))
    return sum(ratio / (k + 1) for k, ratio in enumerate(ratios))


@torch.no_grad()
def naive_tree(model, dpo, prompt, row, *, layers, children, keep, n=N, steps=STEPS, eos=EOS,
               temperature=1.0, **sampling):
    """The definition, one prompt and one token at a time -> the leaves by slot."""
    u = [np.random.default_rng([0, n * row + slot]).random(steps) for slot in range(n)]
    branches, done = {slot: [] for slot in range(n)}, {}
    for layer in range(layers):
        for slot, ids in branches.items():
            for t in range(steps * layer // layers, steps * (layer + 1) // layers):
                if eos not in ids:
                    logits = model(torch.tensor([prompt + ids]))[:, -1]
                    ids = ids + [sample_token(logits, torch.tensor([u[slot][t]]), temperature, **sampling).item()]
            branches[slot] = ids
        if layer == layers - 1:
            break
        ranked = []
        for slot, ids in {**branches, **done}.items():
            score = weighted_ratio(model, dpo, prompt, ids)
            ranked.append((slot not in done, -round(score, 4), slot, ids))
        ranked.sort()
        kept = sorted((slot, ids) for _, _, slot, ids in ranked[:keep])
        branches, done = {}, {}
        for place, (_, ids) in enumerate(kept):
            if eos in ids:
                done[place * children] = ids
            else:
                branches.update({place * children + child: ids for child in range(children)})
    leaves = {**branches, **done}
    return [leaves.get(slot, []) for slot in range(n)]


def grown(model, dpo, prompts=PROMPTS, *, layers, children, keep, n=N, steps=STEPS, eos=EOS, **more):
    decoder = functools.partial(grow_tree, dpo, (layers, children, keep))
    return generate(model, prompts, steps, eos, n=n, decoder=decoder, **{"temperature": 1.0, **more})


SHAPES = [dict(layers=4, children=4, keep=2), dict(layers=3, children=2, keep=4), dict(layers=2, children=1, keep=3),
          dict(layers=12, children=2, keep=3), dict(layers=5, children=8, keep=1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tree_is_its_definition(model, dpo, shape):
    """A cache whose rows are not those of the branches, log-probabilities shifted by a position, 1 / (k + 1) that
    starts anew in each segment, padding in a score, finished rows that branch, are sampled on or are lost."""
    expected = [naive_tree(model, dpo, prompt, row, **shape) for row, prompt in enumerate(PROMPTS)]
    assert grown(model, dpo, **shape) == expected
    lengths = {len(ids) for leaves in expected for ids in leaves}
    assert 0 in lengths and len(lengths) > 4                               # empty slots; rows of many lengths


@pytest.mark.parametrize("sampling", [dict(temperature=1.7, top_p=.9), dict(temperature=0.5, top_k=4)], ids=str)
def test_scores_do_not_depend_on_how_tokens_are_drawn(model, dpo, sampling):
    """Ranks by the probabilities of the truncated or tempered distribution that the tokens were drawn from."""
    shape = dict(layers=4, children=2, keep=4)
    expected = [naive_tree(model, dpo, prompt, row, **shape, **sampling) for row, prompt in enumerate(PROMPTS)]
    assert grown(model, dpo, **shape, **sampling) == expected


def test_trees_that_are_plain_sampling(model, dpo):
    """Siblings, or all rows, that draw the same random numbers or those of another slot; rows in another order."""
    plain = generate(model, PROMPTS, STEPS, EOS, n=N)
    assert grown(model, dpo, layers=1, children=4, keep=2) == plain        # one layer
    for layers in (2, 5, STEPS):                                           # one child, all are kept
        assert grown(model, dpo, layers=layers, children=1, keep=N) == plain
    free = grown(model, dpo, layers=2, children=N, keep=1, eos=-1)         # one parent of all leaves
    for leaves in free:
        assert len({tuple(ids[:STEPS // 2]) for ids in leaves}) == 1 < len({tuple(ids) for ids in leaves})


def test_trees_depend_on_their_prompt_only(model, dpo):
    """Rows of other prompts in the ranking, or random numbers that change with the batch."""
    shape = dict(layers=4, children=2, keep=4)
    expected = grown(model, dpo, **shape)
    for size in (1, 2 * N, 10**6):
        assert grown(model, dpo, batch_size=size, **shape) == expected
    assert grown(model, dpo, [PROMPTS[4], PROMPTS[1]], rows=[4, 1], **shape) == [expected[4], expected[1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equal_models_keep_the_first(dtype):
    """With the reference as the DPO model every score is 0: rounding errors decide, or not the first stay."""
    model = talker(1).to(dtype)
    plain = generate(model, PROMPTS, STEPS, -1, n=N)
    tree = grown(model, model, layers=3, children=4, keep=2, eos=-1)
    for leaves, samples in zip(tree, plain):
        first = [ids[:STEPS // 3] for ids in samples[:2]]
        assert [ids[:STEPS // 3] for ids in leaves] == [first[0]] * N
        assert leaves[0] == samples[0]


class Bigrams:
    """A language model that is a table: probabilities[i][j] of token j after token i."""

    def __init__(self, probabilities):
        self.table = torch.tensor(probabilities, dtype=torch.float64)
        self.lm_head = SimpleNamespace(weight=self.table.log().T)

    def model(self, tokens, cache):
        return torch.nn.functional.one_hot(tokens, len(self.table)).double()


def test_partial_reward_on_paper():
    """The one-position shift, 1 / k with k from 0 or from the segment's start, a beta, tokens after EOS."""
    dpo = Bigrams([[.5, .3, .2], [.1, .6, .3], [.4, .2, .4]])
    hidden = dpo.model(torch.tensor([0, 1]), None)                         # 0 and 1 were the last tokens
    logp = torch.tensor([[.25, .5, .5], [.5, .5, .5]], dtype=torch.float64).log()
    segments = [[1, 2, 2], [2]]
    expected = [math.log(.3 / .25) + math.log(.3 / .5) / 2 + math.log(.4 / .5) / 3, math.log(.3 / .5)]
    assert partial_rewards(dpo, None, hidden, segments, logp, 0).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [math.log(.3 / .25) / 5 + math.log(.3 / .5) / 6 + math.log(.4 / .5) / 7, math.log(.3 / .5) / 5]
    assert partial_rewards(dpo, None, hidden, segments, logp, 4).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_is_kept():
    """Equal scores that differ in the last digits, branches in another order than their slots', a threshold in place of
    ranks, a finished branch that loses its place, or takes that of all its children."""
    ids = {slot: [5] for slot in range(8)}
    ids[6] = [5, EOS]
    scores = [0.1, 0.3, 0.3 + 1e-9, 0.4, -1.0, -3.0, -2.0, -2.0]
    assert prune(ids, range(8), scores, 4, 2, 2, EOS) == {0: 1, 1: 1, 2: 3, 3: 3, 4: 4, 5: 4, 6: 6}
    ids.pop(4)
    assert prune(ids, [0, 1, 2, 3, 5, 7], scores, 4, 2, 1, EOS) == {0: 3, 1: 3, 4: 6}      # 6 has been kept before


@pytest.mark.parametrize("layers,children", [(1, 4), (2, 2), (4, 4), (4, 8), (3, 1)])
def test_token_passes(model, dpo, layers, children):
    """A prefix that is read again for each segment; scoring of the last segment, which prunes nothing; rows that are
    more or fewer than n."""
    read = {"policy": 0, "dpo": 0}
    hooks = []
    for name, part in (("policy", model), ("dpo", dpo)):
        def count(module, inputs, output, name=name):
            read[name] += inputs[0].numel()
        hooks.append(part.model.register_forward_hook(count))
    leaves, = grown(model, dpo, [PROMPTS[2]], layers=layers, children=children, keep=N // children, eos=-1)
    for hook in hooks:
        hook.remove()
    assert [len(ids) for ids in leaves] == [STEPS] * N
    assert read["policy"] == len(PROMPTS[2]) + N * (STEPS - 1)             # as best-of-n
    assert read["dpo"] == len(PROMPTS[2]) + N * (STEPS - STEPS // layers)


def test_a_tree_finds_what_its_score_rewards(model, dpo):
    """A ranking with the wrong sign, or none: where the reward is the sum of partial rewards, the best leaf has to beat
    the best of as many samples (here by 8 standard errors), and with the two models exchanged it must not."""
    prompts = [[1, a, b] for a in range(4, 11) for b in range(4, 11)]
    plain = generate(model, prompts, STEPS, EOS, n=N, seed=1)
    tree = grown(model, dpo, prompts, layers=4, children=4, keep=2, seed=1)
    against = []
    for prompt, samples, leaves in zip(prompts, plain, tree):
        best = [max(weighted_ratio(model, dpo, prompt, ids) for ids in some if ids) for some in (samples, leaves)]
        against.append(best[1] - best[0])
    mean, se = mean_and_se(against)
    assert mean > 4 * se


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def directories(base, tmp_path_factory):
    """--model, --dpo and --reward of a random model, and instructions."""
    folder = tmp_path_factory.mktemp("tree")
    tokenizer, policy = data.Tokenizer.from_pretrained(base), LLaMA.from_pretrained(base)
    torch.manual_seed(5)
    LLaMA(policy.config).save_pretrained(folder / "dpo", tokenizer, extra={"prompt_format": "short"})
    RewardModel(policy.config).save_pretrained(folder / "reward", tokenizer, extra={"prompt_format": "short"})
    ask = folder / "ask.jsonl"
    data.write_json_lines(ask, [{"instruction": f"Say what {i} plus 5 is.", "input": ""} for i in range(5)])
    return [str(x) for x in (base, folder / "dpo", folder / "reward", ask)]


def sample(directories, out, *flags):
    """Runs simulate.py sample; returns the records."""
    model, dpo, reward, ask = directories
    given = ["--dpo", dpo] if "--tree" in flags else []
    argv = ["sample", "--model", model, "--reward", reward, "--data", ask, "--out", str(out), "--max-new-tokens", "6",
            "--device", "cpu", *given, *flags]
    assert simulate.main(argv) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_sampling_on_a_tree(directories, tmp_path):
    """--tree changes nothing, is served another shape's or another DPO model's answers, or keeps another leaf than the
    one that the reward model scores highest."""
    plain = sample(directories, tmp_path / "a.jsonl", "--best-of", "8")
    flat = sample(directories, tmp_path / "b.jsonl", "--best-of", "8", "--tree", "1", "4")
    assert [r["output"] for r in flat] == [r["output"] for r in plain]
    assert [r["reward"] for r in flat] == [r["reward"] for r in plain]
    assert flat[0]["generator"].endswith("best of 8 on the tree [1, 4, 2]")
    deep = sample(directories, tmp_path / "b.jsonl", "--best-of", "8", "--tree", "3", "4")        # the same cache
    wide = sample(directories, tmp_path / "b.jsonl", "--best-of", "8", "--tree", "3", "4", "--keep", "1")
    outputs = {tuple(r["output"] for r in records) for records in (flat, deep, wide)}
    assert len(outputs) == 3
    swapped = [directories[0], directories[0], *directories[2:]]
    other = sample(swapped, tmp_path / "b.jsonl", "--best-of", "8", "--tree", "3", "4")
    assert [r["output"] for r in other] != [r["output"] for r in deep]
    half = sample(directories, tmp_path / "half.jsonl", "--tree", "3", "4", "--dtype", "bfloat16")
    assert half[0]["generator"].endswith("best of 16 on the tree [3, 4, 4]") and len(half) == 5


def test_the_built_in_models_are_made(tmp_path, monkeypatch, capsys):
    """Without --model: models of another seed or device, finished ones made again, unfinished ones used, a failure that
    is not noticed, or minutes of training before a misspelt --data."""
    monkeypatch.chdir(tmp_path)
    ran = []

    def run(argv, returncode=1):
        ran.append([str(word) for word in argv[1:]])
        return SimpleNamespace(returncode=returncode)
    monkeypatch.setattr(simulate.subprocess, "run", run)
    tree = ["--tree", "4", "4", "--seed", "3", "--device", "cpu"]
    with pytest.raises(data.InputError, match="none.jsonl"):
        simulate.main([*tree, "--data", "none.jsonl", "--out", "o.jsonl"])
    assert ran == []
    Path("out/dpo-3").mkdir(parents=True)
    data.write_json("out/dpo-3/config.json", {})
    Path("out/dpo-3/resume.pt").touch()                                    # stopped
    with pytest.raises(data.InputError, match="out/dpo-3 .*: make it with python .*train_ppo.py dpo --seed 3$"):
        simulate.main([*tree, "--prompt", "Hi"])
    assert ran.pop() == [str(ROOT / "train_ppo.py"), "dpo", "--seed", "3", "--device", "cpu", "--resume"]
    Path("out/dpo-3/resume.pt").unlink()
    with pytest.raises(data.InputError, match="train_ppo.py reward --seed 3$"):
        simulate.main([*tree, "--prompt", "Hi"])
    own = ["--model", "m", "--dpo", "d", "--reward", "r"]
    simulate.make_built_in(simulate.parse(["--tree", "4", "4", *own, "--prompt", "Hi"]))
    assert len(ran) == 1                                                   # nothing is made for other models
    args = simulate.parse(["--tree", "4", "2", "--prompt", "Hi"])
    assert (args.model, args.dpo, args.reward) == ("out/sft-0-corrects", "out/dpo-0", "out/reward-0")
    assert (args.best_of, args.tree, args.max_new_tokens) == (16, [4, 2, 8], 16)


@pytest.mark.parametrize("flags,message", [
    (["--model", "m", "--reward", "r", "--tree", "4", "4"], "--dpo"),
    (["--tree", "4", "4", "--best-of", "3"], "1 branches with 4 children into --best-of 3"),
    (["--tree", "17", "2"], "17 layers into --max-new-tokens 16"),
    (["--tree", "4", "4", "--keep", "5"], "5 branches with 4 children"),
    (["--tree", "4", "4", "--model", "m", "--dpo", "d"], "--reward"),
    (["--model", "m", "--dpo", "d"], "--tree"),
    (["--model", "m", "--keep", "2"], "--tree"),
    (["--tree", "4", "4", "--api", "http://x", "--api-model", "m", "--reward", "r"], "not --api"),
])
def test_flags_that_contradict(flags, message):
    """A flag of the tree that does nothing, or a tree that samples more than best-of-n."""
    with pytest.raises(data.InputError, match=message):
        simulate.parse([*flags, "--prompt", "Hi"])


def test_another_vocabulary(directories, tmp_path):
    """An index error in the middle of sampling."""
    config = Config(vocab_size=77, hidden_size=16, num_hidden_layers=1)
    LLaMA(config).save_pretrained(tmp_path / "other")
    with pytest.raises(data.InputError, match="vocabulary"):
        sample([directories[0], str(tmp_path / "other"), *directories[2:]], tmp_path / "o.jsonl", "--tree", "2", "2")


def test_the_bench_prints_its_table(directories, tmp_path, monkeypatch, capsys):
    """README's figures are measured by a script that nobody has run since its imports changed."""
    model, dpo, reward, _ = directories
    stages = {"dpo": dpo, "reward": reward}
    monkeypatch.setattr(bench_tree, "built_in", lambda *args: model)
    monkeypatch.setattr(bench_tree.train_ppo, "built_in_stage", lambda stage, *args: stages[stage])
    flags = ["--seeds", "3", "4", "--count", "40", "--n", "4", "--shapes", "2x2", "--out", str(tmp_path)]
    assert bench_tree.main(flags) == 0
    assert "| 4 | 2x2 |" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_grow_what_one_does(directories, tmp_path):
    """Under torchrun the trees have other random numbers."""
    one = sample(directories, tmp_path / "one.jsonl", "--tree", "3", "4")
    model, dpo, reward, ask = directories
    finish(torchrun("simulate.py", ["sample", "--model", model, "--dpo", dpo, "--reward", reward, "--data", ask,
                                    "--tree", "3", "4", "--out", str(tmp_path / "two.jsonl"), "--max-new-tokens",
                                    "6", "--device", "cpu"]))
    assert [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()] == one
