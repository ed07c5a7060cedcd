"""The parameters that a chapter declares in its cell with the tag ``parameters``, one a line.

::

    digit: int = 1  # 0 | 1 | 2 | 3; the inlier class
    layer: str = "conv3"  # conv1 | conv2 | conv3
    epochs: int = 100  # 1 or more; passes over the training images
    learning_rate: float = 1e-3  # above 0; step size of Adam
    seed: int = 0  # 0 to 4294967295; fixes all that is drawn
    note: str = ""  # ; free text goes behind the first semicolon

The types are int, float, str and bool.
"""

import ast
import io
import math
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from nbformat import NotebookNode

KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
# By type, what may be given besides text, and the text that may: papermill makes numbers of `-p gammas 10` and
# `-p lambdas 0.5`, whatever the parameter is.
GIVEN = {
    int: (Integral, r"[+-]?[0-9]+"),
    float: (Real, r".+"),
    str: (Real, r"(?s:.*)"),
    bool: (bool, r"[Tt]rue|[Ff]alse"),
}

Value = int | float | str | bool


class ChapterError(click.ClickException, ValueError):
    """A mistake in a chapter or in its parameters: one sentence on the command line, a ValueError in Python."""


@dataclass(frozen=True)
class Parameter:
    """One parameter that a chapter declares."""

    name: str
    kind: type
    default: Value | None  # None while the declaration is being read
    constraint: str = ""  # as written: "0 | 1 | 2", "0 or more", "above 0", "0 to 9" or nothing
    choices: tuple[Value, ...] = ()
    lowest: float = -math.inf
    highest: float = math.inf
    help: str = ""

    def __str__(self) -> str:
        """What a value must be, such as "a whole number: 0 or more"."""
        return KINDS[self.kind] + (f": {self.constraint}" if self.constraint else "")

    def value(self, given: object) -> Value:
        """The given value in the parameter's type.

        Text is parsed (``papermill -r`` passes nothing else). A whole number is turned back into text where text is
        wanted, because ``papermill -p`` guesses types and makes a number of every text that looks like one.

        Raises:
            ValueError: If the value has another type, is not among the choices or is out of range.
        """
        value = _convert(given, self.kind)
        allowed = self.lowest <= value <= self.highest if isinstance(value, float | int) else True
        if not allowed or (self.choices and value not in self.choices):
            raise ValueError(f"{value!r} is not {self.constraint!r}")
        return value


def declared(notebook: "NotebookNode", path: str) -> dict[str, Parameter]:
    """The parameters that a chapter declares, by name; none where no cell has the tag ``parameters``.

    Args:
        notebook: The chapter.
        path: The name that error messages give it.

    Raises:
        ChapterError: If a line of the cell is no declaration, or a default does not keep its own declaration.
    """
    cell = parameters_cell(notebook)
    if cell is None:
        return {}
    source = cell.source
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ChapterError(f"{path}: the parameters cell is not valid Python: {error.msg}, in {line!r}.") from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    parameters = [
        _declaration(statement, " ".join(comments[line] for line in lines if line in comments), path)
        for statement in statements
        for lines in [range(statement.lineno, statement.end_lineno + 1)]  # a formatter may break a long line
    ]
    return {parameter.name: parameter for parameter in parameters}


def check(parameters: Mapping[str, object], known: Mapping[str, Parameter], path: str) -> dict[str, Value]:
    """The given parameters in the declared types.

    Raises:
        ChapterError: If the chapter declares no parameter of a given name, or a value breaks its declaration.
    """
    unknown = [name for name in parameters if name not in known]
    if unknown:
        valid = f"it has {', '.join(known)}" if known else "it has none"
        raise ChapterError(f"{path} has no parameter {', '.join(map(repr, unknown))}; {valid}.")
    checked = {}
    for name, given in parameters.items():
        try:
            checked[name] = known[name].value(given)
        except (ValueError, OverflowError):
            raise ChapterError(f"{path}: {name} = {given!r} is not allowed; give {known[name]}.") from None
    return checked


def parameters_cell(notebook: "NotebookNode") -> "NotebookNode | None":
    """The cell of a chapter that declares its parameters; None where it takes none."""
    return next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)


def _declaration(statement: ast.stmt, comment: str, path: str) -> Parameter:
    line = ast.unparse(statement)
    kinds = {kind.__name__: kind for kind in KINDS}
    match statement:
        case ast.AnnAssign(ast.Name(name), ast.Name(kind_name), ast.expr() as value) if kind_name in kinds:
            kind = kinds[kind_name]
        case _:
            raise ChapterError(f"{path}: {line!r} in the parameters cell must read 'name: int|float|str|bool = value'.")
    constraint, _, text = (part.strip() for part in comment.partition(";"))
    try:
        parameter = Parameter(name, kind, None, constraint, *_limits(constraint, kind), text)
    except ValueError:
        raise ChapterError(
            f"{path}: the comment {comment!r} on {name} must begin with 'a | b | c' in the parameter's type, "
            "with 'N or more', 'above N' or 'N to M' for a number, or with a semicolon."
        ) from None
    try:
        default = ast.literal_eval(value)
        if type(default) not in (kind, int if kind is float else kind) or parameter.value(default) != default:
            raise ValueError(default)
    except (ValueError, OverflowError):
        raise ChapterError(f"{path}: the default of {name} must be {parameter}, written out: {line!r}.") from None
    return replace(parameter, default=default)


def _limits(constraint: str, kind: type) -> tuple[tuple[Value, ...], float, float]:
    """The choices, the lowest and the highest number that a constraint allows."""
    if "|" in constraint:
        return tuple(_convert(choice.strip(), kind) for choice in constraint.split("|")), -math.inf, math.inf
    bound = re.fullmatch(r"above (\S+)|(\S+) or more|(\S+) to (\S+)", constraint) if kind in (int, float) else None
    if bound is None and constraint:
        raise ValueError(f"{constraint!r} constrains no {kind.__name__}")
    above, least, first, last = bound.groups() if bound else (None, "-inf", None, None)
    lowest = math.nextafter(float(above), math.inf) if above else float(least or first)
    return (), lowest, float(last or math.inf)


def _convert(given: object, kind: type) -> Value:
    numbers, text = GIVEN[kind]
    if isinstance(given, str):
        allowed = re.fullmatch(text, given.strip())
    else:
        allowed = isinstance(given, numbers) and isinstance(given, bool) == (kind is bool)
    if not allowed:
        raise ValueError(f"{given!r} is no {kind.__name__}")
    value = str(given).strip() in ("True", "true") if kind is bool else kind(given)
    if not all(math.isfinite(number) for number in (given, value) if isinstance(number, float)):
        raise ValueError(f"{given!r} is not finite")
    return value
