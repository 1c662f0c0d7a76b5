"""What holds for the repository as a whole: imports, flags, sizes, widths, and what README promises about the code."""
import ast
import difflib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TRAIN = ["train_sft.py", "train_cut.py", "train_ppo.py"]
BENCHES = ["tests/bench_methods.py", "tests/bench_rlp.py", "tests/bench_sdpo.py", "tests/bench_tree.py"]
SCRIPTS = [*TRAIN, "simulate.py", "evaluate.py", "data.py"]
RUNTIME = ["model.py", "losses.py", *SCRIPTS]
PACKAGES = {"torch", "sentencepiece", "numpy", "tqdm", "requests"}
TOP = {"README.md", "requirements.txt", "LICENSE", "assets", "tests", *RUNTIME}


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def nodes(name, *kinds):
    return [n for n in ast.walk(ast.parse(text(name))) if isinstance(n, kinds)]


# name: the files of ours that it may import, so that reading goes upwards only
FLOORS = {
    "losses": set(), "data": set(),
    "model": {"losses", "data"},
    "train_sft": {"losses", "data", "model"},
    "simulate": {"data", "model"},
    "evaluate": {"data", "model", "simulate"},
    "train_cut": {"losses", "data", "model", "simulate", "evaluate", "train_sft"},
    "train_ppo": {"losses", "data", "model", "simulate", "evaluate", "train_sft"},
}


@pytest.mark.parametrize("name", FLOORS)
def test_imports_go_upwards(name):
    """A circle of imports, or a surprising one: train_sft.py needs simulate.py, data.py needs model.py."""
    found = {a.name for n in nodes(f"{name}.py", ast.Import) for a in n.names}
    found |= {n.module for n in nodes(f"{name}.py", ast.ImportFrom)}
    assert sorted(found & set(FLOORS) - FLOORS[name]) == []


@pytest.mark.parametrize("name", RUNTIME)
def test_functions_fit_a_screen(name):
    """A function that does everything. (Parsers are lists.)"""
    long = [n.name for n in nodes(name, ast.FunctionDef) if n.end_lineno - n.lineno >= 70 and n.name != "parse"]
    assert long == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_read_and_read_flags_exist(name):
    """A flag does nothing, or a misspelt args.x fails after hours of training."""
    declared, positional = set(), set()
    for call in nodes(name, ast.Call):
        if getattr(call.func, "attr", "") == "add_subparsers":
            positional |= {k.value.value for k in call.keywords if k.arg == "dest"}
        if getattr(call.func, "attr", "") == "add_argument":
            assert not any(k.arg == "dest" for k in call.keywords), f"{name}: a flag under another name"
            flag = call.args[0].value
            (declared if flag.startswith("--") else positional).add(flag.lstrip("-").replace("-", "_"))
    uses = [n for n in nodes(name, ast.Attribute) if isinstance(n.value, ast.Name) and n.value.id == "args"]
    read = {n.attr for n in uses if isinstance(n.ctx, ast.Load)}
    assert declared, f"{name} declares no flag: does this test still see them?"
    assert sorted(declared - read) == []
    source = "train_sft.py" if name in TRAIN else "simulate.py" if name == "evaluate.py" else None
    common = set(re.findall(r'"--([\w-]+)"', text(source))) if source else set()
    declared |= {flag.replace("-", "_") for flag in common}
    assert sorted({n.attr for n in uses} - declared - positional) == []


@pytest.mark.parametrize("name", RUNTIME)
def test_no_global_and_no_bare_except(name):
    """Hidden state between calls, or a Ctrl-C that is swallowed with the error."""
    assert [n.lineno for n in nodes(name, ast.Global)] == []
    assert [n.lineno for n in nodes(name, ast.ExceptHandler) if n.type is None] == []


@pytest.mark.parametrize("name", RUNTIME)
def test_imports(name):
    """A package slips in that requirements.txt does not have, and the first run on a clean machine fails."""
    local = {Path(n).stem for n in RUNTIME}
    found = {a.name.split(".")[0] for n in nodes(name, ast.Import) for a in n.names}
    found |= {(n.module or ".").split(".")[0] for n in nodes(name, ast.ImportFrom)}
    assert sorted(found - PACKAGES - local - set(sys.stdlib_module_names)) == []
    assert not any(n.level for n in nodes(name, ast.ImportFrom))


def test_requirements_are_the_packages():
    """An import without its requirement, or versions that are not pinned and give other figures than README's."""
    lines = [line.split("==") for line in text("requirements.txt").split()]
    assert {line[0] for line in lines} == PACKAGES and all(len(line) == 2 for line in lines)


def python_files():
    return sorted([*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")])


@pytest.mark.parametrize("path", python_files(), ids=lambda p: p.name)
def test_lines_fit(path):
    """Lines that wrap on a projector and in a diff of two columns."""
    wide = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert wide == []


def test_files_at_the_top():
    """A helper file, a run's output or a package creeps in beside the few files that a reader is promised."""
    ran = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode or not ran.stdout.strip():
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in ran.stdout.splitlines()}
    assert sorted(n for n in top - TOP if not n.startswith(".")) == []
    assert sorted(set(RUNTIME) - {p.name for p in ROOT.glob("*.py")}) == []


# ----------------------------------------------------------------------------------------------------------------------
# Commands that a reader will type


def command_lines(markdown):
    """The commands of all ```sh blocks: comments gone, continued lines joined, one list of words per simple command."""
    found = []
    for block in re.findall(r"^[ \t]*```(?:sh|bash|shell|console)[^\n]*\n(.*?)^[ \t]*```", markdown, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(re.sub(r"^\s*\$ ", "", line), posix=True, punctuation_chars=True)
            words.whitespace_split = True                                   # ; & | < > ( ) come as words of their own
            command = [[]]
            for word in words:
                if set(word) <= set(";&|()"):
                    command.append([])
                else:
                    command[-1].append(word)
            found += [c for c in command if c]
    return found


def script_and_argv(words):
    """(name of our script, its arguments) of a command that runs one, else None."""
    words = list(words)
    for i, word in enumerate(words):                                        # redirections are not arguments
        if set(word) <= set("<>"):
            words = words[:i]
            break
    while words and (re.match(r"\w+=", words[0]) or words[0] in ("time", "do", "then", "nohup", "env")):
        words.pop(0)
    if not words or not re.fullmatch(r"(.*/)?(python3?|torchrun)", words[0]):
        return None
    for i, word in enumerate(words[1:], 1):
        if word.endswith(".py"):
            return word.removeprefix("./"), [re.sub(r"\$\{?\w+\}?", "1", w) for w in words[i + 1:]]
        if word in ("-m", "-c"):
            return None
    return None


def refusal(name, argv):
    """What a script's parser says against a command line, or None."""
    if name not in SCRIPTS + BENCHES:
        return f"{name} is none of our scripts"
    try:
        importlib.import_module(Path(name).stem).parse(argv)
    except (SystemExit, Exception) as error:
        return f"{name} {shlex.join(argv)}: {type(error).__name__} {error}"
    return None


def test_readmes_commands_parse(capsys):
    """README shows a flag that was renamed, and the first thing a reader types fails."""
    if not (ROOT / "README.md").is_file():
        pytest.skip("README.md is not written yet")
    commands = [c for c in map(script_and_argv, command_lines(text("README.md"))) if c]
    assert commands, "README shows no command: does this test still see them?"
    assert [r for c in commands if (r := refusal(*c))] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstrings_commands_parse(name, capsys):
    """A script's own --help shows a command that its parser refuses."""
    lines = [re.split(r"\s{2,}", line.strip())[0] for line in ast.get_docstring(ast.parse(text(name))).splitlines()]
    commands = [c for line in lines if (c := script_and_argv(shlex.split(line) if "python " in line[:7] or
                                                            line.startswith("torchrun ") else []))]
    assert commands
    assert [r for c in commands if (r := refusal(*c))] == []


def test_commands_are_found_in_markdown(capsys):
    """The test above sees nothing: comments, continued lines, pipes, loops or prompts hide the commands from it."""
    markdown = """
```sh
# python train_sft.py --none
$ python train_sft.py --steps 3 \\
    --seed 1        # and 'why
CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 train_cut.py --lam 1.1 > log.txt 2>&1
for s in 0 1; do python3 simulate.py --model "out/a b" --prompt "Say it; now" --seed $s; done
pip install -r requirements.txt && python -m pytest && python evaluate.py --model X | tee log
```
python train_ppo.py --outside
```python
python train_ppo.py
```
1. In a list:
   ```sh
   python evaluate.py agreement --data x
   ```
"""
    commands = [c for c in map(script_and_argv, command_lines(markdown)) if c]
    assert commands == [
        ("train_sft.py", ["--steps", "3", "--seed", "1"]), ("train_cut.py", ["--lam", "1.1"]),
        ("simulate.py", ["--model", "out/a b", "--prompt", "Say it; now", "--seed", "1"]),
        ("evaluate.py", ["--model", "X"]), ("evaluate.py", ["agreement", "--data", "x"])]
    assert [refusal(*c) for c in commands] == [None] * 5
    for argv in (["--no-such-flag"], ["--steps", "many"], ["stray"]):
        assert "SystemExit" in refusal("train_sft.py", argv)
    assert refusal("evaluate.py", ["agreement"]) and refusal("other.py", [])


# ----------------------------------------------------------------------------------------------------------------------
# What README promises about the code


def test_readme_is_short():
    """README grows into a manual, a lab report and a changelog."""
    assert text("README.md").count("\n") <= 310 and len(text("README.md")) <= 23000


def training_loop(name):
    """The lines of the function `train`."""
    function, = [n for n in nodes(name, ast.FunctionDef) if n.name == "train"]
    return text(name).splitlines()[function.lineno - 1:function.end_lineno]


def test_the_step_diff_is_the_lesson():
    """The loops of SFT and CUT drift apart, or README shows a diff that is no longer theirs."""
    diff = difflib.unified_diff(training_loop("train_sft.py"), training_loop("train_cut.py"), n=0, lineterm="")
    changed = [line for line in diff if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert 10 < len(changed) <= 25
    assert "```diff\n" + "\n".join(changed) + "\n```" in text("README.md")


PATCHES = {"simpo": 12, "rloo": 25}


def changed_lines(name):
    lines = text(f"tests/{name}.patch").splitlines()
    return [line for line in lines if line[:1] in ("+", "-") and line[:4] not in ("+++ ", "--- ")]


def test_a_change_is_small_and_readme_shows_it():
    """Adding a pair loss or a policy gradient touches ever more places; README's diff is another one."""
    assert all(len(changed_lines(name)) <= most for name, most in PATCHES.items())
    assert f"SimPO is {len(changed_lines('simpo'))} lines" in text("README.md")
    assert f"is {len(changed_lines('rloo'))} lines" in text("README.md")
    formula = text("tests/rloo.patch").partition("+def rloo")[2].partition("\n+\n")[0]
    assert f"```diff\n+def rloo{formula}\n```" in text("README.md")


def run(script, *argv, cwd):
    done = subprocess.run([sys.executable, script, *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def world_models(tmp_path_factory):
    """A copy of the tree in which the built-in world's SFT model, pairs and reward model were made, in small."""
    tree = tmp_path_factory.mktemp("tree")
    for name in RUNTIME:
        shutil.copy(ROOT / name, tree)
    run("train_sft.py", "--steps", 1200, cwd=tree)
    world = importlib.import_module("data").World(0)
    rng, pairs = random.Random(0), []
    for r in world.instructions("train", 3000, "patch"):
        wrong = world.corrupt(r, r["reference"], rng)
        pairs.append({"instruction": r["instruction"], "reference": r["reference"], "output_1": r["reference"],
                      "output_2": wrong, "preference": 1})
    path = tree / "out" / "world-0" / "preferences-0.25-sft-0-corrects.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in pairs if r["output_1"] != r["output_2"]))
    run("train_ppo.py", "reward", "--steps", 60, cwd=tree)
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("name, command, key, change", [
    ("simpo", "simpo --steps 60 --lr 1e-3", "margin", 0.5),
    ("rloo", "ppo --group 4 --value-coef 0 --steps 20 --eval-every 20", "reward", 0.3)])
def test_the_changes_learn(name, command, key, change, world_models, tmp_path):
    """A patch that no longer applies, or a new method that runs and learns nothing."""
    tree = tmp_path / "tree"
    shutil.copytree(world_models, tree)
    subprocess.run(["git", "apply", ROOT / "tests" / f"{name}.patch"], cwd=tree, check=True)
    run("train_ppo.py", *command.split(), "--out", "out/run", cwd=tree)
    lines = (tree / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line)[key] for line in lines]
    print(name, values)
    assert sum(values[-5:]) / 5 - sum(values[:5]) / 5 > change


def test_readmes_memory_table():
    """README's numbers are those of an estimate that has changed since."""
    model = importlib.import_module("model")
    shapes = {"7 B": (4096, 11008, 32), "13 B": (5120, 13824, 40)}
    for name, (hidden, mlp, layers) in shapes.items():
        config = model.Config(vocab_size=32000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                              num_attention_heads=layers, num_key_value_heads=layers, head_dim=128)
        cells = []
        for lora, dtype, checkpoint, ranks in ((True, "bfloat16", False, 1), (True, "bfloat16", True, 1),
                                               (False, "float32", True, 1), (False, "float32", True, 8)):
            network = model.on_meta(model.LLaMA, config).to(model.DTYPES[dtype])
            if lora:
                model.add_lora(network)
            estimate = model.memory_estimate(network, 2048, checkpoint=checkpoint, ranks=ranks)
            cells.append(f"{sum(estimate.values()) / 1e9:.1f} GB")
        assert f"| {name} | {' | '.join(cells)} |" in text("README.md")
