"""Every formula of the repository, as pure functions of log-probabilities.

Almost every loss here (NLL, unlikelihood, CUT, DPO, PPO) is a few lines on top of one quantity: logp, the
log-probability that the model gives to each token of a response. This file first shows how to get logp from hidden
states without ever holding the (tokens, vocabulary) matrix of logits, then the formulas: CUT; reward model and DPO;
PPO in the order of its step (KL, rewards, whitening, advantages, the two losses); Quark.

Shapes: N response tokens, R branches (forward passes over the same tokens), D width, V vocabulary. Losses are in nats.
"""
import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The fused head: hidden states x head weight -> log-sum-exp and gather, one tile of tokens at a time


def plain_logp(logits, targets):
    """Per-token log-probability from full logits: the definition, and what the fused forms below are tested against.

    logits (..., V), targets (...) -> logp (...). log_softmax rather than log(softmax): the latter gives log(0) = -inf.
    """
    return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _full_precision(x):
    """Half-precision tensors in fp32, others as they are. bf16 logits between 16 and 32 are 0.125 apart, but CUT's
    ratio test has to resolve ln(1.1) = 0.095."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _tile_softmax(hidden, weight, targets):
    """One tile: hidden (R, n, D), weight (V, D), targets (n,) -> softmax (R, n, V) and logp (R, n)."""
    logits = hidden @ weight.T                                             # (R, n, V), the only large tensor there is
    logits -= logits.amax(dim=-1, keepdim=True)      # first, or a confident token's logp drowns in large equal numbers
    target = logits.gather(-1, targets.expand(logits.shape[:2]).unsqueeze(-1))      # (R, n, 1)
    total = logits.exp_().sum(dim=-1, keepdim=True)                        # (R, n, 1)
    return logits.div_(total), (target - total.log()).squeeze(-1)


def _tile_backward(softmax, targets, grad_logp, hidden, weight, grad_weight):
    """Gradient of sum(grad_logp * logp) for one tile. softmax is overwritten by d/dlogits = grad_logp (1[target] - p).

    Returns d/dhidden (R, n, D); adds d/dweight into grad_weight (V, D), unless that is None (a frozen head).
    """
    grad_logits = softmax.mul_(-grad_logp.unsqueeze(-1))
    index = targets.expand(grad_logp.shape).unsqueeze(-1)
    grad_logits.scatter_add_(-1, index, grad_logp.unsqueeze(-1))
    if grad_weight is not None:
        grad_weight.addmm_(grad_logits.flatten(0, 1).T, hidden.flatten(0, 1))
    return grad_logits @ weight


class _FusedLogp(torch.autograd.Function):
    """logp with a gradient, for losses in which tokens interact (a sequence's sum in DPO): backward computes the tiles
    a second time, because the derivative of the loss is known only then."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, tile):
        with torch.autocast(hidden.device.type, enabled=False):
            w = _full_precision(weight)
            parts = [_tile_softmax(_full_precision(hidden[:, i:i + tile]), w, targets[i:i + tile])[1]
                     for i in range(0, len(targets), tile)]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.tile = tile
        return torch.cat(parts, dim=1) if parts else _full_precision(hidden.new_zeros(hidden.shape[:2]))

    @staticmethod
    def backward(ctx, grad_logp):
        hidden, weight, targets = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            w = _full_precision(weight)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
            for i in range(0, len(targets), ctx.tile):
                h, t = _full_precision(hidden[:, i:i + ctx.tile]), targets[i:i + ctx.tile]
                softmax, _ = _tile_softmax(h, w, t)
                grad_hidden[:, i:i + ctx.tile] = _tile_backward(softmax, t, grad_logp[:, i:i + ctx.tile], h, w,
                                                                grad_weight)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


class _FusedLoss(torch.autograd.Function):
    """A loss that is a sum over tokens of a function of their own logp: its gradient is formed in the forward pass,
    while the tile is at hand, so that each tile is computed once (3 matrix products in place of _FusedLogp's 4)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, tile):
        with torch.autocast(hidden.device.type, enabled=False):
            w = _full_precision(weight)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
            loss, parts = w.new_zeros(()), []
            for i in range(0, len(targets), tile):
                s = slice(i, min(i + tile, len(targets)))
                h, t = _full_precision(hidden[:, s]), targets[s]
                softmax, logp = _tile_softmax(h, w, t)
                with torch.enable_grad():                    # autograd sees R x n numbers, never the logits
                    logp.requires_grad_(True)
                    value = token_loss(logp, s).sum()
                    grad_logp, = torch.autograd.grad(value, logp)
                loss += value.detach()
                parts.append(logp.detach())
                grad_hidden[:, s] = _tile_backward(softmax, t, grad_logp, h, w, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        logp = torch.cat(parts, dim=1) if parts else w.new_zeros(hidden.shape[:2])
        ctx.mark_non_differentiable(logp)
        return loss, logp

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return (grad_hidden * grad_loss).to(grad_hidden.dtype), grad_weight, None, None, None


def fused_logp(hidden, weight, targets, tile=256):
    """Per-token log-probability without full logits: hidden (N, D), weight (V, D), targets (N,) -> logp (N,)."""
    return _FusedLogp.apply(hidden.unsqueeze(0), weight, targets, tile).squeeze(0)


def fused_loss(hidden, weight, targets, token_loss, tile=256):
    """sum over tokens of token_loss(logp), with its gradient formed tile by tile in the forward pass.

    hidden (R, N, D): R passes over the same N tokens, side by side (CUT: with and without the judgment; else R = 1).
    weight (V, D); targets (N,); token_loss(logp (R, n), s) -> (n,), where the slice s says which n of the N tokens
    they are, so that it can look up weights or flags of its own.
    Returns the scalar loss and logp (R, N) for logging, without gradient. The loss may be back-propagated once.
    """
    return _FusedLoss.apply(hidden, weight, targets, token_loss, tile)


def nll_token_loss(logp, _):
    """Negative log-likelihood, for fused_loss: logp (1, n) -> (n,)."""
    return -logp[0]


# ----------------------------------------------------------------------------------------------------------------------
# CUT (arXiv 2312.14591)


def log1mexp(x):
    """log(1 - exp(x)) for x <= 0, to full relative precision at both ends: near 0 through expm1, far below through
    log1p. x is held below -1e-6 (p = 0.999999), where the value would run to -inf and its gradient to 0 * inf."""
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    # Both branches of a `where` are differentiated, so each gets an argument at which its derivative is finite.
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))),
                       torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def detect(logp_judged, logp_plain, lam):
    """CUT's detector (Eq. 5): a token is inappropriate when p(y|x, j-) - lam * p(y|x) > 0, strictly.

    Both (N,) -> bool (N,). In log space: the judgment made the token more than lam times as likely. 0/0 is not flagged
    (NaN compares false), p/0 is. No gradient flows through the choice."""
    return (logp_judged - logp_plain).detach() > math.log(lam)


def unlikelihood(logp):
    """-log(1 - p), the unlikelihood loss of each token: logp (...) -> (...)."""
    return -log1mexp(logp)


def cut_l1(logp_judged, logp_plain, flagged, alpha, gamma=0.0):
    """CUT's first term (Eq. 6) for each token of a bad response, under the plain prompt:
    -log p(y|x) where not flagged, and -alpha * p(y|x, j-)^gamma * log(1 - p(y|x)) where flagged.

    All (N,) -> (N,). gamma 0 is the released code's weight. The weight p^gamma is a number, not a path for gradients:
    through it, L1 would push p(y|x, j-) down against L2."""
    weight = alpha * torch.exp(gamma * logp_judged.detach()) if gamma else alpha
    return torch.where(flagged, weight * unlikelihood(logp_plain), -logp_plain)


def cut_token_loss(logp_judged, logp_plain, flagged, alpha, gamma=0.0):
    """L1 + L2 for each token of a bad response (Eq. 7), where L2 = -log p(y|x, j-). All (N,) -> (N,)."""
    return cut_l1(logp_judged, logp_plain, flagged, alpha, gamma) - logp_judged


def per_example_sum(values, lengths):
    """values (N,) of consecutive responses with `lengths` (B,) tokens each -> their sums (B,)."""
    example = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)    # (N,)
    return values.new_zeros(len(lengths)).index_add(0, example, values)


def per_example_mean(values, lengths):
    """values (N,) of consecutive responses with `lengths` (B,) tokens each -> their means (B,)."""
    return per_example_sum(values, lengths) / lengths


def cut_loss(logp_judged, logp_plain, lengths, logp_positive=None, positive_lengths=None, *,
             lam=1.1, alpha=1.0, gamma=0.0, form="paper"):
    """The CUT loss of a batch: bad responses in two passes, good ones (Align-P) in one.

    logp_judged, logp_plain (N,): the bad responses' tokens, EOS included, with prompt (x, j-) and with x alone.
    lengths (B,): how many of the N tokens each bad response has. logp_positive (P,), positive_lengths: the good ones.

    form "paper": L1 + L2 as means over each response's own tokens, then the mean over all examples (Eq. 5 to 7).
    form "released": the value of the published code (its gamma is 0): cross-entropy pooled over the tokens of Align-P
    and Align-N, plus L1 pooled over the tokens of the bad responses, halved if there is any. With one example a
    micro-batch this makes a good response weigh twice as much against a bad one as in the paper.
    """
    flagged = detect(logp_judged, logp_plain, lam)
    none = logp_judged.new_zeros(0)
    logp_positive = none if logp_positive is None else logp_positive
    l1 = cut_l1(logp_judged, logp_plain, flagged, alpha, gamma)
    if form == "released":
        if gamma:
            raise ValueError(f"the released form has no gamma, got {gamma}: use gamma=0 or form='paper'")
        cross_entropy = -torch.cat([logp_positive, logp_judged]).mean()
        return (cross_entropy + l1.mean()) / 2 if len(logp_judged) else cross_entropy
    if form != "paper":
        raise ValueError(f"form is {form!r}: use 'paper' or 'released'")
    if len(logp_positive) and positive_lengths is None:
        raise ValueError("logp_positive needs positive_lengths, the number of tokens of each good response")
    examples = per_example_mean(l1 - logp_judged, lengths)
    if len(logp_positive):
        examples = torch.cat([examples, per_example_mean(-logp_positive, positive_lengths)])
    return examples.mean()


def detection_sums(logp_judged, logp_plain, flagged):
    """What a CUT step logs, as sums that ranks can add: (5,) = tokens, flagged tokens, log-ratio over all tokens,
    unlikelihood over the flagged and NLL over the unflagged tokens (unweighted, under the plain prompt)."""
    zero = torch.zeros_like(logp_plain)
    return torch.stack([torch.ones_like(logp_plain).sum(), flagged.sum().to(logp_plain.dtype),
                        (logp_judged - logp_plain).sum(),
                        torch.where(flagged, unlikelihood(logp_plain), zero).sum(),
                        torch.where(flagged, zero, -logp_plain).sum()]).detach()


# ----------------------------------------------------------------------------------------------------------------------
# Preferences: the reward model (AlpacaFarm, arXiv 2305.14387) and DPO (arXiv 2305.18290)


def reward_loss(reward_chosen, reward_rejected):
    """Bradley-Terry: -log sigmoid(r_chosen - r_rejected), mean over pairs. Both (B,) -> scalar."""
    return F.softplus(reward_rejected - reward_chosen).mean()


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO of each pair: -log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected)]), all (B,) -> (B,).

    Each is the log-probability of a whole response: the *sum* over its tokens, EOS included, under the policy or the
    frozen reference. While the two are equal the loss is ln 2; the margin in brackets has to grow from there."""
    return F.softplus(-beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


# ----------------------------------------------------------------------------------------------------------------------
# PPO, in the order of its step (arXiv 1707.06347; as AlpacaFarm ran it)
#
# All (B, T): row b is response b, column t its token t. `mask` is 1 on the tokens that were sampled and 0 behind them.
# AlpacaFarm's released code has no mask: its means and its whitening run over all T columns, padding included. Without
# a mask the functions below do the same, to the digit (its arithmetic is a mode of train_ppo.py).


def masked_mean(x, mask=None):
    """Mean of x over the positions where mask is 1 (all of them without one)."""
    return x.mean() if mask is None else (x * mask).sum() / mask.sum()


def kl_estimate(logp, ref_logp, kind):
    """What one sampled token says of KL(policy || reference), with d = logp - ref_logp. Elementwise.

    k1       d: unbiased, but of either sign and noisy
    k2       d^2 / 2: biased, small variance
    k3       exp(-d) - 1 + d: unbiased and never negative
    clamped  max(d, 0): the released code's; biased upwards, so a policy equal to the reference on average pays too
    """
    d = logp - ref_logp
    if kind not in ("k1", "k2", "k3", "clamped"):
        raise ValueError(f"kind is {kind!r}: use k1, k2, k3 or clamped")
    return {"k1": lambda: d, "k2": lambda: d * d / 2, "k3": lambda: torch.expm1(-d) + d,
            "clamped": lambda: d.clamp(min=0)}[kind]()


def shape_rewards(score, kl, last, beta):
    """The reward of every token: -beta * KL at each, and the response's score at its last. score (B,), kl (B, T), last
    (B,): the column of each response's last token -> (B, T)."""
    rewards = -beta * kl
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def whiten(x, mask=None, shift_mean=True):
    """(x - mean) / (std + 1e-8), with the population's standard deviation; shift_mean=False adds the mean back. Zero
    outside of the mask. Without a mask and without a shift, zeros do not stay zero: they become mean * (1 - 1 / std).
    """
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    white = (x - mean) / (std + 1e-8) + (0.0 if shift_mean else mean)
    return white if mask is None else white * mask


def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}.

    Both (B, T), values[t] the value *before* token t is chosen; both zero behind the end -> advantages, returns (B, T),
    where return = advantage + value. At gamma = lam = 1, A_t is what is still to come minus V_t."""
    advantages, ahead = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(values[:, t])
        ahead = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * ahead
        advantages[:, t] = ahead
    return advantages, advantages + values


def ppo_policy_loss(logp, old_logp, advantages, clip):
    """PPO's clipped loss of each token: max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)) with ratio =
    exp(logp - old_logp). Elementwise. No gradient where the ratio has already left the interval in the direction that A
    rewards."""
    ratio = torch.exp(logp - old_logp)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def ppo_value_loss(values, old_values, returns, clip):
    """The critic's clipped loss of each token: half the larger of (V - R)^2 and (V' - R)^2, V' being V held in_range
    `clip` of the value at rollout. Elementwise."""
    held = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)


def explained_variance(values, returns, mask=None):
    """1 - Var(return - value) / Var(return): 1 is a perfect critic, 0 one that says the same everywhere."""
    rest, total = returns - values, returns - masked_mean(returns, mask)
    rest = rest - masked_mean(rest, mask)
    return 1 - masked_mean(rest ** 2, mask) / masked_mean(total ** 2, mask).clamp(min=1e-12)


def next_beta(beta, kl, target, rate=0.1):
    """The adaptive controller: beta grows by up to 2 % when the KL of a response (summed over its tokens) is above
    target, and shrinks as much below it."""
    return beta * (1 + rate * min(0.2, max(-0.2, kl / target - 1)))


# ----------------------------------------------------------------------------------------------------------------------
# Quark (arXiv 2205.13636, as adapted in AlpacaFarm)


def quantiles(rewards, count):
    """Sorts responses by reward, best first (ties in their order), into `count` groups of equal size, the remainder in
    the last; of fewer responses than groups each is one. rewards (B,) -> list of `count` lists of indices."""
    order = torch.argsort(rewards, descending=True, stable=True).tolist()
    size = max(1, len(order) // count)
    return [order[i * size:(i + 1) * size if i + 1 < count else None] for i in range(count)]


def full_vocabulary(hidden, weight, ref_hidden, ref_weight, targets, tile=256):
    """log p(target), KL(p || p_ref) and entropy of p at each of N tokens: hidden, ref_hidden (N, D), weight, ref_weight
    (V, D), targets (N,) -> three (N,), with gradient through hidden and weight. KL and entropy are sums over the whole
    vocabulary, so logits are needed in full: they are made a tile at a time, and again in the backward pass."""
    def one(h, w, rh, targets):
        logp = torch.log_softmax(_full_precision(h) @ _full_precision(w).T, dim=-1)         # (n, V)
        ref = torch.log_softmax(_full_precision(rh) @ _full_precision(ref_weight).T, dim=-1)
        p = logp.exp()
        return logp.gather(1, targets.unsqueeze(1)).squeeze(1), (p * (logp - ref)).sum(-1), -(p * logp).sum(-1)

    parts = [torch.utils.checkpoint.checkpoint(one, hidden[i:i + tile], weight, ref_hidden[i:i + tile],
                                               targets[i:i + tile], use_reentrant=False)
             for i in range(0, len(targets), tile)]
    return tuple(torch.cat(column) for column in zip(*parts))


def quark_token_loss(logp, kl, entropy, kl_coef, entropy_coef):
    """Quark's loss of each token: -log p(y_t) + kl_coef KL(p || p_ref) - entropy_coef H(p). Elementwise."""
    return -logp + kl_coef * kl - entropy_coef * entropy
