"""Imports go down only, heavy packages come late: the architecture as `inlay.__doc__` draws it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import inlay

SOURCE = Path(inlay.__file__).parent
WIDTH = 29  # column where the drawing begins to explain
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "accelerate",
    "ml_dtypes",
    "modelscope",
    "huggingface_hub",
    "ray",
    "vllm",
    "datasets",
    "pyarrow",
    "matplotlib",
}


def layers() -> list[list[str]]:
    """The lines of the drawing, from top to bottom."""
    assert inlay.__doc__ is not None
    drawing = inlay.__doc__.partition("Layers, imports go down only:")[2].partition("From Python:")[0]
    return [line[:WIDTH].split() for line in drawing.splitlines() if line.strip()]


LAYERS = layers()
RANK = {name: len(LAYERS) - i for i, line in enumerate(LAYERS) for name in line}
FILES = sorted(SOURCE.rglob("*.py"))


def part(module: str) -> str | None:
    """`inlay.plan.build` -> `plan`; None for the package itself."""
    words = module.split(".")
    return words[1] if len(words) > 1 else None


def module_name(path: Path) -> str:
    words = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def imports(path: Path, *, at_module_level: bool = False) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, inside functions too; names taken from `inlay` itself by their modules."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = _module_level(tree) if at_module_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run on import: not those in functions, nor under TYPE_CHECKING."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue += node.orelse
            continue
        yield node
        queue += ast.iter_child_nodes(node)


def test_the_drawing_names_every_folder_and_top_file_once() -> None:
    there = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    there |= {p.stem for p in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    drawn = [name for line in LAYERS for name in line]
    assert sorted(drawn) == sorted(there)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path: Path) -> None:
    here = part(module_name(path))
    if here is None or here == "__main__":
        return
    for module, line in imports(path):
        there = part(module) if module.split(".")[0] == "inlay" else None
        if there is None or there == here or there not in RANK:
            continue
        assert RANK[there] < RANK[here], f"{path.name}:{line}: {here} imports {there}"


def test_modules_of_one_folder_do_not_import_each_other_in_a_circle() -> None:
    graph = {module_name(p): {m for m, _ in imports(p)} for p in FILES}
    for module, found in graph.items():
        inner = {m for m in found if m in graph and m != module}
        # `from package import module` asks for the module; that its package is loaded first is no circle.
        graph[module] = {m for m in inner if not any(other.startswith(m + ".") for other in inner)}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path, module])
        if module not in done:
            for other in sorted(graph[module] - {"inlay"}):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph.keys() - {"inlay"}):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_heavy_package_is_imported_at_module_level(path: Path) -> None:
    found = {
        f"{module}, line {line}"
        for module, line in imports(path, at_module_level=True)
        if module.split(".")[0] in HEAVY
    }
    assert not found


def test_a_function_does_not_import_upwards_either() -> None:
    """The walk of these tests sees imports inside functions: here is one that must be found."""
    assert any(module == "inlay.errors" for module, _ in imports(SOURCE / "cli" / "main.py"))
    assert not any(m == "inlay.errors" for m, _ in imports(SOURCE / "cli" / "main.py", at_module_level=True))


@pytest.mark.parametrize("folder", ["tuners"])
def test_the_maths_knows_no_files(folder: str) -> None:
    for path in (SOURCE / folder).glob("*.py"):
        for module, line in imports(path):
            assert part(module) not in ("checkpoints", "adapters", "output"), f"{path.name}:{line}"
            assert module not in ("pathlib", "io", "shutil"), f"{path.name}:{line}"


def test_verification_does_not_trust_run() -> None:
    for path in (SOURCE / "verification").glob("*.py"):
        assert not any(part(m) == "run" for m, _ in imports(path) if m.startswith("inlay."))


LIGHT = "import sys; {}; print(sorted(n for n in ('numpy', 'torch', 'transformers', 'peft', 'tqdm', 'regex') if n in sys.modules))"


@pytest.mark.parametrize("code", ["import inlay", "import inlay.cli.main", "import inlay; inlay.__version__"])
def test_importing_the_package_loads_nothing_heavy(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_merging_on_the_processor_needs_no_torch() -> None:
    code = "import inlay.plan.build, inlay.run.execute, inlay.verification.verify, inlay.cli.export"
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code)], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft"} & set(eval(done.stdout))


def test_every_public_name_is_there() -> None:
    for name in inlay.__all__:
        assert getattr(inlay, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        inlay.nothing_of_this_name  # noqa: B018
