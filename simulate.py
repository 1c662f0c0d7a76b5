"""Responses and feedback: sampling from a model, and judges that say what is wrong with a response.

  python simulate.py --model out/sft-0-corrects --prompt "Say what 7 plus 5 is."        answers one typed prompt
  python simulate.py --model DIR --data instructions.json --out outputs.json            answers a file of instructions
  python simulate.py --model DIR --data instructions.json --judge corrects --out judged.json      and judges the answers

The judges here know the right answer (`reference`) and compare word by word. `corrects` names the wrong word and the
right one, `points` only the wrong one: the kind of judgment that is cheap to give, and that plain supervised learning
cannot use. Both quote the words before the fault, because that is how a reader, and a small model, finds the place.
"""
import argparse
import difflib
import sys

from tqdm import tqdm

from data import FORMATS, InputError, Tokenizer, format_prompt, join, read_instructions, units, write_json_lines
from model import DTYPES, LLaMA, gather_lists, generate, print0, read_config, setup_distributed


# ----------------------------------------------------------------------------------------------------------------------
# The judge that knows the truth


def differences(response, reference):
    """Word diff of two texts: a list of (begin, end, right words), "words begin .. end - 1 of the response should be
    these". begin == end: something is missing before that word."""
    a, b = units(response), units(reference)
    blocks = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes()
    return [(i1, i2, b[j1:j2]) for kind, i1, i2, j1, j2 in blocks if kind != "equal"]


def count_errors(response, reference):
    """Number of wrong, missing and superfluous words."""
    return sum(max(end - begin, len(right)) for begin, end, right in differences(response, reference))


def wrong_words(response, reference):
    """Indices of the wrong words of a response; a missing word counts at the word after it (the number of words stands
    for the end)."""
    return {i for begin, end, _ in differences(response, reference) for i in range(begin, max(end, begin + 1))}


def judge_reference(response, reference, style="corrects", most=3):
    """What a reader who knows the right answer says of a response, or None if nothing is wrong with it.

    style "corrects" names the wrong words and the right ones; "points" never says what would be right. At most `most`
    faults are listed. The quotation is of the same clause, at most four words before the fault."""
    words, sentences = units(response), []
    for begin, end, right in differences(response, reference)[:most]:
        start = begin
        while start > max(0, begin - 4) and words[start - 1] not in (",", "and"):
            start -= 1
        before, wrong = join(words[start:begin]), join(words[begin:end])
        said = join(words[start:end])
        if not wrong:
            what = "Something is missing" if style == "points" else f"It leaves out {join(right)}"
            sentences.append(f"{what} after {before}." if before else f"{what} before {join(words[begin:begin + 3])}.")
        elif not right:
            sentences.append(f"It says {said} and {wrong} does not belong.")
        elif style == "points":
            sentences.append(f"It says {said} and {wrong} is wrong.")
        else:
            sentences.append(f"It says {said} where it should say {join(right)}.")
    return " ".join(sentences) or None


def judge_corrects(response, reference):
    return judge_reference(response, reference, "corrects")


def judge_points(response, reference):
    return judge_reference(response, reference, "points")


JUDGES = {"corrects": judge_corrects, "points": judge_points}


def corrected(response, reference, most=3):
    """The response with the faults mended that judge_corrects lists: the answer that its judgment states."""
    words = units(response)
    for begin, end, right in reversed(differences(response, reference)[:most]):
        words[begin:end] = right
    return join(words)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def respond(model, tokenizer, records, form, *, max_new_tokens, temperature, seed, n=1, top_p=1.0, top_k=0,
            batch_size=512, rank=0, world=1, label="sampling"):
    """Answers every record: a list with n texts for each, the same on all ranks and for any number of ranks."""
    rows = list(range(len(records)))[rank::world]
    prompts = [tokenizer.encode_prompt(format_prompt(records[i], form)) for i in rows]
    with tqdm(total=n * len(rows), desc=label, disable=rank > 0, leave=False, unit="response", delay=1) as bar:
        ids = generate(model, prompts, max_new_tokens, tokenizer.eos, n=n, temperature=temperature, top_p=top_p,
                       top_k=top_k, seed=seed, rows=rows, batch_size=batch_size, progress=bar.update) if rows else []
    texts = dict(gather_lists(zip(rows, [[tokenizer.decode_response(y) for y in ys] for ys in ids])))
    return [texts[i] for i in range(len(records))]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="model directory in Hugging Face layout")
    p.add_argument("--prompt", help="one instruction, answered on the terminal")
    p.add_argument("--data", help="instructions, JSON or JSONL with the keys instruction and input (optional)")
    p.add_argument("--out", help="where the answers to --data go, as JSONL")
    p.add_argument("--judge", choices=JUDGES, help="judge the answers to --data against its key `reference`")
    p.add_argument("--format", choices=FORMATS, help="prompt format (default: what the model's config.json records)")
    p.add_argument("--n", type=int, default=1, help="answers to each instruction")
    p.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this mass")
    p.add_argument("--top-k", type=int, default=0, help="sample from this many likeliest tokens (0: all)")
    p.add_argument("--max-new-tokens", type=int, default=300, help="an answer is cut off here if it has not ended")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--batch-size", type=int, default=64, help="answers sampled side by side: what fits in memory")
    p.add_argument("--device", default="", help="cuda, mps or cpu (default: the best there is)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and arithmetic")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if bool(args.prompt) == bool(args.data) or bool(args.data) != bool(args.out):
        raise InputError("give either --prompt TEXT, or --data FILE and --out FILE")
    if args.judge and args.n > 1:
        raise InputError(f"--judge takes one answer to each instruction, --n is {args.n}: sample first, then judge")
    rank, world, device = setup_distributed(args.device)
    if args.data:
        records = read_instructions(args.data, reference=bool(args.judge))
    else:
        records = [{"instruction": args.prompt, "input": ""}]
    tokenizer = Tokenizer.from_pretrained(args.model)
    _, raw = read_config(args.model, quiet=True)
    form = args.format or raw.get("prompt_format")
    if form is None:
        raise InputError(f"{args.model}/config.json does not record a prompt format: give --format, one of "
                         f"{', '.join(FORMATS)}")
    model = LLaMA.from_pretrained(args.model, DTYPES[args.dtype], device)
    texts = respond(model, tokenizer, records, form, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                    seed=args.seed, n=args.n, top_p=args.top_p, top_k=args.top_k, batch_size=args.batch_size,
                    rank=rank, world=world)
    if args.prompt:
        print0("\n".join(texts[0]))
        return 0
    outputs = []
    for r, ys in zip(records, texts):
        r = {**r, "output": ys[0] if args.n == 1 else ys, "generator": str(args.model)}
        if args.judge:
            r["judgment"] = JUDGES[args.judge](r["output"], r["reference"])
        outputs.append(r)
    if rank == 0:
        write_json_lines(args.out, outputs)
        empty = sum(not y.strip() for ys in texts for y in ys)
        print(f"{args.out}: {len(outputs)} records{f', {empty} answers are empty' if empty else ''}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
