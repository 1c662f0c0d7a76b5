"""losses.py: CUT against vectors computed by hand, its invariants, and the fused head against full logits.

PPO, DPO, Quark and the reward model's loss are in test_preferences.py.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses

torch.set_num_threads(1)
F64 = torch.float64


def logp(*p):
    return torch.tensor(p, dtype=F64).log()


def lengths(*n):
    return torch.tensor(n, dtype=torch.long)


def first(count, of):
    """A mask of `of` tokens of which the first `count` are flagged, as in all vectors below."""
    return torch.arange(of) < count


def through_logits(p, V=5):
    """Leaf logits (N, V) that give token 0 the probabilities p, and the logp that autograd sees."""
    p = torch.tensor(p, dtype=F64).unsqueeze(1)
    rest = ((1 - p) / (V - 1)).expand(-1, V - 1)
    leaf = torch.cat([p, rest], dim=1).log().requires_grad_(True)
    return leaf, torch.log_softmax(leaf, dim=-1)[:, 0]


def near(value, expected, atol=6e-7):
    np.testing.assert_allclose(torch.as_tensor(value).detach().numpy(), expected, rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# CUT: vectors V1 to V4, probabilities of a bad response's tokens after (x, j-) and after x

V1 = (.82, .94, .76, .99, .02, .89), (.03, .94, .93, .99, .03, .85)
V2 = (.9, .6, .5, .8), (.3, .5, .48, .8)
V3 = (.6, .4, .9), (.2, .5, .9)
V3_GOOD = (.7, .9)
V4 = (.5,), (.25,)


@pytest.mark.parametrize("vector, lam, flagged", [
    (V1, 1.1, 1), (V2, 1.1, 2), (V2, 1.25, 1), (V2, 1.03, 3), (V3, 1.1, 1), (V4, 1.1, 1)])
def test_eq5_detect(vector, lam, flagged):
    """A detector with the ratio upside down, or one that flags every token that has become likelier."""
    judged, plain = logp(*vector[0]), logp(*vector[1])
    assert torch.equal(losses.detect(judged, plain, lam), first(flagged, of=len(plain)))


def test_eq5_detect_at_the_limits():
    """A flag for equal probabilities at lambda 1 or for 0/0, none for p/0, or lambda taken for another number."""
    judged, plain = logp(.5, 0, .5), logp(.5, 0, 0)
    assert losses.detect(judged, plain, 1.0).tolist() == [False, False, True]
    assert losses.detect(logp(.549, .551), logp(.5, .5), 1.1).tolist() == [False, True]


@pytest.mark.parametrize("vector, flagged, alpha, means", [
    (V1, 1, 1.0, {0: .640672, 1: .639758}),
    (V1, 1, 0.5, {0: .638134, 1: .637677}),
    (V2, 2, 1.0, {0: .501734, .5: .458098, 1: .423502, 2: .373888}),
    (V2, 2, 0.5, {0: .370506, .5: .348688, 1: .331390, 2: .306583}),
    (V2, 1, 0.5, {0: .457149, .5: .454861, 1: .452691, 2: .448678}),
    (V2, 3, 0.5, {0: .268754, .5: .222996, 1: .188768, 2: .143526}),
    (V3, 1, 1.0, {0: .340550, 1: .310798})])
def test_eq6_cut_l1(vector, flagged, alpha, means):
    """alpha or gamma that acts on the wrong tokens or not at all, or p^gamma of the wrong pass."""
    judged, plain = logp(*vector[0]), logp(*vector[1])
    for gamma, mean in means.items():
        near(losses.cut_l1(judged, plain, first(flagged, of=len(plain)), alpha, gamma).mean(), mean)


def test_eq6_cut_l1_and_eq7_of_each_token():
    """Errors of two tokens that cancel in a mean; L2 under the wrong prompt."""
    judged, plain, flagged = logp(*V1[0]), logp(*V1[1]), first(1, of=6)
    l1 = [.030459, .061875, .072571, .010050, 3.506558, .162519]
    l2 = [.198451, .061875, .274437, .010050, 3.912023, .116534]
    near(losses.cut_l1(judged, plain, flagged, 1.0), l1)
    near(losses.cut_l1(judged, plain, flagged, 1.0, 1.0), [.024977] + l1[1:])
    near(losses.cut_token_loss(judged, plain, flagged, 1.0), np.add(l1, l2), 1.2e-6)


def test_eq6_weight_is_a_constant():
    """p^gamma as a path for gradients, through which L1 pushes p(y|x, j-) down, against L2."""
    judged_leaf, judged = through_logits(V2[0])
    plain_leaf, plain = through_logits(V2[1])
    losses.cut_l1(judged, plain, first(2, of=4), 0.5, 1.0).mean().backward()
    near(plain_leaf.grad[:, 0], [.03375, .0375, -.13, -.05])
    assert judged_leaf.grad is None


@pytest.mark.parametrize("vector, lam, alpha, paper, released", [
    (V1, 1.10, 1.0, {0: 1.402900, 1: 1.401987}, .701450),
    (V1, 1.10, 0.5, {0: 1.400362, 1: 1.399905}, .700181),
    (V2, 1.10, 1.0, {0: .884853, 1: .806621}, .442426),
    (V2, 1.10, 0.5, {0: .753625, 1: .714509}, .376813),
    (V2, 1.25, 0.5, {0: .840269, 1: .835810}, .420134),
    (V2, 1.03, 0.5, {0: .651874, 1: .571887}, .325937)])
def test_eq7_cut_loss_of_one_response(vector, lam, alpha, paper, released):
    """lambda, alpha or gamma that does not arrive; a half too many in the paper's form or missing in the released."""
    judged, plain = logp(*vector[0]), logp(*vector[1])
    n = lengths(len(plain))
    for gamma, value in paper.items():
        near(losses.cut_loss(judged, plain, n, lam=lam, alpha=alpha, gamma=gamma), value)
    near(losses.cut_loss(judged, plain, n, lam=lam, alpha=alpha, form="released"), released)


@pytest.mark.parametrize("form, factor", [("released", 1), ("paper", 2)])
def test_eq7_gradient(form, factor):
    """A gradient that misses a branch or a pass, or has the sign of unlikelihood wrong."""
    judged_leaf, judged = through_logits(V1[0])
    plain_leaf, plain = through_logits(V1[1])
    losses.cut_loss(judged, plain, lengths(6), form=form).backward()
    near(plain_leaf.grad[:, 0] / factor, [.002500, -.005000, -.005833, -.000833, -.080833, -.012500])
    near(judged_leaf.grad[:, 0] / factor, [-.015000, -.005000, -.020000, -.000833, -.081667, -.009167])


def test_v3_a_bad_and_a_good_response():
    """Tokens pooled where the mean over examples is meant, or the reverse; a batch without bad ones that is halved."""
    judged, plain, good = logp(*V3[0]), logp(*V3[1]), logp(*V3_GOOD)
    both = (judged, plain, lengths(3), good, lengths(2))
    near(losses.cut_loss(*both), .541197)
    near(losses.cut_loss(*both, gamma=1.0), .526321)
    near(losses.cut_loss(*both, form="released"), .369726)
    near(losses.cut_loss(judged, plain, lengths(3), form="released"), .425688)
    for form in ("paper", "released"):
        near(losses.cut_loss(logp(), logp(), lengths(), good, lengths(2), form=form), .231018)


def test_v4_responses_of_unequal_length():
    """Means over an example's tokens that take in its neighbour's, or that are pooled in the paper's form."""
    judged, plain, n = logp(*V4[0], *V3[0]), logp(*V4[1], *V3[1]), lengths(1, 3)
    l1 = losses.cut_l1(judged, plain, torch.tensor([True, True, False, False]), 1.0)
    near(losses.per_example_mean(l1, n), [.287682, .340550])
    near(losses.per_example_mean(-judged, n), [.693147, .510826])
    near(losses.cut_loss(judged, plain, n), 2 * .458051, 1.2e-6)
    near(losses.cut_loss(judged, plain, n, form="released"), .441870)


# ----------------------------------------------------------------------------------------------------------------------
# CUT: limits and invariants


def random_batch(seed):
    """Bad responses of 3, 1 and 7 tokens, good ones of 4 and 2: the first five arguments of cut_loss."""
    g = torch.Generator().manual_seed(seed)
    judged, plain, good = (torch.empty(n, dtype=F64).uniform_(.01, .99, generator=g).log() for n in (11, 11, 6))
    return judged, plain, lengths(3, 1, 7), good, lengths(4, 2)


def test_probabilities_0_and_1():
    """NaN gradients through the branch that `where` did not pick, or from a certain token that is not flagged."""
    judged_leaf, judged = through_logits((.5, .5))
    plain_leaf, plain = through_logits((0., .5))
    near(losses.cut_l1(judged, plain, first(1, of=2), 1.0), [0, math.log(2)])
    loss = losses.cut_loss(judged, plain, lengths(2), form="released")
    near(loss, .519860)
    loss.backward()
    assert judged_leaf.grad.isfinite().all() and plain_leaf.grad.isfinite().all()
    zero, one, half = logp(0., .5), logp(1., .5), logp(.5, .5)
    assert losses.cut_loss(zero, zero, lengths(2), form="released") == math.inf
    near(losses.cut_loss(one, one, lengths(2), form="released"), .346574)
    near(losses.cut_loss(half, half, lengths(2), lam=1.0, form="released"), .693147)
    for dtype in (torch.float32, F64):
        judged = torch.tensor([0.0, -1.0, -3.0], dtype=dtype, requires_grad=True)
        plain = judged.detach().clone().requires_grad_(True)
        for grad in torch.autograd.grad(losses.cut_loss(judged, plain, lengths(3)), (judged, plain)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("lam", [1.0, 1.1, 1e12])
def test_nothing_flagged_is_plain_cross_entropy(lam):
    """L1 that differs from -log p(y|x) where the passes agree, or where no ratio reaches lambda."""
    judged, plain, n, _, _ = random_batch(0)
    if lam < 1e6:
        judged = plain
    loss = losses.cut_loss(judged, plain, n, lam=lam, alpha=.7, gamma=.5)
    near(loss, -losses.per_example_mean(plain + judged, n).mean(), 1e-12)


@pytest.mark.parametrize("lam, alpha, gamma", [(1.1, 1.0, 0.0), (1.5, .5, 1.0)])
def test_gradient_is_that_of_fixed_flags_and_weights(lam, alpha, gamma):
    """A gradient through the flags or through p^gamma."""
    judged, plain, n, good, m = random_batch(3)
    inputs = [x.clone().requires_grad_(True) for x in (judged, plain, good)]
    loss = losses.cut_loss(inputs[0], inputs[1], n, inputs[2], m, lam=lam, alpha=alpha, gamma=gamma)
    grads = torch.autograd.grad(loss, inputs)

    per_token = 1 / (5 * n.repeat_interleave(n).double())                  # 5 examples
    flagged = judged - plain > math.log(lam)
    assert 0 < flagged.sum() < len(flagged)
    odds = plain.exp() / (1 - plain.exp())
    plain_grad = torch.where(flagged, alpha * judged.exp() ** gamma * odds, -torch.ones_like(plain))
    near(grads[0], -per_token, 1e-12)
    near(grads[1], per_token * plain_grad, 1e-10)
    near(grads[2], -1 / (5 * m.repeat_interleave(m).double()), 1e-12)


def test_cut_loss_refuses_what_it_cannot_mean():
    """A misspelt form, forgotten lengths or a gamma of the released form that silently give another loss."""
    judged, plain, n, good, _ = random_batch(4)
    with pytest.raises(ValueError, match="form is 'publised'"):
        losses.cut_loss(judged, plain, n, form="publised")
    with pytest.raises(ValueError, match="no gamma"):
        losses.cut_loss(judged, plain, n, gamma=1.0, form="released")
    with pytest.raises(ValueError, match="positive_lengths"):
        losses.cut_loss(judged, plain, n, good)


def test_detection_sums():
    """Metrics that count unflagged tokens as flagged, or that take the judged pass for the plain one."""
    sums = losses.detection_sums(logp(*V2[0]), logp(*V2[1]), first(2, of=4))
    expected = {"tokens": 4, "flagged": 2, "log_ratio": math.log(3 * 1.2 * .5 / .48),
                "flagged_loss": -math.log(.7 * .5), "unflagged_loss": -math.log(.48 * .8)}
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(expected)


def test_log1mexp():
    """Cancellation near 0 or far below it."""
    x = torch.from_numpy(-np.logspace(-5.9, math.log10(700), 4000)).requires_grad_(True)
    value = losses.log1mexp(x)
    grad, = torch.autograd.grad(value.sum(), x)
    exact = x.detach().numpy()
    np.testing.assert_allclose(value.detach(), np.log1p(-np.exp(exact)), rtol=1e-9, atol=0)
    np.testing.assert_allclose(grad, np.exp(exact) / np.expm1(exact), rtol=1e-9)

    x = x.detach()[exact > -80].float()                                    # below, the answer is subnormal in fp32
    exact = x.double().numpy()
    truth = np.where(exact > -.7, np.log(-np.expm1(exact)), np.log1p(-np.exp(exact)))
    np.testing.assert_allclose(losses.log1mexp(x), truth, rtol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_log1mexp_at_its_ends(dtype):
    """Infinite or NaN values and gradients at p = 0 and p = 1; a clamp that leaves no gradient at p = 1."""
    ends = [0, -1e-300, -1e-9, -1e-7, -1e-6, -math.log(2), -50, -1e4, -math.inf]
    x = torch.tensor(ends, dtype=dtype, requires_grad=True)
    value = losses.log1mexp(x)
    grad, = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all() and grad.isfinite().all() and (value <= 0).all()
    assert (grad[:4] == grad[4]).all() and grad[4] < -9e5


def test_unlikelihood_moves_certain_tokens():
    """Through the softmax, d unlikelihood / d logit is p, up to rounding: it must not vanish as p goes to 1."""
    logits = torch.tensor([[0, -float(gap)] for gap in (1, 5, 13, 15)], requires_grad=True)
    losses.unlikelihood(losses.plain_logp(logits, torch.zeros(4, dtype=torch.long))).sum().backward()
    expected = [0.731, 0.993, 1.0, 0.306]            # the last one: p = 1 - 3.06e-7, beyond the clamp at 1 - 1e-6
    np.testing.assert_allclose(logits.grad[:, 0], expected, atol=0.15)


# ----------------------------------------------------------------------------------------------------------------------
# The fused head against autograd through full logits


def head_inputs(R, N, dtype=F64, D=7, V=23, scale=1.0):
    """hidden (R, N, D), weight (V, D), targets (N,) and a further tensor (N,) that the token loss takes."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(R, N, D, generator=g, dtype=F64) * scale
    weight = torch.randn(V, D, generator=g, dtype=F64)
    targets = torch.randint(V, (N,), generator=g)
    factor = torch.rand(N, generator=g, dtype=F64)
    return hidden.to(dtype), weight.to(dtype), targets, factor.float() if dtype != F64 else factor


def token_loss(logp, factor):
    """Not linear, and the passes meet in it, so that each gradient depends on the other pass."""
    return factor * (logp[0] * logp[-1] - logp.sum(dim=0))


def full_logp(hidden, weight, targets):
    logits = hidden @ weight.T                                             # (..., N, V)
    targets = targets.expand(logits.shape[:-1])
    return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def full_loss(hidden, weight, targets, token_loss, per_token):
    logp = full_logp(hidden, weight, targets)
    return token_loss(logp, *per_token).sum(), logp


def joint_loss(hidden, weight, targets, head, *tile):
    """A loss in which tokens interact, as in DPO."""
    logp = head(hidden, weight, targets, *tile)                            # (N,)
    return logp.sin().sum() ** 2 + logp.sum(), logp


def with_grads(function, hidden, weight, *args):
    """loss, logp, and the gradients of -2.5 * loss by hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    loss, logp = function(hidden, weight, *args)
    (-2.5 * loss).backward()
    return loss.detach(), logp.detach(), hidden.grad, weight.grad


def all_close(got, expected, tolerance=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_plain_logp():
    """A softmax over the wrong dimension, or -inf where a probability underflows."""
    hidden, weight, targets, _ = head_inputs(2, 5)
    all_close([losses.plain_logp(hidden @ weight.T, targets.expand(2, 5))], [full_logp(hidden, weight, targets)])
    assert losses.plain_logp(torch.tensor([0., 1000.]), torch.tensor(0)) == -1000


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("N, tile", [(12, 4), (13, 4), (13, 1), (13, 13), (5, 64), (1, 1), (0, 4)])
def test_fused_loss_is_autograd_in_float64(R, N, tile):
    """A tile dropped, counted twice or paired with its neighbour's factors; a gradient without its upstream factor."""
    hidden, weight, targets, factor = head_inputs(R, N)
    got = with_grads(losses.fused_loss, hidden, weight, targets, token_loss, (factor,), tile)
    expected = with_grads(full_loss, hidden, weight, targets, token_loss, (factor,))
    assert got[1].shape == (R, N)
    all_close(got, expected)


@pytest.mark.parametrize("N, tile", [(12, 4), (13, 4), (5, 64), (1, 1), (0, 4)])
def test_fused_logp_is_autograd_in_float64(N, tile):
    """A backward pass whose tiles are not those of the forward pass."""
    hidden, weight, targets, _ = head_inputs(1, N)
    got = with_grads(joint_loss, hidden[0], weight, targets, losses.fused_logp, tile)
    assert got[1].shape == (N,)
    all_close(got, with_grads(joint_loss, hidden[0], weight, targets, full_logp))


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("scale", [1.0, 3.0, 15.0, 60.0])
def test_fused_in_fp32_is_as_exact_as_full_logits(scale):
    """Tiles that lose digits, in the log-sum-exp of large logits or where a token is nearly certain."""
    N, D, V = 300, 32, 500
    hidden, weight, targets, factor = head_inputs(2, N, torch.float32, D, V, scale / D ** .5)
    likeliest = (hidden[-1] @ weight.T).argmax(-1)
    targets = torch.where(first(N // 2, of=N), likeliest, targets)         # half of the tokens are confident ones
    truth = with_grads(full_loss, hidden.double(), weight.double(), targets, token_loss, (factor.double(),))
    fused = with_grads(losses.fused_loss, hidden, weight, targets, token_loss, (factor,), 64)
    full = with_grads(full_loss, hidden, weight, targets, token_loss, (factor,))
    for name, t, a, b in zip(("loss", "logp", "hidden", "weight"), truth, fused, full):
        allowed = 1.5 * rms(b - t) + 2e-7 * rms(t)                         # the loss is one number: luck needs room
        assert rms(a - t) <= allowed, f"{name}: {rms(a - t):.2e}, full logits {rms(b - t):.2e}"
    certain = truth[1] > -.01                                              # log p is small there: its digits count
    if certain.any():
        assert rms((fused[1] - truth[1])[certain]) <= 1.5 * rms((full[1] - truth[1])[certain]) + 1e-8


def test_fused_in_bf16_computes_in_fp32():
    """Logits rounded to bf16, whose steps are wider than CUT's ln(1.1)."""
    hidden, weight, targets, factor = head_inputs(2, 100, torch.bfloat16, 32, 200, 1.5)
    truth = with_grads(full_loss, hidden.double(), weight.double(), targets, token_loss, (factor.double(),))
    got = with_grads(losses.fused_loss, hidden, weight, targets, token_loss, (factor,), 32)
    single = with_grads(joint_loss, hidden[0], weight, targets, losses.fused_logp, 32)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert [x.dtype for x in single] == [torch.float32] * 2 + [torch.bfloat16] * 2
    all_close([got[0].double(), got[1].double(), single[1].double()], [truth[0], truth[1], truth[1][0]], 1e-5)
    for a, t in zip(got[2:], truth[2:]):                                   # rounded to bf16, twice
        torch.testing.assert_close(a.double(), t, rtol=2 ** -7, atol=1e-4 * rms(t))


def test_fused_with_a_frozen_head_or_frozen_hidden_states():
    """A frozen head that crashes, gets a gradient, or changes the gradient of the hidden states."""
    hidden, weight, targets, factor = head_inputs(1, 9)
    loss, logp, hidden_grad, weight_grad = with_grads(full_loss, hidden, weight, targets, token_loss, (factor,))
    h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    (-2.5 * losses.fused_loss(h, weight, targets, token_loss, (factor,), 4)[0]).backward()
    (-2.5 * losses.fused_loss(hidden, w, targets, token_loss, (factor,), 4)[0]).backward()
    all_close([h.grad, w.grad], [hidden_grad, weight_grad])
    h.grad = None
    losses.fused_logp(h[0], weight, targets, 4).sum().backward()
    assert h.grad.any() and weight.grad is None
    with torch.no_grad():                                                  # evaluation
        all_close(losses.fused_loss(hidden, weight, targets, token_loss, (factor,), 4), [loss, logp])


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_fused_never_holds_all_logits():
    """The (tokens, vocabulary) matrix creeping back in, forward or backward."""
    R, N, D, V, tile = 2, 200, 8, 64, 16
    hidden, weight, targets, factor = head_inputs(R, N, torch.float32, D, V)
    bound = max(R * tile * V, V * D, R * N * D)
    assert bound < N * V
    with Largest() as fused:
        with_grads(losses.fused_loss, hidden, weight, targets, token_loss, (factor,), tile)
    with Largest() as single:
        with_grads(joint_loss, hidden[0], weight, targets, losses.fused_logp, tile)
    with Largest() as full:                                                # the recorder does see the full logits
        with_grads(full_loss, hidden, weight, targets, token_loss, (factor,))
    assert 0 < fused.numel <= bound and 0 < single.numel <= bound and full.numel >= R * N * V
