"""What holds for the repository as a whole, read off its text: shared blocks, flags, imports, widths, README."""
import ast
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TRAIN = ["train_sft.py", "train_cut.py", "train_ppo.py"]
SCRIPTS = [*TRAIN, "simulate.py", "evaluate.py", "data.py"]
RUNTIME = ["model.py", "losses.py", *SCRIPTS]
PACKAGES = {"torch", "sentencepiece", "numpy", "tqdm", "requests"}
TOP = {"README.md", "requirements.txt", "LICENSE", "assets", "tests", *RUNTIME}


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def nodes(name, *kinds):
    return [n for n in ast.walk(ast.parse(text(name))) if isinstance(n, kinds)]


def set_up(name):
    """The lines from the banner `# --- set-up` up to the next banner."""
    lines = text(name).splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("# --- set-up")]
    assert len(starts) == 1, f"{name} has {len(starts)} set-up banners"
    end = next(i for i in range(starts[0] + 1, len(lines)) if lines[i].lstrip().startswith("# ---"))
    return lines[starts[0]:end]


@pytest.mark.parametrize("name", TRAIN[1:])
def test_the_set_up_block_is_shared_to_the_letter(name):
    """One of three copies is mended and the others keep the bug."""
    block = set_up(TRAIN[0])
    assert len([line for line in block if line.strip()]) >= 6
    assert set_up(name) == block


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
    if name not in SCRIPTS:
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


def test_compared_methods_parse(capsys):
    """`evaluate.py compare` passes train_cut.py a flag that it no longer has, some hours into the comparison."""
    methods = importlib.import_module("evaluate").METHODS
    assert len(methods) > 4
    assert [r for flags in methods.values() if (r := refusal("train_cut.py", flags))] == []


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
   python evaluate.py compare
   ```
"""
    commands = [c for c in map(script_and_argv, command_lines(markdown)) if c]
    assert commands == [
        ("train_sft.py", ["--steps", "3", "--seed", "1"]), ("train_cut.py", ["--lam", "1.1"]),
        ("simulate.py", ["--model", "out/a b", "--prompt", "Say it; now", "--seed", "1"]),
        ("evaluate.py", ["--model", "X"]), ("evaluate.py", ["compare"])]
    assert [refusal(*c) for c in commands] == [None] * 5
    for argv in (["--no-such-flag"], ["--steps", "many"], ["stray"]):
        assert "SystemExit" in refusal("train_sft.py", argv)
    assert refusal("evaluate.py", []) and refusal("other.py", [])


def test_the_optimizer_step_is_the_same_in_the_train_scripts():
    """Drift between the loops: clipping before the sync, a learning rate set late, or gradients never zeroed."""
    steps = []
    for name in TRAIN:
        lines = [line.split("  #")[0].strip() for line in text(name).splitlines()]
        begins = [i for i, line in enumerate(lines) if line.startswith("norm =")]
        assert len(begins) == (4 if name == "train_ppo.py" else 1)          # one loop, or one for each stage
        for begin in begins:
            end = next(i for i in range(begin, len(lines)) if lines[i].startswith("optimizer.zero_grad"))
            steps.append([line for line in lines[begin:end + 1] if not line.startswith("lr =")])
    assert len(steps) == 6 and len(steps[0]) == 5 and all(step == steps[0] for step in steps)
