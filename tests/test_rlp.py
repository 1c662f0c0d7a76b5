"""RLP (arXiv 2403.19279): the two formulas of UML, its views, its step against plain formulas, what it leaves alone;
SPG's clusters, confidences and pairs; both stages end to end, offline and with judges."""
import argparse
import json
import math
import random
from collections import Counter

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import data
import losses
import simulate
import train_ppo
import train_sft
from conftest import Killed, assert_equal_runs, at_step, die, distance, finish, metrics, torchrun
from data import InputError
from model import LLaMA, RewardModel
from test_api import Server
from test_preferences import CPU, F64, flags, near, plain_score, results, small  # noqa: F401, a fixture


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


def gaussians(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, *shape, dtype=F64, generator=generator)
    deviations = .2 + 2 * torch.rand(2, *shape, dtype=F64, generator=generator)
    return means[0], deviations[0], means[1], deviations[1]


def test_symmetric_kl_is_the_mean_of_both_divergences():
    """Variances for deviations, KL in one direction only, a sum of the two, or a mean over dimensions."""
    m_1, s_1, m_2, s_2 = gaussians(5, 3)
    one, two = Normal(m_1, s_1), Normal(m_2, s_2)
    found = losses.symmetric_kl(m_1, s_1, m_2, s_2)
    near(found, ((kl_divergence(one, two) + kl_divergence(two, one)) / 2).sum(-1), 1e-12)
    near(found, losses.symmetric_kl(m_2, s_2, m_1, s_1), 1e-12)
    x = torch.linspace(-40, 40, 40001, dtype=F64)                          # the definition, as an integral
    p, q = (Normal(m[0, 0], s[0, 0]).log_prob(x) for m, s in ((m_1, s_1), (m_2, s_2)))
    integral = torch.trapezoid((p.exp() - q.exp()) * (p - q), x) / 2
    near(losses.symmetric_kl(m_1[0, :1], s_1[0, :1], m_2[0, :1], s_2[0, :1]), integral, 1e-8)


def test_symmetric_kl_is_0_only_for_equal_codes():
    """s^2/s'^2 + s'^2/s^2 - 2 in fp32, which rounding makes negative for codes that are nearly equal."""
    m_1, s_1, _, _ = (x.float() for x in gaussians(1000, 4))
    near(losses.symmetric_kl(m_1, s_1, m_1, s_1), torch.zeros(1000), 0)
    assert (losses.symmetric_kl(m_1, s_1, m_1, s_1 * (1 + 1e-6)) >= 0).all()
    assert (losses.symmetric_kl(m_1, s_1, m_1 + .1, s_1) > 0).all()


def test_mutual_information_is_bounded_by_the_jensen_shannon_divergence():
    """A sign, or the softplus of the two kinds of pairs exchanged: the best discriminator, log p(a, b) / p(a)p(b),
    reaches 2 JSD - 2 ln 2 exactly, any other one less, and one that knows nothing has -2 ln 2."""
    joint = torch.tensor([[.4, .1, .02], [.05, .2, .23]], dtype=F64)
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    middle = (joint + product) / 2
    jsd = ((joint * (joint / middle).log()).sum() + (product * (product / middle).log()).sum()) / 2

    def estimate(logits):                                                   # each kind of pair under its own measure
        zero = torch.zeros_like(logits)
        near(losses.mutual_information(zero, zero), torch.full_like(zero, -2 * math.log(2)), 1e-12)
        together = losses.mutual_information(logits, zero) + math.log(2)
        apart = losses.mutual_information(zero, logits) + math.log(2)
        return (joint * together + product * apart).sum()

    best = (joint / product).log()
    near(estimate(best), 2 * jsd - 2 * math.log(2), 1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = best + torch.randn(best.shape, dtype=F64, generator=generator)
        assert estimate(other) < estimate(best) <= 0


# ----------------------------------------------------------------------------------------------------------------------
# UML


def test_views_are_two_responses_to_one_instruction_and_one_to_another():
    """A response with itself as the other view, a negative of the same instruction, draws that favour one, or
    noise that is not standard normal. (Expected counts are 250 and 50; five deviations are allowed.)"""
    samples = [[(i, j) for j in range(4)] for i in range(6)]
    drawn = [train_ppo.draw_views(samples, f"views 3 {n}") for n in range(1500)]
    instructions, others, pairs = Counter(), Counter(), Counter()
    for (first, second, other), _ in drawn:
        assert first[0] == second[0] != other[0] and first != second
        instructions[first[0]] += 1
        others[first[0], other[0]] += 1
        pairs[first, second] += 1
    for count, kinds in ((instructions, 6), (others, 30), (pairs, 72)):
        expected = 1500 / kinds
        assert len(count) == kinds and all(abs(c - expected) < 5 * expected ** .5 for c in count.values())
    noise = torch.stack([n for _, n in drawn])                              # (1500, 3, 64)
    assert abs(noise.mean()) < .01 and abs(noise.std() - 1) < .01
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < .01                   # each view has its own
    rows, noise = train_ppo.draw_views(samples, "views 3 7")
    assert rows == drawn[7][0] and torch.equal(noise, drawn[7][1])


@pytest.fixture(scope="module")
def files(small, tmp_path_factory):  # noqa: F811
    """A file of policy samples: of four responses to an instruction two are right, one is wrong, one is another."""
    folder, world, rng = tmp_path_factory.mktemp("rlp"), data.World(9), random.Random(5)
    records = []
    for r in world.instructions("train", 12, "samples"):
        wrong = [world.corrupt(r, r["reference"], rng) for _ in range(2)]
        records.append({k: r[k] for k in ("id", "instruction", "input", "reference")})
        records[-1]["output"] = [r["reference"], wrong[0], r["reference"], wrong[1]]
    data.write_json(folder / "samples.json", records)
    data.write_json(folder / "texts.json", [{**r, "output": "A."} for r in records])
    return {"samples": folder / "samples.json", "texts": folder / "texts.json"}


def argv(small, files, stage, out, *more):  # noqa: F811
    own = {"uml": ["--samples", files["samples"]],
           "spg": ["--samples", files["samples"], "--reward", small.whole]}.get(stage, [])
    return [stage, *flags(small, "reward", out, *own, *more)[1:]]


def run(small, files, stage, out, *more):  # noqa: F811
    assert train_ppo.main(argv(small, files, stage, out, *more)) == 0
    return metrics(out)


def views_of(small, args):  # noqa: F811
    torch.manual_seed(args.seed)
    return train_ppo.RewardAndViews(train_ppo.load_reward_model(args, CPU))


def test_a_step_of_uml_is_the_plain_formula(small, files, tmp_path):  # noqa: F811
    """A code read at padding or at another token than the reward's, one noise for both views, the two scores
    exchanged, a term that is not the mean over instructions, or lambda on the wrong one."""
    more = ["--steps", 1, "--batch-size", 22, "--dtype", "float64", "--lam", .3]
    line, = run(small, files, "uml", tmp_path / "out", *more)
    args = train_ppo.parse(argv(small, files, "uml", "none", *more))
    tokenizer, train, _ = train_ppo.load_pairs(args, CPU)
    views = views_of(small, args)
    reward, samples = views.reward, []
    for r in data.read_json(files["samples"]):
        prompt = data.prompt_ids(tokenizer, r, "short")
        samples.append([prompt + tokenizer.encode_response(text) for text in r["output"]])
    information, kl = [], []
    for number in range(22):
        rows, noise = train_ppo.draw_views(samples, f"views 0 {number}")
        codes, dists = [], []
        for row, e in zip(rows, noise):
            hidden = reward.model(torch.tensor([row]))[0, -1]
            dists.append(Normal(views.mean(hidden), torch.log1p(views.std(hidden).exp()) + 1e-3))
            codes.append(dists[-1].mean + dists[-1].stddev * e)
        t, t_other = (views.discriminator(torch.cat([codes[0], codes[i]])) for i in (1, 2))
        information.append(torch.log(torch.sigmoid(t)) + torch.log(1 - torch.sigmoid(t_other)))
        both = kl_divergence(dists[0], dists[1]) + kl_divergence(dists[1], dists[0])
        kl.append(both.sum() / 2)
    information, kl = torch.stack(information).mean(), torch.stack(kl).mean()
    margins = [plain_score(reward, p.prompt, p.chosen) - plain_score(reward, p.prompt, p.rejected) for p in train]
    loss = -torch.log(torch.sigmoid(torch.stack(margins))).mean() + .3 * (kl - information)
    grads = torch.autograd.grad(loss, list(views.parameters()))
    assert line["information"] == pytest.approx(information.item(), rel=1e-9) and kl > 0
    assert line["kl"] == pytest.approx(kl.item(), rel=1e-7)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert line["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-6)


def test_the_views_shape_the_backbone_and_not_the_head(small, files):  # noqa: F811
    """Codes of detached hidden states, which would teach the reward model nothing; or codes of the reward itself."""
    args = train_ppo.parse(argv(small, files, "uml", "none"))
    views = views_of(small, args)
    loss = train_ppo.view_loss(data.Tokenizer.from_pretrained(small.base), args, CPU)
    loss(views, range(4))[0].backward()
    norms = {name: 0 if p.grad is None else p.grad.norm().item() for name, p in views.named_parameters()}
    assert norms.pop("reward.score.weight") == 0
    unread = {name for name, norm in norms.items() if norm == 0}
    assert unread <= {"discriminator.4.bias"}, unread                       # T and T' of a fresh one may balance


def test_uml_without_its_term_is_the_reward_model_bit_for_bit(small, files, tmp_path):  # noqa: F811
    """MLPs drawn before the head, a term of weight 0 that is computed nevertheless, or pairs in another order: step 5
    would not reproduce plain PPO."""
    run(small, files, "reward", tmp_path / "reward")
    run(small, files, "uml", tmp_path / "none", "--lam", 0)
    assert_equal_runs(tmp_path / "reward", tmp_path / "none", kind=RewardModel)
    found, plain = run(small, files, "uml", tmp_path / "uml"), metrics(tmp_path / "reward")
    assert [found[0][k] for k in ("accuracy", "margin")] == [plain[0][k] for k in ("accuracy", "margin")]
    assert distance(tmp_path / "reward", tmp_path / "uml", RewardModel) > 1e-4
    weights = RewardModel.from_pretrained(tmp_path / "uml").state_dict()    # the MLPs are thrown away
    assert weights.keys() == RewardModel.from_pretrained(tmp_path / "reward").state_dict().keys()


@pytest.mark.parametrize("stage, more", [("uml", ()), ("uml", ("--lora-rank", 2)), ("spg", ("--gamma", 0))])
def test_micro_batches_and_stopping_change_nothing(stage, more, small, files, tmp_path):  # noqa: F811
    """Negatives or noise of the micro-batch, a mean of means, MLPs that are not saved for --resume."""
    whole = tmp_path / "whole"
    run(small, files, stage, whole, "--save-every", 2, *more, "--dtype", "float64")
    run(small, files, stage, tmp_path / "small", "--micro-batch-size", 1, *more, "--dtype", "float64")
    assert_equal_runs(whole, tmp_path / "small", 1e-8, RewardModel)
    again = argv(small, files, stage, tmp_path / "stopped", "--save-every", 2, *more, "--dtype", "float64")
    with at_step(3, die), pytest.raises(Killed):
        train_ppo.main(again)
    more = again.index("--samples")                                         # --judge, if any, goes last
    assert train_ppo.main([*again[:more], "--resume", *again[more:]]) == 0
    assert_equal_runs(whole, tmp_path / "stopped", kind=RewardModel)
    assert results(whole) == results(tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_train_what_one_does(small, files, tmp_path):  # noqa: F811
    """Two forward passes before one backward pass that DDP does not average, views of the rank, a rank without a pair
    that adds its own, or pairs that each rank makes from other scores."""
    commands = []
    for stage, more in (("uml", ["--held-out", 13]), ("spg", ["--gamma", 0])):
        run(small, files, stage, tmp_path / "one" / stage, "--dtype", "float64", *more)
        commands.append(argv(small, files, stage, tmp_path / "two" / stage, "--dtype", "float64", *more))
    finish(torchrun("tests/test_preferences.py", [json.dumps(commands)]))
    for stage in ("uml", "spg"):
        assert_equal_runs(tmp_path / "one" / stage, tmp_path / "two" / stage, 1e-8, RewardModel)


def test_the_discriminator_finds_what_views_share(small):  # noqa: F811
    """Codes that lose the instruction, negatives that are positives, or a discriminator of one code only: on codes of
    a fixed backbone it rises above -2 ln 2 when views are equal, and stays there when they are of any instructions."""
    tokenizer = data.Tokenizer.from_pretrained(small.base)
    records = data.World(9).instructions("train", 40, "critic")
    texts = [r["reference"] for r in records]
    rows = [data.prompt_ids(tokenizer, r, "short") + tokenizer.encode_response(r["reference"]) for r in records]
    assert len(set(texts)) > 30
    for shuffled in (False, True):
        torch.manual_seed(0)
        views = train_ppo.RewardAndViews(RewardModel.from_pretrained(small.whole))
        tokens, lengths = data.pad(rows)
        with torch.no_grad():
            hidden = views.reward.model(tokens)[torch.arange(len(rows)), lengths - 1]
            hidden = (hidden - hidden.mean(0)) / hidden.std(0)              # plain to see
        views.reward.model = torch.nn.Identity()                            # its input: one position of width D
        optimizer = torch.optim.AdamW([p for n, p in views.named_parameters() if "reward" not in n], lr=3e-3)
        generator, found = torch.Generator().manual_seed(1), []
        for step in range(150):
            i, j = torch.randint(40, (2, 64), generator=generator)
            j = torch.where(i == j, (j + 1) % 40, j)
            second = torch.randint(40, (64,), generator=generator) if shuffled else i
            noise = torch.randn(64, 3, 64, generator=generator)
            triples = torch.stack([hidden[i], hidden[second], hidden[j]], 1).flatten(0, 1).unsqueeze(1)
            information, _ = views(triples, torch.ones(192, dtype=torch.long), noise)
            optimizer.zero_grad()
            (-information.mean()).backward()
            optimizer.step()
            found.append(information.mean().item())
        last = sum(found[-20:]) / 20
        assert last < -1.3 if shuffled else last > -.9, (shuffled, last)


# ----------------------------------------------------------------------------------------------------------------------
# SPG


def chosen_args(gamma=.5, seed=0):
    return argparse.Namespace(gamma=gamma, seed=seed)


def same_letter(texts):
    """Clusters of texts that mean the same if they begin with the same letter."""
    return train_ppo.clusters(texts, {(a, b): a[0] == b[0] for a in texts for b in texts if a < b})


def test_clusters_partition_the_texts_and_are_greedy():
    """A text in two groups or in none, groups that a chain of neighbours joins, or a comparison in the other order."""
    assert same_letter(["b2", "a1", "b1", "a1"]) == [["a1", "a1"], ["b1", "b2"]]
    chain = {("a", "b"): True, ("b", "c"): True, ("a", "c"): False, ("c", "d"): True, ("a", "d"): False,
             ("b", "d"): False}                                             # not transitive
    assert train_ppo.clusters(["a", "b", "c", "d"], chain) == [["a", "b"], ["c", "d"]]
    both = {("a", "b"): False, ("a", "c"): True, ("b", "c"): True}          # c joins the first that fits
    assert train_ppo.clusters(["a", "b", "c"], both) == [["a", "c"], ["b"]]


def test_the_best_of_the_largest_group_against_one_outside():
    """The best of all responses, the largest number of different texts, a rejected one of the same meaning, a tie or a
    pair that depends on the order of the samples, or rejected texts drawn without regard to how often they came."""
    output = ["b1", "b2", "b1", "a9", "c5", "c4", "c4", "b1", "c4", "c4"]   # b: 4, c: 5 of 10
    score = {"b1": 3., "b2": 2., "a9": 9., "c4": -2., "c5": -1.}
    rejected = Counter()
    for seed in range(2000):
        record = {"instruction": "x", "output": random.Random(seed).sample(output, 10)}
        pair, = train_ppo.select_pair(record, same_letter(output), score, chosen_args(seed=seed))
        assert (pair["output_1"], pair["preference"], pair["confidence"]) == ("c5", 1, .5)
        again, = train_ppo.select_pair({**record, "output": output}, same_letter(output), score, chosen_args(seed=seed))
        assert again["output_2"] == pair["output_2"]
        rejected[pair["output_2"]] += 1
    assert rejected.keys() == {"b1", "b2", "a9"}
    assert abs(rejected["b1"] / 2000 - .6) < .055                           # five standard errors of 3 of 5
    tie = {"instruction": "x", "output": ["b1", "a9", "b2", "a9"]}
    assert train_ppo.select_pair(tie, same_letter(tie["output"]), score, chosen_args())[0]["output_1"] == "a9"


def test_gamma_selects():
    """A confidence over the different texts, > for >=, .28 * 25 > 7 in floating point, a pair where all agree, or pairs
    without gamma."""
    letters = ["aaaaaaaaaa", "aaaaaaabbb", "aaaaabcdef", "aaaabcdefg", "abcdefghij"]
    confidences = [1, .7, .5, .4, .1]
    counts = []
    for gamma in (0, .1, .4, .5, .51, .7, .9, 1, 1.1):
        pairs = []
        for word in letters:
            groups, score = same_letter(word), dict.fromkeys(word, 0.)
            record = {"instruction": word, "output": list(word)}
            pairs.append(train_ppo.select_pair(record, groups, score, chosen_args(gamma)))
        assert pairs[0] == []                                               # all agree: there is nothing to reject
        kept = [c for c, pair in zip(confidences, pairs) if pair]
        assert kept == [c for c in confidences[1:] if c >= gamma] == [p["confidence"] for p, in filter(None, pairs)]
        counts.append(len(kept))
    assert counts == [4, 4, 3, 2, 1, 1, 0, 0, 0]
    word = "aaaaaaabcdefghijklmnopqrs"                                      # 7 of 25
    record = {"instruction": "x", "output": list(word)}
    assert train_ppo.select_pair(record, same_letter(word), dict.fromkeys(word, 0.), chosen_args(.28))


def test_labels_get_truer_with_gamma():
    """Confidence that says nothing of the truth. Planted: each of 10 responses is right with the same probability,
    between .3 and .9, that belongs to the instruction; wrong ones differ. Scores are noise."""
    rng, found = random.Random(0), {}
    for gamma in (0, .5, .8):
        right = []
        for k in range(3000):
            p = rng.uniform(.3, .9)
            output = ["right" if rng.random() < p else f"wrong {rng.randrange(3)}" for _ in range(10)]
            texts = sorted(set(output))
            groups = train_ppo.clusters(output, {(a, b): False for a in texts for b in texts if a < b})
            record = {"instruction": str(k), "output": output}
            for pair in train_ppo.select_pair(record, groups, {t: rng.random() for t in texts}, chosen_args(gamma)):
                right.append(pair["output_1"] == "right")
        found[gamma] = sum(right) / len(right)
    assert found[0] + .03 < found[.5] < found[.8] - .005 and found[.8] > .98, found


def test_equal_words_are_equal_facts():
    """Word order or a comma that makes another meaning, or one fact that is not compared."""
    frog = "The frog is pink and eats eggs."
    assert train_ppo.same_meaning(frog, "The frog eats eggs and is pink.")
    assert not train_ppo.same_meaning(frog, "The frog is pink and eats fish.")
    assert not train_ppo.same_meaning(frog, "The frog is pink.") and not train_ppo.same_meaning("It is 3.", "It is 31.")


def synthetic(directory):
    return data.read_json(directory / "synthetic.jsonl", empty=True)


def test_spg_trains_on_both_and_holds_out_what_people_have_labelled(small, files, tmp_path):  # noqa: F811
    """Held-out pairs that are synthetic, which would measure agreement with itself; a preferred response by another
    reward model; or the first reward model's weights as the start."""
    args, plain_args = (train_ppo.parse(argv(small, files, stage, tmp_path / "out")) for stage in ("spg", "reward"))
    args.held_out = plain_args.held_out = None                              # the default
    _, train, held_out = train_ppo.load_pairs(args, CPU)
    _, plain, plain_held_out = train_ppo.load_pairs(plain_args, CPU)
    pairs, records = synthetic(tmp_path / "out"), data.read_json(files["samples"])
    assert held_out == plain_held_out and train[-len(plain):] == plain and len(train) == len(plain) + len(pairs)
    assert [p.record for p in train[:len(pairs)]] == pairs and len(pairs) > 5
    scores = simulate.score_texts(small.whole, records, [r["output"] for r in records])
    by_instruction = {r["instruction"]: (r, dict(zip(r["output"], row))) for r, row in zip(records, scores)}
    for p in pairs:
        r, score = by_instruction[p["instruction"]]
        agree = [text for text in r["output"] if set(data.units(text)) == set(data.units(p["output_1"]))]
        assert p["confidence"] == len(agree) / 4 >= .5 and p["output_2"] not in agree
        assert score[p["output_1"]] == max(score[text] for text in agree)
    args.held_out = 1000
    assert train_ppo.load_pairs(args, CPU)[2] == plain + plain_held_out     # more than there are, none synthetic
    run(small, files, "spg", tmp_path / "none", "--gamma", 1.1)             # no pair: the reward model of the pairs
    run(small, files, "reward", tmp_path / "reward")
    assert_equal_runs(tmp_path / "none", tmp_path / "reward", kind=RewardModel)


@pytest.mark.parametrize("reply, count", [
    (lambda a, b: "Yes." if a[:14] == b[:14] else "no", "some"), (lambda a, b: "Hard to say.", 0)])
def test_a_judge_says_what_means_the_same(reply, count, small, files, tmp_path, capsys):  # noqa: F811
    """A prompt without one of the texts, answers of another pair, an unclear answer that becomes a label, or an answer
    that is paid for twice."""
    records = data.read_json(files["samples"])

    def answer(payload):
        text = payload["messages"][-1]["content"]
        a, b = text.split("Answer A:\n> ")[1].split("\n\nDo both")[0].split("\n\nAnswer B:\n> ")
        r, = [r for r in records if text.startswith(f"Question:\n> {r['instruction']}\n\n")]
        assert {a, b} <= set(r["output"]) and a != b
        return reply(a, b)

    server = Server(answer)
    command = argv(small, files, "spg", tmp_path / "out", "--judge", "--api", server.url, "--api-model", "m")
    with pytest.raises(SystemExit) as ended:
        train_ppo.main([*command, "--dry-run"])
    assert ended.value.code == 0 == server.calls
    assert "calls to send" in capsys.readouterr().out
    _, train, _ = train_ppo.load_pairs(train_ppo.parse(command), CPU)
    calls, pairs = server.calls, synthetic(tmp_path / "out")
    assert calls == sum(len({*r["output"]}) * (len({*r["output"]}) - 1) // 2 for r in records)
    assert bool(pairs) == bool(count) and len(train) == 22 + len(pairs)
    for p in pairs:
        assert p["output_1"][:14] != p["output_2"][:14]
    train_ppo.load_pairs(train_ppo.parse(command), CPU)
    assert server.calls == calls and synthetic(tmp_path / "out") == pairs
    printed = capsys.readouterr().out
    unclear = 0 if count else sum(len({*r["output"]}) > 1 for r in records)
    assert f"left out {unclear} instructions" in printed


def test_an_api_is_not_asked_by_torchrun(small, files, tmp_path, monkeypatch):  # noqa: F811
    """Ranks that go on without answers, or wait for them for ever, while the first one is refused."""
    argv_ = argv(small, files, "spg", tmp_path, "--judge", "--api", "http://localhost:1", "--api-model", "m")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_ppo, "rank", lambda: 1)
    with pytest.raises(InputError, match="without torchrun"):
        train_ppo.compare_meanings([{"instruction": "x"}], [["a", "b"]], train_ppo.parse(argv_))


def test_a_model_can_be_the_judge(small, files, tmp_path):  # noqa: F811
    """A judge that is only asked over HTTP."""
    run(small, files, "spg", tmp_path / "out", "--judge", "--model", small.base, "--max-new-tokens", 2,
        "--device", "cpu")
    assert (tmp_path / "out" / "judge.cache.jsonl").is_file() and synthetic(tmp_path / "out") == []


# ----------------------------------------------------------------------------------------------------------------------
# Around them


def test_the_built_in_samples_are_of_ppos_policy(small, tmp_path, monkeypatch):  # noqa: F811
    """Samples of the SFT model, greedy ones, fewer than ten, instructions without a reference or of another split, or
    random numbers that PPO's training has left in another state."""
    monkeypatch.chdir(tmp_path)
    made, instructions = [], data.World.instructions

    def make(stage, *how):
        made.append((stage, *how))
        torch.rand(5)
        return str(small.base)

    monkeypatch.setattr(train_ppo, "built_in_stage", make)
    monkeypatch.setattr(data.World, "instructions", lambda self, *which: instructions(self, which[0], 6, which[2]))
    args = train_ppo.parse(["uml", "--seed", "4", "--noise", "0.1", "--device", "cpu"])
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    records = train_ppo.policy_samples(args, CPU)
    assert torch.equal(torch.random.get_rng_state(), before) and made == [("ppo", 4, .1, "cpu")]
    policy, tokenizer = LLaMA.from_pretrained(small.base), data.Tokenizer.from_pretrained(small.base)
    wanted = simulate.sample_responses(policy, tokenizer, records, "short", max_new_tokens=32, temperature=1.0, seed=4,
                                       n=10)
    assert [r["output"] for r in records] == wanted and all(data.split_of(r["instruction"]) == "train" for r in records)
    assert train_ppo.policy_samples(args, CPU) == records and len(made) == 1                 # made once
    assert all(r["reference"] for r in records)


def test_bad_input_is_one_line(small, files, tmp_path):  # noqa: F811
    """A traceback, or a run that starts without what it needs."""
    def refused(stage, match, *more):
        with pytest.raises(InputError, match=match) as error:
            run(small, files, stage, tmp_path / "out", *more)
        assert "\n" not in str(error.value)

    refused("uml", "--data needs --samples", "--samples", "")
    refused("spg", "--data needs --reward", "--reward", "")
    refused("spg", "was trained with --format short, this run has alpaca", "--format", "alpaca")
    refused("uml", "nowhere: no such file", "--samples", tmp_path / "nowhere")
    refused("uml", "record 0: 'output' is not a list of texts", "--samples", files["texts"])
    refused("spg", "record 0 has no 'output', a list of the policy's responses", "--samples", small.files["pairs"])
    one, empty, records = tmp_path / "one.json", tmp_path / "empty.json", data.read_json(files["samples"])
    data.write_json(one, records[:1])
    refused("uml", "one.json: views need two instructions .*, there are 1:", "--samples", one)
    data.write_json(empty, [*records, {**records[0], "output": []}])
    refused("spg", "record 12 has no 'output'", "--samples", empty)
    refused("spg", "--judge|no model to ask", "--judge", "--batch-size", 4)


def test_two_commands_of_the_built_in_world(small, tmp_path, monkeypatch):  # noqa: F811
    """A stage that asks for files in the built-in world, or whose reward model is of another seed or noise."""
    seen = []
    monkeypatch.setattr(train_ppo, "train_pairs", lambda args, device: seen.append((args.stage, args.out)) or 0)
    monkeypatch.setattr(train_sft, "built_in", lambda *args: str(small.base))
    monkeypatch.setattr(train_ppo, "built_in_reward", lambda *args: seen.append(args) or "out/reward-3")
    assert train_ppo.main(["uml", "--seed", "3", "--device", "cpu"]) == 0
    assert train_ppo.main(["spg", "--seed", "3", "--noise", "0.1", "--device", "cpu"]) == 0
    assert seen == [("uml", "out/uml-3"), (3, .1, "cpu"), ("spg", "out/spg-3-noise-0.1")]
