"""Benchmark of a PPO step beside the same step in plain transformers, split into rollout, scoring and update:

  python tests/bench_ppo.py             the built-in world's models (made if they are not there) and a 106 M LLaMA
  python tests/bench_ppo.py small       only the built-in world's

Both do the same work, in alternate runs: equally many rollouts of the same instructions at temperature 1 with the same
length limit, the same number of epochs and updates, all weights trained, fp32, at learning rate 0, so that responses
keep their length. The plain step is the usual loop around transformers: generate() on left-padded prompts, log-softmax
of full logits over prompt and response for policy and reference, every row padded to the longest, all rows until the
last one has finished. (TRL's PPO trainer is not among the test requirements.) Ours is train_ppo.py as it is launched;
its seconds are those of its metrics.jsonl. Rates are response tokens a second, medians over steps; the first step of
each run is left out.
"""
import copy
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_ppo  # noqa: E402
import train_sft  # noqa: E402
from data import World, prompt_ids, read_json, world_tokenizer, write_json_lines  # noqa: E402
from losses import gae, kl_estimate, masked_mean, ppo_policy_loss, ppo_value_loss, shape_rewards, whiten  # noqa: E402
from model import Config, LLaMA, RewardModel  # noqa: E402

PHASES = ("rollout", "scoring", "update")


class PlainPPO:
    """The same step around transformers."""

    def __init__(self, sft, reward, tokenizer, count, batch, new):
        self.policy = transformers.AutoModelForCausalLM.from_pretrained(sft, dtype=torch.float32)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        self.reward, self.critic = classifier.requires_grad_(False), copy.deepcopy(classifier).requires_grad_(True)
        self.optimizer = torch.optim.AdamW([*self.policy.parameters(), *self.critic.parameters()], lr=0.0, eps=1e-5)
        self.tokenizer, self.count, self.batch, self.new = tokenizer, count, batch, new

    def logp(self, model, tokens, mask, width):
        """Log-probabilities of the last `width` tokens of every row, by way of all logits."""
        logits = model(tokens, attention_mask=mask).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[:, -width:, 0]

    def values(self, model, tokens, mask):
        """The scalar head at every position: (B, T)."""
        return model.score(model.model(tokens, attention_mask=mask)[0]).squeeze(-1)

    def step(self, prompts):
        """One step -> (seconds by phase, response tokens)."""
        clock, eos = [time.perf_counter()], self.tokenizer.eos
        # --- rollout
        longest = max(map(len, prompts))
        left = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        prompt_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            tokens = self.policy.generate(left, attention_mask=prompt_mask, do_sample=True, top_k=0,
                                          max_new_tokens=self.new, eos_token_id=eos, pad_token_id=0)
        clock.append(time.perf_counter())

        # --- scoring
        response = tokens[:, longest:]                                      # (B, T)
        is_eos = response == eos
        finished_before = is_eos.cumsum(1) - is_eos.long() > 0
        real = (~finished_before).float()                                   # 1 up to the first EOS
        mask, width = torch.cat([prompt_mask, real.long()], 1), response.shape[1]
        last = real.sum(1).long() - 1
        with torch.no_grad():
            old_logp, ref_logp = (self.logp(m, tokens, mask, width) * real for m in (self.policy, self.reference))
            values = self.values(self.critic, tokens, mask)[:, longest - 1:-1] * real
            scores = self.values(self.reward, tokens, mask)[torch.arange(len(tokens)), longest + last]
        rewards = shape_rewards(scores, kl_estimate(old_logp, ref_logp, "k1"), last, 0.05)
        advantages, returns = gae(rewards, values, 1.0, 0.95)
        advantages = whiten(advantages, real)
        clock.append(time.perf_counter())

        # --- update
        parameters = [*self.policy.parameters(), *self.critic.parameters()]
        for _ in range(2):
            for part in torch.randperm(len(tokens)).split(self.batch):
                logp = self.logp(self.policy, tokens[part], mask[part], width)
                now = self.values(self.critic, tokens[part], mask[part])[:, longest - 1:-1]
                policy_loss = ppo_policy_loss(logp, old_logp[part], advantages[part], 0.2)
                value_loss = ppo_value_loss(now, values[part], returns[part], 0.2)
                loss = masked_mean(policy_loss, real[part]) + 0.1 * masked_mean(value_loss, real[part])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
        clock.append(time.perf_counter())
        seconds = [end - start for start, end in zip(clock, clock[1:])]
        return seconds, int(real.sum())


def ours(sft, reward, asked, count, batch, new, steps, folder):
    """The same of each step of train_ppo.py, the first left out."""
    flags = {"model": sft, "reward": reward, "data": asked, "format": "short", "rollouts": count, "batch-size": batch,
             "micro-batch-size": batch, "max-new-tokens": new, "steps": steps + 1, "warmup": 1, "lr": 0.0,
             "out": folder, "device": "cpu"}
    command = [sys.executable, str(ROOT / "train_ppo.py"), "ppo"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, capture_output=True)
    found = []
    for line in read_json(folder / "metrics.jsonl")[1:]:
        seconds = [line[f"seconds_{phase}"] for phase in PHASES]
        found.append((seconds, round(line["length"] * count)))
    return found


def table(name, sft, reward, tokenizer, asked, count, batch, new, steps, repeats):
    prompts = [prompt_ids(tokenizer, r, "short") for r in read_json(asked)]
    plain = PlainPPO(sft, reward, tokenizer, count, batch, new)
    plain.step(prompts[:count])                                             # warms up
    found = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(repeats):                                            # A B A B: a slow minute hits both
            found["ours"] += ours(sft, reward, asked, count, batch, new, steps, Path(folder, str(k)))
            for i in range(steps):
                start = (k * steps + i) * count % (len(prompts) - count)
                found["plain"].append(plain.step(prompts[start:start + count]))
    print(f"{name}: {count} rollouts of at most {new} tokens, 2 epochs, batches of {batch}, "
          f"{torch.get_num_threads()} threads")
    rates = {}
    for which, rows in found.items():
        line = f"  {which:<6}"
        for i, phase in enumerate(PHASES):
            seconds = statistics.median(seconds[i] / tokens for seconds, tokens in rows)
            line += f" {phase} {1e3 * seconds:7.2f} ms/token "
        rates[which] = 1 / statistics.median(sum(seconds) / tokens for seconds, tokens in rows)
        mean = statistics.mean(tokens for _, tokens in rows)
        print(f"{line}  {rates[which]:8,.0f} tokens/s, {mean:,.0f} tokens a step")
    print(f"  ratio  {rates['ours'] / rates['plain']:.2f}", flush=True)


def random_models(folder, tokenizer):
    """Writes a policy and a reward model of 106 M parameters with random weights, into folder/policy and /reward."""
    config = Config(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=8,
                    num_attention_heads=12, num_key_value_heads=12, head_dim=64)
    torch.manual_seed(0)
    policy = LLaMA(config)
    # Random weights would hardly ever end a response. Number 0 of the residual stream is made a constant, and EOS's row
    # of the head reads it: about one chance in 30 at every token, so that lengths differ as those of a trained model.
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 0.02
        for block in policy.model.layers:
            block.self_attn.o_proj.weight[0], block.mlp.down_proj.weight[0] = 0.0, 0.0
        policy.lm_head.weight[:, 0] = 0.0
        constant = policy.model(torch.arange(100, 200)[None])[..., 0].mean()
        policy.lm_head.weight[tokenizer.eos, 0] = math.log(config.vocab_size / 30) / constant
    policy.save_pretrained(folder / "policy", tokenizer, extra={"prompt_format": "short"})
    RewardModel(config).save_pretrained(folder / "reward", tokenizer, extra={"prompt_format": "short"})
    print(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.0f} M parameters, random weights")


def main():
    folder, tokenizer = Path("out/bench"), world_tokenizer()
    asked, records = folder / "asked.jsonl", []
    for r in World(0).instructions("train", 3000, "unlabeled"):
        records.append({k: r[k] for k in ("id", "instruction", "input")})
    write_json_lines(asked, records)
    sft, reward = train_sft.built_in(0, "corrects"), train_ppo.built_in_reward(0, 0.25)
    table("the built-in world's model", sft, reward, tokenizer, asked, 128, 64, 32, 6, 3)
    if "small" not in sys.argv[1:]:
        random_models(folder, tokenizer)
        table("a LLaMA of that size", folder / "policy", folder / "reward", tokenizer, asked, 8, 4, 48, 1, 3)


if __name__ == "__main__":
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}))
    main()
