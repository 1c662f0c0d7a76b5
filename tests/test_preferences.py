"""Learning from preferences: AlpacaFarm's numbers (sections 9.1 to 9.10 and 9.15 of its fact sheet), properties of the
formulas, the four stages of train_ppo.py in small, and the recipes that turn preferences into demonstrations."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import losses
import simulate
import train_ppo
import train_sft
from model import (Config, InputError, LLaMA, RewardModel, add_lora, load_adapter, lora_layers, lr_linear, merge_lora)

ROOT = Path(__file__).parent.parent
LLAMA_TOKENIZER = ROOT.parent / "shared" / "data" / "llama" / "tokenizer.model"
F64 = torch.float64


def t(*rows):
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=F64)


def near(found, wanted, tolerance=1e-6):
    """Within one unit of the sheet's last digit (it rounds to six places)."""
    torch.testing.assert_close(torch.as_tensor(found, dtype=F64), torch.as_tensor(wanted, dtype=F64), rtol=0,
                               atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# The sheet's numbers, in the released arithmetic (no mask)

LOGP = t([-1, -2, -.5, 0], [-.7, -.3, -1.2, -.9])
REF = t([-1.5, -1, -.5, 0], [-.9, -.3, -2.2, -.4])
SCORE, LAST = t([.8, -.4]), torch.tensor([2, 3])
SHAPED = [[-.05, 0, .8, 0], [-.02, 0, -.1, -.4]]
WHITE = [[-.219306, -.061810, 2.458129, -.061810], [-.124809, -.061810, -.376803, -1.321780]]
VALUES = t([.1, .2, 0, -.1], [0, .3, .1, .2])
RETURNS = [[2.115201, 2.334508, 2.396318, -.061810], [-1.885201, -1.760393, -1.698582, -1.321780]]
ADVANTAGES = {      # lambda: (plain, whitened)
    1.0: ([[2.015201, 2.134508, 2.396318, .038190], [-1.885201, -2.060393, -1.798582, -1.521780]],
          [[1.129748, 1.193919, 1.334738, .066377], [-.968154, -1.062383, -.921564, -.772681]]),
    0.95: ([[1.792928, 2.012878, 2.394409, .038190], [-1.628079, -1.898179, -1.722493, -1.521780]],
           [[1.062495, 1.188175, 1.406184, .059829], [-.892284, -1.046621, -.946233, -.831545]])}


def test_reward_loss_and_its_gradient():
    """9.1: a sum in place of the mean, a swapped preference, or a tie that counts as right."""
    r0, r1, second = t([.2, 1.0, -.5]), t([1.2, .4, -.5]).requires_grad_(), torch.tensor([True, False, True])
    better, worse = torch.where(second, r1, r0), torch.where(second, r0, r1)
    near(torch.stack([losses.reward_loss(b, w) for b, w in zip(better[:, None], worse[:, None])]).detach(),
         [.313262, .437488, .693147])
    loss = losses.reward_loss(better, worse)
    near(loss.detach(), .481299)
    near(torch.autograd.grad(loss, r1)[0], [-.089647, .118115, -.166667])
    # The sheet's rule z >= 0 calls the tie right (1.0), but only because its label is 2; by margins a tie is not right.
    z = (r1 - r0).detach()
    assert ((z >= 0) == second).double().mean() == 1
    records = [{"output_1": "a", "output_2": "b", "preference": 2}] * 3
    assert train_ppo.accuracy((better - worse).tolist(), records)["accuracy"] == pytest.approx(2 / 3)


def test_rewards_are_shaped_by_the_clamped_kl():
    """9.2: KL that is not clamped, of the wrong sign, or a score beside the last token."""
    kl = losses.kl_estimate(LOGP, REF, "clamped")
    near(kl, [[.5, 0, 0, 0], [.2, 0, 1.0, 0]])
    near(kl.sum(1).mean(), .85)
    near(kl.mean(), .2125)
    near(losses.kl_estimate(LOGP, REF, "k1").sum(1), [-.5, .7])
    near(losses.shape_rewards(SCORE, kl, LAST, .1), SHAPED)


def test_whitening_without_a_shift():
    """9.3: the sample's in place of the population's deviation, zeros left zero, or a mean that is not added back."""
    x = t(*SHAPED)
    white = losses.whiten(x, shift_mean=False)
    near(white, WHITE)
    near(x.mean(), .02875, 1e-9)
    near(white[x == 0], [.02875 * (1 - 1 / .31746801)] * 3)


@pytest.mark.parametrize("lam", [1.0, .95])
def test_gae(lam):
    """9.4: V of the wrong step, a lambda that is not used, or returns made of whitened advantages."""
    advantages, returns = losses.gae(losses.whiten(t(*SHAPED), shift_mean=False), VALUES, 1.0, lam)
    near(advantages, ADVANTAGES[lam][0])
    near(losses.whiten(advantages), ADVANTAGES[lam][1])
    near(returns, RETURNS if lam == 1 else (advantages + VALUES))
    if lam == 1:
        near(advantages.mean(), -.085217)
        near(advantages.std(unbiased=False), 1.859193)


def test_ppo_policy_loss_and_its_gradient():
    """9.5: a minimum for the maximum, a clip of the wrong side, or a gradient through a ratio that is out of range."""
    old, new, advantages = t([-1] * 4), t([-.7, -1.4, -.95, -1.0]).requires_grad_(), t([1, -2, .5, -.3])
    each = losses.ppo_policy_loss(new, old, advantages, .2)
    near(each.detach(), [-1.2, 1.6, -.525636, .3])
    near(each.mean().detach(), .043591)
    near(torch.autograd.grad(each.mean(), new)[0], [0, 0, -.131409, .075])


@pytest.mark.parametrize("advantage,ratio,loss,moves", [(1, 1.5, -1.2, False), (1, .5, -.5, True), (-1, 1.5, 1.5, True),
                                                        (-1, .5, .8, False)])
def test_the_four_cases_of_the_clip(advantage, ratio, loss, moves):
    """9.5: a clip that also holds back the way home."""
    new = t([math.log(ratio)]).requires_grad_()
    found = losses.ppo_policy_loss(new, t([0.]), t([float(advantage)]), .2)
    near(found.detach(), [float(loss)])
    assert (torch.autograd.grad(found.sum(), new)[0].item() != 0) == moves


def test_ppo_value_loss_and_the_total():
    """9.6: a missing half, the smaller of the two errors, or a gradient through a value that is held."""
    old, new = t([.5, .5, -.2, 1]), t([.9, .55, -.8, 1.1]).requires_grad_()
    each = losses.ppo_value_loss(new, old, t([1, 0, -1, 1.05]), .2)
    near(2 * each.detach(), [.09, .3025, .36, .0025])
    near(each.mean().detach(), .094375)
    near(torch.autograd.grad(each.mean(), new)[0], [0, .1375, 0, .0125])
    policy = losses.ppo_policy_loss(t([-.7, -1.4, -.95, -1.0]), t([-1] * 4), t([1, -2, .5, -.3]), .2).mean()
    near(policy + .1 * each.mean().detach(), .0530286, 1e-7)


def test_dpo_loss_and_its_gradient():
    """9.7: the published code's first version, which had the sign of every log-probability flipped (.709548)."""
    winner, loser = t([-12, -20]).requires_grad_(), t([-15, -18])
    ref_winner, ref_loser = t([-13, -19]), t([-14, -18.5])
    each = losses.dpo_loss(winner, loser, ref_winner, ref_loser, .1)
    near(each.detach(), [.598139, .770957])
    near(each.mean().detach(), .684548)
    assert abs(each.mean().item() - .709548) > .02
    near(torch.autograd.grad(each.mean(), winner)[0], [-.022508, -.026871])
    near(losses.dpo_loss(ref_winner, ref_loser, ref_winner, ref_loser, .1), [.693147] * 2)


def test_quantiles():
    """9.8: worst first, ties in another order, or a remainder that is dropped or put in the first group."""
    rewards = t([.3, -1, 2.5, .9, 1.1, -.2, 0, 1.7, .9, -.6])
    assert losses.quantiles(rewards, 4) == [[2, 7], [4, 3], [8, 0], [6, 5, 9, 1]]


def test_quark_token_loss():
    """9.9: KL(p_ref || p) for KL(p || p_ref), an entropy of the wrong sign, or a coefficient on the wrong term."""
    hidden, reference, eye = t([[1, 0, -1]]), t([[.5, .5, 0]]), torch.eye(3, dtype=F64)
    logp, kl, entropy = losses.full_vocabulary(hidden, eye, reference, eye, torch.tensor([0]))
    near(torch.stack([-logp, kl, entropy]), [[.407606], [.170640], [.832396]])
    near(losses.quark_token_loss(logp, kl, entropy, .05, 0), [.416138])
    near(losses.quark_token_loss(logp, kl, entropy, 0, .1), [.407606 - .0832396])


@pytest.mark.parametrize("n,proxy,gold", [(1, .325, .375), (2, .633333, .5), (3, .8, .5), (4, .9, .4)])
def test_best_of_n(n, proxy, gold):
    """9.10: the best of the first n for the mean over all choices of n, or gold sorted by itself."""
    proxies, golds = [.1, .5, -.2, .9], [.2, .8, .1, .4]
    near(evaluate.best_of_n(proxies, golds, n), [proxy, gold])
    best = [max(chosen) for chosen in itertools.combinations(zip(proxies, golds), n)]      # by counting them all
    near(evaluate.best_of_n(proxies, golds, n), [sum(x) / len(best) for x in zip(*best)], 1e-12)


def test_kl_of_best_of_n():
    """9.10: ln n - (n - 1) / n."""
    for n, kl in ((1, 0), (2, .193147), (4, .636294), (16, 1.835089), (64, 3.174508), (1024, 5.932448)):
        near(evaluate.best_of_n_kl(n), kl)


def test_linear_schedule_and_kl_controller():
    """9.15: a schedule off by one (the first step has rate 0), or a controller without its bounds."""
    for step, lr in ((1, 0), (2, 2e-6), (6, 1e-5), (7, 9.974026e-6), (21, 9.610390e-6), (41, 9.090909e-6),
                     (81, 8.051948e-6), (390, 2.6e-8)):
        near(lr_linear(step - 1, 1e-5, 5, 390), lr, 1e-12 if step < 390 else 5e-11)
    for kl, beta in ((3, .196), (6, .2), (9, .204), (30, .204), (6.6, .202)):
        near(losses.next_beta(.2, kl, 6), beta, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Properties


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def ragged(lengths, width):
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).double()


def test_gae_without_discount_is_what_is_still_to_come():
    """At gamma = lambda = 1 the values at later positions cancel; one that does not is off by one."""
    rewards, values = draw(3, 7), draw(3, 7, seed=1)
    advantages, returns = losses.gae(rewards, values, 1.0, 1.0)
    near(returns, rewards.flip(1).cumsum(1).flip(1), 1e-12)
    near(advantages, returns - values, 1e-12)


@pytest.mark.parametrize("gamma,lam", [(.9, .7), (.99, 0), (.3, 1), (0, .5)])
def test_gae_is_its_double_sum(gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}: a recursion that discounts by one of the two only."""
    rewards, values = draw(2, 6), draw(2, 6, seed=1)
    after = torch.cat([values[:, 1:], values.new_zeros(2, 1)], dim=1)
    delta = rewards + gamma * after - values
    want = [[sum((gamma * lam) ** (k - s) * delta[b, k] for k in range(s, 6)) for s in range(6)] for b in range(2)]
    near(losses.gae(rewards, values, gamma, lam)[0], torch.stack([torch.stack(row) for row in want]), 1e-12)


def test_masked_whitening():
    """Padding that counts in mean or deviation, or that comes out as something else than 0."""
    x, mask = draw(3, 5) * 3 + 2, ragged([5, 2, 3], 5)
    white = losses.whiten(x, mask)
    real = white[mask.bool()]
    near(real.mean(), 0, 1e-7)
    near(real.std(unbiased=False), 1, 1e-7)
    assert (white[mask == 0] == 0).all()
    more = losses.whiten(torch.cat([x, draw(3, 4, seed=2)], dim=1), ragged([5, 2, 3], 9))
    near(more, torch.cat([white, torch.zeros(3, 4, dtype=F64)], dim=1), 1e-12)
    kept = losses.whiten(x, mask, shift_mean=False)
    near(kept, (white + x[mask.bool()].mean()) * mask, 1e-7)
    near(losses.masked_mean(x, mask), x[mask.bool()].mean(), 1e-12)


def test_k1_and_k3_are_unbiased():
    """Over a whole small vocabulary the expectation is known: an estimator with d for -d has another one."""
    p, q = torch.log_softmax(draw(11), 0), torch.log_softmax(draw(11, seed=1), 0)
    kl = (p.exp() * (p - q)).sum()
    mean = {kind: (p.exp() * losses.kl_estimate(p, q, kind)).sum() for kind in ("k1", "k2", "k3", "clamped")}
    near(mean["k1"], kl, 1e-12)
    near(mean["k3"], kl, 1e-12)
    assert mean["clamped"] > kl + .05 and abs(mean["k2"] - kl) > .005
    near(mean["k2"], (p.exp() * (p - q) ** 2 / 2).sum(), 1e-12)
    assert (losses.kl_estimate(p, q, "k3") >= 0).all() and (losses.kl_estimate(p, q, "clamped") >= 0).all()
    for kind in mean:
        assert (losses.kl_estimate(p, p, kind) == 0).all()
    with pytest.raises(ValueError, match="k4"):
        losses.kl_estimate(p, q, "k4")


def test_explained_variance():
    """A ratio turned over, padding that counts, or a constant that a critic should not be praised for."""
    returns, mask = draw(2, 4), ragged([4, 2], 4)
    near(losses.explained_variance(returns, returns, mask), 1, 1e-12)
    near(losses.explained_variance(returns + 5, returns, mask), 1, 1e-12)
    near(losses.explained_variance(torch.full_like(returns, 3), returns, mask), 0, 1e-12)
    real = returns[mask.bool()]
    values = draw(2, 4, seed=1)
    near(losses.explained_variance(values, returns, mask),
         1 - (real - values[mask.bool()]).var(unbiased=False) / real.var(unbiased=False), 1e-12)


@pytest.mark.parametrize("tile", [1, 3, 7, 256])
def test_full_vocabulary_is_the_plain_form(tile):
    """A tile cut wrongly, or a gradient that does not go through KL, entropy or the head."""
    N, D, V = 7, 4, 9
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D, seed=1).requires_grad_()
    ref_hidden, ref_weight, targets = draw(N, D, seed=2), draw(V, D, seed=3), torch.arange(N) % V
    found = losses.full_vocabulary(hidden, weight, ref_hidden, ref_weight, targets, tile)
    logp, ref = (torch.log_softmax(h @ w.T, dim=-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    plain = (logp[torch.arange(N), targets], (logp.exp() * (logp - ref)).sum(1), -(logp.exp() * logp).sum(1))
    grads = []
    for three in (found, plain):
        total = sum((x * draw(N, seed=4 + i)).sum() for i, x in enumerate(three))
        grads.append(torch.autograd.grad(total, (hidden, weight)))
    for a, b in zip((*found, *grads[0]), (*plain, *grads[1])):
        near(a.detach(), b.detach(), 1e-12)
    if tile == 3:
        assert torch.autograd.gradcheck(
            lambda h, w: losses.full_vocabulary(h, w, ref_hidden, ref_weight, targets, tile), (hidden, weight))


def test_the_head_divides_logits_by_the_temperature():
    """Old, new and reference log-probabilities of another temperature than the one that sampled the tokens."""
    torch.manual_seed(0)
    model = LLaMA(Config(vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=4, initializer_range=.5)).double()
    tokens, targets = data.collate([([1, 5, 6], [7, 8, 2]), ([1, 4], [9, 2])])
    want = losses.plain_logp(model(tokens) / .7, targets.clamp(min=0))[targets != losses.IGNORE]
    assert (want - losses.plain_logp(model(tokens), targets.clamp(min=0))[targets != losses.IGNORE]).abs().max() > .05
    near(model(tokens, targets, None, .7).detach(), want.detach(), 1e-12)
    loss, logp = model(tokens, targets, losses.nll_token_loss, .7)
    near(loss.detach(), -want.sum().detach(), 1e-12)
    near(logp[0], want.detach(), 1e-12)
    hidden = model.model(tokens)[targets != losses.IGNORE].detach() / .7
    logp, kl, entropy = model(tokens, targets, None, .7, (hidden, model.lm_head.weight.detach()))
    near(logp.detach(), want.detach(), 1e-12)
    near(kl.detach(), [0.] * 5, 1e-12)
    p = torch.log_softmax((model(tokens) / .7)[targets != losses.IGNORE], -1).detach()
    near(entropy.detach(), -(p.exp() * p).sum(1), 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# PPO between rollout and update


def rollout(i, response, logp, ref, values, score, prompt=(1, 9)):
    return train_ppo.Rollout(i, list(prompt), response, torch.as_tensor(logp, dtype=F64),
                             torch.as_tensor(ref, dtype=F64), torch.as_tensor(values, dtype=F64), score)


def ppo_args(*more):
    return train_ppo.parse(["ppo", "--data", "x.json", *map(str, more)])


def test_process_in_the_released_form_gives_the_sheets_numbers():
    """9.2 to 9.4 in one: padding that does not count, rewards that are not whitened, scores in another unit."""
    rows = [rollout(0, [11, 12, 2], LOGP[0, :3], REF[0, :3], VALUES[0], .8),
            rollout(1, [13, 14, 15, 16], LOGP[1], REF[1], VALUES[1], -.4)]
    args = ppo_args("--released", "--max-new-tokens", 4)
    assert (args.kl, args.lam, args.beta, args.ending_penalty) == ("clamped", 1.0, .0067, 0.0)
    found, stats = train_ppo.process(rows, .1, [5.0, 3.0], args, 2, 1)
    near(found["advantages"], ADVANTAGES[1.0][1])
    near(found["returns"], RETURNS)
    near(stats["kl"], .85)
    near(stats["kl_k1"], .1)
    assert stats["ended"] == .5 and stats["length"] == 3.5


def test_the_score_lands_on_the_last_sampled_token():
    """AlpacaFarm counts ids that are not padding; a sampled 0 shifts its score by one. Ours counts sampled ids."""
    responses = [[11, 0, 12, 2], [5, 2], [7, 8, 9, 10, 11]]
    rows = [rollout(i, y, [-1.] * len(y), [-1.] * len(y), [0.] * len(y), 1.0) for i, y in enumerate(responses)]
    args = ppo_args("--gamma", .5, "--lam", 1, "--ending-penalty", 0)
    found, _ = train_ppo.process(rows, .1, [0.0, 1.0], args, 2, 1)
    want = [[.125, .25, .5, 1, 0], [.5, 1, 0, 0, 0], [.0625, .125, .25, .5, 1]]     # gamma ** (tokens still to come)
    near(found["returns"], want, 1e-7)
    padded = torch.tensor([y + [0] * (5 - len(y)) for y in responses])
    theirs = (padded != 0).sum(1) - 1
    assert theirs.tolist() == [2, 1, 4] and [len(y) - 1 for y in responses] == [3, 1, 4]
    shaped = losses.shape_rewards(t([1., 1, 1]), torch.zeros(3, 5, dtype=F64), theirs, .1)
    assert shaped[0].tolist() == [0, 0, 1, 0, 0]                            # on the token before EOS


def test_an_answer_that_does_not_end_pays_the_penalty():
    """A penalty for answers that did end, or in another unit than the standardized score."""
    rows = [rollout(i, [5, last], [0.] * 2, [0.] * 2, [0.] * 2, 3.0) for i, last in enumerate((2, 6))]
    found, stats = train_ppo.process(rows, .1, [1.0, 4.0], ppo_args("--lam", 1, "--ending-penalty", .75), 2, 1)
    near(found["returns"], [[.5, .5], [-.25, -.25]], 1e-6)
    assert stats["reward"] == 3.0 and stats["ended"] == .5                 # what is logged is the raw score


def random_rollouts(count=6, width=None, eos=2):
    lengths = [1 + 3 * i % 7 for i in range(count)]
    return [rollout(i, [5 + i] * (n - 1) + [eos if i % 2 else 6], -draw(n, seed=i).abs(), -draw(n, seed=50 + i).abs(),
                    draw(width or n, seed=99 + i), float(draw(1, seed=200 + i))) for i, n in enumerate(lengths)]


def test_process_by_hand_without_any_padding():
    """Whatever padding adds: each response by itself, as lists of its own tokens, gives the same numbers."""
    rows, beta, scale = random_rollouts(), .3, [.2, 1.7]
    args = ppo_args("--gamma", .9, "--lam", .8, "--ending-penalty", .5)
    found, _ = train_ppo.process(rows, beta, scale, args, 2, 1)
    every, returns = [], []
    for r in rows:
        reward = [-beta * x for x in (r.logp - r.ref_logp).tolist()]
        reward[-1] += (r.score - scale[0]) / scale[1] - .5 * (r.response[-1] != 2)
        ahead, mine, values = 0.0, [], r.values.tolist()
        for k in reversed(range(len(reward))):
            after = values[k + 1] if k + 1 < len(values) else 0.0
            ahead = reward[k] + .9 * after - values[k] + .9 * .8 * ahead
            mine.insert(0, ahead)
        every += mine
        returns.append([a + v for a, v in zip(mine, values)])
    every = torch.tensor(every, dtype=F64)
    white = ((every - every.mean()) / every.std(unbiased=False)).split([len(r.response) for r in rows])
    for b, r in enumerate(rows):
        n = len(r.response)
        near(found["advantages"][b, :n], white[b], 1e-6)
        near(found["returns"][b, :n], returns[b], 1e-6)
        assert (found["advantages"][b, n:] == 0).all() and (found["logp"][b, n:] == 0).all()


def test_process_and_the_number_of_ranks():
    """Ours: the same for any number of ranks. Released: every process whitens its own share."""
    args = ppo_args()
    one, two = (train_ppo.process(random_rollouts(), .1, [0, 1], args, 2, world) for world in (1, 2))
    assert all(torch.equal(one[0][k], two[0][k]) for k in one[0]) and one[1] == two[1]
    args = ppo_args("--released", "--max-new-tokens", 8)
    rows = random_rollouts(width=8)
    one, two = (train_ppo.process(rows, .1, [0, 1], args, 2, world)[0] for world in (1, 2))
    assert not torch.allclose(one["advantages"], two["advantages"])
    for rank in (0, 1):
        alone, _ = train_ppo.process(rows[rank::2], .1, [0, 1], args, 2, 1)
        for key in ("advantages", "returns"):
            near(two[key][rank::2], alone[key], 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The stages in small


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small data files: pairs, instructions (a batch of 8 leaves 3), judged responses."""
    d, world = tmp_path_factory.mktemp("data"), data.World(9)
    asked = world.instructions("train", 60)
    rng = data.random.Random(0)
    wrong = [world.corrupt(r, r["reference"], rng) for r in asked]
    keep = [{k: r[k] for k in ("id", "instruction", "input", "reference")} for r in asked]
    rows = {
        "pairs": [{**r, "output_1": (r["reference"], w)[i % 2], "output_2": (w, r["reference"])[i % 2],
                   "preference": 1 + i % 2} for i, (r, w) in enumerate(zip(keep[:26], wrong)) if w != r["reference"]],
        "instructions": keep[26:37], "validation": keep[37:43],
        "judged": [{**r, "output": w, "judgment": simulate.judge_reference(w, r["reference"])}
                   for r, w in zip(keep[:20], wrong)] + [{**keep[20], "output": wrong[20], "judgment": None}],
        "demos": [{**r, "output": r["reference"]} for r in keep],
    }
    for name in rows:
        (d / f"{name}.json").write_text(json.dumps(rows[name]), encoding="utf-8")
    return {name: d / f"{name}.json" for name in rows}


@pytest.fixture(scope="module")
def base(tmp_path_factory, files):
    """A small LLaMA after some steps of SFT, so that some of its answers end and some do not."""
    torch.manual_seed(0)
    d, tokenizer = tmp_path_factory.mktemp("model"), data.world_tokenizer()
    LLaMA(Config(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
          ).save_pretrained(d / "random", tokenizer, extra={"prompt_format": "short"})
    train_sft.main(["--model", str(d / "random"), "--data", str(files["demos"]), "--format", "short", "--device", "cpu",
                    "--steps", "60", "--batch-size", "16", "--lr", "1e-2", "--out", str(d / "base")])
    return d / "base"


@pytest.fixture(scope="module")
def rewards(tmp_path_factory, base, files):
    """Two reward models on it: all weights trained, and adapters."""
    d = tmp_path_factory.mktemp("reward")
    for name, more in (("whole", []), ("adapter", ["--lora-rank", "4"])):
        train_ppo.main(flags("reward", base, files, d / name, "--steps", 8, "--lr", "3e-3", *more))
    return {name: d / name for name in ("whole", "adapter")}


def flags(stage, base, files, out, *more, reward=None):
    """The command line of a short run. The later of two equal flags counts."""
    pairs = stage in ("reward", "dpo")
    own = ["--held-out", 4] if pairs else ["--reward", reward, "--rollouts", 8, "--max-new-tokens", 14, "--warmup", 1]
    return [stage, *map(str, [
        "--model", base, "--data", files["pairs" if pairs else "instructions"], "--format", "short", "--device", "cpu",
        "--steps", 4, "--batch-size", 4, "--micro-batch-size", 3, "--lr", "1e-3", "--out", out, *own, *more])]


def metrics(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]


def weights(directory, stage):
    return (RewardModel if stage == "reward" else LLaMA).from_pretrained(directory, F64).state_dict()


def same_run(a, b, stage, tolerance=0.0):
    """Equal metrics and weights; and the weights are not those of a run that did nothing."""
    one, two = metrics(a), metrics(b)
    assert len(one) == len(two) > 0
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        for key in x:
            if stage == "dpo" and x["step"] == 0 and key == "accuracy":
                continue                                                    # all margins are 0: rounding decides
            assert x[key] == pytest.approx(y[key], rel=100 * tolerance, abs=100 * tolerance), (x["step"], key)
    one, two = weights(a, stage), weights(b, stage)
    for key in one:
        assert (one[key] - two[key]).abs().max() <= tolerance, key


# stage and flags of every way to train; quark's rollouts and the last batch of an epoch are uneven
VARIANTS = {
    "reward": ("reward",), "reward-lora": ("reward", "--lora-rank", 2),
    "dpo": ("dpo",), "dpo-lora": ("dpo", "--lora-rank", 2),
    "ppo": ("ppo", "--target-kl", 0.1), "ppo-lora": ("ppo", "--lora-rank", 4), "quark": ("quark", "--count", 2),
    "quark-best": ("quark", "--quantiles", "best", "--count", 2), "quark-lora": ("quark", "--lora-rank", 2),
}


def variant(name, base, files, rewards, out, *more):
    stage, *own = VARIANTS[name]
    reward = rewards["adapter" if name == "ppo-lora" else "whole"]
    return stage, flags(stage, base, files, out, *own, *more, reward=reward)


def test_two_processes_equal_one(base, files, rewards, tmp_path):
    """A mean of each rank's own, a missing factor for DDP's average, samples or baselines that depend on the rank."""
    runs = {name: variant(name, base, files, rewards, tmp_path / "two" / name, "--dtype", "float64")
            for name in VARIANTS}
    driver = tmp_path / "driver.py"                                         # all in one launch: starting takes longest
    driver.write_text(f"import json, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "import train_ppo\nfrom model import launch\n"
                      "launch(lambda: max(train_ppo.main(argv) for argv in json.load(open(sys.argv[1]))))\n")
    (tmp_path / "runs.json").write_text(json.dumps([argv for _, argv in runs.values()]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run([*command, str(driver), str(tmp_path / "runs.json")], capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=300)
    assert two.returncode == 0, two.stderr[-3000:]
    for name in VARIANTS:
        stage, argv = variant(name, base, files, rewards, tmp_path / "one" / name, "--dtype", "float64")
        train_ppo.main(argv)
        same_run(tmp_path / "one" / name, tmp_path / "two" / name, stage, 1e-8)
        if stage != "reward":
            start, now = weights(base, stage), weights(tmp_path / "one" / name, stage)
            assert any((start[k] - now[k]).abs().max() > 1e-4 for k in now), f"{name} has not been trained"
    assert 0 < sum(x["ended"] for x in metrics(tmp_path / "one" / "ppo")) < 4, "all answers end, or none"


@pytest.mark.parametrize("name", ["dpo", "ppo", "ppo-released", "quark"])
def test_micro_batches_do_not_change_the_result(name, base, files, rewards, tmp_path):
    """A mean of means, or padding that counts."""
    name, released = name.removesuffix("-released"), ["--released"] * name.endswith("-released")
    for size in (1, 3, 8):
        stage, argv = variant(name, base, files, rewards, tmp_path / str(size), "--dtype", "float64",
                              "--micro-batch-size", size, *released)
        train_ppo.main(argv)
    same_run(tmp_path / "1", tmp_path / "3", stage, 1e-8)
    same_run(tmp_path / "1", tmp_path / "8", stage, 1e-8)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["reward-lora", "dpo", "ppo", "ppo-lora", "quark"])
def test_stopping_and_resuming_is_bitwise_not_stopping(name, base, files, rewards, tmp_path, monkeypatch):
    """Optimizer, beta, the scores' scale, the curve or the reference lost on the way; and a stop that is not heard."""
    more = ["--save-every", 2]
    if VARIANTS[name][0] in ("ppo", "quark"):
        judge = rewards["whole" if name == "ppo-lora" else "adapter"]
        more += ["--validation", files["validation"], "--judge", judge, "--eval-every", 2]
    argv = {d: variant(name, base, files, rewards, tmp_path / d, *more)[1] for d in ("whole", "killed", "stopped")}
    stage = VARIANTS[name][0]
    assert train_ppo.main(argv["whole"]) == 0
    save = train_ppo.save_resume

    def save_and_die(*args):
        save(*args)
        raise Killed

    monkeypatch.setattr(train_ppo, "save_resume", save_and_die)
    with pytest.raises(Killed):
        train_ppo.main(argv["killed"])
    monkeypatch.undo()
    steps = len(metrics(tmp_path / "killed"))
    assert steps == 2

    class StopAt:                                                           # Ctrl-C some time in the third step
        def __init__(self):
            self.seen = 0

        @property
        def requested(self):
            self.seen += 1
            return len(metrics(tmp_path / "stopped")) >= 2

    monkeypatch.setattr(train_ppo, "StopSignal", StopAt)
    assert train_ppo.main(argv["stopped"]) == 130
    assert len(metrics(tmp_path / "stopped")) == 3
    monkeypatch.undo()
    for d in ("killed", "stopped"):
        assert train_ppo.main([*argv[d], "--resume"]) == 0
        same_run(tmp_path / "whole", tmp_path / d, stage)
        found = [json.loads((tmp_path / x / "results.json").read_text()) for x in ("whole", d)]
        for figures in found:
            [figures.pop(k, None) for k in ("seconds", "peak_memory_bytes")]
        assert found[0] == found[1]
    with pytest.raises(InputError, match="--lr was 0.001, is 0.002"):
        train_ppo.main([*argv["stopped"], "--resume", "--lr", "2e-3"])


@pytest.mark.parametrize("released", [[], ["--released"]])
def test_the_first_pass_over_rollouts_is_on_policy(released, base, files, rewards, tmp_path):
    """Old and new log-probabilities read in two ways: then the ratio is not 1, nor is the KL 0 before any step."""
    argv = flags("ppo", base, files, tmp_path / "one", "--epochs", 1, "--batch-size", 8, "--micro-batch-size", 8,
                 "--dtype", "float64", *released, reward=rewards["whole"])
    train_ppo.main(argv)
    for x in metrics(tmp_path / "one"):
        assert x["updates"] == 1 and x["clip_fraction"] == x["value_clip_fraction"] == 0
        assert abs(x["drift"]) < 1e-14
    first, *_, last = metrics(tmp_path / "one")
    assert first["kl"] == first["kl_k1"] == first["kl_k3"] == first["drift"] == first["lr"] == 0
    assert last["kl_k3"] > 0
    train_ppo.main(flags("ppo", base, files, tmp_path / "two", "--dtype", "float64", "--lr", "1e-2", *released,
                         reward=rewards["whole"]))
    assert all(x["drift"] > 1e-9 for x in metrics(tmp_path / "two")[1:])   # with more updates it does move


def spy(monkeypatch, name):
    """Everything that a function of train_ppo returns, in order."""
    inner, seen = getattr(train_ppo, name), []

    def wrapped(*args):
        seen.append(inner(*args))
        return seen[-1]
    monkeypatch.setattr(train_ppo, name, wrapped)
    return seen


@pytest.mark.parametrize("released", [False, True])
def test_a_rollout_is_what_the_four_models_say(released, base, files, rewards):
    """A value read after its token, a score without EOS, log-probabilities at another temperature."""
    args = train_ppo.parse(flags("ppo", base, files, "none", "--temperature", .7, "--dtype", "float64",
                                 *["--released"] * released, reward=rewards["whole"]))
    models = train_ppo.load_models(args, F64, torch.device("cpu"))
    assert (models.critic.score.weight == 0).all() and not (models.reward.score.weight == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(models.critic.model.parameters(), models.reward.model.parameters()))
    torch.nn.init.normal_(models.critic.score.weight)
    torch.nn.init.normal_(models.policy.lm_head.weight, std=.3)             # so that it is no longer the reference
    both = train_ppo.PolicyAndCritic(models.policy, models.critic)
    answered = [(0, [1, 30, 31], [40, 41, 42, 2]), (1, [1, 32], [43]), (2, [1, 33, 34, 35], [44, 0, 2])]
    rows = {r.number: r for r in train_ppo.look_back(models, both, answered, args, torch.device("cpu"))}
    assert sorted(rows) == [0, 1, 2]
    for i, x, y in answered:
        r, whole = rows[i], torch.tensor([x + y + [0] * (14 - len(y))] if released else [x + y])
        with torch.no_grad():
            at = slice(len(x) - 1, len(x) - 1 + len(y))
            for found, model in ((r.logp, models.policy), (r.ref_logp, models.reference)):
                near(found, losses.plain_logp(model(whole)[0, at] / .7, torch.tensor(y)), 1e-10)
            near(r.score, models.reward.score(models.reward.model(torch.tensor([x + y])))[0, -1, 0], 1e-10)
            values = models.critic.score(models.critic.model(whole))[0, len(x) - 1:-1, 0]
            assert len(values) == (14 if released else len(y))
            near(r.values, values, 1e-10)
    assert (rows[0].logp - rows[0].ref_logp).abs().max() > .01


@pytest.mark.parametrize("released", [False, True])
def test_the_gradient_of_a_ppo_step(released, base, files, rewards, tmp_path, monkeypatch):
    """Loss, count and weights of the update, against the plain formulas over one padded batch."""
    seen = spy(monkeypatch, "look_back")
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda w: w)               # a critic that does say something
    train_ppo.main(flags("ppo", base, files, tmp_path / "out", "--epochs", 1, "--batch-size", 8, "--dtype", "float64",
                         "--steps", 1, "--value-coef", .3, "--clip", 1e9, *["--released"] * released,
                         reward=rewards["whole"]))
    rows, width = sorted(seen[0]), 14
    args = ppo_args("--max-new-tokens", width, *["--released"] * released)
    scores = torch.tensor([r.score for r in rows])
    scale = [scores.mean().item(), scores.std(unbiased=False).item()]
    found, _ = train_ppo.process(rows, args.beta, scale, args, data.Tokenizer.from_pretrained(base).eos, 1)
    policy, critic = LLaMA.from_pretrained(base, F64), RewardModel.from_pretrained(rewards["whole"], F64)
    policy_losses, value_losses = [], []
    for b, r in enumerate(rows):
        n, slots = len(r.response), width if released else len(r.response)
        whole = torch.tensor([r.prompt + r.response + [0] * (slots - n)])
        logp = losses.plain_logp(policy(whole)[0, len(r.prompt) - 1:][:n], torch.tensor(r.response))
        policy_losses.append(losses.ppo_policy_loss(logp, r.logp, found["advantages"][b, :n], .2))
        values = critic.score(critic.model(whole))[0, len(r.prompt) - 1:-1, 0]
        value_losses.append(losses.ppo_value_loss(values, r.values, found["returns"][b, :slots], .2))
    policy_losses, value_losses = torch.cat(policy_losses), torch.cat(value_losses)
    total = (policy_losses.sum() + .3 * value_losses.sum()) / len(value_losses)
    grads = torch.autograd.grad(total, [*policy.parameters(), *critic.parameters()])
    line, = metrics(tmp_path / "out")
    assert line["value_loss"] == pytest.approx(value_losses.mean().item(), rel=1e-6)
    assert line["policy_loss"] == pytest.approx(policy_losses.mean().item(), rel=1e-6, abs=1e-6)
    assert line["grad_norm"] == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in grads)), rel=1e-6)


def test_the_reward_model_learns_what_is_preferred(base, files, tmp_path):
    """A preference turned over, a text without its prompt or its EOS, or a mean that is off by the batch."""
    train_ppo.main(flags("reward", base, files, tmp_path / "one", "--steps", 1, "--batch-size", 22,
                         "--dtype", "float64"))
    torch.manual_seed(0)                                                    # the head is drawn from the run's seed
    model = RewardModel.sharing(LLaMA.from_pretrained(base, F64))
    _, train, _, _ = train_ppo.load_pairs(train_ppo.parse(flags("reward", base, files, "x")), torch.device("cpu"))
    assert len(train) == 22
    better, worse = (torch.cat([model(*data.pad([p[0] + p[k]])) for p in train]) for k in (1, 2))
    loss = -torch.log(torch.sigmoid(better - worse)).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    line, = metrics(tmp_path / "one")
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert line["grad_norm"] == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in grads)), rel=1e-6)
    assert line["accuracy"] == pytest.approx((better > worse).double().mean().item())
    train_ppo.main(flags("reward", base, files, tmp_path / "many", "--steps", 30, "--lr", "3e-3"))
    records = data.read_preferences(files["pairs"])
    scores = simulate.score_texts(tmp_path / "many", records, [data.better_and_worse(r) for r in records])
    assert sum(better > worse for better, worse in scores) > .8 * len(records)


def test_dpo_starts_at_ln_2_and_its_margin_rises(base, files, tmp_path):
    """Log-probabilities averaged or of the wrong sign, a reference other than the policy at step 0."""
    train_ppo.main(flags("dpo", base, files, tmp_path / "out", "--steps", 20, "--dtype", "float64"))
    lines = metrics(tmp_path / "out")
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-9)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-9)
    assert lines[-1]["loss"] < .65 and lines[-1]["margin"] > .2
    args = train_ppo.parse(flags("dpo", base, files, tmp_path / "out"))
    _, train, held_out, records = train_ppo.load_pairs(args, torch.device("cpu"))
    pairs = [*train, *held_out]
    assert len(held_out) == len(records) == 4 and len(train) + 4 == len(data.read_preferences(files["pairs"]))
    model = LLaMA.from_pretrained(base, F64)
    found = train_ppo.pair_logps(model, pairs, torch.device("cpu"), 0, 1, batch_size=5)
    for (x, *answers), mine in zip(pairs, found):
        for y, logp in zip(answers, mine):                                  # the sum over the response, EOS included
            logits = model(torch.tensor([x + y]))[0, len(x) - 1:-1]
            assert logp == pytest.approx(losses.plain_logp(logits, torch.tensor(y)).sum().item(), abs=1e-9)
            assert y[-1] == data.Tokenizer.from_pretrained(base).eos


def test_quarks_rows_and_loss(base, files, rewards, tmp_path, monkeypatch):
    """A quantile's token on the wrong rollouts, a reference that reads the token too, or EOS that is not trained."""
    seen, calls = spy(monkeypatch, "roll_out"), []
    forward = LLaMA.forward

    def spied(self, tokens, targets=None, token_loss=None, temperature=1.0, reference=None):
        if reference is not None:
            calls.append((tokens, targets, reference[0]))
        return forward(self, tokens, targets, token_loss, temperature, reference)

    monkeypatch.setattr(LLaMA, "forward", spied)
    train_ppo.main(flags("quark", base, files, tmp_path / "out", "--count", 4, "--steps", 1, "--epochs", 1,
                         "--batch-size", 8, "--micro-batch-size", 8, "--kl-coef", .2, "--entropy-coef", .1, "--clip",
                         1e9, "--dtype", "float64", "--ending-penalty", 3, reward=rewards["whole"]))
    monkeypatch.undo()
    tokenizer, model = data.Tokenizer.from_pretrained(base), LLaMA.from_pretrained(base, F64)
    reward = RewardModel.from_pretrained(rewards["whole"], F64)
    answered = seen[0]
    raw = torch.tensor([reward(*data.pad([x + y])).item() for _, x, y in answered])
    scores = raw - 3 * raw.std(unbiased=False) * torch.tensor([y[-1] != tokenizer.eos for _, _, y in answered])
    order = torch.argsort(scores, descending=True).tolist()
    wanted, rows = {}, []
    for rank, i in enumerate(order):
        _, x, y = answered[i]
        told = [x[0], tokenizer.sp.piece_to_id(f"<0x{0xF8 + rank // 2:02X}>"), *x[1:]]      # behind BOS
        rows.append((told, x, y))
        wanted[tuple(told + y)] = y
    (tokens, targets, hidden), = calls
    for b in range(8):
        y = targets[b][targets[b] != losses.IGNORE].tolist()
        begin = (targets[b] != losses.IGNORE).nonzero()[0].item() + 1
        assert wanted.pop(tuple(tokens[b, :begin].tolist() + y)) == y
    assert not wanted
    parts = []
    for told, plain, y in rows:
        p, q = (torch.log_softmax(model(torch.tensor([x + y]))[0, len(x) - 1:-1], -1) for x in (told, plain))
        q = q.detach()
        parts.append(-p.gather(1, torch.tensor(y)[:, None])[:, 0] + .2 * (p.exp() * (p - q)).sum(1)
                     + .1 * (p.exp() * p).sum(1))
    grads = torch.autograd.grad(torch.cat(parts).mean(), list(model.parameters()))
    line, = metrics(tmp_path / "out")
    assert line["grad_norm"] == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in grads)), rel=1e-6)
    assert line["reward"] == pytest.approx(raw.mean().item(), abs=1e-6)


@pytest.mark.parametrize("quantiles,token", [("all", 0), ("best", None)])
def test_quark_is_asked_for_the_best(quantiles, token, base, files, rewards, tmp_path, monkeypatch):
    """Prompts without the token that was trained, a token in the first rollout, or one that the reward model reads."""
    asked, scored = [], []
    inner, score = train_ppo.generate, train_ppo.score
    monkeypatch.setattr(train_ppo, "generate", lambda *a, **k: (asked.append(a[1]), inner(*a, **k))[1])
    monkeypatch.setattr(train_ppo, "score", lambda m, rows, *rest: (scored.append(rows), score(m, rows, *rest))[1])
    train_ppo.main(flags("quark", base, files, tmp_path / "out", "--quantiles", quantiles, "--count", 2, "--steps", 3,
                         reward=rewards["whole"]))
    control = [data.Tokenizer.from_pretrained(base).sp.piece_to_id(f"<0x{b:02X}>") for b in range(0xF8, 0x100)]
    assert len(asked) == len(scored) == 3
    for step, prompts in enumerate(asked):
        assert all((x[1] == control[0]) == (step > 0 and token == 0) for x in prompts)
    assert not any(set(control) & set(row) for rows in scored for row in rows)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("reward_token") == token                              # simulate.py sample asks with it too
    told = simulate.conditioned(tmp_path / "out", [{"instruction": "a", "input": ""}])
    assert told[0].get("reward_token") == token


@pytest.mark.parametrize("quantiles", ["best", "all"])
def test_quark_with_fewer_rollouts_than_quantiles_in_an_epochs_last_batch(quantiles, base, files, rewards, tmp_path):
    """The best of 4 quantiles of 3 answers is empty: a division by zero after the first epoch."""
    train_ppo.main(flags("quark", base, files, tmp_path / "out", "--quantiles", quantiles, "--count", 4, "--steps", 2,
                         reward=rewards["whole"]))
    assert len(metrics(tmp_path / "out")) == 2


def test_the_four_models_of_ppo_share_one_backbone(base, files, rewards, tmp_path, monkeypatch):
    """A second copy of a 7B backbone; a base that moves; a reference that is not the base; a critic with a head."""
    loaded, read = spy(monkeypatch, "load_models"), spy(monkeypatch, "look_back")
    train_ppo.main(flags("ppo", base, files, tmp_path / "out", "--lora-rank", 4, "--lora-attention", "--lr", "3e-3",
                         "--dtype", "float64", reward=rewards["adapter"]))
    policy, reference, reward, critic = loaded[0]
    assert reference is None
    start = LLaMA.from_pretrained(base, F64)
    for name, p in critic.model.named_parameters():                        # (the policy has been merged by now)
        if "lora" not in name:
            assert torch.equal(p, start.model.get_parameter(name)), name
            assert p.data_ptr() == reward.model.get_parameter(name).data_ptr(), name
    assert all(torch.equal(r.values, torch.zeros_like(r.values)) for r in read[0]) and read[0][0].score != 0
    for r in read[-1]:
        logits = start(torch.tensor([r.prompt + r.response]))[0, len(r.prompt) - 1:-1]
        near(r.ref_logp, losses.plain_logp(logits, torch.tensor(r.response)).detach(), 1e-10)
    assert max((r.logp - r.ref_logp).abs().max() for r in read[-1]) > 1e-4  # the policy has moved
    with torch.no_grad():                                                   # and the reward model has not
        whole = RewardModel.from_pretrained(rewards["adapter"], F64)
        for r in read[-1]:
            assert r.score == pytest.approx(whole(*data.pad([r.prompt + r.response])).item(), abs=1e-5)

    args = train_ppo.parse(flags("ppo", base, files, tmp_path / "x", "--lora-rank", 4, reward=rewards["adapter"]))
    policy, _, reward, critic = train_ppo.load_models(args, torch.float32, torch.device("cpu"))
    for name, p in policy.model.named_parameters():
        if "lora" not in name:
            assert p.data_ptr() == reward.model.get_parameter(name).data_ptr() == \
                critic.model.get_parameter(name).data_ptr(), name
            assert not p.requires_grad
    adapters = [{n: p for n, p in m.named_parameters() if "lora" in n} for m in (policy, reward, critic)]
    assert all(torch.equal(adapters[1][n], adapters[2][n]) for n in adapters[1])
    assert len({p.data_ptr() for mine in adapters for p in mine.values()}) == sum(map(len, adapters))
    assert [any(p.requires_grad for p in m.parameters()) for m in (policy, reward, critic)] == [True, False, True]


def test_a_reward_model_without_an_adapter_is_held_beside_the_policy(base, files, rewards, capsys):
    """A reward model of all weights taken for the policy's backbone."""
    args = train_ppo.parse(flags("ppo", base, files, "x", "--lora-rank", 4, reward=rewards["whole"]))
    policy, reference, reward, critic = train_ppo.load_models(args, torch.float32, torch.device("cpu"))
    assert reference is None and "has no adapter of" in capsys.readouterr().out
    a, b, c = (m.model.layers[0].self_attn.q_proj.weight.data_ptr() for m in (policy, reward, critic))
    assert a != b == c
    x = data.pad([[1, 7, 8, 9]])
    near(reward(*x).detach(), RewardModel.from_pretrained(rewards["whole"])(*x).detach())


def test_run_folders_open_in_transformers_and_peft(base, files, rewards, tmp_path):
    """A head, an adapter or a config under another name than the one that others look for."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    train_ppo.main(flags("ppo", base, files, tmp_path / "ppo", "--lora-rank", 4, "--lr", "1e-2",
                         reward=rewards["adapter"]))
    tokens = torch.tensor([[1, 40, 41, 42, 43, 2]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ppo").eval()
    near(theirs(tokens).logits.detach(), LLaMA.from_pretrained(tmp_path / "ppo")(tokens).detach(), 1e-5)
    adapted = LLaMA.from_pretrained(base)
    load_adapter(adapted, tmp_path / "ppo" / "adapter")
    near(theirs(tokens).logits.detach(), adapted(tokens).detach(), 1e-5)
    for reward in rewards.values():
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(reward).eval()
        ours = RewardModel.from_pretrained(reward)(tokens, torch.tensor([6]))
        near(theirs(tokens).logits[:, 0].detach(), ours.detach(), 1e-5)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(whole, rewards["adapter"] / "adapter").eval()
    near(theirs(tokens).logits[:, 0].detach(), ours.detach(), 1e-5)         # ours: of the adapter, the last of the two
    shared = RewardModel.sharing(LLaMA.from_pretrained(base))
    load_adapter(shared, rewards["adapter"] / "adapter")
    near(shared(tokens, torch.tensor([6])).detach(), ours.detach(), 1e-5)
    near(merge_lora(shared)(tokens, torch.tensor([6])).detach(), ours.detach(), 1e-5)


def test_sharing_a_backbone_leaves_the_other_as_it_is():
    """Adapters of one model that show in another, or a merge that writes into the weights they share."""
    torch.manual_seed(0)
    policy = LLaMA(Config(vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=4, initializer_range=.5))
    tokens = torch.tensor([[1, 2, 3]])
    before = policy(tokens)
    reward = RewardModel.sharing(policy)
    assert reward.model.norm.weight.data_ptr() == policy.model.norm.weight.data_ptr()
    plain = reward(tokens, torch.tensor([3]))
    add_lora(reward, 2, 16, 0.0)
    for layer in lora_layers(reward).values():
        torch.nn.init.normal_(layer.lora_B.weight)
    moved = reward(tokens, torch.tensor([3]))
    assert not torch.allclose(moved, plain) and torch.equal(policy(tokens), before)
    merge_lora(reward)
    torch.testing.assert_close(reward(tokens, torch.tensor([3])), moved)
    assert torch.equal(policy(tokens), before)


def test_the_best_checkpoint_is_the_judges(base, files, rewards, tmp_path, monkeypatch):
    """The last step kept in place of the best, or the reward model as its own judge."""
    inner, judged = train_ppo.score_texts, []

    def scripted(directory, *rest, **more):               # the judge likes the second checkpoint best
        assert Path(directory) == rewards["adapter"]
        judged.append([.1, .9, .5][len(judged)])
        return [[judged[-1]] for _ in inner(directory, *rest, **more)]

    monkeypatch.setattr(train_ppo, "score_texts", scripted)
    kept, save = [], train_ppo.keep_best
    monkeypatch.setattr(train_ppo, "keep_best", lambda policy, *rest: (
        kept.append({k: v.clone() for k, v in policy.state_dict().items()}), save(policy, *rest)))
    train_ppo.main(flags("ppo", base, files, tmp_path / "out", "--validation", files["validation"], "--judge",
                         rewards["adapter"], "--eval-every", 2, reward=rewards["whole"]))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["step"] for c in results["curve"]] == [0, 2, 4]
    assert [c["judge"] for c in results["curve"]] == pytest.approx([.1, .9, .5])
    assert results["step"] == 2 and results["judge"] == pytest.approx(.9)
    saved = LLaMA.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[k], kept[1][k]) for k in saved)
    assert not all(torch.equal(saved[k], kept[2][k]) for k in saved)


@pytest.mark.parametrize("stage", ["dpo", "ppo", "quark"])
def test_a_loss_that_is_not_finite_stops_the_run(stage, base, files, rewards, tmp_path):
    """A NaN that is trained on."""
    model = LLaMA.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan", data.Tokenizer.from_pretrained(base))
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        train_ppo.main(flags(stage, tmp_path / "nan", files, tmp_path / "out", reward=rewards["whole"]))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def refused(match, argv):
    with pytest.raises(InputError, match=match) as error:
        train_ppo.main(list(map(str, argv)))
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(base, files, rewards, tmp_path, monkeypatch):
    """A traceback, or a run that starts with half of what it needs."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    tokenizer = data.Tokenizer.train(["some other words for another tokenizer"] * 3, 300)
    torch.manual_seed(0)
    RewardModel(Config(vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=8)).save_pretrained(other, tokenizer)
    for stage in ("ppo", "quark"):
        def run(*more, reward=rewards["whole"]):
            return flags(stage, base, files, tmp_path / "out", *more, reward=reward)

        refused("neither config.json", run(reward=tmp_path / "nowhere"))
        refused("--validation FILE and --judge DIR", run("--validation", files["validation"]))
        refused("--validation FILE and --judge DIR", run("--judge", rewards["whole"]))
        refused("different tokenizers", run(reward=other))
        refused("--data needs --reward", run("--reward", ""))
        refused("--data needs --model", run("--model", ""))
        refused("no prompt fits in 3 tokens", run("--max-length", 3))
        refused("is the --reward", run("--out", rewards["adapter"], reward=rewards["adapter"]))
        refused("no such file", run("--data", tmp_path / "none.json"))
        with monkeypatch.context() as three:
            three.setattr(train_ppo, "setup_distributed", lambda device: (0, 3, torch.device("cpu")))
            refused("--rollouts 8 is not a multiple of the 3 ranks", run("--batch-size", 6))
            refused("--batch-size 8 is not a multiple of the 3 ranks", run("--batch-size", 8, "--rollouts", 9))
    refused("--rollouts 3 is less than the 4 quantiles", run("--rollouts", 3))
    for stage in ("reward", "dpo"):
        refused("--held-out 100 of the 2", flags(stage, base, files, tmp_path / "out", "--held-out", 100))
        refused("--data needs --model", flags(stage, base, files, tmp_path / "out", "--model", ""))
        refused("is the --model", flags(stage, base, files, base))
        refused("nothing to resume", flags(stage, base, files, tmp_path / "out", "--resume"))
    assert not list(tmp_path.glob("out*"))


def test_the_stages_defaults():
    """AlpacaFarm's settings with --data, the built-in world's without, and no stage means reward, then ppo."""
    assert train_ppo.parse([]).stage == train_ppo.parse(["--seed", "3"]).stage == "both"
    args = ppo_args()
    assert (args.batch_size, args.rollouts, args.lr, args.max_new_tokens) == (256, 512, 1e-5, 300)
    assert (args.epochs, args.ratio_clip, args.value_clip, args.value_coef, args.temperature) == (2, .2, .2, .1, 1.0)
    reward, dpo = (train_ppo.parse([stage, "--data", "x.json"]) for stage in ("reward", "dpo"))
    assert (reward.batch_size, reward.lr, reward.epochs) == (16, 3e-6, 1.0)
    assert (dpo.batch_size, dpo.lr, dpo.epochs, dpo.beta) == (64, 1e-6, 2.0, .1)
    assert train_ppo.parse(["ppo"]).format == "short" != args.format and args.out != train_ppo.parse(["ppo"]).out
    assert (args.kl, args.lam, args.beta) != (ppo_args("--released").kl, ppo_args("--released").lam,
                                              ppo_args("--released").beta)
    assert ppo_args("--released", "--beta", .02).beta == .02               # what is given is not replaced


def test_without_a_stage_reward_then_ppo(monkeypatch):
    """A stage left out, in the wrong order, or without the seed and the noise that it was asked for."""
    seen = []
    for stage in train_ppo.STAGES:
        monkeypatch.setitem(train_ppo.STAGES, stage, lambda args, *rest: seen.append(
            (args.stage, args.seed, args.noise, args.device)) or 0)
    assert train_ppo.main(["--seed", "3", "--noise", "0.1", "--device", "cpu"]) == 0
    assert seen == [("reward", 3, .1, "cpu"), ("ppo", 3, .1, "cpu")]
    monkeypatch.setitem(train_ppo.STAGES, "reward", lambda *a: 130)         # stopped: ppo must not begin
    assert train_ppo.main(["--device", "cpu"]) == 130 and len(seen) == 2


def test_accuracy_against_labels_and_truth():
    """Noise of the labels taken for errors of the model, or the other way round."""
    record = {"output_1": "It is red.", "output_2": "It is blue.", "reference": "It is red."}
    records = [{**record, "preference": p} for p in (1, 1, 2, 1)]           # the third label is wrong
    found = train_ppo.accuracy([1.0, -1.0, -2.0, 3.0], records)             # the model errs on the second
    assert found["accuracy"] == .5 and found["truth"] == .75 and found["ceiling"] == .75
    plain = train_ppo.accuracy([1.0, -1.0], [{"output_1": "a", "output_2": "b", "preference": 1}] * 2)
    assert set(plain) == {"accuracy", "accuracy_se"}


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: preferences and judgments as demonstrations


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


PAIRS = [{"instruction": "a", "input": "", "output_1": "one", "output_2": "two", "preference": 1},
         {"instruction": "b", "input": "x", "output_1": "one", "output_2": "two", "preference": 2},
         {"instruction": "c", "input": "", "output_1": "one", "output_2": "two", "preference": 1.5},
         {"instruction": "d", "input": "", "output_1": "one", "output_2": "two", "preference": 1.9}]


def test_feedme_keeps_the_preferred_output(tmp_path):
    """The first output for the preferred one, or a tie that becomes a demonstration."""
    records = data.read_feedme(write(tmp_path / "pairs.json", PAIRS))
    assert [(r["instruction"], r["output"], r["judgment"]) for r in records] == \
        [("a", "one", None), ("b", "two", None), ("d", "two", None)]


def test_conditioning_makes_two_records_with_control_tokens(tmp_path):
    """Tokens exchanged between better and worse, two records with one id, or a token that is not encoded."""
    path = write(tmp_path / "pairs.json", PAIRS)
    records = data.read_conditioning(path)
    assert [(r["instruction"], r["output"], r["reward_token"]) for r in records] == [
        ("a", "one", 0), ("a", "two", 1), ("b", "two", 0), ("b", "one", 1), ("d", "two", 0), ("d", "one", 1)]
    assert len({r["id"] for r in records}) == 6 and all(r["judgment"] is None for r in records)
    tokenizer = data.world_tokenizer()
    examples = data.encode(tokenizer, records, "short", 99)
    plain = data.encode(tokenizer, [{**r, "reward_token": None} for r in records], "short", 99)
    for e, p, k in zip(examples, plain, itertools.cycle(["<0xF8>", "<0xF9>"])):
        assert e.prompt == [tokenizer.bos, tokenizer.sp.piece_to_id(k), *p.prompt[1:]] and e.response == p.response


def tokenizers():
    found = [("world", data.world_tokenizer)]
    return found + [("llama", lambda: data.Tokenizer(LLAMA_TOKENIZER.read_bytes()))] * LLAMA_TOKENIZER.is_file()


@pytest.mark.parametrize("name,make", tokenizers(), ids=lambda x: x if isinstance(x, str) else "")
def test_no_text_encodes_to_a_control_token(name, make):
    """A control token that a text can write, or one that the tokenizer does not have."""
    tokenizer = make()
    control = {tokenizer.encode_prompt("Say it.", k)[1] for k in range(8)}
    assert len(control) == 8 and all(tokenizer.sp.is_byte(i) for i in control) and tokenizer.sp.unk_id() not in control
    for k in range(8):
        assert tokenizer.encode_prompt("Say it.", k) == [tokenizer.bos, tokenizer.sp.piece_to_id(f"<0x{0xF8 + k:X}>"),
                                                         *tokenizer.encode_prompt("Say it.")[1:]]
    texts = ["<0xF8> <0xFF>", "".join(f"<0x{b:02X}>" for b in range(256)), "\u00f8\u00ff\ufffd"]
    texts += ["".join(map(chr, range(i, i + 64))) for i in (*range(0, 0xD800, 0x440), *range(0xE000, 0x10FFC0, 0x3FC0))]
    for text in texts:
        assert not control & {*tokenizer.encode_prompt(text), *tokenizer.encode_response(text)}


@pytest.mark.parametrize("token", [8, -1, "0", 0.5])
def test_a_bad_reward_token_is_an_input_error(token):
    """A KeyError, or <unk> in place of a control token."""
    record = {"id": 7, "instruction": "a", "input": "", "reward_token": token}
    with pytest.raises(InputError, match=f"record 7: 'reward_token' is {token!r}, expected 0 to 7"):
        data.prompt_ids(data.world_tokenizer(), record, "short")


def test_forward_prediction_and_hindsight(files):
    """Responses without their judgments, judgments without their responses, or a judgment told that is to be learnt."""
    judged = data.read_judged(files["judged"])
    forward, tokenizer = data.read_forward(files["judged"]), data.world_tokenizer()
    assert len(forward) == 2 * len(judged)
    for r, answer, verdict in zip(judged, forward, forward[len(judged):]):
        assert (answer["instruction"], answer["output"], answer["judgment"]) == (r["instruction"], r["output"], None)
        assert verdict["output"] == (r["judgment"] or "Perfect.") and verdict["judgment"] is None
        assert r["instruction"] in verdict["instruction"] and r["output"] in verdict["instruction"]
    hindsight = data.encode(tokenizer, train_sft.RECIPES["hindsight"](files["judged"]), "short", 512, hindsight=True)
    for r, e in zip(judged, hindsight):
        assert e.judged is None and e.response == tokenizer.encode_response(r["output"])
        assert e.prompt == data.prompt_ids(tokenizer, r, "short", r["judgment"])
    assert judged[0]["judgment"] and judged[-1]["judgment"] is None


@pytest.mark.parametrize("recipe,file,factor", [("feedme", "pairs", 1), ("conditioning", "pairs", 2),
                                                ("hindsight", "judged", 1), ("forward", "judged", 2),
                                                ("judge", "judged", 1), ("demonstrations", "demos", 1)])
def test_train_sft_runs_every_recipe(recipe, file, factor, base, files, tmp_path, capsys):
    """A recipe that reads but does not train."""
    train_sft.main(["--model", str(base), "--data", str(files[file]), "--recipe", recipe, "--format", "short",
                    "--device", "cpu", "--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "out")])
    assert f"{factor * len(json.loads(files[file].read_text()))} examples, 2 steps of 4" in capsys.readouterr().out
    assert len(metrics(tmp_path / "out")) == 2
    now, start = weights(tmp_path / "out", "sft"), weights(base, "sft")
    assert any(not torch.equal(now[k], start[k]) for k in now)


def test_a_conditioned_model_is_asked_for_the_best(base, files, tmp_path):
    """Trained behind a control token, asked without one: answers of either kind."""
    out = tmp_path / "out"
    train_sft.main(["--model", str(base), "--data", str(files["pairs"]), "--recipe", "conditioning", "--format",
                    "short", "--device", "cpu", "--steps", "1", "--batch-size", "4", "--out", str(out)])
    assert simulate.conditioned(out, [{"instruction": "a"}])[0].get("reward_token") == 0
    train_ppo.main(flags("dpo", base, files, tmp_path / "dpo"))            # and one that was not is not
    assert simulate.conditioned(tmp_path / "dpo", [{"instruction": "a"}]) == [{"instruction": "a"}]


def test_evaluate_asks_a_conditioned_model_for_the_best(base, tmp_path, monkeypatch, capsys):
    """Exact match of a Quark model that is asked another way than it was trained."""
    prompts, inner = [], simulate.prompt_ids
    monkeypatch.setattr(simulate, "prompt_ids", lambda *a: (prompts.append(inner(*a)), prompts[-1])[1])
    tokenizer, model = data.Tokenizer.from_pretrained(base), LLaMA.from_pretrained(base)
    for name, extra in (("plain", {}), ("told", {"reward_token": 0})):
        model.save_pretrained(tmp_path / name, tokenizer, extra={"prompt_format": "short", **extra})
        prompts.clear()
        evaluate.main(["--model", str(tmp_path / name), "--split", "validation"])
        assert len(prompts) == 800
        assert all((x[1] == tokenizer.sp.piece_to_id("<0xF8>")) == (name == "told") for x in prompts)


def test_sample_keeps_the_best_of_four(base, files, rewards, tmp_path, capsys):
    """The worst for the best, an empty text that wins, or a score of something else than prompt + answer + EOS."""
    common = ["sample", "--data", files["instructions"], "--model", base, "--temperature", 1, "--max-new-tokens", 14,
              "--device", "cpu", "--seed", 5]
    simulate.main(list(map(str, [*common, "--outputs", 4, "--out", tmp_path / "four.jsonl"])))
    simulate.main(list(map(str, [*common, "--best-of", 4, "--reward", rewards["whole"],
                                 "--out", tmp_path / "best.jsonl"])))
    four, best = (data.read_json(tmp_path / f"{name}.jsonl") for name in ("four", "best"))
    tokenizer, reward = data.Tokenizer.from_pretrained(base), RewardModel.from_pretrained(rewards["whole"])
    places = set()
    for many, one in zip(four, best, strict=True):
        with torch.no_grad():
            scores = [reward(*data.pad([data.prompt_ids(tokenizer, many, "short") + tokenizer.encode_response(text)]))
                      .item() if text.strip() else -math.inf for text in many["output"]]
        k = max(range(4), key=lambda i: scores[i])
        assert one["output"] == many["output"][k] and one["reward"] == pytest.approx(max(scores), abs=1e-5)
        assert "best of 4" in one["generator"] and one["instruction"] == many["instruction"]
        places.add(k)
    assert len(places) > 1                                                  # not the first of them, every time
    with pytest.raises(InputError, match="--best-of N and --reward DIR"):
        simulate.main(list(map(str, [*common, "--best-of", 4, "--out", tmp_path / "x.jsonl"])))
    assert data.read_feedme(write(tmp_path / "p.json", PAIRS)) and data.read_demonstrations(tmp_path / "best.jsonl")


def test_refinements_are_demonstrations_and_pairs(base, files, tmp_path, capsys):
    """The rejected answer taught as the better one, good records refined too, or a judgment left to be told (ILF)."""
    simulate.main(["refine", "--by", "reference", "--data", str(files["judged"]),
                   "--out", str(tmp_path / "better.jsonl")])
    judged = [r for r in data.read_judged(files["judged"]) if r["judgment"] is not None]
    demos, pairs = (read(tmp_path / "better.jsonl") for read in (data.read_demonstrations, data.read_preferences))
    assert 0 < len(judged) == len(demos) == len(pairs) < len(json.loads(files["judged"].read_text()))
    for r, demo, pair in zip(judged, demos, pairs):
        assert demo["output"] == r["reference"] and demo["judgment"] is None        # at most three faults: all mended
        assert data.better_and_worse(pair) == (r["reference"], r["output"]) and demo["was_judged"] == r["judgment"]
    train_ppo.main(flags("dpo", base, {"pairs": tmp_path / "better.jsonl"}, tmp_path / "ilf", "--steps", 1))
    assert metrics(tmp_path / "ilf")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    record = {k: v for k, v in judged[0].items() if k != "reference"}
    with pytest.raises(InputError, match="judged response 0 has no key 'reference'"):
        simulate.main(["refine", "--by", "reference", "--data", str(write(tmp_path / "no.json", [record])), "--out",
                       str(tmp_path / "no.jsonl")])
