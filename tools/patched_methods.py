"""A mypy plugin for classes that grow with fastcore's `@patch`: such a function is checked as a method of its class."""

from collections.abc import Callable

from mypy.nodes import CallExpr, Decorator, Expression, NameExpr
from mypy.plugin import ClassDefContext, Plugin
from mypy.types import UnboundType


def _patch(node: Expression) -> str:
    "What `@patch` makes of a function: a property, a classmethod or a method; empty for any other decorator"
    call = node if isinstance(node, CallExpr) else None
    name = call.callee if call else node
    if not isinstance(name, NameExpr) or name.name != "patch":
        return ""
    given = [arg for arg in (call.arg_names if call else []) if arg]
    return {"as_prop": "property", "cls_method": "classmethod"}[given[0]] if given else "method"


def _owner(node: Decorator) -> str:
    "Name of the class in the annotation of the first parameter"
    first = node.func.arguments[0].type_annotation if node.func.arguments else None
    return first.name if isinstance(first, UnboundType) else ""


def move_in(context: ClassDefContext) -> None:
    "Move the functions that patch a class into its body, before mypy looks at it"
    module = context.api.cur_mod_node  # type: ignore[attr-defined]
    for node in [n for n in module.defs if isinstance(n, Decorator) and _owner(n) == context.cls.name]:
        kind = _patch(node.original_decorators[0])
        if not kind:
            continue
        module.defs.remove(node)
        if kind == "method":
            node.func.is_decorated = False
            context.cls.defs.body.append(node.func)
        else:
            name = NameExpr(kind)
            name.set_line(node)
            node.decorators, node.original_decorators = [name], [name]
            context.cls.defs.body.append(node)


class PatchedMethods(Plugin):
    "The plugin"

    def get_customize_class_mro_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        "Look at every class of this project"
        return move_in if fullname.startswith("mlpkg.") else None


def plugin(version: str) -> type[Plugin]:
    "What mypy asks for"
    return PatchedMethods
