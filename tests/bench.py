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
from data import (IGNORE, Batches, World, chunks, collate, encode, format_prompt, judge_corrects,  # noqa: E402
                  world_tokenizer)
from losses import cut_token_loss, detect, fused_loss, nll_token_loss, plain_logp  # noqa: E402
from model import Config, LLaMA, generate, make_optimizer  # noqa: E402

N, D, V = 4096, 1024, 32000


def one_cut_loss(variant, dtype):
    """Prints the median seconds and the extra bytes of one variant, in this process."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    hidden = (torch.randn(2, N, D) / 8).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) / 8).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,))
    (hidden[:, :64] @ weight.T).float().sum().backward()                    # warms up threads and gradient buffers
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

    def token_loss(logp):                                                   # logp (2, n)
        return cut_token_loss(logp[0], logp[1], detect(logp[0], logp[1], 1.1), 1.0) / N

    for _ in range(3):
        start = time.perf_counter()
        if variant == "fused":
            loss, _ = fused_loss(hidden, weight, targets, token_loss)
        else:
            logits = (hidden @ weight.T).float()                            # (2, N, V) in full
            loss = token_loss(plain_logp(logits, targets.expand(2, N))).sum()
            del logits
        loss.backward()
        seconds.append(time.perf_counter() - start)
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": statistics.median(seconds), "bytes": extra * 1024, "loss": loss.item()}))


def cut_loss_table():
    print(f"CUT loss, 2 x {N} tokens, width {D}, vocabulary {V}, {torch.get_num_threads()} threads", flush=True)
    for dtype in ("float32", "bfloat16"):
        found = {"fused": [], "full": []}
        for _ in range(3):                                                  # A B A B: other load hits both
            for variant in found:
                out = subprocess.check_output([sys.executable, __file__, variant, dtype], text=True)
                found[variant].append(json.loads(out))
        medians = {}
        for variant, rows in found.items():
            medians[variant] = {key: statistics.median(r[key] for r in rows) for key in rows[0]}
            r = medians[variant]
            print(f"  {dtype:<9} {variant:<6} {r['seconds']:6.2f} s  {r['bytes'] / 1e9:5.2f} GB  loss {r['loss']:.4f}")
        seconds, memory = (medians["fused"][key] / medians["full"][key] for key in ("seconds", "bytes"))
        print(f"  {dtype:<9} ratio  {seconds:6.2f}    {memory:5.2f}", flush=True)


def compare(name, ours, theirs):
    """Alternates two functions of a number, which return how many tokens they did, and prints tokens a second."""
    rates = {"ours": [], "transformers": []}
    for number in range(6):
        for label, run in (("ours", ours), ("transformers", theirs)):
            start = time.perf_counter()
            tokens = run(number)
            rates[label].append(tokens / (time.perf_counter() - start))
    a, b = (statistics.median(rates[label][1:]) for label in ("ours", "transformers"))      # the first one warms up
    print(f"{name:<9} ours {a:8,.0f} tokens/s   transformers {b:8,.0f} tokens/s   ratio {a / b:.2f}", flush=True)


def sampling(tokenizer, world, model, theirs):
    records, new = world.instructions("validation", 256), 32
    prompts = [tokenizer.encode_prompt(format_prompt(r, "short")) for r in records]
    longest = max(map(len, prompts))
    left = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])    # transformers wants padding on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def ours(number):
        return sum(len(y) for ys in generate(model, prompts, new, -1) for y in ys)          # -1: no EOS

    @torch.no_grad()
    def transformers(number):
        out = theirs.generate(left, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new,
                              min_new_tokens=new, pad_token_id=0)
        return (out.shape[1] - longest) * len(prompts)

    compare("sampling", ours, transformers)


def sft_steps(tokenizer, world, model, theirs):
    examples = encode(tokenizer, world.demonstrations(2000, judge_corrects, "bench"), "short", 256, hindsight=True)
    batches = Batches([e.size() for e in examples], 32, 0)
    optimizer, their_optimizer = make_optimizer(model), torch.optim.AdamW(theirs.parameters(), lr=1e-4)

    def our_step(rows):
        for part in chunks(rows, 8):
            model(*collate(part), nll_token_loss)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    def their_step(rows):                                                   # a bare loop: one padded batch a step
        tokens, targets = collate(rows)
        labels = torch.cat([torch.full((len(rows), 1), IGNORE), targets], dim=1)[:, :-1]
        theirs(tokens, labels=labels, attention_mask=torch.ones_like(tokens)).loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()

    def twenty(step):
        def run(number):
            tokens = 0
            for k in range(20 * number, 20 * number + 20):
                rows = [(examples[i].prompt, examples[i].response) for i in batches(k)]
                step(rows)
                tokens += sum(len(prompt) + len(response) for prompt, response in rows)
            return tokens
        return run

    compare("SFT step", twenty(our_step), twenty(their_step))


def against_transformers():
    import transformers
    torch.manual_seed(0)
    tokenizer, world, directory = world_tokenizer(), World(0), Path("out/bench")
    model = LLaMA(Config(vocab_size=tokenizer.vocab_size, initializer_range=0.08))
    model.save_pretrained(directory, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    sampling(tokenizer, world, model, theirs)
    sft_steps(tokenizer, world, model, theirs)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_cut_loss(*sys.argv[1:])
    else:
        cut_loss_table()
        against_transformers()
