"""Supervised fine-tuning: demonstrations -> policy. The reference script, which the other two are read against.

  python train_sft.py                                          the built-in world, from random weights
  python train_sft.py --model DIR --data sft.json              a LLaMA checkpoint and AlpacaFarm's demonstrations
  torchrun --nproc_per_node 8 train_sft.py --model ...         the same on eight GPUs

The loss is the negative log-likelihood of the response given the prompt, averaged over the response tokens of the whole
step. Many methods are this loss on other data (--recipe): preferred outputs only (FeedME), outputs after a control
token (reward conditioning), responses after their judgment (Hindsight).

metrics.jsonl in the run folder has a line for each step:
  loss        nats per response token; falls to about 0.1 in the built-in world
  lr          learning rate
  grad_norm   before clipping; constantly above --clip: lower the learning rate
  tokens      response tokens of the step, over all ranks
  seconds     of the step
"""
import argparse
import math
from pathlib import Path

import torch

from data import (
    ADVICE, FORMATS, JUDGES, Batches, HelpFormatter, InputError, Tokenizer, World, chunks, collate, encode, fraction,
    in_range, nonnegative_float, nonnegative_int, positive_int, print0, read_conditioning, read_demonstrations,
    read_feedme, read_forward, read_judge_training, read_judged, run_main, world_tokenizer)
from losses import nll_token_loss
from model import (
    ATTENTION_MODULES, DTYPES, MLP_MODULES, Config, LLaMA, Run, add_lora, changed_flag, check_finite,
    check_memory, distribute, lora_layers, lr_at, make_optimizer, memory_estimate, merge_lora, on_meta,
    rank, read_config, save_adapter, set_execution, setup_device, share, world_size)

# Defaults: (with --data, in the built-in world). With --data they are AlpacaFarm's, but for --max-length (512 there).
DEFAULTS = {
    "format": ("alpaca", "short"),
    "max_length": (1024, 256),
    "batch_size": (128, 32),
    "micro_batch_size": (4, 8),
    "steps": (None, 2400),
    "epochs": (3.0, None),
    "lr": (2e-5, 3e-3),
    "beta2": (0.999, 0.95),
    "lora_rank": (0, 0),
    "save_every": (500, 500),
}

# How --data becomes demonstrations; the functions in data.py describe each.
RECIPES = {
    "demonstrations": read_demonstrations,
    "feedme": read_feedme,
    "conditioning": read_conditioning,
    "hindsight": read_judged,
    "forward": read_forward,
    "judge": read_judge_training,
}


# ----------------------------------------------------------------------------------------------------------------------
# The lesson


def train(model, examples, steps, peak, seed, run, args):
    """The training loop: demonstrations. train_cut.py has the same one, with a second kind of micro-batch."""
    warmup = math.ceil(args.warmup * steps)
    batches = Batches([e.size() for e in examples], args.batch_size, seed)
    for step in run.steps(steps, "sft"):
        batch = [examples[i] for i in batches(step)]              # the whole step's examples, on every rank
        total = sum(len(e.response) for e in batch)               # response tokens, over all ranks
        # A rank for which the last batch of an epoch has no example takes part with an empty response.
        local = share(batch) or [batch[0]._replace(response=[], judged_prompt=None)]
        micro = [sft_batch(part, run.device) for part in chunks(local, args.micro_batch_size)]

        loss_sum = 0.0
        for i, (tokens, targets) in enumerate(micro):
            # DDP averages gradients over ranks in the last backward pass only; it reads this switch in forward.
            model.require_backward_grad_sync = i == len(micro) - 1
            loss, _ = model(tokens, targets, nll_token_loss)      # LLaMA.forward: a sum over tokens
            loss = loss / total
            (loss * world_size()).backward()                      # DDP takes the mean over ranks; we want the sum
            loss_sum += loss.item()

        lr = lr_at(step, peak, warmup, steps)
        loss, norm = run.update(loss_sum, lr, [e.id for e in batch])
        run.log(loss=loss, lr=lr, grad_norm=norm, tokens=total)


def sft_batch(part, device):
    """Examples -> tokens (b, T), targets (b, T)."""
    return collate([(e.prompt, e.response) for e in part], device)


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


def load_examples(args):
    """The tokenizer and the examples: of --data, or of the built-in world."""
    if args.data:
        tokenizer = Tokenizer.from_pretrained(args.model)
        records = RECIPES[args.recipe](args.data)
    else:
        tokenizer = world_tokenizer()
        count = args.batch_size * args.steps // 4               # so that each example is seen twice
        records = World(args.seed).demonstrations(count, JUDGES[args.judge], advice=ADVICE in args.format)
    return tokenizer, encode(tokenizer, records, args.format, args.max_length, hindsight=True)


def main(argv=None):
    args = parse(argv)
    device = set_up(args)

    # --- data, before the model: mistakes surface early
    tokenizer, examples = load_examples(args)
    per_epoch = -(-len(examples) // args.batch_size)
    steps = args.steps or math.ceil(args.epochs * per_epoch)
    print0(f"{len(examples)} examples, {steps} steps of {args.batch_size} over {world_size()} ranks; an epoch's "
           f"last batch has {len(examples) - (per_epoch - 1) * args.batch_size}")

    # --- memory estimate: the longest examples in one micro-batch
    if args.model:
        config, _ = read_config(args.model, quiet=True)
    else:
        # A matrix of 96 columns needs larger initial weights than one of 4096: 0.08 is near 1 / sqrt(96).
        config = Config(vocab_size=tokenizer.vocab_size, initializer_range=0.08)
    rows = min(args.micro_batch_size, args.batch_size // world_size())
    estimate_memory(config, rows * max(e.size() for e in examples), args, device)

    # --- model and optimizer
    dtype = DTYPES[args.dtype]
    if args.model:
        model = LLaMA.from_pretrained(args.model, dtype, device)
    else:
        model = LLaMA(config).to(device, dtype)
    prepare(model, args, device)
    optimizer = make_optimizer(model, betas=(0.9, args.beta2), zero=args.zero)
    run = start_run(model, optimizer, args)

    train(distribute(model), examples, steps, args.lr, args.seed, run, args)

    control = 0 if args.recipe == "conditioning" else None      # the control token that asks for good answers
    save_run(model, tokenizer, args, reward_token=control)
    return run.finish()


def built_in(seed, judge, device="", advice=""):
    """The directory of the built-in world's SFT model, which the other scripts start from."""
    argv = ["--seed", str(seed), "--judge", judge, "--device", device, "--format", "short" + advice]
    return make_once(main, argv, parse(argv))


# ----------------------------------------------------------------------------------------------------------------------
# What the three train scripts share before their loops


def set_up(args):
    """Joins the process group, checks the flags that depend on them, seeds; returns the device."""
    device = setup_device(args.device)
    if args.data and not args.model:
        raise InputError("--data needs --model, a checkpoint directory whose tokenizer reads it")
    if args.batch_size % world_size():
        lower = args.batch_size // world_size() * world_size() or world_size()
        raise InputError(f"--batch-size {args.batch_size} is not a multiple of the {world_size()} ranks: use {lower} "
                         "or another number of ranks")
    check_folder(args)
    torch.manual_seed(args.seed)
    return device


def check_folder(args):
    """Keeps what a run folder holds: an unfinished run, unless --resume goes on with it, and a finished one with other
    flags. --resume in a folder without a save starts from the beginning, so the same command always goes on."""
    unfinished, config = Path(args.out, "resume.pt").is_file(), Path(args.out, "config.json").is_file()
    if args.resume and not unfinished:
        if config and not args.overwrite:
            raise InputError(f"{args.out} is finished, there is nothing to resume: leave --resume out")
        print0(f"{args.out}: nothing of this run was saved yet, so it starts from the beginning")
        args.resume = False
    elif unfinished and not (args.resume or args.overwrite):
        raise InputError(f"{args.out} holds an unfinished run: go on with --resume, or start over with --overwrite")
    elif config and not (args.resume or args.overwrite):
        # The built-in models that are not given are made, and named, later.
        now = {name: value for name, value in vars(args).items() if value or name not in ("model", "reward")}
        if changed := changed_flag(read_config(args.out, quiet=True)[1].get("run") or {}, now):
            raise InputError(f"{args.out} holds a model of another run ({changed}): give another --out, or --overwrite")


def make_once(main, argv, args):
    """Runs main(argv) unless its run folder is finished, and resumes it if it was stopped; returns the folder. args:
    what argv means, for a warning if the folder was made with other flags."""
    out, unfinished = args.out, Path(args.out, "resume.pt").is_file()
    if Path(out, "config.json").is_file() and not unfinished:
        now = {name: value for name, value in vars(args).items() if name not in ("model", "reward")}
        changed = changed_flag(read_config(out, quiet=True)[1].get("run") or {}, now)
        print0(f"using {out}, made earlier (delete it to make it again)" + f": {changed} by default" * bool(changed))
        return out
    print0(f"first, {out} is made")
    if main([*argv, "--resume"] if unfinished else argv):
        raise SystemExit(130)                                   # stopped by the user
    return out


def lora_modules(args):
    """The linear layers that --lora-rank adapts."""
    return MLP_MODULES + (ATTENTION_MODULES if args.lora_attention else ())


def estimate_memory(config, tokens, args, device, copies=1):
    """Prints the memory estimate of a step with `tokens` tokens in one micro-batch; InputError if it cannot fit.
    copies: of the weights that are trained."""
    model = on_meta(LLaMA, config).to(DTYPES[args.dtype])
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, lora_modules(args))
    ranks = world_size() if args.zero else 1
    estimate = memory_estimate(model, tokens, args.checkpoint_activations, args.autocast, ranks)
    if not args.lora_rank:
        estimate["weights"] *= copies
    check_memory(estimate, device)


def prepare(model, args, device):
    """Adds the adapters that --lora-rank asks for and sets how the blocks run."""
    if args.lora_rank:
        trained = add_lora(model, args.lora_rank, args.lora_alpha, lora_modules(args))
        print0(f"training {trained / 1e6:.1f} M adapter parameters, the rest is frozen")
    set_execution(model, device, args.checkpoint_activations, args.compile, args.autocast)


def start_run(model, optimizer, args, **state):
    """A Run with these flags, resumed if --resume is given; `state`: further entries to save for resuming."""
    if args.model and Path(args.out).resolve() == Path(args.model).resolve():
        raise InputError(f"--out {args.out} is the --model, which the run would overwrite: choose another")
    return Run(model, optimizer, args.out, vars(args), args.clip, args.save_every, args.resume, state)


def save_run(model, tokenizer, args, **extra):
    """Writes the trained model into the run folder, on rank 0: whole, for transformers and vLLM, and if it was trained
    with LoRA its adapters in adapter/, in PEFT's layout. `extra` goes into config.json, beside format and flags."""
    check_finite(model)
    if rank():
        return
    if lora_layers(model):
        save_adapter(model, Path(args.out, "adapter"), args.model)
        merge_lora(model.to("cpu"))                             # a GPU may have no room to merge
    extra.update(prompt_format=args.format, run=vars(args))
    model.save_pretrained(args.out, tokenizer, extra)


def add_common_flags(p):
    """The flags of all train scripts. Those without a default here take the script's DEFAULTS."""
    p.add_argument("--model", default="", help="checkpoint directory to start from")
    p.add_argument("--data", default="", help="JSON or JSONL to train on (default: the built-in world)")
    p.add_argument("--format", choices=FORMATS, help="prompt format")
    p.add_argument("--out", default="", help="run folder (default: in out/, named after method and seed or data)")
    p.add_argument("--resume", action="store_true", help="continue from the last save in the run folder")
    p.add_argument("--overwrite", action="store_true", help="start over in a folder that holds another run")
    p.add_argument("--seed", type=nonnegative_int, default=0, help="seed of world, weights, sampling and data order")
    p.add_argument("--batch-size", type=positive_int, help="examples per optimizer update, over all ranks")
    p.add_argument("--micro-batch-size", type=positive_int, help="examples per forward pass: as many as fit")
    p.add_argument("--max-length", type=positive_int, help="tokens; longer records are left out")
    p.add_argument("--lr", type=nonnegative_float, help="peak learning rate")
    p.add_argument("--clip", type=in_range(float, 1e-6), default=1.0, help="maximum gradient norm (inf: no clipping)")
    p.add_argument("--lora-rank", type=nonnegative_int, help="rank of the adapters (0: train all weights)")
    p.add_argument("--lora-alpha", type=nonnegative_float, default=16.0, help="adapters are scaled by alpha / rank")
    p.add_argument("--lora-attention", action="store_true", help="adapt the attention projections too")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best available)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32",
                   help="of weights and arithmetic (float16 would need loss scaling)")
    p.add_argument("--checkpoint-activations", action="store_true", help="activation checkpointing: less memory")
    p.add_argument("--save-every", type=positive_int, help="steps between saves for --resume")


def add_execution_flags(p):
    """Further flags of train_sft.py and train_cut.py."""
    p.add_argument("--autocast", action="store_true", help="matmuls in bf16 on fp32 weights")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    p.add_argument("--zero", action="store_true", help="shard the optimizer state over ranks (ZeRO stage 1)")


def fill_defaults(args, defaults):
    """Gives flags that were not given their default: the first of the pair with --data, else the second. The default
    of --format is the one that the model was trained with, if its config.json records it."""
    if args.model and Path(args.model, "config.json").is_file():
        recorded = read_config(args.model, quiet=True)[1].get("prompt_format")
        if args.format and recorded not in (None, args.format):
            print0(f"{args.model} was trained with --format {recorded}, this run has --format {args.format}")
        args.format = args.format or recorded
    for name, (with_data, built_in_world) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, with_data if args.data else built_in_world)


def folder_name(args, method, *parts):
    """The default run folder: method, then model and data or the world's seed, then what else tells runs apart."""
    told_apart = [Path(args.model).name, Path(args.data).stem] if args.data else [str(args.seed)]
    return "-".join(["out/" + method, *told_apart, *filter(None, parts)])


def describe_defaults(defaults):
    """The table of defaults at the end of --help."""
    rows = ["defaults                    with --data   in the built-in world"]
    for name, (with_data, built_in_world) in defaults.items():
        flag = "--" + name.replace("_", "-")
        values = ["-" if value is None else value for value in (with_data, built_in_world)]
        rows.append(f"  {flag:<25} {values[0]:<13} {values[1]}")
    return "\n".join(rows)


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, epilog=describe_defaults(DEFAULTS),
                                formatter_class=HelpFormatter)
    add_common_flags(p)
    add_execution_flags(p)
    p.add_argument("--recipe", choices=RECIPES, default="demonstrations", help="how --data is read")
    p.add_argument("--judge", choices=JUDGES, default="corrects", help="whose wording the built-in data teaches")
    p.add_argument("--steps", type=positive_int, help="optimizer steps (default: from --epochs)")
    p.add_argument("--epochs", type=nonnegative_float, help="passes over --data, if --steps is not given")
    p.add_argument("--warmup", type=fraction, default=0.03, help="fraction of the steps; then cosine")
    p.add_argument("--beta2", type=fraction, help="AdamW's decay of squared gradients")
    args = p.parse_args(argv)
    fill_defaults(args, DEFAULTS)
    if args.recipe != "demonstrations" and not args.data:
        raise InputError(f"--recipe {args.recipe} reads a file: give --data and --model")
    kind = args.recipe if args.data else args.judge
    args.out = args.out or folder_name(args, "sft", kind.removeprefix("demonstrations"), args.format.partition("-")[2])
    return args


if __name__ == "__main__":
    run_main(main, "--resume")
