"""Every formula of the repository, as pure functions of log-probabilities.

Nearly every loss here is a few lines on top of one quantity: logp, the log-probability that the model gives to each
token of a response.

  NLL          -log p(y_t)                                             train_sft.py
  CUT          NLL, or unlikelihood -log(1 - p(y_t)) where flagged     train_cut.py
  SDPO         divergence from the model that has read the feedback    train_cut.py
  reward, DPO  -log sigmoid(reward of chosen - reward of rejected)     train_ppo.py (RLP-UML adds a term)
  PPO          clipped ratio exp(logp - old_logp) times advantage      train_ppo.py
  Quark        NLL + KL penalty - entropy bonus                        train_ppo.py

The last section computes logp from hidden states without ever holding the (tokens, vocabulary) matrix of logits.

Shapes: B responses, T tokens of the longest one, N response tokens of a batch, R passes (forward passes over the same
response after different prompts), D width, V vocabulary. Losses are in nats.
"""
import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint


def plain_logp(logits, targets):
    """Log-probability of each target from full logits: logits (..., V), targets (...) -> logp (...).

    This is the definition; the fused head at the end of the file is tested against it. log_softmax rather than
    log(softmax), which is -inf as soon as a probability underflows.
    """
    return of_targets(torch.log_softmax(logits, dim=-1), targets)


def of_targets(values, targets):
    """The value of each target: values (..., V), targets (...) -> (...)."""
    return values.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def nll_token_loss(logp, weight=1.0):
    """Weighted negative log-likelihood of each token: logp (1, n), weight (n,) or 1 -> (n,)."""
    return -weight * logp[0]


def per_example_sum(values, lengths):
    """Sum over each response: values (N,) of consecutive responses with `lengths` (B,) tokens each -> (B,)."""
    numbers = torch.arange(len(lengths), device=values.device)
    example = numbers.repeat_interleave(lengths)                           # (N,), the response of each token
    return values.new_zeros(len(lengths)).index_add(0, example, values)


def per_example_mean(values, lengths):
    """Mean over each response: values (N,), lengths (B,) -> (B,)."""
    return per_example_sum(values, lengths) / lengths


# ----------------------------------------------------------------------------------------------------------------------
# CUT (arXiv 2312.14591)


def detect(logp_judged, logp_plain, lam):
    """CUT's detector (Eq. 5): a token is flagged when p(y|x, j-) - lam * p(y|x) > 0, strictly.

    Both (N,) -> bool (N,). Computed in log space: the judgment made the token more than lam times as likely. No
    gradient flows through the choice. 0/0 is not flagged (NaN compares false), p/0 is.
    """
    return (logp_judged - logp_plain).detach() > math.log(lam)


def log1mexp(x):
    """log(1 - exp(x)) for x <= 0, accurate at both ends: through expm1 near 0, through log1p far below it.

    The value is clamped at x = -1e-6 (p = 0.999999), beyond which it runs to -inf. The gradient is not cut off there,
    it stays at its size at -1e-6: a token of which the model is certain is the one that unlikelihood has to move.
    """
    x = torch.where(x > -1e-6, x - x.detach() - 1e-6, x)
    near = x > -math.log(2)
    # `where` differentiates both branches, so each one gets an argument at which its derivative is finite.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


def unlikelihood(logp):
    """Unlikelihood loss of each token, -log(1 - p): logp (...) -> (...)."""
    return -log1mexp(logp)


def cut_l1(logp_judged, logp_plain, flagged, alpha, gamma=0.0):
    """CUT's first term (Eq. 6) for each token of a bad response, under the plain prompt x:

        -log p(y|x)                                 where not flagged
        -alpha p(y|x, j-)^gamma log(1 - p(y|x))     where flagged

    All (N,) -> (N,). gamma 0 is the released code's weight. The weight p^gamma is a constant, not a path for gradients:
    through it, L1 would push p(y|x, j-) down, against L2.
    """
    weight = alpha
    if gamma:
        weight = alpha * torch.exp(gamma * logp_judged.detach())
    return torch.where(flagged, weight * unlikelihood(logp_plain), -logp_plain)


def cut_token_loss(logp_judged, logp_plain, flagged, alpha, gamma=0.0):
    """L1 + L2 for each token of a bad response (Eq. 7), where L2 = -log p(y|x, j-). All (N,) -> (N,)."""
    return cut_l1(logp_judged, logp_plain, flagged, alpha, gamma) - logp_judged


def find_flagged(logp, lam, flagged=None, old_logp=None):
    """The flagged tokens: those given (frozen detection), else by the model as it is now (live). logp (2, n) -> (n,)"""
    return detect(logp[0], logp[1], lam) if flagged is None else flagged


def cut_step_loss(logp, weight, flagged=None, old_logp=None, *, lam, alpha, gamma):
    """Weighted CUT loss of each token, as training needs it: logp (2, n), after (x, j-) and after x; weight, flagged
    (n,) -> (n,). With weight 1 / (examples * tokens of the response) its sum is cut_loss. (old_logp: of SDPO.)"""
    judged, plain = logp
    return weight * cut_token_loss(judged, plain, find_flagged(logp, lam, flagged), alpha, gamma)


def cut_loss(logp_judged, logp_plain, lengths, logp_positive=None, positive_lengths=None, *,
             lam=1.1, alpha=1.0, gamma=0.0, form="paper"):
    """The CUT loss of a batch: bad responses in two passes, good ones (Align-P) in one.

    logp_judged, logp_plain (N,): tokens of the bad responses, EOS included, after (x, j-) and after x alone.
    lengths (B,): number of tokens of each bad response. logp_positive (P,), positive_lengths: the good responses.

    form "paper": L1 + L2 as means over each response's own tokens, then the mean over all examples (Eq. 5 to 7).
    form "released": the value of the published code (its gamma is 0). Cross-entropy is pooled over the tokens of
    Align-P and Align-N; L1, pooled over the tokens of the bad responses, is added and the sum is halved if there is
    any. At one example a micro-batch, a good response then weighs twice as much against a bad one as in the paper.
    """
    if form not in ("paper", "released"):
        raise ValueError(f"form is {form!r}: use 'paper' or 'released'")
    if form == "released" and gamma:
        raise ValueError(f"the released form has no gamma, got {gamma}: use gamma=0 or form='paper'")
    if logp_positive is None:
        logp_positive = logp_judged.new_zeros(0)
    flagged = detect(logp_judged, logp_plain, lam)
    l1 = cut_l1(logp_judged, logp_plain, flagged, alpha, gamma)            # (N,)
    if form == "released":
        cross_entropy = -torch.cat([logp_positive, logp_judged]).mean()
        return (cross_entropy + l1.mean()) / 2 if len(logp_judged) else cross_entropy

    if len(logp_positive) and positive_lengths is None:
        raise ValueError("logp_positive needs positive_lengths, the number of tokens of each good response")
    examples = per_example_mean(l1 - logp_judged, lengths)                 # (B,)
    if len(logp_positive):
        good = per_example_mean(-logp_positive, positive_lengths)
        examples = torch.cat([examples, good])
    return examples.mean()


def detection_sums(logp_judged, logp_plain, flagged):
    """What a CUT step logs, as sums over tokens: their number, those flagged, the log-ratio, the unlikelihood of the
    flagged ones and the NLL of the others (both unweighted, under the plain prompt)."""
    zero = torch.zeros_like(logp_plain)
    return {
        "tokens": len(logp_plain),
        "flagged": flagged.sum(),
        "log_ratio": (logp_judged - logp_plain).sum(),
        "flagged_loss": torch.where(flagged, unlikelihood(logp_plain), zero).sum(),
        "unflagged_loss": torch.where(flagged, zero, -logp_plain).sum(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# SDPO, self-distillation (arXiv 2601.20802): the student reads x, its teacher x and the feedback; both score the same
# response y, the targets (n,). student, teacher (n, V): their log-probabilities over the vocabulary.


def kl_divergence(p, q):
    """KL(p || q) of log-probabilities: (n, V), (n, V) -> (n,)."""
    return (p.exp() * (p - q)).sum(-1)


def sdpo_token_loss(student, teacher, targets, form):
    """SDPO's loss of each token -> (n,), without gradient through the teacher:

    forward  KL(teacher || student)
    reverse  KL(student || teacher): seeks the teacher's mode
    jsd      Jensen-Shannon divergence: the mean KL of the two to their mean
    sampled  -A log p(y), where the advantage A = log p_teacher(y) - log p(y) is a constant. In expectation over the
             student's samples its gradient is that of `reverse`; its value means nothing
    """
    teacher = teacher.detach()
    if form == "forward":
        return kl_divergence(teacher, student)
    if form == "reverse":
        return kl_divergence(student, teacher)
    if form == "jsd":
        mean = torch.logaddexp(student, teacher) - math.log(2)
        return (kl_divergence(student, mean) + kl_divergence(teacher, mean)) / 2
    advantage = of_targets(teacher - student, targets).detach()
    return -advantage * of_targets(student, targets)


def sdpo_step_loss(student, teacher, targets, weight, flagged, old_logp, *, form, alpha):
    """Weighted SDPO loss of each token, as training needs it, and log p(y) of teacher and student for logging: three
    (n,). weight, flagged (not used), old_logp (n,). The importance ratio p / p_old, of the student to the policy that
    has sampled the responses, is truncated at 2 and a constant."""
    logp = of_targets(student, targets)
    ratio = (logp - old_logp).detach().clamp(-20, math.log(2)).exp()
    loss = alpha * weight * ratio * sdpo_token_loss(student, teacher, targets, form)
    return loss, of_targets(teacher, targets), logp


# ----------------------------------------------------------------------------------------------------------------------
# Preference pairs: the reward model (AlpacaFarm, arXiv 2305.14387) and DPO (arXiv 2305.18290)


def reward_loss(chosen, rejected):
    """Bradley-Terry loss, -log sigmoid(r_chosen - r_rejected), mean over pairs: rewards (B,), (B,) -> scalar."""
    return F.softplus(rejected - chosen).mean()


def implicit_reward(logp, ref_logp, beta):
    """The reward that a policy implies (DPO, Eq. 5): beta * log(p(y|x) / p_ref(y|x)), up to a constant of x.

    logp, ref_logp (B,): log-probabilities of whole responses, *summed* over their tokens, EOS included -> (B,).
    """
    return beta * (logp - ref_logp)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO (Eq. 7) of each pair: the Bradley-Terry loss of implicit rewards. All (B,) -> (B,). It starts at ln 2."""
    margin = implicit_reward(chosen, ref_chosen, beta) - implicit_reward(rejected, ref_rejected, beta)
    return F.softplus(-margin)


# ----------------------------------------------------------------------------------------------------------------------
# RLP-UML (arXiv 2403.19279): reward loss + lambda L_M, where L_M = -I(z_1; z_2) + SKL(p(z|v_1) || p(z|v_2)). The views
# v_1, v_2 are two responses to one instruction; the code z of a view is drawn from Normal(mean, std^2), all (B, Z)


def mutual_information(together, apart):
    """Jensen-Shannon estimate of I (arXiv 1808.06670, Eq. 4), a training signal, not a number of nats: -softplus(-T) -
    softplus(T') <= 0. T, T' (B,) are a discriminator's logits of two codes of one instruction and of different ones ->
    (B,). Its mean is -2 ln 2 = -1.386 if the discriminator knows nothing, 0 if it tells them apart for sure."""
    return -F.softplus(-together) - F.softplus(apart)


def symmetric_kl(mean_1, std_1, mean_2, std_2):
    """SKL, the mean of KL(p_1 || p_2) and KL(p_2 || p_1) -> (B,): over dimensions the sum of
    [s_1^2 / s_2^2 + s_2^2 / s_1^2 - 2 + (m_1 - m_2)^2 (1 / s_1^2 + 1 / s_2^2)] / 4."""
    spread = (std_1 / std_2 - std_2 / std_1) ** 2                          # as a square, rounding leaves it >= 0
    shift = (mean_1 - mean_2) ** 2 * (std_1 ** -2 + std_2 ** -2)
    return (spread + shift).sum(-1) / 4


# ----------------------------------------------------------------------------------------------------------------------
# PPO, in the order of its step (arXiv 1707.06347; as AlpacaFarm ran it)
#
# All (B, T): row b is response b, column t its token t. `mask` is 1 on sampled tokens and 0 behind them. AlpacaFarm's
# released code has no mask: its means and its whitening run over all T columns, padding included. Without a mask the
# functions below do the same, to the digit.


def masked_mean(x, mask=None):
    """Mean of x over the positions where mask is 1 (over all of them without a mask)."""
    if mask is None:
        return x.mean()
    return (x * mask).sum() / mask.sum()


def kl_estimate(logp, ref_logp, kind):
    """Single-sample estimate of KL(policy || reference) at each token, with d = logp - ref_logp. Elementwise.

    k1       d: unbiased, but noisy and of either sign
    k2       d^2 / 2: biased, low variance
    k3       exp(-d) - 1 + d: unbiased and never negative
    clamped  max(d, 0): the released code's; biased upwards, as it grows with |d| where KL grows with d^2
    """
    d = logp - ref_logp
    if kind == "k1":
        return d
    if kind == "k2":
        return d * d / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    if kind == "clamped":
        return d.clamp(min=0)
    raise ValueError(f"kind is {kind!r}: use k1, k2, k3 or clamped")


def shape_rewards(score, kl, last, beta):
    """Reward of each token: -beta * KL, plus the response's score at its last token.

    score (B,), kl (B, T), last (B,) the column of each response's last token -> (B, T).
    """
    rewards = -beta * kl
    rows = torch.arange(len(score), device=score.device)
    rewards[rows, last] += score
    return rewards


def whiten(x, mask=None, shift_mean=True):
    """Whitening: (x - mean) / (std + 1e-8), with the population's standard deviation; 0 outside of the mask.

    shift_mean=False adds the mean back. Without mask and shift, zeros do not stay 0: they become mean * (1 - 1 / std).
    """
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    white = (x - mean) / (std + 1e-8)
    if not shift_mean:
        white = white + mean
    return white if mask is None else white * mask


def gae(rewards, values, gamma, lam):
    """Generalized advantage estimation: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}.

    Both (B, T) -> advantages, returns (B, T), where return = advantage + value. values[:, t] is the value *before*
    token t is chosen; both inputs are 0 behind a response's end. At gamma = lam = 1, A_t is the sum of the rewards
    still to come, minus V_t.
    """
    B, T = rewards.shape
    advantages = torch.zeros_like(rewards)
    advantage = next_value = rewards.new_zeros(B)                          # behind the last column
    for t in reversed(range(T)):
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def ppo_policy_loss(logp, old_logp, advantages, clip):
    """PPO's clipped policy loss of each token: max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)). Elementwise.

    ratio = exp(logp - old_logp). There is no gradient where the ratio has already left the interval in the direction
    that A rewards.
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def ppo_value_loss(values, old_values, returns, clip):
    """PPO's clipped value loss of each token: half the larger of (V - R)^2 and (V' - R)^2. Elementwise.

    V' is V clamped to within `clip` of the value at the time of the rollout.
    """
    clipped = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values, returns, mask=None):
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for one that predicts a constant."""
    error = returns - values
    error = error - masked_mean(error, mask)
    centered = returns - masked_mean(returns, mask)
    variance = masked_mean(centered ** 2, mask).clamp(min=1e-12)
    return 1 - masked_mean(error ** 2, mask) / variance


def next_beta(beta, kl, target):
    """Adaptive KL controller: beta grows by up to 2 % a step while a response's KL (summed over its tokens) is above
    the target, and shrinks by as much below it."""
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + 0.1 * error)


# ----------------------------------------------------------------------------------------------------------------------
# Quark (arXiv 2205.13636, as adapted in AlpacaFarm)


def quantiles(rewards, count):
    """Sorts responses by reward, best first (ties keep their order), into `count` groups of equal size.

    rewards (B,) -> `count` lists of indices. The remainder goes to the last group; of fewer responses than groups,
    each is a group of its own.
    """
    order = torch.argsort(rewards, descending=True, stable=True).tolist()
    size = max(1, len(order) // count)
    groups = [order[i * size:(i + 1) * size] for i in range(count - 1)]
    return [*groups, order[(count - 1) * size:]]


def quark_token_loss(logp, kl, entropy, kl_coef, entropy_coef):
    """Quark's loss of each token: -log p(y_t) + kl_coef KL(p || p_ref) - entropy_coef H(p). Elementwise."""
    return -logp + kl_coef * kl - entropy_coef * entropy


def quark_terms(logp, ref_logp, targets):
    """log p(target), KL(p || p_ref) and the entropy of p: logp, ref_logp (n, V), targets (n,) -> three (n,)."""
    p = logp.exp()
    return of_targets(logp, targets), (p * (logp - ref_logp)).sum(-1), -(p * logp).sum(-1)


def full_vocabulary(hidden, weight, ref_hidden, ref_weight, targets, terms=quark_terms, per_token=(), tile=256):
    """terms(logp (n, V), ref_logp (n, V), targets (n,), *per_token) of all tokens, for sums over the whole vocabulary.

    hidden, ref_hidden (N, D), weight, ref_weight (V, D), targets and per_token (N,) -> tensors (N,), with gradient
    through hidden and weight. Full logits are needed here: they are made one tile of tokens at a time, and again in the
    backward pass.
    """
    def one_tile(hidden, ref_hidden, *per_token):
        logp = torch.log_softmax(_fp32(hidden) @ _fp32(weight).T, dim=-1)             # (n, V)
        ref_logp = torch.log_softmax(_fp32(ref_hidden) @ _fp32(ref_weight).T, dim=-1)
        return terms(logp, ref_logp, *per_token)

    tiles = []
    for i in range(0, len(targets), tile):
        rows = [x[i:i + tile] for x in (hidden, ref_hidden, targets, *per_token)]
        tiles.append(torch.utils.checkpoint.checkpoint(one_tile, *rows, use_reentrant=False))
    return tuple(torch.cat(column) for column in zip(*tiles))


# ----------------------------------------------------------------------------------------------------------------------
# The fused head (you may skip this): hidden states x head weight -> logp, one tile of tokens at a time
#
# For a vocabulary of 32,000, logits take more memory than the rest of the step. Both functions below hold those of 256
# tokens at most. d logp / d logits = 1[target] - softmax, so the gradient is two more matmuls for each tile.


def fused_logp(hidden, weight, targets, tile=256):
    """Log-probability of each target without full logits: hidden (N, D), weight (V, D), targets (N,) -> logp (N,).

    For losses in which tokens interact, such as the sum over a response in DPO.
    """
    return _FusedLogp.apply(hidden.unsqueeze(0), weight, targets, tile).squeeze(0)


def fused_loss(hidden, weight, targets, token_loss, per_token=(), tile=256):
    """Sum over tokens of token_loss(logp), with its gradient formed tile by tile in the forward pass.

    hidden (R, N, D): R passes over the same N tokens, side by side (CUT: after (x, j-) and after x; otherwise R = 1).
    weight (V, D); targets (N,). token_loss(logp (R, n), *per_token) -> (n,), a function of each token's own logp;
    per_token are further tensors (N,), of which it gets the n entries of its tile: weights, flags, advantages.
    Returns the scalar loss, which may be back-propagated once, and logp (R, N) for logging, without gradient.
    """
    return _FusedLoss.apply(hidden, weight, targets, token_loss, tuple(per_token), tile)


def _fp32(x):
    """Half-precision tensors in fp32, others unchanged. bf16 logits between 16 and 32 are 0.125 apart, but CUT's ratio
    test has to resolve ln(1.1) = 0.095."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _tile_softmax(hidden, weight, targets):
    """One tile: hidden (R, n, D), weight (V, D), targets (n,) -> softmax (R, n, V) and logp (R, n)."""
    logits = hidden @ weight.T                                             # (R, n, V), the only large tensor
    logits -= logits.amax(dim=-1, keepdim=True)      # first: a confident token's logp is a small difference
    target = of_targets(logits, targets.expand(logits.shape[:2]))          # (R, n)
    total = logits.exp_().sum(dim=-1, keepdim=True)                        # (R, n, 1)
    logp = target - total.log().squeeze(-1)
    return logits.div_(total), logp


def _tile_backward(softmax, targets, grad_logp, hidden, weight, grad_weight):
    """Gradient of sum(grad_logp * logp) for one tile; softmax is overwritten by d/dlogits = grad_logp (1[target] - p).

    Returns d/dhidden (R, n, D); adds d/dweight to grad_weight (V, D) unless that is None (a frozen head).
    """
    grad_logits = softmax.mul_(-grad_logp.unsqueeze(-1))
    index = targets.expand(grad_logp.shape).unsqueeze(-1)
    grad_logits.scatter_add_(-1, index, grad_logp.unsqueeze(-1))
    if grad_weight is not None:
        grad_weight.addmm_(grad_logits.flatten(0, 1).T, hidden.flatten(0, 1))
    return grad_logits @ weight


class _FusedLogp(torch.autograd.Function):
    """The backward pass computes each tile a second time, because d loss / d logp is known only then (4 matmuls)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, tile):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.tile = tile
        logp = _fp32(hidden.new_zeros(hidden.shape[:2]))                   # (R, N)
        with torch.autocast(hidden.device.type, enabled=False):
            w = _fp32(weight)
            for i in range(0, len(targets), tile):
                s = slice(i, i + tile)
                logp[:, s] = _tile_softmax(_fp32(hidden[:, s]), w, targets[s])[1]
        return logp

    @staticmethod
    def backward(ctx, grad_logp):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        with torch.autocast(hidden.device.type, enabled=False):
            w = _fp32(weight)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(w)
            for i in range(0, len(targets), ctx.tile):
                s = slice(i, i + ctx.tile)
                h = _fp32(hidden[:, s])
                softmax, _ = _tile_softmax(h, w, targets[s])
                grad_hidden[:, s] = _tile_backward(
                    softmax, targets[s], grad_logp[:, s], h, w, grad_weight)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


class _FusedLoss(torch.autograd.Function):
    """The gradient is formed in the forward pass while a tile is at hand, so each tile is computed once (3 matmuls)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, per_token, tile):
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        all_logp = _fp32(hidden.new_zeros(hidden.shape[:2]))               # (R, N)
        with torch.autocast(hidden.device.type, enabled=False):
            w = _fp32(weight)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.zeros_like(w)
            loss = w.new_zeros(())
            for i in range(0, len(targets), tile):
                s = slice(i, i + tile)
                h = _fp32(hidden[:, s])
                softmax, logp = _tile_softmax(h, w, targets[s])
                with torch.enable_grad():              # autograd sees R x n numbers, never the logits
                    logp.requires_grad_(True)
                    value = token_loss(logp, *[x[s] for x in per_token]).sum()
                    grad_logp, = torch.autograd.grad(value, logp)
                loss += value.detach()
                all_logp[:, s] = logp.detach()
                grad_hidden[:, s] = _tile_backward(softmax, targets[s], grad_logp, h, w, grad_weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(all_logp)
        return loss, all_logp

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        grad_hidden = (grad_hidden * grad_loss).to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None
