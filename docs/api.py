"""Exported source as Markdown: signature, docstring and a table of docments for each public definition.

It reads source and imports nothing. Nothing of the machine that builds the site can get into a page this way: the
live signature of a function whose default is `os.environ` would print that whole environment.
"""

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
_RETURNS = "*Returns:*"
WIDTH = 88  # A signature longer than this takes one line per parameter


def definitions(source: str) -> list[Definition]:
    "The public functions and classes that a cell defines"
    return [node for node in ast.parse(source).body if isinstance(node, Definition) and node.name[0] != "_"]


def methods(node: Definition) -> list[Function]:
    "The public methods of a class; none for a function"
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [child for child in body if isinstance(child, Function) and child.name[0] != "_"]


def owner(node: Definition) -> str:
    "Name of the class that a function belongs to by fastcore's `@patch`; empty for any other"
    if not isinstance(node, Function) or not any(_is_patch(item) for item in node.decorator_list):
        return ""
    first = node.args.args[0].annotation if node.args.args else None
    return ast.unparse(first) if first else ""


def _is_patch(decorator: ast.expr) -> bool:
    call = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(call) == "patch"


def full_name(node: Definition) -> str:
    "Name of a definition as people write it, with its class where it is patched in"
    return f"{owner(node)}.{node.name}".lstrip(".")


def names(source: str) -> Iterator[str]:
    "Names in the headings of a cell: `Lake`, `Lake.read`, `open_lake`"
    for node in definitions(source):
        yield full_name(node)
        yield from (f"{node.name}.{method.name}" for method in methods(node))


def render(
    source: str,  # One exported cell
    module: str,  # Where it goes, like "mlpkg.data.lake"; the start of every link target
) -> str:  # Markdown; empty if the cell defines nothing public
    "The reference part of an exported cell"
    comments = _comments(source)
    parts = []
    for node in definitions(source):
        parts.append(_entry(node, full_name(node), module, comments, level=4 if owner(node) else 3))
        parts += [_entry(method, f"{node.name}.{method.name}", module, comments, level=4) for method in methods(node)]
    return "\n\n".join(parts)


def described(functions: Iterable[Function], source: str) -> list[set[str]]:
    "The parameters of each function in a cell that have a docment, as its reference shows them"
    comments = _comments(source)
    return [{name.strip("`") for name, _ in _parameters(node, comments)} - {_RETURNS} for node in functions]


def _entry(node: Definition, name: str, module: str, comments: dict[int, str], level: int) -> str:
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
        rows, label = (_parameters(init, comments), "Parameter") if init else (_fields(node, comments), "Field")
        signature = _call(name, init) if init else f"class {name}" + _bases(node)
    else:
        rows, label, signature = _parameters(node, comments), "Parameter", _call(name, node)
    blocks = [f"({module}.{name})=\n{'#' * level} {name}", f"```python\n{signature}\n```", _escape(doc)]
    returns = dict(rows).get(_RETURNS, "")
    if rows := [(key, text) for key, text in rows if key != _RETURNS]:
        table = [f"| {label} | Meaning |", "| --- | --- |"]
        blocks.append("\n".join(table + [f"| {_in_table(key)} | {_in_table(_escape(text))} |" for key, text in rows]))
    if returns:
        blocks.append(f"{_RETURNS} {_escape(returns)}")
    return "\n\n".join(block for block in blocks if block)


def _bases(node: ast.ClassDef) -> str:
    return f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""


def _call(name: str, node: Function) -> str:
    "The signature as a reader sees it: types and defaults, without `self` and without comments"
    parts = _arguments(node.args)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    kinds = [kind for item in node.decorator_list if (kind := _kind(item))]
    line = name + ("" if _PROPERTIES & set(kinds) else f"({', '.join(parts)})") + returns
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return "\n".join([f"@{kind}" for kind in kinds] + [prefix + line])


def _kind(decorator: ast.expr) -> str:
    "A decorator as a reader of the class would write it: a patched-in property is a property"
    if not _is_patch(decorator):
        return ast.unparse(decorator)
    return "property" if isinstance(decorator, ast.Call) else ""


_PROPERTIES = {"property", "cached_property", "functools.cached_property"}


def _arguments(args: ast.arguments) -> list[str]:
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [*args.defaults]
    parts = [_argument(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if plain and plain[0].arg in ("self", "cls"):
        parts = parts[1:]
    if args.vararg:
        parts.append("*" + ast.unparse(args.vararg))
    elif args.kwonlyargs:
        parts.append("*")
    parts += [_argument(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return parts + (["**" + ast.unparse(args.kwarg)] if args.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(arg)
    return f"{ast.unparse(arg)}{' = ' if arg.annotation else '='}{ast.unparse(default)}"


def _parameters(node: Function, comments: dict[int, str]) -> list[tuple[str, str]]:
    "Docments of a function, by parameter"
    args = node.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    ends = {arg.arg: arg.end_lineno for arg in found if arg}
    plain = [*args.posonlyargs, *args.args]
    pairs = [*zip(plain[len(plain) - len(args.defaults) :], args.defaults, strict=True)]
    pairs += [(arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value]
    ends |= {arg.arg: value.end_lineno for arg, value in pairs}
    last = max([node.lineno, *(line for line in ends.values() if line)])
    start = node.returns.end_lineno or last if node.returns else last + (last > node.lineno)
    closing = range(start, node.body[0].lineno)
    rows = [(f"`{name}`", _comment(line, comments)) for name, line in ends.items() if line not in closing]
    rows.append((_RETURNS, next((comments[line] for line in closing if line in comments), "")))
    return [(name, text) for name, text in rows if text]


def _fields(node: ast.ClassDef, comments: dict[int, str]) -> list[tuple[str, str]]:
    "Annotated fields of a class: the trailing comment, or the description given to pydantic's Field"
    rows = []
    for child in node.body:
        if not isinstance(child, ast.AnnAssign) or ast.unparse(child.target)[0] == "_":
            continue
        call = child.value if isinstance(child.value, ast.Call) else None
        given = {item.arg: item.value for item in call.keywords} if call else {}
        described = given.get("description")
        text = described.value if isinstance(described, ast.Constant) else _comment(child.end_lineno, comments)
        default = call.args[0] if call and call.args else None if call else child.value
        rows.append((f"`{_argument(ast.arg(ast.unparse(child.target), child.annotation), default)}`", str(text)))
    return rows


def _comments(source: str) -> dict[int, str]:
    "Docments by line: the comment that ends the line, else the comment lines above it"
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = source.splitlines()
    found: dict[int, str] = {}
    above: list[str] = []
    for line, text in ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT):
        text = text.lstrip("# ")
        if not lines[line - 1].lstrip().startswith("#"):
            found[line], above = text, []
            continue
        above.append(text)
        if line < len(lines) and not lines[line].lstrip().startswith("#"):
            found[line + 1], above = " ".join(above), []
    return found


def _comment(line: int | None, comments: dict[int, str]) -> str:
    return comments.get(line or 0, "")


def _escape(text: str) -> str:
    "Markdown that shows a docstring or a comment as it was written; code spans keep their meaning"
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([<*\[\]$])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _in_table(text: str) -> str:
    return text.replace("|", r"\|")
