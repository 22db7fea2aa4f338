"""Prints docs/api.md, the public names with their docstrings, from the sources: python docs/api.py > docs/api.md"""

import ast
import re
import textwrap
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "vitfn"
# beside what vitfn itself offers
MODULES = ("tree", "rng", "schedules", "losses", "optim", "layers", "vit", "lora", "errors")
_SPECIAL = ("__init__", "__call__")  # methods that are shown with their class's fields

INTRODUCTION = """# API reference

What `import vitfn` offers, then the modules beneath it that are of use by themselves: signatures and docstrings as the
sources have them. `python docs/api.py > docs/api.md` writes this page.

B is a batch, C channels, H and W an image's height and width (H also heads, beside d, the features of one), N tokens,
D the hidden size, M the MLP's width, K classes. Images are normalised. A `Tree` is a nested dict of tensors, whose
'/'-joined paths are the names in Google's files. What is wrong with an argument or a file is an `InputError`.
"""

Definition = ast.FunctionDef | ast.ClassDef


class Module:
    """A module's source, its docstring, and its public functions and classes by name, in its own order."""

    def __init__(self, name: str):
        self.source = (SOURCES / f"{name}.py").read_text()
        self.tree = ast.parse(self.source)
        self.doc = markdown(self.tree)
        self.public = {
            node.name: node for node in self.tree.body if isinstance(node, Definition) and node.name[0] != "_"
        }

    def head(self, function: ast.FunctionDef) -> str:
        """A function's source up to its body."""
        body = function.body[0]
        lines = self.source.splitlines()[function.lineno - 1 : body.lineno]
        lines[-1] = lines[-1][: body.col_offset]
        return textwrap.dedent("\n".join(lines)).rstrip().removesuffix(":")


def exported() -> dict[str, str]:
    """The names that `import vitfn` offers, in the order of its imports, each with its module."""
    imports = [node for node in Module("__init__").tree.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: str(node.module).removeprefix("vitfn.") for node in imports for alias in node.names}
    return {name: module for name, module in modules.items() if module != "vitfn"}  # a submodule


def methods(node: Definition) -> list[ast.FunctionDef]:
    """A class's public methods and properties."""
    return [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name[0] != "_"]


def markdown(node: ast.Module | Definition) -> str:
    """A docstring so that Markdown shows it as it is: what is not in backticks is escaped."""
    return re.sub(r"(`[^`]*`)|([*<])", lambda found: found[1] or "\\" + found[2], ast.get_docstring(node) or "")


def entry(module: Module, node: Definition, name: str) -> str:
    """A public function or class: its heading, its signature or fields, its docstring, and a class's methods."""
    parts = [f"### `{name}`", f"```text\n{signature(module, node)}\n```", markdown(node)]
    if isinstance(node, ast.ClassDef) and methods(node):
        parts.append("\n".join(method(module, each) for each in methods(node)))
    return "\n\n".join(parts)


def signature(module: Module, node: Definition) -> str:
    """A function's signature; a class's fields, and how it is made or called."""
    if isinstance(node, ast.FunctionDef):
        return module.head(node)
    bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
    fields = [ast.get_source_segment(module.source, each) for each in node.body if isinstance(each, ast.AnnAssign)]
    special = [module.head(each) for each in node.body if getattr(each, "name", "") in _SPECIAL]
    return "\n".join([f"class {node.name}{bases}", *(textwrap.indent(str(part), "    ") for part in fields + special)])


def method(module: Module, node: ast.FunctionDef) -> str:
    """A method or property as an item of a list."""
    is_property = any(ast.unparse(each) == "property" for each in node.decorator_list)
    shown = node.name if is_property else module.head(node).removeprefix("def ").replace("(self, ", "(")
    return f"- `{shown}`: " + textwrap.indent(markdown(node), "  ").lstrip()


def reference() -> str:
    """The page."""
    offered = exported()
    found = {name: Module(name) for name in {*MODULES, *offered.values()}}
    parts = [INTRODUCTION.rstrip(), "## `vitfn`", Module("__init__").doc]
    parts += [entry(found[module], found[module].public[name], f"vitfn.{name}") for name, module in offered.items()]
    for name in MODULES:
        parts += [f"## `vitfn.{name}`", found[name].doc]
        own = {key: node for key, node in found[name].public.items() if offered.get(key) != name}
        parts += [entry(found[name], node, f"{name}.{key}") for key, node in own.items()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
