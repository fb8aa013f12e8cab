"""Same name, same code: show, and repair, copies of the plumbing that differ.

    python tests/sync_plumbing.py                         show what differs
    python tests/sync_plumbing.py --from algos/td3.py     copy its functions and classes to every script that has them

Plumbing is every function and class below a script's `# Plumbing` line.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("algos/*.py"), *ROOT.glob("marl_algos/*.py")])


def plumbing(script: Path) -> dict[str, str]:
    """Name -> source, decorators included, of the functions and classes below the `# Plumbing` line."""
    text = script.read_text()
    lines = text.splitlines()
    below = next((i for i, line in enumerate(lines, 1) if line.startswith("# Plumbing")), len(lines))
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno > below:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            sources[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return sources


def differences(scripts: list[Path] = SCRIPTS) -> list[str]:
    """A unified diff for every copy that differs from the first script that has the name."""
    first, found = {}, []
    for script in scripts:
        for name, source in plumbing(script).items():
            origin, original = first.setdefault(name, (script, source))
            if source != original:
                diff = difflib.unified_diff(
                    original.splitlines(), source.splitlines(), str(origin), str(script), "", "", 1
                )
                found.append(f"{name} differs\n" + "\n".join(diff))
    return found


def copy_from(origin: Path, scripts: list[Path] = SCRIPTS) -> list[str]:
    """Give every script the origin's version of the names that both have; returns what changed."""
    changed, new = [], plumbing(origin)
    for script in scripts:
        for name, source in plumbing(script).items():
            if source != new.get(name, source):
                script.write_text(script.read_text().replace(source, new[name]))
                changed.append(f"{script.relative_to(ROOT)}: {name}")
    return changed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--from"]:
        print("\n".join(copy_from(Path(sys.argv[2]).resolve())) or "nothing to change")
    else:
        print("\n\n".join(differences()) or "all copies are the same")
        sys.exit(bool(differences()))
