"""Every script has the parts that the README promises, and its pseudo-code and its code cite each other."""

import ast
import dataclasses
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS, fields, load
from sync_plumbing import copy_from, differences
from tasks import TASKS

NUMBER = r"[A-Z]?\d+[a-z]?"
COMMON = {  # the words of the flags that mean the same in every script
    "env_kwargs": "arguments of the environment, as JSON",
    "device": "auto, cpu or cuda; auto is cuda if there is a GPU",
    "num_threads": "CPU threads of PyTorch; small networks rarely gain from more",
    "compile": "compile the updates with torch.compile; on a GPU they become CUDA graphs",
    "run_dir": "folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>",
    "eval_every": "environment steps between evaluations; 0 evaluates at the end only",
    "checkpoint_every": "environment steps between checkpoints; 0 saves at the end only",
    "resume": "folder of a run to continue with that run's settings",
    "capture_video": "film the first episode of the last evaluation",
}
INSTALLED_AS = {"ale_py": "ale-py", "cv2": "opencv-python-headless"}
CONVENTIONS = {
    "gamma": "γ",
    "rho": "ρ",
    "alpha": "α",
    "lam": "λ",
    "epsilon": "ε",
    "td_lambda": "λ",
    "epsilon_start": "ε",
}


def text_of(script: str) -> str:
    return (ROOT / script).read_text()


def docstring(script: str) -> str:
    return ast.get_docstring(ast.parse(text_of(script)), clean=False)


def numbered_lines(script: str) -> list[str]:
    """The numbers of the pseudo-code in the docstring."""
    return re.findall(rf"^ {{1,8}}({NUMBER})  +\S", docstring(script), re.M)


def cited_lines(script: str) -> set[str]:
    """The numbers in the comments `# line 4`, `# lines 5, 6`, `# lines 12-14`."""
    cited = set()
    for token in tokenize.generate_tokens(io.StringIO(text_of(script)).readline):
        if token.type == tokenize.COMMENT:
            for numbers in re.findall(rf"\blines? ({NUMBER}(?:(?:, | and |-){NUMBER})*)", token.string):
                for part in re.split(", | and ", numbers):
                    first, _, last = part.partition("-")
                    whole = range(int(first), int(last) + 1) if last and first.isdigit() and last.isdigit() else ()
                    cited |= {first, *([last] if last else []), *map(str, whole)}
    return cited


def dependencies(script: str) -> set[str]:
    """The packages of the PEP 723 block, without extras."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text_of(script))
    meta = tomllib.loads(re.sub(r"^# ?", "", block.group(1), flags=re.M))
    assert meta["requires-python"] == ">=3.10"
    return {re.split(r"[\[=<>]", name)[0].lower() for name in meta["dependencies"]}


def imports(script: str, top_level_only: bool) -> set[str]:
    """The packages that a script imports, by the names they are installed by; the standard library left out."""
    tree = ast.parse(text_of(script))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    packages = {"tensorboard" for name in names if name == "torch.utils.tensorboard"}
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    return packages | {INSTALLED_AS.get(root, root) for root in roots}


def requirements() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.split(r"[\[=]", line)[0].lower() for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_names_paper_notes_and_command(script):
    text = docstring(script)
    assert re.search(r"^Paper +\S", text, re.M) and "http" in text
    assert re.search(r"^Notes +\S", text, re.M)
    assert re.search(rf"^Run +python {script}", text, re.M)
    assert re.search(r"^Result", text, re.M), "the verified figure and the command that gave it"


@pytest.mark.parametrize("script", SCRIPTS)
def test_pseudo_code_and_comments_cite_each_other(script):
    numbers = numbered_lines(script)
    assert len(numbers) >= 3
    assert len(numbers) == len(set(numbers)), "a number stands twice"
    assert set(numbers) == cited_lines(script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_declares_what_the_file_imports(script):
    declared = dependencies(script)
    assert imports(script, top_level_only=True) <= declared
    default_suite = load(script).Args().env_id.split(".")[0] if "env_id" in fields(script) else ""
    text = text_of(script)
    by_name = {package for package in declared if f'"{package}")' in text}  # imported only where it is needed
    assert declared <= imports(script, top_level_only=False) | by_name | {default_suite}
    assert "moviepy" in declared or "capture_video" not in fields(script)
    assert declared <= requirements()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_stands_alone(script):
    folders = {"algos", "marl_algos", "tests", "benchmark"}
    own = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert not imports(script, top_level_only=False) & (own | folders | {"envs"})
    ast.parse(text_of(script), feature_version=(3, 10))


@pytest.mark.parametrize("script", SCRIPTS)
def test_order_of_the_parts(script):
    text = text_of(script)
    parts = ["# /// script", '"""', "\nimport ", "\n@dataclass\nclass Args:", "\ndef train(args: Args) -> dict:"]
    parts += ["\n# Plumbing", '\nif __name__ == "__main__":\n    main()\n']
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    assert text.endswith(parts[-1])


def lengths(script: str) -> tuple[int, int]:
    """How many lines a script of this kind may have above the plumbing, and in all."""
    words = text_of(script)
    if script.startswith("marl"):
        if "def attention" in words or "def importance" in words:  # more networks in the mixer than qmix
            return 330, 800
        if "def coalitions" in words:  # two boxes of pseudo-code
            return 340, 815
        if 'Literal["base", "alt"]' in words:  # two algorithms
            return 355, 820
        if "def update_latent" in words:  # a discriminator and a latent policy beside qmix
            return 385, 850
        if "def specialisation" in words:  # a role encoder, a role decoder and two more losses beside qmix
            return 395, 860
        if "class TransitionReplay" in words:  # a replay of its own, and where MAgent2 has its agents
            return 315, 800
        return (395, 875) if "class TeamRollout" in words else (305, 770)
    if "def conjugate_gradient" in words:  # second derivatives and a line search
        return 315, 695
    if "def make_expert" in words:  # experts and demonstrations; GAIL is PPO with a discriminator
        return (340, 840) if "class Rollout" in words else (265, 690)
    if "class DeepSea" in words:  # PPO and what explores for it, and a world to explore
        return (410, 870) if "class Archive" in words else (330, 790)
    if "class Rollout" in words or "class FrameReplay" in words:
        return 290, 825 if "distributed" in words else 695
    if "class Workers" in words:  # processes, and what is said when one of them crashes
        return 280, 675
    if "class WorldModel" in words:  # three learners, for vectors and images
        return 520, 1000
    if "class Hindsight" in words:  # two learners, and environments with goals
        return 290, 735
    if "class SumTree" in words:
        return 280, 650
    return (240, 600) if "class ReplayBuffer" in words else (195, 525)


@pytest.mark.parametrize("script", SCRIPTS)
def test_length(script):
    """The algorithm fits on a few screens, and the plumbing does not outgrow it."""
    text = text_of(script)
    above, whole = lengths(script)
    assert text[: text.index("\n# Plumbing")].count("\n") <= above
    assert text.count("\n") <= whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_copied_file_forgets_to_change(script):
    """A test file of its own; a title, papers and a result that no other script has."""
    assert (ROOT / "tests" / f"test_{Path(script).stem}.py").exists()
    for part in (r"\A.*", r"^Paper .*?(?=^Notes )", r"^Result .*"):
        texts = {other: re.search(part, docstring(other), re.M | re.S if part != r"\A.*" else 0) for other in SCRIPTS}
        assert [other for other in SCRIPTS if texts[other].group() == texts[script].group()] == [script], part


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_is_explained(script):
    tree = ast.parse(text_of(script))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    for field, below in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr), ast.unparse(field)
        name, words = field.target.id, below.value.value
        assert words == COMMON.get(name, words), name
        assert CONVENTIONS.get(name, "") in words, f"{name}: its symbol"
    assert {"seed", "run_dir"} <= fields(script)
    assert dataclasses.is_dataclass(load(script).Args)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_among_the_settings_has_a_range(script):
    """check() refuses what lies outside a range, and NaN and infinity with it."""
    calls = [node for node in ast.walk(ast.parse(text_of(script))) if isinstance(node, ast.Call)]
    checked = {word.arg for call in calls if getattr(call.func, "id", "") == "check" for word in call.keywords}
    common = {"total_timesteps", "eval_episodes", "num_threads", "eval_every", "checkpoint_every", "seed"}
    numbers = {
        field.name
        for field in dataclasses.fields(load(script).Args)
        if field.default_factory is not dataclasses.MISSING or type(field.default) in (int, float)
    }
    assert numbers <= checked | common


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_listed_in_readme_and_benchmark(script):
    assert f"]({script})" in (ROOT / "README.md").read_text()
    assert any(task.script == script for task in TASKS)


def test_same_name_same_code():
    assert not differences(), "python tests/sync_plumbing.py --from SCRIPT copies one script's plumbing to the others"


def test_sync_plumbing_shows_and_repairs_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr("sync_plumbing.ROOT", tmp_path)
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def f():\n    return 1\n\n\n# Plumbing\n\n\ndef g():\n    return 1\n\n\ndef only():\n    pass\n")
    two.write_text("def f():\n    return 2\n\n\n# Plumbing\n\n\n@cache\ndef g():\n    return 2\n")
    assert len(differences([one, two])) == 1
    assert copy_from(one, [one, two]) == ["two.py: g"]
    assert not differences([one, two])
    assert two.read_text() == "def f():\n    return 2\n\n\n# Plumbing\n\n\ndef g():\n    return 1\n"


def test_requirements_are_exact_and_installed():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w-]+)(?:\[[\w,-]+\])?==([\w.]+)", line).groups()
            assert importlib.metadata.version(name).split("+")[0] == version


def test_top_level_is_the_promised_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    promised = {"algos", "marl_algos", "tests", "benchmark", "requirements.txt", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= promised
