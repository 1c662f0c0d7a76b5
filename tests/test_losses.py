"""losses.py against the numbers of the CUT fact sheet, the loss's invariants, and autograd through full logits."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses  # noqa: E402

torch.set_num_threads(1)
F64 = torch.float64


def logp(*p):
    return torch.tensor(p, dtype=F64).log()


def lengths(*n):
    return torch.tensor(n, dtype=torch.long)


def logits_of(p, V=5, target=0):
    """Probabilities of the target -> logits (N, V) that are log probabilities, the rest of the mass spread evenly."""
    p = torch.tensor(p, dtype=F64).unsqueeze(1)
    rest = (1 - p) / (V - 1)
    return torch.cat([rest[:, :target].expand(-1, target), p, rest.expand(-1, V - 1 - target)], 1).log()


def through_logits(p):
    """Leaf logits with the given target probabilities, and the logp that autograd sees."""
    leaf = logits_of(p).requires_grad_(True)
    return leaf, losses.plain_logp(leaf, torch.zeros(len(p), dtype=torch.long))


def near(value, expected, atol=6e-7):
    np.testing.assert_allclose(torch.as_tensor(value).detach().numpy(), expected, rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# The fact sheet's vectors (section 9)

V1_N, V1_M = (.82, .94, .76, .99, .02, .89), (.03, .94, .93, .99, .03, .85)
V2_N, V2_M = (.9, .6, .5, .8), (.3, .5, .48, .8)
V3_P, V3_N, V3_M = (.7, .9), (.6, .4, .9), (.2, .5, .9)
V4_N, V4_M = (.5,), (.25,)


def test_v1_tokens_and_detection():
    """A detector that flags equal or merely likelier tokens, or a per-token loss with a wrong sign or branch."""
    N, M = logp(*V1_N), logp(*V1_M)
    near((N - M).exp(), [27.3333, 1, .8172, 1, .6667, 1.0471], 5e-5)
    flagged = losses.detect(N, M, 1.1)
    assert flagged.tolist() == [True] + [False] * 5
    l2 = [.198451, .061875, .274437, .010050, 3.912023, .116534]
    near(-N, l2)
    near(-N.mean(), .762228)
    l1 = [.030459, .061875, .072571, .010050, 3.506558, .162519]
    near(losses.cut_l1(N, M, flagged, 1.0), l1)
    near(losses.cut_l1(N, M, flagged, 1.0, 1.0), [.024977] + l1[1:])
    near(losses.cut_token_loss(N, M, flagged, 1.0), np.add(l1, l2), 1.2e-6)


@pytest.mark.parametrize("alpha, gamma, l1, paper, released", [
    (1.0, 0.0, .640672, 1.402900, .701450), (1.0, 1.0, .639758, 1.401987, None),
    (0.5, 0.0, .638134, 1.400362, .700181), (0.5, 1.0, .637677, 1.399905, None)])
def test_v1_loss(alpha, gamma, l1, paper, released):
    """A wrong weight alpha * p^gamma, a wrong mean, or a missing half in either form."""
    N, M = logp(*V1_N), logp(*V1_M)
    near(losses.cut_l1(N, M, losses.detect(N, M, 1.1), alpha, gamma).mean(), l1)
    near(losses.cut_loss(N, M, lengths(6), alpha=alpha, gamma=gamma), paper)
    if released is not None:
        near(losses.cut_loss(N, M, lengths(6), alpha=alpha, form="released"), released)
    else:
        with pytest.raises(ValueError, match="gamma"):
            losses.cut_loss(N, M, lengths(6), alpha=alpha, gamma=gamma, form="released")


def test_v1_gradient():
    """A gradient that misses a branch, the released halving, or the sign of unlikelihood."""
    leaf_n, N = through_logits(V1_N)
    leaf_m, M = through_logits(V1_M)
    losses.cut_loss(N, M, lengths(6), form="released").backward()
    released_m = np.array([.002500, -.005000, -.005833, -.000833, -.080833, -.012500])
    released_n = np.array([-.015000, -.005000, -.020000, -.000833, -.081667, -.009167])
    near(leaf_m.grad[:, 0], released_m)
    near(leaf_n.grad[:, 0], released_n)
    leaf_n, N = through_logits(V1_N)
    leaf_m, M = through_logits(V1_M)
    losses.cut_loss(N, M, lengths(6)).backward()
    near(leaf_m.grad[:, 0], 2 * released_m, 1.2e-6)
    near(leaf_n.grad[:, 0], 2 * released_n, 1.2e-6)


V2 = [  # lambda, alpha, how many flagged, L1 for gamma 0, .5, 1, 2, paper sum for gamma 0 and 1, released
    (1.1, 1.0, 2, (.501734, .458098, .423502, .373888), (.884853, .806621), .442426),
    (1.1, 0.5, 2, (.370506, .348688, .331390, .306583), (.753625, .714509), .376813),
    (1.25, .5, 1, (.457149, .454861, .452691, .448678), (.840269, .835810), .420134),
    (1.03, .5, 3, (.268754, .222996, .188768, .143526), (.651874, .571887), .325937)]


@pytest.mark.parametrize("lam, alpha, flags, l1, paper, released", V2)
def test_v2_loss(lam, alpha, flags, l1, paper, released):
    """lambda, alpha or gamma that acts in the wrong place or not at all."""
    N, M = logp(*V2_N), logp(*V2_M)
    near((N - M).exp(), [3, 1.2, 1.041667, 1])
    near(-N.mean(), .383119)
    flagged = losses.detect(N, M, lam)
    assert flagged.tolist() == [i < flags for i in range(4)]
    for gamma, expected in zip((0.0, 0.5, 1.0, 2.0), l1):
        near(losses.cut_l1(N, M, flagged, alpha, gamma).mean(), expected)
    for gamma, expected in zip((0.0, 1.0), paper):
        near(losses.cut_loss(N, M, lengths(4), lam=lam, alpha=alpha, gamma=gamma), expected)
    near(losses.cut_loss(N, M, lengths(4), lam=lam, alpha=alpha, form="released"), released)


def test_v2_gradient_and_detached_weight():
    """p^gamma as a path for gradients, through which L1 pushes the judged branch down against L2."""
    leaf_n, N = through_logits(V2_N)
    leaf_m, M = through_logits(V2_M)
    losses.cut_l1(N, M, losses.detect(N, M, 1.1), 0.5, 1.0).mean().backward()
    near(leaf_m.grad[:, 0], [.03375, .0375, -.13, -.05])
    assert leaf_n.grad is None or not leaf_n.grad.any()


def cut3(form, gamma=0.0):
    """V3's three reductions need the batch as (bad, good)."""
    return losses.cut_loss(logp(*V3_N), logp(*V3_M), lengths(3), logp(*V3_P), lengths(2), form=form, gamma=gamma)


def test_v3_normalisation():
    """Pooling over tokens where the mean over examples is meant, or the reverse; halving a positives-only batch."""
    N, M, P = logp(*V3_N), logp(*V3_M), logp(*V3_P)
    none, no = logp(), lengths()
    flagged = losses.detect(N, M, 1.1)
    assert flagged.tolist() == [True, False, False]
    near(losses.cut_l1(N, M, flagged, 1.0), [.223144, .693147, .105361])
    near(losses.cut_l1(N, M, flagged, 1.0).mean(), .340550)
    near(losses.cut_l1(N, M, flagged, 1.0, 1.0).mean(), .310798)
    near(-N.mean(), .510826)
    near(-torch.cat([P, N]).mean(), .398902)
    near(cut3("released"), .369726)
    for form in ("paper", "released"):
        near(losses.cut_loss(none, none, no, P, lengths(2), form=form), .231018)
    alone = losses.cut_loss(N, M, lengths(3), form="released")
    near(alone, .425688)
    near((losses.cut_loss(none, none, no, P, lengths(2), form="released") + alone) / 2, .328353)
    near(cut3("paper"), .541197)
    near(cut3("paper", 1.0), .526321)


def test_v4_unequal_lengths():
    """Per-example means that mix the tokens of neighbours, or pool them in the paper's form."""
    N, M, n = logp(*V4_N, *V3_N), logp(*V4_M, *V3_M), lengths(1, 3)
    l1 = losses.cut_l1(N, M, losses.detect(N, M, 1.1), 1.0)
    near(losses.per_example_mean(l1, n), [.287682, .340550])
    near(losses.per_example_mean(-N, n), [.693147, .510826])
    near(losses.cut_loss(N, M, n, form="released"), .441870)
    near(losses.cut_loss(N, M, n), 2 * .458051, 1.2e-6)                     # the release halves, the paper does not
    ones = [losses.cut_loss(logp(*a), logp(*b), lengths(len(a)), form="released")
            for a, b in ((V4_N, V4_M), (V3_N, V3_M))]
    near(sum(ones) / 2, .458051)


def test_edges():
    """p = 0 and p = 1: a flag for 0/0, none for p/0, or NaN gradients from the branch that `where` did not pick."""
    leaf_n, N = through_logits((.5, .5))
    leaf_m, M = through_logits((0., .5))
    flagged = losses.detect(N, M, 1.1)
    assert flagged.tolist() == [True, False]
    near(losses.cut_l1(N, M, flagged, 1.0), [0, math.log(2)])
    loss = losses.cut_loss(N, M, lengths(2), form="released")
    near(loss, .519860)
    loss.backward()
    assert leaf_n.grad.isfinite().all() and leaf_m.grad.isfinite().all()
    zero = logp(0., .5)
    assert not losses.detect(zero, zero, 1.1).any()
    assert losses.cut_loss(zero, zero, lengths(2), form="released") == math.inf
    near(losses.cut_loss(logp(1., .5), logp(1., .5), lengths(2), form="released"), .346574)
    half = logp(.5, .5)
    assert not losses.detect(half, half, 1.0).any()                         # strict
    near(losses.cut_loss(half, half, lengths(2), lam=1.0, form="released"), .693147)


# ----------------------------------------------------------------------------------------------------------------------
# Invariants


def random_batch(seed, bad=(3, 1, 7), good=(4, 2)):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(sum(n), generator=g, dtype=F64).mul(.98).add(.01).log()
    return draw(bad), draw(bad), lengths(*bad), draw(good), lengths(*good)


@pytest.mark.parametrize("lam", [1.0, 1.1, 1e12])
def test_nothing_flagged_is_plain_cross_entropy(lam):
    """Flags where both passes agree, or with a lambda that nothing reaches: L1 must then be CE(y|x)."""
    N, M, n, _, _ = random_batch(0)
    N = M if lam < 1e6 else N
    flagged = losses.detect(N, M, lam)
    assert not flagged.any()
    assert torch.equal(losses.cut_l1(N, M, flagged, .7, .5), -M)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_alpha_zero_keeps_flagged_tokens_in_the_count(form):
    """Averaging over the unflagged tokens only once alpha is 0."""
    N, M, n = logp(*V2_N), logp(*V2_M), lengths(4)
    expected = (-M[2:].sum() - N.sum()) / 4                                 # tokens 0 and 1 are flagged and weigh 0
    near(losses.cut_loss(N, M, n, alpha=0.0, form=form), expected / (2 if form == "released" else 1), 1e-12)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_batch_order_changes_nothing(form):
    """Examples whose tokens leak into a neighbour's mean."""
    N, M, n, P, m = random_batch(1)
    bad, good = [0, 2, 1], [1, 0]
    order = lambda x, n, by: torch.cat([x.split(n.tolist())[i] for i in by])
    a = losses.cut_loss(N, M, n, P, m, form=form, alpha=.5)
    b = losses.cut_loss(order(N, n, bad), order(M, n, bad), n[bad], order(P, m, good), m[good], form=form, alpha=.5)
    near(a, b, 1e-12)


def test_positives_only_is_plain_cross_entropy():
    """A batch of good responses that is halved, or NaN for want of bad ones."""
    _, _, _, P, m = random_batch(2)
    none = logp()
    near(losses.cut_loss(none, none, lengths(), P, m, form="released"), -P.mean(), 1e-12)
    near(losses.cut_loss(none, none, lengths(), P, m), -(P[:4].mean() + P[4:].mean()) / 2, 1e-12)


@pytest.mark.parametrize("lam, alpha, gamma", [(1.1, 1.0, 0.0), (1.5, .5, 1.0)])
def test_gradient_is_that_of_a_fixed_mask_and_weight(lam, alpha, gamma):
    """A gradient through the mask or through p^gamma."""
    N, M, n, P, m = random_batch(3)
    N, M, P = (x.requires_grad_(True) for x in (N, M, P))
    got = torch.autograd.grad(losses.cut_loss(N, M, n, P, m, lam=lam, alpha=alpha, gamma=gamma), (N, M, P))
    per_token = 1 / (5 * n.repeat_interleave(n).double())                   # 5 examples
    p, flagged = M.detach().exp(), (N - M).detach() > math.log(lam)
    assert 0 < flagged.sum() < len(flagged)
    plain = torch.where(flagged, alpha * N.detach().exp() ** gamma * p / (1 - p), -torch.ones_like(p))
    for grad, expected in zip(got, (-per_token, per_token * plain, -1 / (5 * m.repeat_interleave(m).double()))):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_unflagged_certain_token_has_finite_gradients():
    """NaN from log(1 - p) at p = 1 on a token whose unlikelihood is not even wanted."""
    for dtype in (torch.float32, F64):
        N, M = (torch.tensor([0.0, -1.0, -3.0], dtype=dtype, requires_grad=True) for _ in range(2))
        for form in ("paper", "released"):
            grads = torch.autograd.grad(losses.cut_loss(N, M, lengths(3), form=form), (N, M))
            assert all(g.isfinite().all() for g in grads)


def test_cut_loss_refuses_what_it_cannot_mean():
    """A misspelt form or forgotten lengths that silently give another loss."""
    N, M, n, P, m = random_batch(4)
    with pytest.raises(ValueError, match="form"):
        losses.cut_loss(N, M, n, form="publised")
    with pytest.raises(ValueError, match="positive_lengths"):
        losses.cut_loss(N, M, n, P)


def test_detection_sums_add_up():
    """Log values that count unflagged tokens as flagged or the judged pass as the plain one."""
    N, M = logp(*V2_N), logp(*V2_M)
    sums = losses.detection_sums(N, M, losses.detect(N, M, 1.1))
    near(sums, [4, 2, math.log(3 * 1.2 * .5 / .48), -math.log(.7 * .5), -math.log(.48 * .8)], 1e-9)


def test_log1mexp():
    """Cancellation near 0 or far below it, and infinite or NaN gradients through either branch."""
    wide = torch.from_numpy(-np.logspace(-5.9, math.log10(700), 4000)).requires_grad_(True)
    x = wide.detach().numpy()
    value = losses.log1mexp(wide)
    np.testing.assert_allclose(value.detach(), np.log1p(-np.exp(x)), rtol=1e-9, atol=0)
    grad, = torch.autograd.grad(value.sum(), wide)
    np.testing.assert_allclose(grad, np.exp(x) / np.expm1(x), rtol=1e-9)
    narrow = torch.from_numpy(x).float().requires_grad_(True)
    value = losses.log1mexp(narrow)
    truth = narrow.detach().numpy().astype(np.float64)
    truth = np.where(truth > -.7, np.log(-np.expm1(truth)), np.log1p(-np.exp(truth)))
    keep = x > -80                                                          # below, the answer is subnormal in fp32
    np.testing.assert_allclose(value.detach()[keep], truth[keep], rtol=5e-7)
    for dtype in (torch.float32, F64):
        ends = torch.tensor([0, -1e-300, -1e-9, -1e-7, -1e-6, -math.log(2), -50, -1e4, -math.inf], dtype=dtype)
        ends.requires_grad_(True)
        value = losses.log1mexp(ends)
        grad, = torch.autograd.grad(value.sum(), ends)
        assert value.isfinite().all() and grad.isfinite().all() and (value <= 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# The fused head against autograd through full logits


def head_inputs(R, N, dtype=F64, D=7, V=23, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, N, D, generator=g, dtype=F64) * scale
    weight = torch.randn(V, D, generator=g, dtype=F64)
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (N,), generator=g)


def cut_token_loss(N, dtype, can_flag=True):
    """A token loss with weights, flags and (for R = 1) judged probabilities of its own, looked up by the slice."""
    g = torch.Generator().manual_seed(1)
    weight, flagged = torch.rand(N, generator=g, dtype=F64).to(dtype), (torch.rand(N, generator=g) < .5) & can_flag
    fixed = torch.rand(N, generator=g, dtype=F64).log().to(dtype)

    def token_loss(lp, s):
        judged, plain = (lp[0], lp[1]) if len(lp) == 2 else (fixed[s], lp[0])
        return weight[s] * losses.cut_token_loss(judged, plain, flagged[s], .7, .5)
    return token_loss


def plain_loss(hidden, weight, targets, token_loss):
    lp = losses.plain_logp(hidden @ weight.T, targets.expand(hidden.shape[:2]))
    return token_loss(lp, slice(0, len(targets))).sum(), lp


def with_grads(form, hidden, weight, *args, scale=1.0):
    h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    loss, lp = form(h, w, *args)
    (loss * scale).backward()
    return loss.detach(), lp.detach(), h.grad, w.grad


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("N, tile", [(12, 4), (13, 4), (13, 1), (13, 13), (5, 64), (1, 1), (0, 4)])
def test_fused_loss_is_autograd_in_float64(R, N, tile):
    """A tile that is dropped, counted twice or paired with its neighbour's weights; a gradient not scaled by its
    upstream."""
    hidden, weight, targets = head_inputs(R, N)
    token_loss = cut_token_loss(N, F64)
    got = with_grads(losses.fused_loss, hidden, weight, targets, token_loss, tile, scale=-2.5)
    want = with_grads(plain_loss, hidden, weight, targets, token_loss, scale=-2.5)
    assert got[1].shape == (R, N)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N, tile", [(12, 4), (13, 4), (5, 64), (1, 1), (0, 4)])
def test_fused_logp_is_autograd_in_float64(N, tile):
    """A backward pass whose tiles differ from those of the forward pass."""
    hidden, weight, targets = head_inputs(1, N)
    mix = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=F64)
    joint = lambda lp: ((lp * mix).sum() ** 2 + lp.sum(), lp)               # tokens interact
    got = with_grads(lambda h, w: joint(losses.fused_logp(h, w, targets, tile)), hidden[0], weight)
    want = with_grads(lambda h, w: joint(losses.plain_logp(h @ w.T, targets)), hidden[0], weight)
    assert got[1].shape == (N,)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("R", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 3.0, 15.0, 60.0])
def test_fused_in_fp32_is_as_exact_as_full_logits(R, scale):
    """Tiling that loses digits (in the log-sum-exp of large logits, say): its fp32 error must be the plain form's."""
    N, D, V = 300, 32, 500
    hidden, weight, targets = head_inputs(R, N, torch.float32, D, V, scale / D ** .5)
    likeliest = (hidden[-1] @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, likeliest, targets)     # half of the tokens are confident ones
    truth = losses.plain_logp(hidden.double() @ weight.double().T, targets.expand(R, N))
    can_flag = truth[-1] < -math.log(1.1)                                   # p < 1 / lambda
    f32, f64 = cut_token_loss(N, torch.float32, can_flag), cut_token_loss(N, F64, can_flag)
    truth = with_grads(plain_loss, hidden.double(), weight.double(), targets, f64)
    fused = with_grads(losses.fused_loss, hidden, weight, targets, f32, 64)
    plain = with_grads(plain_loss, hidden, weight, targets, f32)
    for name, t, a, b in zip(("loss", "logp", "hidden", "weight"), truth, fused, plain):
        allowed = 1.5 * rms(b - t) + 2e-7 * rms(t)                          # the loss is one number: luck needs room
        assert rms(a - t) <= allowed, f"{name}: {rms(a - t):.2e}, full logits {rms(b - t):.2e}"
    lp = losses.fused_logp(hidden[0], weight, targets, 64)
    sure = truth[1][0] > -.01                                               # where 1 - p is small, its digits count
    for rows in (slice(None), sure):
        if len(lp[rows]):
            t, b = truth[1][0][rows], plain[1][0][rows]
            assert rms(lp[rows] - t) <= 1.5 * rms(b - t) + 1e-8


@pytest.mark.parametrize("R", [1, 2])
def test_fused_in_bf16_computes_in_fp32(R):
    """Logits rounded to bf16, whose steps are wider than CUT's ln(1.1)."""
    N, D, V = 100, 32, 200
    hidden, weight, targets = head_inputs(R, N, torch.bfloat16, D, V, 1.5)
    f32, f64 = cut_token_loss(N, torch.float32), cut_token_loss(N, F64)
    truth = with_grads(plain_loss, hidden.double(), weight.double(), targets, f64)
    got = with_grads(losses.fused_loss, hidden, weight, targets, f32, 32)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[2].dtype == got[3].dtype == torch.bfloat16
    for a, t, rtol in zip(got, truth, (1e-5, 1e-5, 2 ** -8, 2 ** -8)):      # gradients are stored in bf16
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), t, rtol=rtol, atol=rtol * rms(t) * .02 + 1e-5 * rms(t))
    lp = with_grads(lambda h, w: (lambda x: (x.sum(), x))(losses.fused_logp(h, w, targets, 32)), hidden[0], weight)
    torch.testing.assert_close(lp[1].double(), truth[1][0], rtol=1e-5, atol=1e-5)
    assert lp[2].isfinite().all() and lp[3].isfinite().all()


def test_fused_with_a_frozen_head_or_frozen_hidden():
    """A frozen head that crashes, gets a gradient, or changes the gradient of the hidden states."""
    hidden, weight, targets = head_inputs(1, 9)
    token_loss = cut_token_loss(9, F64)
    want = with_grads(plain_loss, hidden, weight, targets, token_loss)
    h = hidden.clone().requires_grad_(True)
    losses.fused_loss(h, weight, targets, token_loss, 4)[0].backward()
    torch.testing.assert_close(h.grad, want[2], rtol=1e-9, atol=1e-9)
    w = weight.clone().requires_grad_(True)
    losses.fused_loss(hidden, w, targets, token_loss, 4)[0].backward()
    torch.testing.assert_close(w.grad, want[3], rtol=1e-9, atol=1e-9)
    h = hidden[0].clone().requires_grad_(True)
    losses.fused_logp(h, weight, targets, 4).sum().backward()
    assert weight.grad is None and h.grad.abs().sum() > 0
    with torch.no_grad():                                                   # evaluation
        loss, lp = losses.fused_loss(hidden, weight, targets, token_loss, 4)
    torch.testing.assert_close(loss, want[0], rtol=1e-9, atol=1e-9)
    assert not lp.requires_grad


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def test_fused_never_holds_all_logits():
    """The (tokens, vocabulary) matrix creeping back in, forward or backward."""
    R, N, D, V, tile = 2, 200, 8, 64, 16
    hidden, weight, targets = head_inputs(R, N, torch.float32, D, V)
    token_loss = cut_token_loss(N, torch.float32)
    bound = max(R * tile * V, V * D, R * N * D)
    assert bound < N * V
    with Largest() as mode:
        with_grads(losses.fused_loss, hidden, weight, targets, token_loss, tile)
    assert 0 < mode.numel <= bound
    with Largest() as mode:
        with_grads(lambda h, w: (losses.fused_logp(h, w, targets, tile).sum(), targets), hidden[0], weight)
    assert 0 < mode.numel <= bound
    with Largest() as mode:                                                 # the recorder does see the plain form's
        with_grads(plain_loss, hidden, weight, targets, token_loss)
    assert mode.numel >= R * N * V


# ----------------------------------------------------------------------------------------------------------------------
# Reward model


def test_reward_loss():
    """A swapped preference, a sum in place of the mean, or an overflow for confident pairs."""
    r1, r0 = torch.tensor([1.2, .4, -.5], dtype=F64), torch.tensor([.2, 1.0, -.5], dtype=F64)
    first = torch.tensor([True, False, True])
    chosen, rejected = torch.where(first, r1, r0), torch.where(first, r0, r1)
    near(losses.reward_loss(chosen, rejected), .481299)
    near(losses.reward_loss(torch.tensor([1e4, 0.]), torch.tensor([0., 1e4])), 5000.0)
