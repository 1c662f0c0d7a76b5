"""Speed and memory beside the plain ways, in one run, alternately, medians:  python tests/bench.py  (about 8 minutes)

1. The CUT loss on 2 x 4,096 response tokens, width 1,024, vocabulary 32,000, forward and backward: fused, against full
   logits of both passes as in the released code (log-softmax in its place, which is kinder to it than the original).
   Each measurement is a process of its own; memory is its resident peak above what its inputs took.
2. Sampling and one SFT step of the built-in world's model, against transformers with the same weights and data.
"""
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import Batches, World, collate, encode, format_prompt, split, world_tokenizer  # noqa: E402
from losses import IGNORE, cut_token_loss, detect, fused_loss, nll_token_loss, plain_logp  # noqa: E402
from model import Config, LLaMA, generate, make_optimizer  # noqa: E402
from simulate import judge_corrects  # noqa: E402

N, D, V = 4096, 1024, 32000


def one_cut_loss(form, dtype):
    """Median seconds and extra bytes of one form, in this process."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    hidden = (torch.randn(2, N, D) / 8).to(kind).requires_grad_()
    weight = (torch.randn(V, D) / 8).to(kind).requires_grad_()
    targets = torch.randint(0, V, (N,))
    (hidden[:, :64] @ weight.T).float().sum().backward()                    # warms up threads and gradient buffers
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

    def per_token(logp, _):
        return cut_token_loss(logp[0], logp[1], detect(logp[0], logp[1], 1.1), 1.0) / N

    for _ in range(3):
        start = time.perf_counter()
        if form == "fused":
            loss, _ = fused_loss(hidden, weight, targets, per_token)
        else:
            logp = plain_logp((hidden @ weight.T).float(), targets.expand(2, N))            # (2, N, V) in full
            loss = per_token(logp, None).sum()
        loss.backward()
        times.append(time.perf_counter() - start)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": statistics.median(times), "bytes": extra * 1024, "loss": loss.item()}))


def cut_loss_table():
    print(f"CUT loss, 2 x {N} tokens, width {D}, vocabulary {V}, {torch.get_num_threads()} threads")
    for dtype in ("float32", "bfloat16"):
        found = {"fused": [], "full": []}
        for _ in range(3):                                                  # A B A B: the machine's moods hit both
            for form in found:
                out = subprocess.check_output([sys.executable, __file__, form, dtype], text=True)
                found[form].append(json.loads(out))
        mid = {form: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for form, rows in found.items()}
        for form, r in mid.items():
            print(f"  {dtype:<9} {form:<6} {r['seconds']:6.2f} s  {r['bytes'] / 1e9:5.2f} GB  loss {r['loss']:.4f}")
        print(f"  {dtype:<9} ratio  {mid['fused']['seconds'] / mid['full']['seconds']:6.2f}    "
              f"{mid['fused']['bytes'] / mid['full']['bytes']:5.2f}")


def against_transformers():
    import transformers
    torch.manual_seed(0)
    tokenizer, world = world_tokenizer(), World(0)
    ours = LLaMA(Config(vocab_size=tokenizer.vocab_size, initializer_range=0.08))
    directory = Path("out/bench")
    ours.save_pretrained(directory, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = world.instructions("validation", 256)
    prompts = [tokenizer.encode_prompt(format_prompt(r, "short")) for r in asked]
    longest, new = max(map(len, prompts)), 32
    left = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])    # transformers wants padding on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    examples = encode(tokenizer, world.demonstrations(2000, judge_corrects, "bench"), "short", 256, hindsight=True)
    batches = Batches([e.size() for e in examples], 32, 0)
    optimizers = {"ours": make_optimizer(ours), "theirs": torch.optim.AdamW(theirs.parameters(), lr=1e-4)}

    def sample_ours():
        return sum(len(y) for ys in generate(ours, prompts, new, -1, temperature=1.0) for y in ys)      # -1: no EOS

    @torch.no_grad()
    def sample_theirs():
        out = theirs.generate(left, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new,
                              min_new_tokens=new, pad_token_id=0)
        return (out.shape[1] - longest) * len(prompts)

    def step_ours(step):
        rows = [(examples[i].prompt, examples[i].response) for i in batches(step)]
        for part in split(rows, 8):
            ours(*collate(part), nll_token_loss)[0].backward()
        optimizers["ours"].step()
        optimizers["ours"].zero_grad()
        return sum(len(p) + len(y) for p, y in rows)

    def step_theirs(step):                                                  # a bare loop: one padded batch a step
        rows = [(examples[i].prompt, examples[i].response) for i in batches(step)]
        tokens, targets = collate(rows)
        labels = torch.cat([torch.full((len(rows), 1), IGNORE), targets], dim=1)[:, :-1]
        theirs(tokens, labels=labels, attention_mask=torch.ones_like(tokens)).loss.backward()
        optimizers["theirs"].step()
        optimizers["theirs"].zero_grad()
        return sum(len(p) + len(y) for p, y in rows)

    for name, a, b, repeat in (("sampling", sample_ours, sample_theirs, 1), ("SFT step", step_ours, step_theirs, 20)):
        rates = {"ours": [], "transformers": []}
        for round_ in range(6):
            for label, run in (("ours", a), ("transformers", b)):
                start = time.perf_counter()
                tokens = sum(run(round_ * repeat + k) if repeat > 1 else run() for k in range(repeat))
                rates[label].append(tokens / (time.perf_counter() - start))
        mid = {label: statistics.median(r[1:]) for label, r in rates.items()}                # the first warms up
        print(f"{name:<9} ours {mid['ours']:8,.0f} tokens/s   transformers {mid['transformers']:8,.0f} tokens/s   "
              f"ratio {mid['ours'] / mid['transformers']:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_cut_loss(*sys.argv[1:])
    else:
        cut_loss_table()
        against_transformers()
