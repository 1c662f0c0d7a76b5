"""SDPO: vectors and invariants of its loss, the teacher, the gates, and training steps against full logits.

V1 and V2 are vectors of the paper's formulas, computed in numpy: probabilities of the student, of a teacher, and of
CUT's judged prompt in the teacher's place."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

import data
import train_cut
import train_sft
from conftest import Killed, assert_equal_runs, at_step, die, finish, metrics, torchrun
from data import ADVICE, JUDGES, Tokenizer, World, collate, encode, format_prompt, prompt_ids
from evaluate import token_words
from losses import detect, full_vocabulary, per_example_mean, sdpo_step_loss, sdpo_token_loss, unlikelihood
from model import LLaMA, add_lora, make_optimizer
from test_train import first_step, online, small_world  # noqa: F401
from train_cut import StudentAndTeacher

FORMS = ("forward", "reverse", "jsd", "sampled")


def log(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def close(value, expected, tolerance=1.1e-6):
    torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64),
                               rtol=0, atol=tolerance)


def loss_and_gradient(student, teacher, targets, form, weight=1.0):
    """Token losses and their gradient with respect to the student's logits."""
    logits = student.clone().requires_grad_(True)
    loss = sdpo_token_loss(torch.log_softmax(logits, -1), teacher, targets, form)
    (weight * loss).sum().backward()
    return loss.detach(), logits.grad


# ----------------------------------------------------------------------------------------------------------------------
# The loss

V1_STUDENT = log([.5, .3, .15, .05], [.4, .4, .1, .1], [.7, .1, .1, .1])
V1_TEACHER = log([.2, .6, .15, .05], [.4, .4, .1, .1], [.85, .05, .05, .05])
V1_TARGETS = torch.tensor([0, 1, 0])


@pytest.mark.parametrize("form, tokens, mean, gradient", [
    ("forward", [.232630, 0, .061061], .097897, [.3, -.3, 0, 0]),
    ("reverse", [.250201, 0, .072035], .107412, [.333045, -.283005, -.037530, -.012510]),
    ("jsd", [.058692, 0, .016377], .025023, None),
    ("sampled", [-.635124, 0, .069251], None, [.458145, -.274887, -.137444, -.045815])])
def test_vector_v1(form, tokens, mean, gradient):
    """Forward and reverse swapped, a JSD without its halves, an advantage of the other sign or with gradient."""
    loss, grad = loss_and_gradient(V1_STUDENT, V1_TEACHER, V1_TARGETS, form)
    close(loss, tokens)
    if mean:
        close(loss.mean(), mean)
    if gradient:
        close(grad[0], gradient)


def binary(*p):
    """Two-word distributions in which the target has these probabilities."""
    return log(*[[x, 1 - x] for x in p])


V2_STUDENT, V2_TEACHER, V2_CUT = binary(.30, .60, .02), binary(.10, .60, .001), binary(.60, .60, .05)
V2_TARGETS, V2_LENGTHS = torch.tensor([0, 0, 0]), torch.tensor([2, 1])


def test_vector_v2_gradients_and_the_offline_trap():
    """A probability factor in the sampled form or none in the full one: they differ 50-fold for an unlikely
    token (t3)."""
    close(loss_and_gradient(V2_STUDENT, V2_TEACHER, V2_TARGETS, "sampled")[1][:, 0], [.769029, 0, 2.935818])
    loss, grad = loss_and_gradient(V2_STUDENT, V2_TEACHER, V2_TARGETS, "reverse")
    close(grad[:, 0], [.283485, 0, .059093])
    close(loss, [.153664, 0, .041096])
    logp = V2_STUDENT[:, 0].clone().requires_grad_(True)
    unlikelihood(logp).sum().backward()
    close((logp.grad * (1 - logp.exp()))[[0, 2]], [.30, .02])               # CUT's gradient of the same two


@pytest.mark.parametrize("form", ["sampled", "reverse"])
def test_the_same_ratio_has_the_opposite_sign_in_cut(form):
    """CUT's judged prompt given to SDPO: exactly the tokens that CUT flags, and lowers, are raised."""
    student, judged = V2_STUDENT[:, 0], V2_CUT[:, 0]
    assert detect(judged, student, 1.1).tolist() == [True, False, True]
    close(judged - student, [.693147, 0, .916291])
    good = loss_and_gradient(V2_STUDENT, V2_TEACHER, V2_TARGETS, form)[1][:, 0]
    wrong = loss_and_gradient(V2_STUDENT, V2_CUT, V2_TARGETS, form)[1][:, 0]
    assert (good[[0, 2]] > 0).all() and (wrong[[0, 2]] < 0).all() and good[1] == 0


def test_vector_v2_normalization_and_importance_ratio():
    """A mean over tokens in place of one over answers; a ratio that is not truncated, truncated below too, or inverted,
    or that carries gradient."""
    loss = sdpo_token_loss(V2_STUDENT, V2_TEACHER, V2_TARGETS, "reverse")
    close(loss.mean(), .064920)
    close(per_example_mean(loss, V2_LENGTHS).mean(), .058964)
    old, weight = torch.tensor([.30, .20, .08], dtype=torch.float64).log(), torch.ones(3, dtype=torch.float64)
    logits = V2_STUDENT.clone().requires_grad_(True)

    def step(old_logp):
        return sdpo_step_loss(torch.log_softmax(logits, -1), V2_TEACHER, V2_TARGETS, weight, None, old_logp,
                              form="reverse", alpha=1.0)[0]

    close(step(old).mean(), .054646)
    ratio = torch.tensor([1, 2, .25], dtype=torch.float64)
    close((step(old) / loss)[[0, 2]], [1, .25])
    close(step(V2_STUDENT[:, 0]), loss.tolist(), 1e-15)                     # on-policy it is 1
    close(step(torch.full((3,), -900.)), (2 * loss).tolist(), 1e-15)        # never above 2
    assert step(torch.full((3,), 900.)).isfinite().all()
    gradient, = torch.autograd.grad(step(old).sum(), logits)
    close(gradient, (loss_and_gradient(V2_STUDENT, V2_TEACHER, V2_TARGETS, "reverse", ratio)[1]).tolist(), 1e-12)


def random_logp(seed, n=50, V=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(n, V, generator=generator, dtype=torch.float64), -1)


def test_the_sampled_form_is_the_reverse_kl_in_expectation():
    """A missing baseline term, or an advantage that is not a constant: exact expectation over all tokens, and the mean
    of 40,000 samples, which a missing or doubled factor leaves by more than 20 standard errors."""
    student, teacher = random_logp(0), random_logp(1)
    exact = loss_and_gradient(student, teacher, torch.zeros(50, dtype=torch.long), "reverse")[1]
    expected = torch.zeros_like(exact)
    for v in range(7):
        gradient = loss_and_gradient(student, teacher, torch.full((50,), v), "sampled")[1]
        expected += student[:, v:v + 1].exp() * gradient
    torch.testing.assert_close(expected, exact, rtol=0, atol=1e-12)

    generator = torch.Generator().manual_seed(2)
    targets = torch.multinomial(student[0].exp(), 40_000, replacement=True, generator=generator)
    one = loss_and_gradient(student[:1].expand(40_000, -1), teacher[:1].expand(40_000, -1), targets, "sampled")[1]
    error = (one.mean(0) - exact[0]).abs()
    assert (error < 4 * one.std(0) / 200).all() and exact[0].abs().max() > 20 * one.std(0).max() / 200


@pytest.mark.parametrize("form", FORMS)
def test_equal_distributions_teach_nothing(form):
    """A divergence that is not 0 at 0, or whose gradient is not."""
    logp = random_logp(3)
    loss, gradient = loss_and_gradient(logp, logp, torch.zeros(50, dtype=torch.long), form)
    assert loss.abs().max() < 1e-14 and gradient.abs().max() < 1e-14


@pytest.mark.parametrize("form", FORMS)
def test_a_better_teacher_lowers_the_token_and_the_swap_raises_it(form):
    """Teacher and student swapped."""
    for student, teacher, sign in ((V2_STUDENT, V2_TEACHER, 1), (V2_TEACHER, V2_STUDENT, -1)):
        gradient = loss_and_gradient(student, teacher, V2_TARGETS, form)[1][:, 0]
        assert (sign * gradient[[0, 2]] > 0).all()


def test_divergences_stay_finite_where_probabilities_underflow():
    """log(softmax) or log(exp + exp) in place of their stable forms: NaN or inf where a model is certain."""
    certain = torch.tensor([[0., -200., -300.]])
    for form in FORMS:
        loss, gradient = loss_and_gradient(certain, torch.log_softmax(certain.flip(1), -1), torch.tensor([1]), form)
        assert loss.isfinite().all() and gradient.isfinite().all(), form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [3, 256])
def test_tiles_are_autograd_through_full_logits_in_float64(form, tile):
    """A tile that is lost, weighted twice or given another tile's weights; gradient that reaches the teacher, here the
    same weights as the student's."""
    generator = torch.Generator().manual_seed(0)
    hidden, advised, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (8, 8, 11))
    targets = torch.randint(0, 11, (8,), generator=generator)
    factor, old = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    found = []
    for full in (True, False):
        h, a, w = (x.clone().requires_grad_(True) for x in (hidden, advised, weight))
        if full:
            student, teacher = torch.log_softmax(h @ w.T, -1), torch.log_softmax(a @ w.detach().T, -1)
            ratio = (student[range(8), targets] + old).detach().exp().clamp(max=2)
            loss = (0.3 * ratio * factor * sdpo_token_loss(student, teacher, targets, form)).sum()
            logp = torch.stack([teacher[range(8), targets], student[range(8), targets]])
        else:
            def token_loss(*args):
                return sdpo_step_loss(*args, form=form, alpha=0.3)
            loss, *logp = full_vocabulary(h, w, a, w, targets, token_loss, (factor, factor, -old), tile)
            loss, logp = loss.sum(), torch.stack(logp)
        loss.backward()
        found.append((loss.detach(), logp.detach(), h.grad, w.grad))
        assert a.grad is None or not a.grad.any()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher


def small_model(base, dtype=torch.float64):
    return LLaMA.from_pretrained(base, dtype)


def with_teacher(model, optimizer, rate):
    return StudentAndTeacher(model, SimpleNamespace(optimizer=optimizer, state={}, path="resume.pt"), rate)


def test_the_teacher_is_frozen_live_or_a_moving_average(base):
    """An update of the wrong direction or rate, a teacher that moves with its student's tensors, or is trained."""
    for rate, expected in ((0, 1.0), (1, 3.0), (0.05, 1.1)):
        model = small_model(base)
        for p in model.parameters():
            torch.nn.init.ones_(p)
        optimizer = torch.optim.SGD(model.parameters(), 2.0)
        both = with_teacher(model, optimizer, rate)
        for p in model.parameters():
            p.grad = -torch.ones_like(p)
        optimizer.step()                                                    # 1 -> 3
        assert all(torch.allclose(p, torch.full_like(p, expected)) for p in both.teacher.parameters())
        assert all((p == 3).all() for p in both.student.parameters())
        assert not any(p.requires_grad for p in both.teacher.parameters())
        assert both.teacher.lm_head.weight.data_ptr() == both.weights["lm_head.weight"].data_ptr()


def test_the_teacher_of_adapters_shares_the_frozen_weights(base):
    """A second copy of seven billion frozen weights, or adapters that are shared, so that no teacher stays behind."""
    model = small_model(base)
    add_lora(model, rank=2)
    both = with_teacher(model, make_optimizer(model), 0.0)
    same = {n for n, p in both.student.named_parameters() if p is dict(both.teacher.named_parameters())[n]}
    assert same == {n for n, p in model.named_parameters() if not p.requires_grad} and both.weights
    assert not same & set(both.weights)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A file of 13 good and 20 bad responses."""
    records = World(9).demonstrations(60, JUDGES["corrects"], "train")[1::2]
    bad = [r for r in records if r["judgment"] != "All of it is right."]
    good = [{**r, "id": f"good-{r['id']}", "judgment": None} for r in bad[20:33]]
    bad[0]["reference"], bad[1]["reference"] = bad[0]["output"], 12         # a number is no right answer
    path = tmp_path_factory.mktemp("data") / "judged.json"
    path.write_text(json.dumps(good + bad[:20]))
    return path


@pytest.fixture
def arguments(base, judged, tmp_path):
    def job(out, *more):
        argv = ["--model", base, "--data", judged, "--recipe", "sdpo", "--device", "cpu", "--dtype", "float64",
                "--steps", 8, "--batch-size", 8, "--micro-batch-size", 3, "--lr", 1e-2, "--downsample", -1,
                "--lora-rank", 0, "--teacher-rate", 0.2, "--out", tmp_path / out]
        return [str(a) for a in (*argv, *more)]
    return job


def brute_force(base, records, form, teacher, alpha=0.7):
    """The loss of all records at once and its gradients, from full logits of one sequence at a time."""
    student = small_model(base)
    total = 0.0
    for e in encode(Tokenizer.from_pretrained(base), records, "short" + ADVICE, 256):
        def logp(model, prompt):
            logits = model(torch.tensor([prompt + e.response[:-1]]))[0, len(prompt) - 1:]
            return torch.log_softmax(logits, -1)
        targets, plain = torch.tensor(e.response), logp(student, e.prompt)
        if e.judged_prompt:
            with torch.no_grad():
                advised = logp(teacher, e.judged_prompt)
            loss = alpha * sdpo_token_loss(plain, advised, targets, form)
        else:
            loss = -plain[range(len(targets)), targets]
        total = total + loss.mean() / len(records)
    total.backward()
    return {"": total.detach(), **{name: p.grad for name, p in student.named_parameters()}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("micro", [1, 3, 33])
def test_the_first_step_is_the_papers_loss(base, judged, arguments, form, micro):
    """CUT's prompt in place of the advice, or one with the response in it; answers read at other positions (padding, a
    longer teacher prompt, the batch's order); weights that do not add up; good responses with advice of their own."""
    found = first_step(train_cut.main, arguments("out", "--batch-size", 33, "--divergence", form, "--alpha", 0.7,
                                                 "--micro-batch-size", micro))
    expected = brute_force(base, data.read_json(judged), form, small_model(base))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)          # old_logp is kept in float32
    assert any(g.abs().max() > 1e-6 for g in expected.values())


def test_good_responses_alone_are_plain_likelihood(arguments, judged, tmp_path, capsys):
    """NaN of a step without a judgment, praise turned into advice, or a crash of gates without a right answer."""
    path = tmp_path / "good.json"
    path.write_text(json.dumps([r for r in data.read_json(judged) if r["judgment"] is None]))
    argv = arguments("out", "--data", path, "--batch-size", 13)
    expected = first_step(train_cut.main, [*argv, "--recipe", "expert", "--out", str(tmp_path / "expert")])
    torch.testing.assert_close(first_step(train_cut.main, argv), expected, rtol=0, atol=1e-12)
    assert "no gates" in capsys.readouterr().out


def test_the_loss_is_a_mean_over_good_and_bad_responses(base, judged, arguments, tmp_path):
    """Advice for good responses, or a mean over tokens or micro-batches: twice the batch, half of it good, is the mean
    of the two losses, as in CUT."""
    records = data.read_json(judged)
    parts = {"bad": records[13:26], "good": records[:13], "both": records[13:26] + records[:13]}
    losses_of = {}
    for name, part in parts.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(part))
        found = first_step(train_cut.main, arguments(name, "--data", path, "--batch-size", len(part)))
        losses_of[name] = found[""].item()
    assert losses_of["both"] == pytest.approx((losses_of["bad"] + losses_of["good"]) / 2, abs=1e-12)


def test_the_teacher_in_training(arguments, tmp_path):
    """A frozen teacher that follows, a moving one that stays, an EMA that is not updated after each step."""
    runs = {}
    for rate in (0, 0.2, 1):
        train_cut.main(arguments(f"rate-{rate}", "--teacher-rate", rate))
        runs[rate] = metrics(tmp_path / f"rate-{rate}")
    first, second = zip(*[(m[0]["loss"], m[1]["loss"]) for m in runs.values()])
    assert len(set(first)) == 1 and len(set(second)) == 3
    optimized = []

    def follow(both, *_):
        before = {n: w.clone() for n, w in both.weights.items()}
        original(both)
        for name, p in both.student.named_parameters():
            expected = 0.8 * before[name] + 0.2 * p
            torch.testing.assert_close(both.weights[name], expected, rtol=0, atol=1e-15)
        optimized.append(True)

    original = StudentAndTeacher.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentAndTeacher, "follow", follow)
        train_cut.main(arguments("again"))
    assert len(optimized) == 8 and metrics(tmp_path / "again") == runs[0.2]


@pytest.mark.parametrize("rank, copies", [(0, 2), (4, 1)])
def test_the_memory_estimate_counts_the_teacher(arguments, monkeypatch, rank, copies):
    """A teacher of all weights that the estimate does not know, or one of adapters counted as a second model."""
    seen = {}
    monkeypatch.setattr(train_sft, "check_memory", lambda estimate, _: seen.setdefault(recipe, estimate["weights"]))
    for recipe in ("cut", "sdpo"):
        train_cut.main(arguments(recipe, "--recipe", recipe, "--lora-rank", rank, "--steps", 1))
    assert seen["sdpo"] == copies * seen["cut"]


@pytest.mark.parametrize("more", [[], ["--lora-rank", 4]])
def test_a_stopped_run_resumes_bitwise(arguments, tmp_path, capsys, more):
    """The teacher, or the log-probabilities of the round's beginning, made anew from the model that has moved on; gates
    printed for it; a second save with the teacher of the first."""
    train_cut.main(arguments("whole", *more))
    assert len(gates(capsys.readouterr().out)) == 3
    for killed_at, resume in ((5, []), (7, ["--resume"])):                  # saved after steps 4 and 6
        with at_step(killed_at, die), pytest.raises(Killed):
            train_cut.main(arguments("parts", "--save-every", 2, *resume, *more))
    assert len(gates(capsys.readouterr().out)) == 3
    assert train_cut.main(arguments("parts", "--save-every", 2, "--resume", *more)) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_equal_one(arguments, tmp_path):
    """A teacher that differs between ranks, weights that DDP waits for, a hook that --zero's optimizer never calls."""
    train_cut.main(arguments("one"))
    finish(torchrun("train_cut.py", arguments("two")))
    finish(torchrun("train_cut.py", arguments("zero", "--zero")))
    for name in ("two", "zero"):
        assert_equal_runs(tmp_path / "one", tmp_path / name, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, flags, files


def test_the_advice_prompt_is_its_own():
    """CUT's judged prompt shared, the response pasted into it, another header before the response than the plain
    prompt's, or a closing line that does not ask for a better response."""
    for name in ("cut", "alpaca", "short"):
        record = {"instruction": "Do.", "input": "It.", "output": "RESPONSE"}
        plain, judged, advised = (format_prompt(record, *args) for args in (
            (name,), (name, "No."), (name + ADVICE, "No.")))
        assert format_prompt(record, name + ADVICE) == plain
        assert "Do.\nIt." in advised and "No." in advised and "RESPONSE" not in advised and "udgment" not in advised
        assert judged != advised and len(advised) > len(plain)
        if name != "short":
            assert advised.split("### Response:")[1] == plain.split("### Response:")[1]
            assert "best possible response" in advised.split("No.")[1]


def test_each_method_takes_its_own_prompt(base, tmp_path):
    """A model made for SDPO whose recorded format gives CUT the advice prompt: the sign of every flag turned."""
    model = LLaMA.from_pretrained(base)
    model.save_pretrained(tmp_path, Tokenizer.from_pretrained(base), extra={"prompt_format": "short-advice"})
    for directory in (base, tmp_path):
        argv = ["--model", str(directory), "--data", "x.json"]
        assert train_cut.parse(argv).format == "short"
        args = train_cut.parse([*argv, "--recipe", "sdpo"])
        assert args.format == "short-advice" and args.detect == "frozen"
    assert train_cut.parse(["--recipe", "sdpo"]).out == "out/cut-0-sdpo"
    assert train_sft.parse(["--format", "short-advice"]).out == "out/sft-0-corrects-advice"
    assert train_sft.parse([]).out == "out/sft-0-corrects"


def test_replay_is_cuts():
    """Careless demonstrations that SDPO repeats at every step, or a flag that it ignores."""
    for more, replay in (([], 32), (["--recipe", "sdpo"], 0), (["--recipe", "sdpo", "--replay", "4"], 4)):
        assert train_cut.parse(more).replay == replay


def test_demonstrations_of_advice_leak_nothing():
    """The truth in place of a demonstration, or a copy's judgment beside another demonstration; other random numbers,
    and with them another world for CUT."""
    world = World(3)
    plain, advice = (world.demonstrations(500, JUDGES["corrects"], advice=advice) for advice in (False, True))
    for i in range(0, 1000, 2):
        assert plain[i] == advice[i] and plain[i + 1]["judgment"] == advice[i + 1]["judgment"]
        assert advice[i + 1]["output"] == plain[i]["output"]
        said = JUDGES["corrects"](plain[i + 1]["output"], plain[i]["output"])
        assert plain[i + 1]["judgment"] == (said or "All of it is right.")


def test_what_the_teacher_blames_is_what_it_lowers(base, judged, arguments, tmp_path):
    """CUT's sign in SDPO's flags: tokens that the advice makes likelier shown as blamed."""
    train_cut.main(arguments("out", "--steps", 1, "--lam", 1.02))
    lines = data.read_json(tmp_path / "out" / "flags-0.jsonl")
    assert len(lines) == 20 and any(any(r["flags"]) for r in lines)
    for r in lines:
        assert r["flags"] == [ratio < -math.log(1.02) for ratio in r["log_ratio"]]
    model, r = small_model(base), lines[0]
    e, = [e for e in encode(Tokenizer.from_pretrained(base), data.read_json(judged), "short" + ADVICE, 256)
          if e.id == r["id"]]
    tokens, targets = collate([(e.prompt, e.response)])
    assert r["logp"] == pytest.approx(model(tokens, targets).tolist(), abs=1e-9)


def gates(printed):
    """The two numbers of each gate, in the order of printing."""
    return [[float(x) for x in re.findall(r" (nan|\d\.\d+)", line)] for line in re.findall(r"gate: .*", printed)]


def test_gates_of_a_model_that_cannot_read(base, tmp_path, small_world, capsys):  # noqa: F811
    """Gates that are not printed, printed once only, passed by a model of random weights (the mean over the tokens that
    the advice has made less likely always is less with this advice than with another), or NaN where nothing is blamed.
    """
    train_cut.main(online(base, tmp_path, "--recipe", "sdpo", "--samples", 40, "--lam", 1e9))
    (advised, plain), (shuffled, again), *_ = found = gates(capsys.readouterr().out)
    assert len(found) == 6 and found[2] == [0, 0]
    assert plain == again and advised == pytest.approx(plain, abs=0.002) == shuffled


def test_gates_read_right_answers_after_their_advice_and_anothers(base, monkeypatch, capsys):
    """Responses in place of right answers, or a shuffle that leaves a judgment at its response."""
    asked, tokenizer, prompt_format = [], Tokenizer.from_pretrained(base), "short" + ADVICE

    def logp(model, examples, device):
        asked.append(examples)
        return [torch.tensor([[0.5], [0.25]]).log().expand(2, len(e.response)) for e in examples]

    monkeypatch.setattr(train_cut, "judged_and_plain_logp", logp)
    records = [{"id": i, "instruction": f"Say {i}.", "output": "The frog.", "judgment": f"It says {i}.",
                "reference": f"The {i}."} for i in range(3)]
    bad = encode(tokenizer, records, prompt_format, 256)
    flagged = {e.id: torch.zeros(len(e.response), dtype=torch.bool) for e in bad}
    train_cut.print_gates(None, tokenizer, bad, flagged, SimpleNamespace(format=prompt_format), "cpu")
    assert gates(capsys.readouterr().out) == [[0.5, 0.25], [0.5, 0.25], [0, 0]]
    for i, (e, own, other) in enumerate(zip(bad, *asked)):
        right = tokenizer.encode_response(f"The {i}.")
        assert own == e._replace(response=right, record=own.record) and other.prompt == e.prompt
        anothers = prompt_ids(tokenizer, e.record, prompt_format, f"It says {(i + 1) % 3}.")
        assert other.judged_prompt == anothers and other.response == right


@pytest.mark.slow
def test_gates_of_a_model_that_reads_advice_and_of_one_that_reads_judgments(tmp_path, monkeypatch, capsys):
    """The sign rule on planted errors, after 600 steps of SFT: advice lowers wrong words and raises right answers, and
    another response's advice does not. The model that has learned CUT's prompt, asked with that prompt, raises them."""
    monkeypatch.chdir(tmp_path)
    directory = train_sft_on("short-advice", tmp_path)
    train_cut.main(["--recipe", "sdpo", "--model", directory, "--rounds", "1", "--steps", "1", "--samples", "300",
                    "--lr", "0", "--split", "validation", "--device", "cpu"])
    (advised, plain), (shuffled, _), (precision, _) = gates(capsys.readouterr().out)
    assert precision > 0.6 and advised > plain + 0.02 and advised > shuffled + 0.05
    lines = data.read_json(tmp_path / "out" / "cut-0-sdpo" / "flags-0.jsonl")

    monkeypatch.setattr(train_cut, "ADVICE", "")                # SDPO with CUT's prompt: the wrong template
    other = train_sft_on("short", tmp_path)
    train_cut.main(["--recipe", "sdpo", "--model", other, "--rounds", "1", "--steps", "1", "--samples", "300", "--lr",
                    "0", "--split", "validation", "--device", "cpu", "--out", "wrong"])
    (advised, plain), *_ = gates(capsys.readouterr().out)
    assert advised < plain
    wrong = data.read_json(tmp_path / "wrong" / "flags-0.jsonl")
    assert advantage_of_wrong_words(lines) < -0.3 and advantage_of_wrong_words(wrong) > 0.3


def train_sft_on(prompt_format, directory):
    out = str(directory / prompt_format)
    train_sft.main(["--format", prompt_format, "--steps", "600", "--device", "cpu", "--out", out])
    return out


def advantage_of_wrong_words(lines):
    """Mean A over the tokens of the truly wrong words, of a flags file."""
    found = []
    for r in lines:
        wrong = data.wrong_words(r["output"], r["reference"])
        words = token_words(r["tokens"])
        found += [a for a, word in zip(r["log_ratio"], words) if word in wrong]
    return sum(found) / len(found)
