"""Writes a recipe and just those parts of common/ that it uses into one file, to be copied anywhere.

    python scripts/bundle.py recipes/cifar10_cnn.py -o my_train.py
    python scripts/bundle.py recipes/cifar10_cnn.py -o my_train.ipynb --notebook

The recipe comes first, its `Config` with all flags; what it calls follows, sorted so that everything is
defined before a line that needs it at import. Docstrings from common/ are cut to their first paragraph. What
common/plain.py defines stands in for its larger namesakes, so that the file can be read in one sitting.
"""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable

from common.cli import Parser, UserError, run_script
from common.records import commit

import nbformat

ROOT = pathlib.Path(__file__).parent.parent
SHARED, OWN = "SharedConfig", "Config"  # The two dataclasses of flags, which become one.
# The module of common/ whose definitions stand in for their namesakes, and the flags that it does without.
PLAIN, LEFT_OUT = "plain", ("cluster_timeout", "checkpoint_every")
# What a recipe must name to be in need of a cure.
CURED = {"cure_adam": {"Adam", "AdamW", "Muon"}, "cure_fusion": {"BatchNormalization"}, "cure_silu": {"silu", "swish"}}


@dataclasses.dataclass
class Module:
    """A source file: its top-level definitions by name, and where its imported names come from."""

    name: str
    lines: list[str]
    tree: ast.Module
    definitions: dict[str, ast.stmt]
    from_common: dict[str, str]  # Name to the module of common/ that it is imported from.
    imports: list[ast.stmt]


def read_module(path: pathlib.Path) -> Module:
    """Parses a recipe or a module of common/."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError) as error:
        problem = f"{path}: can't be read as Python ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"{problem}; give a recipe such as recipes/mnist_cnn.py") from error
    module = Module(path.stem, source.splitlines(), tree, {}, {}, [])
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
            if any(name.asname or name.name == "*" for name in node.names):
                raise UserError(f"{path}, line {node.lineno}: import from common/ by name, without `as` or `*`")
            module.from_common |= {name.name: node.module.removeprefix("common.") for name in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module.imports.append(node)
        else:
            module.definitions |= dict.fromkeys(defined_names(node), node)
    return module


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    stored = (each for each in ast.walk(node) if isinstance(each, ast.Name))
    return [each.id for each in stored if isinstance(each.ctx, ast.Store)]


def used_names(node: ast.AST) -> set[str]:
    """The names that code may refer to; those in quoted annotations too."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    quoted = (each.value for each in ast.walk(node) if isinstance(each, ast.Constant))
    return names | {text for text in quoted if isinstance(text, str) and text.isidentifier()}


class Bundle:
    """A recipe with everything of common/ that it needs."""

    def __init__(self, path: pathlib.Path, without: tuple[str, ...] = ()):
        self.recipe = read_module(path)
        self.modules: dict[str, Module] = {}  # Those that are called before those that call.
        self.needed: dict[str, set[int]] = {}  # Positions of the statements that are used, by module.
        self._found: dict[str, str] = {}
        attributes = {each.attr for each in ast.walk(self.recipe.tree) if isinstance(each, ast.Attribute)}
        named = attributes | used_names(self.recipe.tree)
        self.needless = {cure for cure, names in CURED.items() if not names & named}
        if not ({OWN, "train", "main"} <= self.recipe.definitions.keys() and self.recipe.from_common):
            problem = f"no recipe, which would define {OWN}, train and main, and import from common/"
            raise UserError(f"{path}: {problem}; give one such as recipes/mnist_cnn.py")
        own = [node for node in self.recipe.definitions.values() if not set(defined_names(node)) & set(without)]
        for node in own:
            for name in sorted(used_names(node)):
                self._need(self.recipe, name)
        for name in self.recipe.definitions:
            if name in self._found:
                raise UserError(f"{path}: {name!r} is also a name in common/{self._found[name]}.py; choose another")

    def _need(self, user: Module, name: str) -> None:
        if name in user.from_common:
            module = self._module(user.from_common[name])
        elif user is not self.recipe and name in user.definitions:
            module = user
        else:
            return
        if name in self._module(PLAIN).definitions:
            module = self._module(PLAIN)
        if name not in module.definitions:
            raise UserError(
                f"{user.name}.py: common/{module.name}.py does not define {name!r}; import it from where it is defined"
            )
        node = module.definitions[name]
        if node.lineno in self.needed[module.name]:
            return
        if self._found.setdefault(name, module.name) != module.name:
            raise UserError(f"{name!r} stands in common/{module.name}.py and common/{self._found[name]}.py; rename one")
        self.needed[module.name].add(node.lineno)
        for inner in sorted(used_names(node) - self.needless):
            self._need(module, inner)

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            module = read_module(ROOT / "common" / f"{name}.py")
            self.needed[name] = set()
            for other in dict.fromkeys(module.from_common.values()):
                self._module(other)
            self.modules[name] = module
        return self.modules[name]

    def imports(self) -> str:
        """All imports of the recipe and of the modules in use; those of no use among them."""
        used = [self.recipe, *(module for module in self.modules.values() if self.needed[module.name])]
        lines = dict.fromkeys(ast.unparse(node) for module in used for node in module.imports)
        return "\n".join(line for line in lines if line != "import os")  # It is there, see `environment`.

    def config_class(self) -> str:
        """The recipe's `Config` with its own fields first, then the shared ones that it does not set anew."""
        node, shared = self.recipe.definitions[OWN], self._module("cli")
        own = {field.target.id for field in node.body if isinstance(field, ast.AnnAssign)}
        lines = chunk(self.recipe, node, {SHARED: ""}).replace(f"class {OWN}():", f"class {OWN}:").splitlines()
        for field in shared.definitions[SHARED].body:
            if isinstance(field, ast.AnnAssign) and field.target.id not in (*own, *LEFT_OUT):
                lines += shared.lines[field.lineno - 1 : field.end_lineno]
                for name in sorted(used_names(field)):
                    self._need(shared, name)
        return "\n".join(lines)

    def recipe_statements(self, without: tuple[str, ...] = ()) -> list[str]:
        """The statements of the recipe in their order."""
        chunks = []
        for node in dict.fromkeys(self.recipe.definitions.values()):
            if isinstance(node, ast.ClassDef) and node.name == OWN:
                chunks.append(self.config_class())
            elif not set(defined_names(node)) & set(without):
                chunks.append(chunk(self.recipe, node))
        return chunks

    def sections(self) -> list[tuple[str, list[str]]]:
        """Of each module of common/ in use, the first line of its docstring and its used statements."""
        sections = []
        for module in self.modules.values():
            nodes = [node for node in module.tree.body if node.lineno in self.needed[module.name]]
            nodes = [node for node in nodes if defined_names(node) != [SHARED]]
            if nodes:
                title = ast.get_docstring(module.tree).splitlines()[0]
                chunks = []
                for before, node in zip([None, *nodes], nodes, strict=False):
                    text = chunk(module, node, {SHARED: OWN}, shorten=True, without_calls=self.needless)
                    if isinstance(before, ast.Assign) and isinstance(node, ast.Assign):
                        chunks[-1] += f"\n{text}"
                    else:
                        chunks.append(text)
                sections.append((title, chunks))
        return sections


def chunk(
    module: Module,
    node: ast.stmt,
    renamed: dict[str, str] | None = None,
    shorten: bool = False,
    without_calls: Iterable[str] = (),
) -> str:
    """The source of a statement with the comments above it, names replaced, docstrings made short, calls left out."""
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
    while first and module.lines[first - 1].startswith("#"):
        first -= 1
    lines = module.lines[first : node.end_lineno]
    edits = []  # Line and columns (of UTF-8 bytes, as `ast` counts them) with their new text.
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in (renamed or {}):
            edits.append((each, renamed[each.id]))
        if shorten and isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each):
            literal = each.body[0].value
            paragraph = literal.value.split("\n\n")[0].rstrip()
            edits.append((literal, f'"""{paragraph}"""'))
        if isinstance(each, ast.Expr) and ast.unparse(each).removesuffix("()") in without_calls:
            edits.append((each, "# left out"))
    for place, text in sorted(edits, key=lambda edit: (-edit[0].lineno, -edit[0].col_offset)):
        begin, end = place.lineno - 1 - first, place.end_lineno - 1 - first
        before, after = lines[begin].encode()[: place.col_offset], lines[end].encode()[place.end_col_offset :]
        lines[begin : end + 1] = [before.decode() + text + after.decode()]
    return "\n".join(line for line in lines if line.strip() != "# left out")


def environment() -> str:
    """The lines of common/startup.py that set environment variables, which Keras and TensorFlow read."""
    startup = read_module(ROOT / "common" / "startup.py")
    settings = [node for node in startup.tree.body if ast.unparse(node).startswith("os.environ.")]
    return "import os\n\n" + "\n".join(ast.unparse(node) for node in settings)


def pip_line(source: str) -> str:
    """The packages that a file imports, within the versions of requirements.txt."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    names = {name.lower() for package in imported for name in distributions.get(package, [])}
    names.add("tensorboard")  # Keras imports it for its callback.
    if "tensorflow-datasets" in names:
        names.add("importlib_resources")  # See requirements.txt.
    required = re.findall(r"^(([\w-]+)[<>=][^ \n]*)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    return " ".join(["pip install", *(f"'{line}'" for line, name in required if name in names)])


def tidy(source: str) -> str:
    """Without unused imports, sorted and formatted as the project is; with ruff."""
    settings = ["--config", str(ROOT / "pyproject.toml"), "--quiet", "-"]
    for command in (["check", "--fix-only", "--select", "F401,I,UP037"], ["format"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *settings],
            input=source,
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise UserError(f"ruff could not tidy the bundle up ({run.stderr.strip()}); mend the recipe")
        source = run.stdout
    return source


def origin(path: pathlib.Path) -> str:
    """Where a bundle comes from."""
    return f"recipes/{path.name} of Keras recipes, {commit(ROOT) or 'no commit'}, by scripts/bundle.py"


def as_file(path: pathlib.Path, name: str) -> str:
    """The bundle as a Python program, to be saved under `name`."""
    bundle = Bundle(path)
    statements = bundle.recipe_statements()
    guard = [chunk(bundle.recipe, bundle.recipe.tree.body[-1])]
    parts = [*(part for part in statements if part != guard[0])]
    for title, chunks in bundle.sections():
        gap = "\n" if chunks[0].startswith("#") else ""  # The title is no part of a statement's own comment.
        parts += [f"# ---- {title}\n{gap}{chunks[0]}", *chunks[1:]]
    code = "\n\n\n".join([*parts, *guard])
    docstring = f'"""{ast.get_docstring(bundle.recipe.tree, clean=False)}"""'
    docstring = docstring.replace(f"python recipes/{path.name}", f"python {name}")
    future = "from __future__ import annotations  # What a function names may be defined below it."
    body = tidy("\n\n".join([docstring, future, environment(), bundle.imports(), code]) + "\n")
    return f"# Origin: {origin(path)}\n# {pip_line(body)}\n{body}"


def as_notebook(path: pathlib.Path) -> str:
    """The bundle as a Jupyter notebook, which ends with a training with the standard settings in place of `main`."""
    bundle = Bundle(path, without=("main",))
    docstring = ast.get_docstring(bundle.recipe.tree)
    statements = bundle.recipe_statements(without=("main",))
    sections = [(None, statement) for statement in statements]
    for title, chunks in bundle.sections():
        sections += [(title, "\n\n\n".join(chunks))]
    # Tidied up as a whole, then cut at marks: in parts, ruff would not know which imports are used.
    parts = ["from __future__ import annotations", environment(), bundle.imports()]
    mark = "# In [{}]:"
    for number, (_, code) in enumerate(sections):
        parts.append(f"{mark.format(number)}\n{code}")
    tidied = tidy("\n\n\n".join(parts) + "\n")
    head, *rest = re.split(r"^# In \[\d+\]:\n", tidied, flags=re.MULTILINE)
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    title, _, rest_of_docstring = docstring.partition("\n")
    text = f"# {title}\n\n```\n{rest_of_docstring.strip()}\n```\n\nOrigin: {origin(path)}\n\n`{pip_line(tidied)}`"
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell(head.strip())]
    for (heading, _), code in zip(sections, rest, strict=True):
        if heading:
            cells.append(nbformat.v4.new_markdown_cell(f"## {heading}"))
        cells.append(nbformat.v4.new_code_cell(code.strip()))
    cells.append(nbformat.v4.new_markdown_cell("## Training, with the standard settings"))
    cells.append(nbformat.v4.new_code_cell("metrics = train(Config())\nmetrics"))
    notebook.cells = cells
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # The same file for the same recipe.
    return nbformat.writes(notebook) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("recipe", type=pathlib.Path, help="such as recipes/cifar10_cnn.py")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, help="file to write; must not exist")
    parser.add_argument("--notebook", action="store_true", help="write a Jupyter notebook")
    arguments = parser.parse_args()
    if arguments.output.suffix != (".ipynb" if arguments.notebook else ".py"):
        raise UserError(f"-o {arguments.output}: give a name that ends in .py, or in .ipynb with --notebook")
    if not re.fullmatch(r"[\w.-]{1,200}", arguments.output.name):
        raise UserError(f"-o {arguments.output}: choose a name of letters, digits, _, - and ., 200 at most")
    if arguments.output.exists():
        raise UserError(f"{arguments.output}: exists already; choose another name or remove it")
    # A program's own folder comes first on the import path: keras.py would hide Keras.
    if arguments.output.suffix == ".py" and importlib.util.find_spec(arguments.output.stem.split(".")[0]):
        raise UserError(f"-o {arguments.output}: would hide Python's own {arguments.output.stem}; choose another name")
    written = as_notebook(arguments.recipe) if arguments.notebook else as_file(arguments.recipe, arguments.output.name)
    try:
        arguments.output.write_text(written, encoding="utf-8")
    except OSError as error:
        arguments.output.unlink(missing_ok=True)
        raise UserError(f"{arguments.output}: can't be written ({error.strerror}); choose another place") from error
    print(f"wrote {arguments.output}, {written.count(chr(10))} lines")


if __name__ == "__main__":
    run_script(main)
