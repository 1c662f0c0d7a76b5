"""Learning from preferences: AlpacaFarm's numbers (sections 9.1 to 9.9 and 9.15 of its fact sheet), properties of the
formulas, the four stages of train_ppo.py in small, and the recipes that turn preferences into demonstrations."""
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data
import evaluate
import losses
import model
import simulate
import train_ppo
import train_sft
from conftest import (ROOT, Killed, assert_equal_runs, at_step, die, distance, finish, metrics, press_ctrl_c, torchrun,
                      without_time)
from data import InputError
from model import Config, LLaMA, RewardModel, load_adapter, lr_linear

LLAMA_TOKENIZER = ROOT.parent / "shared" / "data" / "llama" / "tokenizer.model"
F64 = torch.float64
CPU = torch.device("cpu")


def t(*rows):
    return torch.tensor(rows[0] if len(rows) == 1 else rows, dtype=F64)


def near(found, wanted, tolerance=1e-6):
    """Within one unit of the sheet's last digit (it rounds to six places)."""
    found, wanted = (torch.as_tensor(x, dtype=F64).detach() for x in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# The sheet's numbers

LOGP = t([-1, -2, -.5, 0], [-.7, -.3, -1.2, -.9])
REF_LOGP = t([-1.5, -1, -.5, 0], [-.9, -.3, -2.2, -.4])
KL = [[.5, 0, 0, 0], [.2, 0, 1.0, 0]]                                        # clamped
SHAPED = [[-.05, 0, .8, 0], [-.02, 0, -.1, -.4]]
WHITE = [[-.219306, -.061810, 2.458129, -.061810], [-.124809, -.061810, -.376803, -1.321780]]
VALUES = t([.1, .2, 0, -.1], [0, .3, .1, .2])
RETURNS = [[2.115201, 2.334508, 2.396318, -.061810], [-1.885201, -1.760393, -1.698582, -1.321780]]
ADVANTAGES = {      # lambda: (plain, whitened)
    1.0: ([[2.015201, 2.134508, 2.396318, .038190], [-1.885201, -2.060393, -1.798582, -1.521780]],
          [[1.129748, 1.193919, 1.334738, .066377], [-.968154, -1.062383, -.921564, -.772681]]),
    0.95: ([[1.792928, 2.012878, 2.394409, .038190], [-1.628079, -1.898179, -1.722493, -1.521780]],
           [[1.062495, 1.188175, 1.406184, .059829], [-.892284, -1.046621, -.946233, -.831545]])}


def test_9_1_reward_loss_and_its_gradient():
    """A sum in place of the mean, or chosen and rejected swapped."""
    r0, r1, second = t([.2, 1.0, -.5]), t([1.2, .4, -.5]).requires_grad_(), torch.tensor([True, False, True])
    chosen, rejected = torch.where(second, r1, r0), torch.where(second, r0, r1)
    for i, loss in enumerate([.313262, .437488, .693147]):
        near(losses.reward_loss(chosen[i:i + 1], rejected[i:i + 1]), loss)
    loss = losses.reward_loss(chosen, rejected)
    near(loss, .481299)
    near(torch.autograd.grad(loss, r1)[0], [-.089647, .118115, -.166667])


def test_9_2_kl_estimate():
    """KL that is not clamped, or of the wrong sign."""
    near(losses.kl_estimate(LOGP, REF_LOGP, "clamped"), KL)
    near(losses.kl_estimate(LOGP, REF_LOGP, "k1").sum(1), [-.5, .7])
    near(losses.kl_estimate(LOGP, REF_LOGP, "k2").sum(1), [.625, .645])


def test_9_3_shape_rewards_and_whiten_without_a_mask_are_the_released_code():
    """A score beside the last token, the sample's deviation for the population's, zeros left zero, a mean that is not
    added back."""
    near(losses.shape_rewards(t([.8, -.4]), t(*KL), torch.tensor([2, 3]), .1), SHAPED)
    near(losses.whiten(t(*SHAPED), shift_mean=False), WHITE)
    near(losses.whiten(t(*ADVANTAGES[1.0][0])), ADVANTAGES[1.0][1], 2e-6)


@pytest.mark.parametrize("lam", [1.0, .95])
def test_9_4_gae(lam):
    """V of the wrong step, or a lambda that is not used."""
    advantages, returns = losses.gae(t(*WHITE), VALUES, 1.0, lam)
    near(advantages, ADVANTAGES[lam][0], 4e-6)                           # of rounded rewards
    near(returns, RETURNS if lam == 1 else advantages + VALUES, 4e-6)


def test_9_5_ppo_policy_loss_and_its_gradient():
    """A minimum for the maximum, a gradient through a ratio that is out of range, or a clip of the way back into it."""
    old_logp, logp = t([-1] * 4), t([-.7, -1.4, -.95, -1.0]).requires_grad_()
    each = losses.ppo_policy_loss(logp, old_logp, t([1, -2, .5, -.3]), .2)
    near(each, [-1.2, 1.6, -.525636, .3])
    near(each.mean(), .043591)
    near(torch.autograd.grad(each.mean(), logp)[0], [0, 0, -.131409, .075])
    logp = t([1.5, .5, 1.5, .5]).log().requires_grad_()                     # the four cases
    each = losses.ppo_policy_loss(logp, t([0.] * 4), t([1, 1, -1, -1]), .2)
    near(each, [-1.2, -.5, 1.5, .8])
    near(torch.autograd.grad(each.sum(), logp)[0], [0, -.5, 1.5, 0])


def test_9_6_ppo_value_loss_and_the_total():
    """A missing half, the smaller of the two errors, or a gradient through a clipped value."""
    old_values, values = t([.5, .5, -.2, 1]), t([.9, .55, -.8, 1.1]).requires_grad_()
    each = losses.ppo_value_loss(values, old_values, t([1, 0, -1, 1.05]), .2)
    near(2 * each, [.09, .3025, .36, .0025])
    near(torch.autograd.grad(each.mean(), values)[0], [0, .1375, 0, .0125])
    policy = losses.ppo_policy_loss(t([-.7, -1.4, -.95, -1.0]), t([-1] * 4), t([1, -2, .5, -.3]), .2).mean()
    near(policy + .1 * each.mean(), .0530286, 1e-7)


def test_9_7_dpo_is_the_reward_loss_of_implicit_rewards():
    """The published code's first version, which had the sign of every log-probability flipped (.709548)."""
    chosen, rejected = t([-12, -20]).requires_grad_(), t([-15, -18])
    ref_chosen, ref_rejected = t([-13, -19]), t([-14, -18.5])
    each = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, .1)
    near(each, [.598139, .770957])
    near(torch.autograd.grad(each.mean(), chosen)[0], [-.022508, -.026871])
    rewards = losses.implicit_reward(chosen, ref_chosen, .1), losses.implicit_reward(rejected, ref_rejected, .1)
    near(rewards[0], [.1, -.1], 1e-12)
    near(losses.reward_loss(*rewards), .684548)
    near(losses.dpo_loss(ref_chosen, ref_rejected, ref_chosen, ref_rejected, .1), [math.log(2)] * 2)


def test_9_8_quantiles():
    """Worst first, ties in another order, or a remainder that is dropped or put in the first group."""
    rewards = t([.3, -1, 2.5, .9, 1.1, -.2, 0, 1.7, .9, -.6])
    assert losses.quantiles(rewards, 4) == [[2, 7], [4, 3], [8, 0], [6, 5, 9, 1]]


def test_9_9_quark_token_loss():
    """KL(p_ref || p) for KL(p || p_ref), an entropy of the wrong sign, or a coefficient on the wrong term."""
    hidden, reference, eye = t([[1, 0, -1]]), t([[.5, .5, 0]]), torch.eye(3, dtype=F64)
    logp, kl, entropy = losses.full_vocabulary(hidden, eye, reference, eye, torch.tensor([0]))
    near(torch.stack([-logp, kl, entropy]), [[.407606], [.170640], [.832396]])
    near(losses.quark_token_loss(logp, kl, entropy, .05, 0), [.416138])
    near(losses.quark_token_loss(logp, kl, entropy, 0, .1), [.407606 - .0832396])


def test_9_15_linear_schedule_and_kl_controller():
    """A schedule off by one (the first step has rate 0), or a controller without its bounds."""
    for step, lr in ((1, 0), (2, 2e-6), (6, 1e-5), (7, 9.974026e-6), (21, 9.610390e-6), (41, 9.090909e-6),
                     (81, 8.051948e-6), (390, 2.6e-8)):
        near(lr_linear(step - 1, 1e-5, 5, 390), lr, 1e-12 if step < 390 else 5e-11)
    for kl, beta in ((3, .196), (6, .2), (9, .204), (30, .204), (6.6, .202)):
        near(losses.next_beta(.2, kl, 6), beta, 1e-12)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_full_vocabulary_is_the_plain_form():
    """A tile cut wrongly, or a gradient that does not go through KL, entropy or the head."""
    N, D, V = 7, 4, 9
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D, seed=1).requires_grad_()
    ref_hidden, ref_weight, targets = draw(N, D, seed=2), draw(V, D, seed=3), torch.arange(N) % V
    found = losses.full_vocabulary(hidden, weight, ref_hidden, ref_weight, targets, tile=3)
    logp, ref_logp = torch.log_softmax(hidden @ weight.T, -1), torch.log_softmax(ref_hidden @ ref_weight.T, -1)
    p = logp.exp()
    plain = (logp[torch.arange(N), targets], (p * (logp - ref_logp)).sum(1), -(p * logp).sum(1))
    near(torch.stack(found), torch.stack(plain), 1e-12)
    grads = [torch.autograd.grad(torch.stack(x).flatten() @ draw(3 * N), (hidden, weight)) for x in (found, plain)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_by_hand_without_padding(whiten_rewards):
    """Whatever padding adds, for each response by itself, as a list of its own tokens, gives the same numbers. A score
    beside the last sampled token (AlpacaFarm counts ids that are not padding: a sampled 0 shifts it by one); a penalty
    for finished responses, or in another unit than the standardized score."""
    lengths, beta, mean, std = [1, 4, 7, 3, 6, 2], .3, .2, 1.7
    rollouts, rewards = [], []
    for i, n in enumerate(lengths):
        logp, ref_logp, score = -draw(n, seed=i).abs(), -draw(n, seed=50 + i).abs(), draw(1, seed=200 + i).item()
        response = [0] * (n - 1) + [2 if i % 2 else 0]                      # every second one is finished
        rollouts.append(train_ppo.Rollout(i, [1, 9], response, score, logp, ref_logp, draw(n, seed=99 + i)))
        rewards.append(-beta * (logp - ref_logp))
        rewards[i][-1] += (score - mean) / std - .5 * (i % 2 == 0)
    if whiten_rewards:
        every = torch.cat(rewards)
        rewards = ((every - every.mean()) / every.std(unbiased=False) + every.mean()).split(lengths)
    advantages = []
    for r, reward in zip(rollouts, rewards):
        mine, ahead, next_value = [], 0.0, 0.0
        for k in reversed(range(len(reward))):
            ahead = reward[k] + .9 * next_value - r.values[k] + .9 * .8 * ahead
            next_value = r.values[k]
            mine.insert(0, ahead)
        advantages.append(torch.stack(mine))
    every = torch.cat(advantages)
    white = ((every - every.mean()) / every.std(unbiased=False)).split(lengths)

    args = train_ppo.parse(["ppo", "--gamma", ".9", "--lam", ".8", "--ending-penalty", ".5",
                            *["--whiten-rewards"] * whiten_rewards])
    found, statistics = train_ppo.compute_advantages(rollouts, beta, [mean, std], 2, args)
    for b, r in enumerate(found):
        near(r.advantages, white[b])
        near(r.returns, advantages[b] + r.values)
    logp, ref_logp, values = (torch.cat([r[k] for r in rollouts]) for k in (4, 5, 6))
    log_ratio = ref_logp - logp
    k1, k3 = -log_ratio.sum().item() / 6, (log_ratio.exp() - 1 - log_ratio).sum().item() / 6
    assert statistics == pytest.approx({
        "reward": sum(r.score for r in rollouts) / 6, "kl": k1, "kl_k1": k1, "kl_k3": k3, "beta": beta,
        "finished": .5, "length": 23 / 6, "entropy": -logp.mean().item(),
        "explained_variance": (1 - every.var() / (every + values).var()).item()}, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The stages in small


class Small(NamedTuple):
    files: dict          # {name: data file}
    base: Path           # a LLaMA after some steps of SFT: some of its responses finish, some are truncated
    whole: Path          # a reward model of it, all weights trained
    adapter: Path        # another one, trained as adapters


@pytest.fixture(scope="module")
def small(base, tmp_path_factory):
    folder, world, rng = tmp_path_factory.mktemp("small"), data.World(9), random.Random(0)
    asked, demos, pairs, judged = [], [], [], []
    for i, r in enumerate(world.instructions("train", 60)):
        record = {k: r[k] for k in ("id", "instruction", "input", "reference")}
        right, wrong = r["reference"], world.corrupt(r, r["reference"], rng)
        first, second = (right, wrong) if i % 2 == 0 else (wrong, right)
        asked.append(record)
        demos.append({**record, "output": right})
        pairs.append({**record, "output_1": first, "output_2": second, "preference": 1 + i % 2})
        judged.append({**record, "output": wrong, "judgment": data.judge_reference(wrong, right)})
    judged[20]["judgment"] = None
    rows = {"demos": demos, "pairs": pairs[:26], "judged": judged[:21], "instructions": asked[26:37],
            "validation": asked[37:43]}
    files = {name: folder / f"{name}.json" for name in rows}
    for name in rows:
        data.write_json(files[name], rows[name])
    found = Small(files, folder / "base", folder / "whole", folder / "adapter")
    train_sft.main(["--model", str(base), "--data", str(files["demos"]), "--format", "short", "--device", "cpu",
                    "--steps", "60", "--batch-size", "16", "--lr", "1e-2", "--out", str(found.base)])
    run(found, "reward", found.whole, "--steps", 8, "--lr", "3e-3")
    run(found, "reward", found.adapter, "--steps", 8, "--lr", "3e-3", "--lora-rank", 4)
    return found


def flags(small, stage, out, *more):
    """The command line of a short run. The later of two equal flags counts."""
    pairs = stage in ("reward", "dpo")
    reward = small.adapter if "--lora-rank" in more else small.whole
    own = ["--held-out", 4] if pairs else ["--reward", reward, "--rollouts", 8, "--max-new-tokens", 14, "--warmup", 1]
    common = ["--model", small.base, "--data", small.files["pairs" if pairs else "instructions"], "--format", "short",
              "--device", "cpu", "--steps", 4, "--batch-size", 4, "--micro-batch-size", 3, "--lr", "1e-3", "--out", out]
    return [stage, *map(str, [*common, *own, *more])]


def run(small, stage, out, *more):
    assert train_ppo.main(flags(small, stage, out, *more)) == 0
    return metrics(out)


def results(directory):
    found = json.loads(Path(directory, "results.json").read_text())
    return without_time({key: value for key, value in found.items() if key != "peak_memory_bytes"})


def kind(stage):
    return RewardModel if stage == "reward" else LLaMA


# Every way to train. 13 pairs make an epoch's last batch one pair and 8 quantiles a best one of one rollout, so that
# one of two ranks has none; of 8 rollouts the second batch of an epoch is smaller than the first.
VARIANTS = {
    "reward": ("reward", "--held-out", 13),
    "reward-lora": ("reward", "--lora-rank", 2),
    "dpo": ("dpo", "--held-out", 13),
    "ppo": ("ppo", "--target-kl", .1, "--batch-size", 6),
    "ppo-lora": ("ppo", "--lora-rank", 4),
    "quark": ("quark", "--count", 2, "--batch-size", 6),
    "quark-best": ("quark", "--quantiles", "best", "--count", 8, "--lora-rank", 4),
}


def test_neither_processes_nor_micro_batches_change_the_result(small, tmp_path):
    """A mean of means or of each rank's own, padding that counts, a missing factor for DDP's average, samples or
    baselines that depend on the rank."""
    commands = []
    for name, (stage, *more) in VARIANTS.items():
        run(small, stage, tmp_path / "one" / name, "--dtype", "float64", "--micro-batch-size", 1, *more)
        commands.append(flags(small, stage, tmp_path / "two" / name, "--dtype", "float64", *more))
    finish(torchrun("tests/test_preferences.py", [json.dumps(commands)]))   # in one launch: starting takes longest
    for name, (stage, *_) in VARIANTS.items():
        of_rounding = ["accuracy"] if stage == "dpo" else []                # at step 0 all margins are 0
        assert_equal_runs(tmp_path / "one" / name, tmp_path / "two" / name, 1e-8, kind(stage), of_rounding)
    finished = sum(x["finished"] for x in metrics(tmp_path / "one" / "ppo"))
    assert 0 < finished < 4, "all responses finish, or none"


@pytest.mark.parametrize("name", ["reward-lora", "dpo", "ppo", "ppo-lora", "quark"])
def test_stopping_and_resuming_is_bitwise_not_stopping(name, small, tmp_path):
    """Optimizer, beta, the scores' scale, the curve or the reference lost on the way, steps logged twice, or a Ctrl-C
    that is not heard."""
    stage, *more = VARIANTS[name]
    more += ["--save-every", 2]
    if stage in ("ppo", "quark"):
        gold = small.whole if name == "ppo-lora" else small.adapter
        more += ["--validation", small.files["validation"], "--gold-reward", gold, "--eval-every", 2]
    run(small, stage, tmp_path / "whole", *more)
    argv = flags(small, stage, tmp_path / "stopped", *more)
    with at_step(3, die), pytest.raises(Killed):                            # the last save was after two steps
        train_ppo.main(argv)
    with at_step(2, press_ctrl_c):
        assert train_ppo.main([*argv, "--resume"]) == 130
    assert [x["step"] for x in metrics(tmp_path / "stopped")] == [0, 1, 2]
    with pytest.raises(InputError, match="--lr was 0.001, is 0.002"):
        train_ppo.main([*argv, "--resume", "--lr", "2e-3"])
    assert train_ppo.main([*argv, "--resume"]) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped", kind=kind(stage))
    assert results(tmp_path / "whole") == results(tmp_path / "stopped")


@pytest.mark.parametrize("stage", ["dpo", "ppo", "quark"])
def test_a_loss_that_is_not_finite_stops_the_run(stage, small, nan_model, tmp_path):
    """A NaN that is trained on."""
    with pytest.raises(InputError, match="diverged: step 0 has loss nan"):
        run(small, stage, tmp_path / "out", "--model", nan_model)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What the models say, and the gradient of one step, against one row at a time without padding


def plain_logits(policy, prompt, response, temperature=1.0):
    """Logits that predict each token of a response: (n, V)."""
    return policy(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1] / temperature


def plain_logp(policy, prompt, response, temperature=1.0):
    return losses.plain_logp(plain_logits(policy, prompt, response, temperature), torch.tensor(response))


def plain_values(critic, prompt, response):
    """The head at the positions that predict each token of a response: (n,)."""
    return critic.score(critic.model(torch.tensor([prompt + response])))[0, len(prompt) - 1:-1, 0]


def plain_score(reward, prompt, response):
    """The head at the last token."""
    return reward.score(reward.model(torch.tensor([prompt + response])))[0, -1, 0]


def move(parameters, std=.02):
    """Adds noise to the weights: a model that is no longer what it started from."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p += std * torch.randn(p.shape, dtype=p.dtype, generator=generator)


def load(small, stage, out, *more):
    """Flags, models and task of ppo or quark, as train_policy loads them."""
    args = train_ppo.parse(flags(small, stage, out, "--dtype", "float64", "--temperature", .7, "--epochs", 1,
                                 "--batch-size", 8, "--clip", 1e9, *more))
    return args, train_ppo.load_models(args, CPU), train_ppo.load_task(args)


def sampled(args, models, task):
    """Eight rollouts as the stage reads them; of Quark with all quantiles, asked with token 0."""
    rollouts = train_ppo.roll_out(models.policy, task, task.records[:8], task.control, 1, args)
    read, _ = train_ppo.POLICY_METHODS[args.stage]
    return sorted(read(models, rollouts, args, CPU))


def check_update(loss, args, models, task, rollouts):
    """Asserts that the stage's update, as one step of plain gradient descent at rate 1, moves every weight by the
    gradient of the loss that autograd finds; returns its statistics."""
    parameters = list(models.trained.parameters())
    wanted, before = torch.autograd.grad(loss, parameters), [p.detach().clone() for p in parameters]
    trainer = train_sft.start_run(models.trained, torch.optim.SGD(parameters, lr=0.0), args)
    _, update = train_ppo.POLICY_METHODS[args.stage]
    statistics = update(models, models.trained, rollouts, trainer, 1.0, 1, task, args)
    for p, old, gradient in zip(parameters, before, wanted):
        near(old - p, gradient, 1e-9)
        assert gradient.norm() > 0
    return statistics


def test_the_reward_model_learns_what_is_preferred(small, tmp_path):
    """A preference turned over, a text without its prompt or its EOS, or a mean that is off by the batch."""
    line, = run(small, "reward", tmp_path / "one", "--steps", 1, "--batch-size", 22, "--dtype", "float64")
    _, train, held_out = train_ppo.load_pairs(train_ppo.parse(flags(small, "reward", "none")), CPU)
    assert (len(train), len(held_out)) == (22, 4)
    tokenizer = data.Tokenizer.from_pretrained(small.base)
    torch.manual_seed(0)                                                    # the head is drawn from the run's seed
    reward = RewardModel.from_backbone(LLaMA.from_pretrained(small.base, F64))
    margins = []
    for p in train:
        assert p.chosen == tokenizer.encode_response(p.record["reference"]) != p.rejected
        margins.append(plain_score(reward, p.prompt, p.chosen) - plain_score(reward, p.prompt, p.rejected))
    loss = -torch.log(torch.sigmoid(torch.stack(margins))).mean()
    grads = torch.autograd.grad(loss, list(reward.parameters()))
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert line["grad_norm"] == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-6)
    assert line["accuracy"] == pytest.approx(sum(m.item() > 0 for m in margins) / 22)

    run(small, "reward", tmp_path / "many", "--steps", 30, "--lr", "3e-3")
    records = data.read_preferences(small.files["pairs"])
    scores = simulate.score_texts(tmp_path / "many", records, [data.chosen_and_rejected(r) for r in records])
    assert sum(chosen > rejected for chosen, rejected in scores) > .8 * len(records)


def test_dpo_starts_at_ln_2_and_its_margin_rises(small, tmp_path):
    """Log-probabilities averaged, of the wrong sign or without EOS; a reference other than the policy at step 0."""
    first, *_, last = run(small, "dpo", tmp_path / "out", "--steps", 20, "--dtype", "float64")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-9) and first["margin"] == pytest.approx(0, abs=1e-9)
    assert last["loss"] < .65 and last["margin"] > .2

    args = train_ppo.parse(flags(small, "dpo", "none"))
    policy, reference = (LLaMA.from_pretrained(small.base, F64) for _ in range(2))
    pairs = train_ppo.add_reference(policy, train_ppo.load_pairs(args, CPU)[1], args, CPU)
    move(policy.parameters())
    wanted = []
    for p in pairs:
        logp = [plain_logp(m, p.prompt, y).sum() for m in (policy, reference) for y in (p.chosen, p.rejected)]
        wanted.append(losses.dpo_loss(*logp, args.beta))
    assert torch.stack(wanted).std() > .01
    rewards = train_ppo.implicit_rewards(policy, pairs, args, CPU)
    near(losses.reward_loss(*rewards), torch.stack(wanted).mean(), 1e-9)


def test_held_out_accuracy_against_labels_and_truth():
    """Noise of the labels taken for errors of the model or the other way round, or a tie that counts as right."""
    record = {"output_1": "It is red.", "output_2": "It is blue.", "reference": "It is red."}
    pairs = [train_ppo.Pair({**record, "preference": p}, [], [], []) for p in (1, 1, 2, 1)]     # the third is wrong
    found = train_ppo.accuracy([1.0, -1.0, -2.0, 3.0], pairs)               # the model errs on the second
    assert found["accuracy"] == .5 and found["truth"] == .75 and found["ceiling"] == .75
    plain = train_ppo.Pair({"output_1": "a", "output_2": "b", "preference": 1}, [], [], [])
    found = train_ppo.accuracy([1.0, 0.0], [plain, plain])
    assert found["accuracy"] == .5 and set(found) == {"accuracy", "accuracy_se"}


def test_rollouts_and_gradient_of_a_ppo_step(small, tmp_path):
    """A value read after its token, a score without EOS, log-probabilities at another temperature; then whatever
    differs from the plain formulas: a loss, its mean over tokens, a statistic."""
    args, models, task = load(small, "ppo", tmp_path / "out", "--value-coef", .3)
    policy, critic = models.policy, models.trained.critic
    assert (critic.score.weight == 0).all() and not (models.reward.score.weight == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(critic.model.parameters(), models.reward.model.parameters()))
    move(models.trained.parameters())                                       # the policy is no longer the reference
    rollouts = sampled(args, models, task)
    for r in rollouts:
        near(r.logp, plain_logp(policy, r.prompt, r.response, .7), 1e-10)
        near(r.ref_logp, plain_logp(models.reference, r.prompt, r.response, .7), 1e-10)
        near(r.score, plain_score(models.reward, r.prompt, r.response), 1e-10)
        near(r.values, plain_values(critic, r.prompt, r.response), 1e-10)
        assert (r.logp - r.ref_logp).abs().max() > .01

    move(models.trained.parameters())                                       # ratios and values move
    scores = torch.tensor([r.score for r in rollouts])
    scale = [scores.mean().item(), scores.std(unbiased=False).item()]
    logp, values, policy_losses, value_losses = [], [], [], []
    for r in train_ppo.compute_advantages(rollouts, args.beta, scale, task.tokenizer.eos, args)[0]:
        logp.append(plain_logp(policy, r.prompt, r.response, .7))
        values.append(plain_values(critic, r.prompt, r.response))
        policy_losses.append(losses.ppo_policy_loss(logp[-1], r.logp, r.advantages, .2))
        value_losses.append(losses.ppo_value_loss(values[-1], r.values, r.returns, .2))
    logp, old_logp = torch.cat(logp), torch.cat([r.logp for r in rollouts])
    moved = torch.cat(values) - torch.cat([r.values for r in rollouts])
    policy_loss, value_loss = torch.cat(policy_losses).mean(), torch.cat(value_losses).mean()
    clip_fraction, value_clip_fraction = ((logp - old_logp).exp() - 1).abs().gt(.2), moved.abs().gt(.2)
    wanted = {"policy_loss": policy_loss, "value_loss": value_loss, "clip_fraction": clip_fraction.double().mean(),
              "value_clip_fraction": value_clip_fraction.double().mean(),
              "approx_kl": losses.kl_estimate(old_logp, logp, "k3").mean()}
    statistics = check_update(policy_loss + .3 * value_loss, args, models, task, rollouts)
    for name, value in wanted.items():
        assert statistics[name] == pytest.approx(value.item(), rel=1e-6) != 0, name


def control_id(tokenizer, k):
    return tokenizer.sp.piece_to_id(f"<0x{0xF8 + k:02X}>")


@pytest.mark.parametrize("which", ["all", "best"])
def test_the_gradient_of_a_quark_step(which, small, tmp_path):
    """A quantile's token on the wrong rollouts, a score or a reference that reads the token too, EOS not trained."""
    args, models, task = load(small, "quark", tmp_path / "out", "--quantiles", which, "--kl-coef", .2,
                              "--entropy-coef", .1, "--ending-penalty", 3)
    rollouts = sampled(args, models, task)
    move(models.policy.parameters())                                        # no longer the reference
    raw = torch.stack([plain_score(models.reward, r.prompt, r.response) for r in rollouts])
    truncated = torch.tensor([r.response[-1] != task.tokenizer.eos for r in rollouts])
    assert 0 < truncated.sum() < 8
    order = torch.argsort(raw - 3 * raw.std(unbiased=False) * truncated, descending=True).tolist()
    parts = []
    for place, i in enumerate(order[:8 if which == "all" else 2]):
        plain, y = rollouts[i].prompt, rollouts[i].response
        prompt = plain
        if which == "all":
            prompt = [plain[0], control_id(task.tokenizer, place // 2), *plain[1:]]
        logp = torch.log_softmax(plain_logits(models.policy, prompt, y, .7), -1)          # (n, V)
        ref_logp = torch.log_softmax(plain_logits(models.reference, plain, y, .7), -1)
        p, nll = logp.exp(), -logp.gather(1, torch.tensor(y)[:, None])[:, 0]
        parts.append(nll + .2 * (p * (logp - ref_logp)).sum(1) + .1 * (p * logp).sum(1))
    statistics = check_update(torch.cat(parts).mean(), args, models, task, rollouts)
    assert statistics["reward"] == pytest.approx(raw.mean().item(), abs=1e-6)


def test_the_first_pass_over_rollouts_is_on_policy(small, tmp_path):
    """Old and new log-probabilities computed in two ways: then the ratio is not 1, nor the KL 0 before any step."""
    lines = run(small, "ppo", tmp_path / "one", "--epochs", 1, "--batch-size", 8, "--micro-batch-size", 8, "--dtype",
                "float64")
    for x in lines:
        assert x["clip_fraction"] == x["value_clip_fraction"] == 0 and abs(x["approx_kl"]) < 1e-14
    assert lines[0]["kl"] == lines[0]["kl_k1"] == lines[0]["kl_k3"] == lines[0]["lr"] == 0 < lines[-1]["kl_k3"]
    # with four updates a step the policy leaves its rollouts, and the KL its target
    lines = run(small, "ppo", tmp_path / "two", "--dtype", "float64", "--lr", "1e-2", "--target-kl", .1)
    for x, y in zip(lines, lines[1:]):
        assert y["approx_kl"] > 1e-9 and y["beta"] == losses.next_beta(x["beta"], x["kl"], .1) != x["beta"]


@pytest.mark.parametrize("which,token", [("all", 0), ("best", None)])
def test_quark_is_asked_for_the_best(which, token, small, tmp_path, monkeypatch):
    """Prompts without the token that was trained, a token in the first rollout, or a step with fewer rollouts."""
    asked, generate = [], train_ppo.generate

    def spied(policy, prompts, *args, **kwargs):
        asked.append(prompts)
        return generate(policy, prompts, *args, **kwargs)

    monkeypatch.setattr(train_ppo, "generate", spied)
    run(small, "quark", tmp_path / "out", "--quantiles", which, "--count", 2, "--steps", 3)
    assert [len(prompts) for prompts in asked] == [8, 8, 8]                 # of 11 instructions
    best = control_id(data.Tokenizer.from_pretrained(small.base), 0)
    for step, prompts in enumerate(asked):
        assert all((x[1] == best) == (step > 0 and token == 0) for x in prompts)
    assert asked_with(tmp_path / "out", small, monkeypatch) == {token}      # and so is the model that it leaves


def simulate_main(*argv):
    simulate.main(list(map(str, argv)))


def asked_with(directory, small, monkeypatch):
    """The control tokens of all prompts when evaluate.py and simulate.py ask the model in a directory."""
    seen, encode, instructions = set(), data.Tokenizer.encode_prompt, data.World.instructions

    def spied(self, text, control=None):
        seen.add(control)
        return encode(self, text, control)

    with monkeypatch.context() as patch:
        patch.setattr(data.Tokenizer, "encode_prompt", spied)
        patch.setattr(data.World, "instructions", lambda self, split, count: instructions(self, split, 10))
        evaluate.main(["--model", str(directory), "--device", "cpu"])
        simulate_main("sample", "--model", directory, "--data", small.files["instructions"], "--device", "cpu",
                      "--max-new-tokens", 4, "--out", directory / "asked.jsonl")
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# The four models, and the checkpoints they leave


def test_the_four_models_of_ppo_share_one_backbone(small):
    """A second copy of a 7B backbone, a base that is trained, a reference that is not the base, adapters of one model
    that act in another, or a merge into the shared weights."""
    args, models, task = load(small, "ppo", "none", "--lora-rank", 4)
    three = (models.policy, models.reward, models.trained.critic)
    assert models.reference is None
    for name, p in models.policy.model.named_parameters():
        if "lora" not in name:
            assert len({m.model.get_parameter(name).data_ptr() for m in three}) == 1 and not p.requires_grad, name
    adapters = [[p for name, p in m.named_parameters() if "lora" in name] for m in three]
    assert len({p.data_ptr() for mine in adapters for p in mine}) == sum(map(len, adapters)) > 0
    assert [any(p.requires_grad for p in m.parameters()) for m in three] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(adapters[1], adapters[2]))  # the critic starts from the reward model

    move(adapters[0] + adapters[2], .1)
    start, reward = LLaMA.from_pretrained(small.base, F64), RewardModel.from_pretrained(small.adapter, F64)
    for r in sampled(args, models, task):
        near(r.ref_logp, plain_logp(start, r.prompt, r.response, .7), 1e-10)
        near(r.score, plain_score(reward, r.prompt, r.response), 1e-5)
        assert (r.logp - r.ref_logp).abs().max() > 1e-3 and (r.values == 0).all()         # the critic's head is 0
    model.merge_lora(models.reward)
    near(plain_score(models.reward, r.prompt, r.response), r.score)
    near(plain_logp(models.policy, r.prompt, r.response, .7), r.logp, 1e-10)


def test_a_reward_model_without_adapters_is_held_beside_the_policy(small, tmp_path, capsys):
    """A reward model of all weights, or adapters of another model, taken for the policy's backbone, or not counted in
    the memory estimate."""
    estimates, other = [], shutil.copytree(small.base, tmp_path / "other")
    lora = ["--lora-rank", 4]
    for more in ([], [*lora, "--reward", small.whole], [*lora, "--model", other], lora):
        estimates.append(train_ppo.policy_memory(train_ppo.parse(flags(small, "ppo", "none", *more)))["weights"])
    one = sum(p.nbytes for p in LLaMA.from_pretrained(small.base).parameters())
    assert [round(estimate / one) for estimate in estimates] == [4, 2, 2, 1]
    _, models, _ = load(small, "ppo", "none", "--lora-rank", 4, "--reward", small.whole)
    assert models.reference is None and "has no adapters of" in capsys.readouterr().out
    three = (models.policy, models.reward, models.trained.critic)
    policy, reward, critic = (m.model.layers[0].self_attn.q_proj.weight.data_ptr() for m in three)
    assert policy != reward == critic


def test_run_folders_open_in_transformers_and_peft(small, tmp_path, monkeypatch):
    """A head, an adapter or a config under another name than the one that others look for."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    run(small, "ppo", ".", "--lora-rank", 4, "--lr", "1e-2")                # "." is not the --gold-reward left out
    tokens = torch.tensor([[1, 40, 41, 42, 43, 2]])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    adapted = LLaMA.from_pretrained(small.base)
    load_adapter(adapted, tmp_path / "adapter")
    for ours in (LLaMA.from_pretrained(tmp_path), adapted):
        near(theirs(tokens).logits, ours(tokens), 1e-5)

    heads = transformers.AutoModelForSequenceClassification
    ours = RewardModel.from_pretrained(small.adapter)(tokens, torch.tensor([6]))
    with_head = heads.from_pretrained(small.base, num_labels=1)
    adapted = peft.PeftModel.from_pretrained(with_head, small.adapter / "adapter")
    for theirs in (heads.from_pretrained(small.adapter), adapted):
        near(theirs.eval()(tokens).logits[:, 0], ours, 1e-5)


def test_the_best_checkpoint_is_golds(small, tmp_path, monkeypatch):
    """The last step kept in place of the best by gold, or the best by the reward that is optimized."""
    kept = []

    def scripted(models, task, step, token, args, device):                  # the second checkpoint is the best
        kept.append({name: p.clone() for name, p in models.policy.state_dict().items()})
        return {"step": step, "proxy": float(step), "gold": {0: .1, 2: .9, 4: .5}[step]}

    monkeypatch.setattr(train_ppo, "validate", scripted)
    run(small, "ppo", tmp_path / "out", "--validation", small.files["validation"], "--gold-reward", small.adapter,
        "--eval-every", 2)
    found = results(tmp_path / "out")
    assert [c["gold"] for c in found["curve"]] == [.1, .9, .5] and (found["step"], found["gold"]) == (2, .9)
    saved = LLaMA.from_pretrained(tmp_path / "out").state_dict()
    assert [all(torch.equal(saved[k], w[k]) for k in saved) for w in kept] == [False, True, False]


@pytest.mark.parametrize("golds, token", [((.9, .5, .1), None), ((.1, .9, .5), 0)])
def test_control_tokens_mean_nothing_to_the_sft_model(small, tmp_path, monkeypatch, golds, token):
    """Quark's step 0, chosen without a control token, then tested and saved with one."""
    monkeypatch.setattr(train_ppo, "validate", lambda models, task, step, token, args, device: {
        "step": step, "proxy": 0.0, "gold": golds[step // 2]})
    run(small, "quark", tmp_path / "out", "--validation", small.files["validation"], "--gold-reward", small.adapter,
        "--eval-every", 2, "--quantiles", "all")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reward_token"] == token


def test_held_out_pairs_are_those_of_the_released_reward_models(small):
    """The head of the permutation held out in place of its tail, or the permutation of the pairs that fit: the
    published reward models would be measured on pairs that they were trained on."""
    records = data.read_preferences(small.files["pairs"])
    rows = [[r["instruction"], r["output_1"], r["output_2"]] for r in records]
    sizes = [len(rows) - 5, 5]
    _, expected = torch.utils.data.random_split(rows, sizes, torch.Generator().manual_seed(42))
    for max_length in (256, 24):
        args = flags(small, "reward", "none", "--held-out", 5, "--max-length", max_length)
        _, train, held_out = train_ppo.load_pairs(train_ppo.parse(args), CPU)
        found = [[p.record["instruction"], p.record["output_1"], p.record["output_2"]] for p in held_out]
        assert found == [row for row in expected if row in found] and 0 < len(found) <= 5
        assert not any(p.record in [q.record for q in train] for p in held_out)


def test_gold_is_the_second_reward_model_or_the_truth(small):
    """The reward model that is optimized as its own judge, texts beside their references, or sampled responses where
    exact match is measured."""
    args, models, task = load(small, "ppo", "none", "--gold-reward", small.adapter)
    task = task._replace(validation=data.read_demonstrations(small.files["demos"]))
    for args.data, temperature in ((args.data, .7), ("", 0)):
        found = train_ppo.validate(models, task, 3, None, args, CPU)
        texts = simulate.sample_responses(models.policy, task.tokenizer, task.validation, "short", max_new_tokens=14,
                                          temperature=temperature, seed=0)
        proxy, gold = (simulate.score_texts(d, task.validation, texts, most=14) for d in (small.whole, small.adapter))
        if not args.data:
            gold = [[float(text == r["reference"])] for r, [text] in zip(task.validation, texts)]
        near([found["proxy"], found["gold"]], [torch.tensor(proxy).mean(), torch.tensor(gold).mean()], 1e-5)
        assert found["gold"] != 0


def test_bad_input_is_one_line(small, tmp_path, monkeypatch):
    """A traceback, or a run that starts with half of what it needs."""
    config = Config(vocab_size=1024, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1, head_dim=8)
    tokenizer = data.Tokenizer.train(["some other words for another tokenizer"] * 3, 300)
    RewardModel(config).save_pretrained(tmp_path / "other", tokenizer)
    validation = ["--validation", small.files["validation"]]

    def refused(stage, match, *more):
        with pytest.raises(InputError, match=match) as error:
            run(small, stage, tmp_path / "out", *more)
        assert "\n" not in str(error.value)

    refused("ppo", "nowhere/config.json: no such file", "--reward", tmp_path / "nowhere")
    refused("ppo", "--validation FILE and --gold-reward DIR", *validation)
    refused("ppo", "is the --reward", *validation, "--gold-reward", small.whole)
    refused("ppo", "whole holds a model of another run", "--out", small.whole)
    refused("ppo", "is a reward model that this run reads", "--out", small.whole, "--overwrite")
    refused("ppo", "different tokenizers", "--reward", tmp_path / "other")
    refused("ppo", "--data needs --reward", "--reward", "")
    refused("ppo", "0 prompts fit in --max-length 3, fewer than --rollouts 8", "--max-length", 3)
    refused("ppo", "was trained with --format short, this run has alpaca", "--format", "alpaca")
    refused("ppo", "--dtype bfloat16 with all weights", "--dtype", "bfloat16")
    refused("ppo", "--steps 4 is less than --warmup 5", "--warmup", 5)
    refused("quark", "--rollouts 3 is less than the 4 quantiles", "--rollouts", 3)
    refused("dpo", "of 26 pairs 0 are left to train on and 26 to hold out.* --held-out 2", "--held-out", 100)
    with monkeypatch.context() as patch:
        patch.setattr(model, "available_memory", lambda device: 10 ** 6)
        refused("ppo", "this run takes about .*: lower --micro-batch-size")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train_sft, "setup_device", lambda name: CPU)
    refused("ppo", "--rollouts 8 is not a multiple of the 3 ranks", "--batch-size", 6)
    assert not (tmp_path / "out").exists()


def test_without_a_stage_it_is_ppo_on_the_built_in_reward_model(small, monkeypatch):
    """Another stage, a reward model of another seed or noise, or one that was stopped half way."""
    seen = []
    monkeypatch.setattr(train_ppo, "train_policy", lambda args, device: seen.append((args.stage, args.reward)) or 0)
    monkeypatch.setattr(train_sft, "built_in", lambda *args: str(small.base))
    monkeypatch.setattr(train_ppo, "built_in_reward", lambda *args: args)
    assert train_ppo.main(["--seed", "3", "--noise", "0.1", "--device", "cpu"]) == 0
    assert seen == [("ppo", (3, .1, "cpu"))]
    monkeypatch.setattr(train_ppo, "built_in_reward", lambda *args: sys.exit(130))
    with pytest.raises(SystemExit):
        train_ppo.main(["--device", "cpu"])
    assert len(seen) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Recipes: preferences and judgments as demonstrations


def test_demonstrations_made_of_preferences_and_judgments(small, tmp_path):
    """The first output for the preferred one, a tie that becomes a demonstration, tokens swapped between chosen and
    rejected, two records with one id; a task left out of `forward`, or a judgment given that is to be learnt."""
    pairs, texts = [], {"input": "", "output_1": "one", "output_2": "two"}
    for name, preference in (("a", 1), ("b", 2), ("c", 1.5), ("d", 1.9)):   # 1.9: a judge's probability
        pairs.append({"instruction": name, **texts, "preference": preference})
    data.write_json(tmp_path / "pairs.json", pairs)
    feedme, records = data.read_feedme(tmp_path / "pairs.json"), data.read_conditioning(tmp_path / "pairs.json")
    assert [(r["instruction"], r["output"]) for r in feedme] == [("a", "one"), ("b", "two"), ("d", "two")]
    assert [(r["instruction"], r["output"], r["reward_token"]) for r in records] == [
        ("a", "one", 0), ("a", "two", 1), ("b", "two", 0), ("b", "one", 1), ("d", "two", 0), ("d", "one", 1)]
    assert len({r["id"] for r in records}) == 6 and all(r["judgment"] is None for r in feedme + records)

    path, tokenizer = small.files["judged"], data.world_tokenizer()
    judged = data.read_judged(path)
    assert judged[0]["judgment"] and judged[-1]["judgment"] is None
    assert data.read_forward(path) == [{**r, "judgment": None} for r in judged] + data.read_judge_training(path)
    hindsight = data.encode(tokenizer, train_sft.RECIPES["hindsight"](path), "short", 512, hindsight=True)
    for r, e in zip(judged, hindsight, strict=True):
        assert e.judged_prompt is None and e.response == tokenizer.encode_response(r["output"])
        assert e.prompt == data.prompt_ids(tokenizer, r, "short", r["judgment"])


@pytest.mark.parametrize("name", ["world", "llama"])
def test_control_tokens(name):
    """A control token that a text can write, that the tokenizer does not have, or before BOS; one that a record asks
    for and does not get; a KeyError or <unk> for a bad number; control_prompt that differs from encode_prompt."""
    if name == "llama" and not LLAMA_TOKENIZER.is_file():
        pytest.skip(f"needs {LLAMA_TOKENIZER}")
    tokenizer = data.world_tokenizer() if name == "world" else data.Tokenizer(LLAMA_TOKENIZER.read_bytes())
    control = {control_id(tokenizer, k) for k in range(8)}
    assert len(control) == 8 and tokenizer.sp.unk_id() not in control and all(map(tokenizer.sp.is_byte, control))
    every_plane = "".join(map(chr, [*range(0, 0xD800, 97), *range(0xE000, 0x110000, 997)]))
    for text in ("<0xF8> <0xFF>", "\u00f8\u00ff\ufffd", every_plane):
        assert not control & {*tokenizer.encode_prompt(text), *tokenizer.encode_response(text)}
    record = {"id": 7, "instruction": "Say it.", "input": ""}
    plain = data.prompt_ids(tokenizer, record, "short")
    for k in range(8):
        found = data.prompt_ids(tokenizer, {**record, "reward_token": k}, "short")
        wanted = [tokenizer.bos, control_id(tokenizer, k), *plain[1:]]
        assert found == train_ppo.control_prompt(tokenizer, plain, k) == wanted
    for bad in (8, -1, "0", 0.5):
        with pytest.raises(InputError, match=f"record 7: 'reward_token' is {bad!r}, expected 0 to 7"):
            data.prompt_ids(tokenizer, {**record, "reward_token": bad}, "short")


@pytest.mark.parametrize("recipe,file,factor", [
    ("demonstrations", "demos", 1), ("feedme", "pairs", 1), ("conditioning", "pairs", 2), ("hindsight", "judged", 1),
    ("forward", "judged", 2), ("judge", "judged", 1)])
def test_train_sft_runs_every_recipe(recipe, file, factor, small, tmp_path, capsys, monkeypatch):
    """A recipe that reads but does not train, or a model trained after a control token that is asked without it."""
    path, out = small.files[file], tmp_path / "out"
    train_sft.main(["--model", str(small.base), "--data", str(path), "--recipe", recipe, "--format", "short",
                    "--device", "cpu", "--steps", "2", "--batch-size", "4", "--out", str(out)])
    assert f"{factor * len(data.read_json(path))} examples, 2 steps of 4" in capsys.readouterr().out
    assert len(metrics(out)) == 2 and distance(out, small.base) > 0
    assert asked_with(out, small, monkeypatch) == {0 if recipe == "conditioning" else None}


def test_sample_keeps_the_best_of_four(small, tmp_path):
    """The worst for the best, an empty text that wins, or a score of something else than prompt + response + EOS."""
    common = ["sample", "--data", small.files["instructions"], "--model", small.base, "--temperature", 1,
              "--max-new-tokens", 14, "--device", "cpu", "--seed", 5]
    simulate_main(*common, "--outputs", 4, "--out", tmp_path / "four.jsonl")
    simulate_main(*common, "--best-of", 4, "--reward", small.whole, "--out", tmp_path / "best.jsonl")
    four, best = data.read_json(tmp_path / "four.jsonl"), data.read_demonstrations(tmp_path / "best.jsonl")
    tokenizer, reward, places = data.world_tokenizer(), RewardModel.from_pretrained(small.whole), set()
    for many, one in zip(four, best, strict=True):
        prompt, scores = data.prompt_ids(tokenizer, many, "short"), []
        for text in many["output"]:
            ids = tokenizer.encode_response(text)[:14]                      # no EOS if it was truncated
            scores.append(plain_score(reward, prompt, ids).item() if text.strip() else -math.inf)
        places.add(scores.index(max(scores)))
        assert one["output"] == many["output"][scores.index(max(scores))] and "best of 4" in one["generator"]
        assert one["reward"] == pytest.approx(max(scores), abs=1e-5)
    assert len(places) > 1                                                  # not the first of them, every time
    with pytest.raises(InputError, match="--best-of N and --reward DIR"):
        simulate_main(*common, "--best-of", 4, "--out", tmp_path / "x.jsonl")


def test_refinements_are_demonstrations_and_pairs(small, tmp_path):
    """The rejected response taught as the chosen one, good records refined, or a judgment left in the prompt (ILF)."""
    out = tmp_path / "refined.jsonl"
    simulate_main("refine", "--by", "reference", "--data", small.files["judged"], "--out", out)
    judged = [r for r in data.read_judged(small.files["judged"]) if r["judgment"] is not None]
    assert len(judged) == 20
    for r, demo, pair in zip(judged, data.read_demonstrations(out), data.read_preferences(out), strict=True):
        assert demo["output"] == r["reference"] and demo["judgment"] is None        # at most three faults: all mended
        assert data.chosen_and_rejected(pair) == (r["reference"], r["output"]) and demo["was_judged"] == r["judgment"]
    line, = run(small, "dpo", tmp_path / "ilf", "--steps", 1, "--data", out)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
    del judged[0]["reference"]
    data.write_json(tmp_path / "without.json", judged)
    with pytest.raises(InputError, match="has no key 'reference'"):
        simulate_main("refine", "--by", "reference", "--data", tmp_path / "without.json", "--out", out)


if __name__ == "__main__":                                                  # as torchrun starts it
    data.run_main(lambda: max(train_ppo.main(argv) for argv in json.loads(sys.argv[1])))
