"""What the JSON of a `torch.export` program may say.

Its loader was not made for untrusted files: it looks operators up as attributes of `torch`, evaluates size expressions
as Python, and puts names, guards and tree contexts into source code that it then executes. So nothing passes here that is
not on a list: tensor operators, arithmetic on sizes, plain names.
"""

from __future__ import annotations

import json
import re

from guard.errors import ModelError

_NAME = re.compile(r"[A-Za-z0-9_.+\-]*")
_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims|quantized|quantized_decomposed)"
    r"\.(?!(?:from_file|save|load|_print|warn|_test_warn\w*|seed|manual_seed)\b|__)\w+\.(?!__)\w+"
    r"|torch\.ops\.aten\.__i?(?:and|or|xor|lshift|rshift)__\.\w+"
    r"|torch\.ops\.higher_order\.(?:cond|scan|while_loop|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(?:eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|truediv|floordiv|mod|pow|and_|or_|not_|getitem)"
    r"|math\.(?:trunc|floor|ceil|sqrt)|torch\.sym_(?:not|int|float|ite|max|min|sqrt|sum)",
    re.ASCII,
)
_EXPRESSION = re.compile(r"(?:'[a-z]*[0-9.e+\-]*'|\.?[0-9]+|[A-Za-z_][A-Za-z0-9_]*|[(),=+\-*/%<>!&|~. ])*")
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]+")
_FUNCTION = re.compile(r"[A-Z][A-Za-z]*")
_ASSUMPTIONS = {
    "positive", "nonnegative", "negative", "nonpositive", "integer", "real", "finite", "zero", "nonzero", "even", "odd",
    "precision", "evaluate", "int_oo", "oo",
}  # fmt: skip
_GUARD = re.compile(r"(?:'[A-Za-z0-9_]+'|[0-9]+(?:\.[0-9]+)?|[A-Za-z_][A-Za-z0-9_]*|[\[\](),+\-*/%<>=!. ])*")
_GUARD_WORDS = {
    "L", "args", "kwargs", "size", "stride", "storage_offset", "len", "max", "min", "math", "trunc", "floor", "ceil", "sqrt",
    "isnan", "inf", "torch", "sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "and", "or", "not", "is", "None",
    "True", "False",
}  # fmt: skip
_TREES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def plain_program(data: bytes) -> bytes:
    """A program's JSON, without what only debuggers need, when all of it is on the lists.

    Raises:
        ModelError: It says what is not.
    """
    try:
        program = json.loads(data)
        if not isinstance(program, dict):
            raise ModelError("no program")
        _check("", program)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ModelError("damaged JSON") from error
    return json.dumps(program).encode()


def plain_weights(data: bytes, file: str) -> bytes:
    """A table of weights or constants, when all of them are plain tensors in files of their own.

    Raises:
        ModelError: Something in it asks for unpickling.
    """
    try:
        table = json.loads(data)
        entries = table["config"].values()
        plain = all(
            entry.get("use_pickle") is False and re.fullmatch(r"(?:weight|tensor)_[0-9]+", entry["path_name"])
            for entry in entries
        )
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is damaged") from error
    if not plain:
        raise ModelError(f"{file} asks for unpickling")
    return json.dumps(table).encode()


def _check(key: str, value: object) -> None:
    if isinstance(value, dict):
        if "nodes" in value and isinstance(value["nodes"], list):
            for node in value["nodes"]:
                node["metadata"] = {}  # stack traces and the like: free text, which runs nothing and would be pasted
        for name, item in value.items():
            _check_text("name", name)
            _check(name, item)
    elif isinstance(value, list):
        for item in value:
            _check(key, item)
    elif isinstance(value, str):
        _check_text(key, value)


def _check_text(key: str, text: str) -> None:
    if key in ("as_string", "as_strings"):
        return  # an operator's argument (an equation, a mode): only ever a quoted string
    if key in ("target", "as_operator"):
        allowed = _OPERATOR.fullmatch(text) is not None
    elif key == "expr_str":
        allowed = _is_expression(text)
    elif key == "guards_code":
        allowed = _GUARD.fullmatch(text) is not None and all(word in _GUARD_WORDS for word in _words(text))
    elif key in ("in_spec", "out_spec"):
        _check_tree(json.loads(text)[1])
        allowed = True
    else:
        allowed = _NAME.fullmatch(text) is not None
    if not allowed:
        raise ModelError(f"{key} {text[:60]!r} is nothing that an image model needs")


def _is_expression(text: str) -> bool:
    return _EXPRESSION.fullmatch(text) is not None and all(
        word in _ASSUMPTIONS or _SYMBOL.fullmatch(word) or _FUNCTION.fullmatch(word) for word in _words(text)
    )


def _words(text: str) -> list[str]:
    """Identifiers outside quotes."""
    return re.findall(r"[A-Za-z_][A-Za-z0-9_]*", re.sub(r"'[^']*'", "''", text))


def _check_tree(tree: dict[str, object]) -> None:
    """A container of inputs or outputs: of a plain type, whose context is nothing but names."""
    context = json.loads(str(tree["context"])) if tree["context"] is not None else None
    names = context if isinstance(context, list) else []
    plain = context is None or isinstance(context, list)
    if tree["type"] not in _TREES or not plain or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise ModelError(f"a container {str(tree['type'])[:60]!r} is nothing that an image model needs")
    children = tree["children_spec"]
    for child in children if isinstance(children, list) else []:
        _check_tree(child)
