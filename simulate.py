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
from pathlib import Path

from tqdm import tqdm

from data import FORMATS, InputError, Tokenizer, format_prompt, join, read_json, units
from model import DTYPES, LLaMA, gather_lists, generate, read_config, setup_distributed, write_json


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
    with tqdm(total=n * len(rows), desc=label, disable=rank > 0, leave=False, unit="response") as bar:
        ids = generate(model, prompts, max_new_tokens, tokenizer.eos, n=n, temperature=temperature, top_p=top_p,
                       top_k=top_k, seed=seed, rows=rows, batch_size=batch_size, progress=bar.update) if rows else []
    texts = dict(gather_lists(zip(rows, [[tokenizer.decode_response(y) for y in ys] for ys in ids])))
    return [texts[i] for i in range(len(records))]
