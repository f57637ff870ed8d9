"""Creates a stand-alone project from a recipe.

    python scripts/new_project.py mnist_cnn ../my_project
    python scripts/new_project.py recipes/mnist_cnn.py ../my_project --notebook

The folder must be new or empty. The script writes the recipe as train.py, the modules of common/ that it imports,
requirements.txt, README.md, a test and the licence; with --notebook also train.ipynb.
"""

import ast
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tomllib

from common.cli import Parser, UserError, run_script
from common.console import print_line
from common.records import commit

import nbformat
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Packages that another package imports without declaring the dependency.
UNDECLARED = {"keras": "tensorboard", "tensorflow-datasets": "importlib-resources"}
TRAINING = """## Training

A few seconds on the sample. The full training is `train(Config())`; `Config` takes every setting above, and
`data="PATH"`. Runs are written to `runs/notebook/`; `%load_ext tensorboard` and `%tensorboard --logdir runs` show
them."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", help="name or path of a recipe, such as mnist_cnn")
    parser.add_argument("folder", type=pathlib.Path, help="folder to write to; new or empty")
    parser.add_argument("--notebook", action="store_true", help="also write the recipe as a notebook, train.ipynb")
    arguments = parser.parse_args()
    write(arguments.folder, project_files(find_recipe(arguments.recipe), arguments.notebook))
    print_line(f"wrote {arguments.folder}; its README.md says how to install, train and resume")


def find_recipe(name: str) -> pathlib.Path:
    """Finds the file of a recipe by name or path."""
    file = pathlib.Path(name.removesuffix(".py") + ".py")
    for path in (file, ROOT / file, ROOT / "recipes" / file):
        if os.path.isfile(path):
            if {"Config", "train", "main"} <= {getattr(node, "name", "") for node in parse(path).body}:
                return path
            raise UserError(f"{path}: not a recipe, which defines Config, train and main; give another file")
    names = ", ".join(sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
    raise UserError(f"{name}: no such recipe; choose one of {names}, or give the path of your own")


def parse(path: pathlib.Path) -> ast.Module:
    """Returns the syntax tree of a Python file."""
    try:
        return ast.parse(path.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: can't be read as Python ({error}); correct it first") from error


def imported_names(path: pathlib.Path) -> set[str]:
    """Returns the dotted names that a file imports: both `a.b` and `a.b.c` for `from a.b import c`."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), "common")
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def needed_files(recipe: pathlib.Path) -> list[pathlib.Path]:
    """Returns the recipe, followed by all files of common/ that it imports directly or indirectly."""
    files = []
    pending = [recipe]
    while pending:
        path = pending.pop(0)
        if path not in files:
            files.append(path)
            for parts in (name.split(".") for name in sorted(imported_names(path)) if name.startswith("common")):
                for prefix in (ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)):
                    pending += filter(pathlib.Path.is_file, (prefix / "__init__.py", prefix.with_suffix(".py")))
    return files


def requirements(files: list[pathlib.Path], notebook: bool) -> list[str]:
    """Returns the packages that the files import, with the version ranges of this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    known = {canonicalize_name(Requirement(line).name): line for line in lines}
    distributions = importlib.metadata.packages_distributions()
    needed = {"pytest", "ipykernel"} if notebook else {"pytest"}
    for path in files:
        for module in {name.partition(".")[0] for name in imported_names(path)} - sys.stdlib_module_names - {"common"}:
            if module not in distributions:
                raise UserError(f"{path}: imports {module}, which is not installed; install it, or put it into common/")
            needed |= set(map(canonicalize_name, distributions[module]))
        # Modules imported by name: `importlib.import_module("ai_edge_litert.interpreter")`.
        calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call) and node.args)
        arguments = {str(node.args[0].value) for node in calls if isinstance(node.args[0], ast.Constant)}
        needed |= {canonicalize_name(name.partition(".")[0]) for name in arguments} & known.keys()
    needed |= {UNDECLARED[name] for name in needed & UNDECLARED.keys()}
    return sorted(known.get(name) or f"{name}>={importlib.metadata.version(name)}" for name in needed)


def project_files(recipe: pathlib.Path, notebook: bool) -> dict[str, bytes]:
    """Returns the content of each project file by its path."""
    needed, templates = needed_files(recipe), ROOT / "scripts" / "project"
    files = {str(path.relative_to(ROOT)): path.read_bytes() for path in (*needed[1:], ROOT / "LICENSE")}
    for path in filter(pathlib.Path.is_file, templates.rglob("*")):
        files[str(path.relative_to(templates)).replace("gitignore", ".gitignore")] = path.read_bytes()
    run_line = rf"^(Run +python ).*\b{re.escape(recipe.stem)}\.py"
    source = re.sub(run_line, r"\1train.py", recipe.read_text("utf-8"), count=1, flags=re.MULTILINE)
    readme = (
        files["README.md"]
        .decode()
        .format(
            title=(ast.get_docstring(parse(recipe)) or recipe.stem).splitlines()[0],
            origin=f"`recipes/{recipe.name}` of Keras recipes" + (f", commit {commit(ROOT)}" if commit(ROOT) else ""),
            notebook="`train.ipynb` holds the same code in cells: `pip install jupyterlab`, then `jupyter lab`.\n"
            * notebook,
        )
    )
    texts = {
        "train.py": source,
        "README.md": readme,
        "requirements.txt": "\n".join(requirements(needed, notebook)) + "\n",
    }
    if notebook:
        texts["train.ipynb"] = as_notebook(source)
    return files | {name: text.encode() for name, text in texts.items()}


def as_notebook(source: str) -> str:
    """Splits a recipe into notebook cells, without `main`, and appends a cell that trains."""
    tree, lines, cells, end, previous = ast.parse(source), source.splitlines(), [], 0, None
    for node in tree.body:
        text, end = "\n".join(lines[end : node.end_lineno]), node.end_lineno
        if node is tree.body[0] and (docstring := ast.get_docstring(tree)):
            title, _, rest = docstring.partition("\n")
            cells.append(nbformat.v4.new_markdown_cell(f"# {title}\n\n```\n{rest.strip()}\n```"))
        elif isinstance(previous, ast.Import | ast.ImportFrom) and isinstance(node, ast.Import | ast.ImportFrom):
            cells[-1].source += f"\n{text}"  # `text` includes blank lines between import groups.
        elif getattr(node, "name", "") != "main" and not text.strip().startswith("if __name__"):
            cells.append(nbformat.v4.new_code_cell(text.strip()))
        previous = node
    cells.append(nbformat.v4.new_markdown_cell(TRAINING))
    cells.append(nbformat.v4.new_code_cell('metrics = train(Config(data="sample", smoke=True, epochs=2))\nmetrics'))
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # Random ids would make the output differ between calls.
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})) + "\n"


def write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    """Writes all files or none: writes to a temporary folder, then renames it.

    Raises:
        UserError: the folder is not empty, or can't be written.
    """
    try:
        exists = folder.is_dir()
        if exists and any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty; name a new folder")
        if not exists and os.path.lexists(folder):
            raise UserError(f"{folder}: not a folder; name a new one")
        if not folder.parent.is_dir():
            raise UserError(f"{folder}: there is no folder {folder.parent}; create it first")
        # An existing folder is kept: its parent may be read-only, and a shell may use it as working directory.
        part = (folder if exists else folder.parent) / f".new-project-{os.getpid()}"
        try:
            for name, content in files.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(content)
            if exists:
                for path in part.iterdir():
                    path.rename(folder / path.name)
            else:
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another place") from error


if __name__ == "__main__":
    run_script(main)
