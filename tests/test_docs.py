"""docs/ and README.md: every snippet runs and prints what is shown, links lead somewhere, the reference is complete."""

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

import vitfn

spec = importlib.util.spec_from_file_location("api", ROOT / "docs/api.py")
api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)

DOCS = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# What stands in the line before a snippet: why it is not run, or which optional packages it needs.
MARK = re.compile(r"not run: (?P<reason>.{8,})|needs (?P<packages>\w+(, \w+)*)")
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"
CLONE = ("vitfn", "benchmarks", "docs", "examples", "flags", "modelzoo", "tests")  # what snippets find around them
# torchvision, which timm imports, may have operators for CUDA alone, beside a torch for the CPU.
BEFORE_TIMM = """
try:
    import torchvision
except RuntimeError:
    import torch
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class Snippet(NamedTuple):
    """A block of bash or Python, the mark before it, and what is shown after it as its output."""

    where: str
    language: str
    text: str
    mark: str = ""
    shown: str | None = None


def snippets(name: str, text: str) -> list[Snippet]:
    """Those of a page, in order."""
    found: list[Snippet] = []
    for block in BLOCK.finditer(text):
        if block["language"] in ("bash", "python"):
            line = text.count("\n", 0, block.start("text")) + 1
            found.append(Snippet(f"{name}, line {line}", block["language"], block["text"], block["mark"] or ""))
        elif block["mark"] == "output":
            found[-1] = found[-1]._replace(shown=block["text"])
    return found


def is_run(snippet: Snippet) -> bool:
    """Whether it is to run, and can here."""
    packages = re.findall(r"\w+", snippet.mark.removeprefix("needs ")) if snippet.mark.startswith("needs ") else []
    return not snippet.mark.startswith("not run") and all(map(importlib.util.find_spec, packages))


def run(chosen: list[Snippet], folder: Path) -> list[str]:
    """What each of them prints, run in order in a folder that is like a clone."""
    for name in CLONE:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    sent = [("python", BEFORE_TIMM, "before timm")] if any("timm" in snippet.mark for snippet in chosen) else []
    sent += [(snippet.language, snippet.text, snippet.where) for snippet in chosen]
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/snippets.py"],
        input=json.dumps(sent),
        cwd=folder,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[-len(chosen) :]


def assert_alike(printed: str, shown: str) -> None:
    """The same but for spaces and for what `...` stands for, and numbers within a tenth of each other, or 0.02."""

    def pattern(part: str) -> str:
        if re.fullmatch(NUMBER, part):
            return f"({NUMBER})"
        return ".*?" if part == "..." else r"\s+" if part.isspace() else re.escape(part)

    parts = re.split(rf"({NUMBER}|\.\.\.|\s+)", shown.strip())
    found = re.fullmatch("".join(map(pattern, parts)), printed.strip(), re.S)
    assert found, f"printed:\n{printed}\nshown:\n{shown}"
    for pair in zip(found.groups(), (part for part in parts if re.fullmatch(NUMBER, part)), strict=True):
        first, second = (float(text.replace(",", "")) for text in pair)
        assert math.isclose(first, second, rel_tol=0.1, abs_tol=0.02), f"printed {pair[0]}, shown {pair[1]}:\n{printed}"


PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *DOCS)}
SNIPPETS = {name: snippets(name, text) for name, text in PAGES.items()}


# --- snippets


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, found in SNIPPETS.items() if any(map(is_run, found))])
def test_every_snippet_of_a_page_runs_and_prints_what_is_shown(name, tmp_path):
    chosen = [snippet for snippet in SNIPPETS[name] if is_run(snippet)]
    for snippet, printed in zip(chosen, run(chosen, tmp_path), strict=True):
        if snippet.shown is not None:
            assert_alike(printed, snippet.shown)


@pytest.mark.parametrize("name", PAGES)
def test_a_snippet_that_is_not_run_says_why(name):
    for snippet in SNIPPETS[name]:
        assert not snippet.mark or MARK.fullmatch(snippet.mark), snippet.where


@pytest.mark.parametrize("name", PAGES)
def test_no_snippet_goes_under_another_language(name):
    assert {block["language"] for block in BLOCK.finditer(PAGES[name])} <= {"bash", "python", "text", "yaml", ""}
    assert len(re.findall("^```", PAGES[name], re.M)) == 2 * len(BLOCK.findall(PAGES[name]))


PAGE = """
```python
x = 2
```

<!-- not run: needs four cards -->
```bash
exit 1
```

```bash
echo "x $((1 + 1)) y"
```

<!-- output -->
```text
x 2
```

<!-- needs no_such_package, torch -->
```python
import no_such_package
```

```python
print("y is", 500 * x, "or so")
```

<!-- output -->
```text
y is 1,004 ...
```
"""


def test_snippets_are_found_with_their_marks_and_share_a_session(tmp_path):
    found = snippets("page", PAGE)
    assert [snippet.where for snippet in found] == [f"page, line {line}" for line in (3, 8, 12, 22, 26)]
    assert [is_run(snippet) for snippet in found] == [True, False, True, False, True]
    chosen = [snippet for snippet in found if is_run(snippet)]
    printed = run(chosen, tmp_path)
    assert printed == ["", "x 2 y\n", "y is 1000 or so\n"]
    assert_alike(printed[2], chosen[2].shown)
    with pytest.raises(AssertionError, match="shown"):
        assert_alike(printed[1], chosen[1].shown)


@pytest.mark.parametrize(("language", "text"), [("bash", "false | true"), ("python", "assert False, 'why'")])
def test_a_snippet_that_fails_is_named(tmp_path, language, text):
    with pytest.raises(AssertionError, match="page, line 7"):
        run([Snippet("page, line 7", language, text)], tmp_path)


@pytest.mark.parametrize(
    ("printed", "shown"), [("a 1.0", "a 1.3"), ("a 1", "b 1"), ("a\nb", "a"), ("1,000", "100"), ("a", "a ... b")]
)
def test_other_outputs_are_told_apart(printed, shown):
    with pytest.raises(AssertionError):
        assert_alike(printed, shown)


# --- links


@pytest.mark.parametrize("name", [*PAGES, "BUILD.md"])
def test_links_and_names_of_files_lead_to_something(name):
    text = (ROOT / name).read_text()
    for link in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"`((?:docs|vitfn|tests|benchmarks|flags|modelzoo|\.ci)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_index_names_every_page_and_every_example():
    text = PAGES["docs/README.md"]
    assert set(re.findall(r"\]\((\w+\.md)\)", text)) == {path.name for path in DOCS} - {"README.md"}
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    if examples:
        assert set(re.findall(r"^\| `(\w+\.py)`", text, re.M)) == examples


# --- the reference

OFFERED = api.exported()
PUBLIC = [
    (module, name)
    for module in sorted({*api.MODULES, *OFFERED.values()})
    for name in api.Module(module).public
    if module in api.MODULES or OFFERED.get(name) == module
]
# (B, C, H, W), (..., D), (1, N, D), (*key.shape, *shape), (layers, 2, B), 0-d
SHAPE = re.compile(r"\((?:[A-Z]|\d|\.\.\.|\*[\w.]+|layers(?: \+ 1)?)(?:, ?[^()]*)?\)|0-d")


def test_the_reference_is_what_the_sources_say():
    assert PAGES["docs/api.md"] == api.reference(), "python docs/api.py > docs/api.md renews it"


def test_the_reference_has_every_public_name():
    def of(module) -> set[str]:
        kinds = [name for name, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        return {name for name in kinds if name[0] != "_"}

    assert of(vitfn) == set(OFFERED)
    for name in api.MODULES:
        module = importlib.import_module(f"vitfn.{name}")
        own = {key for key in of(module) if getattr(module, key).__module__ == module.__name__}
        assert own == set(api.Module(name).public)
        assert own - OFFERED.keys() <= set(re.findall(rf"^### `{name}\.(\w+)`$", PAGES["docs/api.md"], re.M))


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_a_public_function_says_what_it_does_and_which_shapes_it_takes(module, name):
    node = api.Module(module).public[name]
    for function in (node, *api.methods(node)) if isinstance(node, ast.ClassDef) else (node,):
        docstring = ast.get_docstring(function) or ""
        assert docstring.rstrip().endswith("."), function.name
        arguments = [*function.args.args, *function.args.kwonlyargs] if isinstance(function, ast.FunctionDef) else []
        types = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
        if any(re.match(r"(\w+ \| )?Tensor\b", kind) for kind in types):
            assert SHAPE.search(docstring), f"{function.name}: {docstring}"
