"""The pages on the library, from its source: nothing of it is imported, so that they need no torch.

The directive ``{api} package`` with names in its content shows the signature and the docstring of each, as MyST, and of
a private module its docstring. These are Markdown but for the sections of Google's style, which become lists of
definitions.
"""

from collections.abc import Iterator
from functools import cache
from textwrap import indent

import griffe
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from expvae_book.places import REPOSITORY

WIDTH = 80  # characters of a signature on one line
TITLES = {"parameters": "Arguments", "attributes": "Attributes", "returns": "Returns", "raises": "Raises"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx extension: adds the directive."""
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class Api(SphinxDirective):
    """What a package exports, by the names that are given one a line."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The names as Sphinx describes Python's objects.

        Raises:
            DirectiveError: If the package does not export a name.
        """
        package, parts = self.arguments[0], [f"```{{py:currentmodule}} {self.arguments[0]}\n```"]
        for name in self.content:
            if name not in exported(package):
                raise self.error(f"{package} exports no {name}")
            parts += described(exported(package)[name], 6)
        container, lines = nodes.container(), "\n\n".join(parts).splitlines()
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), self.content_offset, container)
        return container.children


@cache
def library() -> griffe.Module:
    """The source of the library."""
    options = {"warnings": False, "returns_multiple_items": False, "returns_named_value": False}
    where = [REPOSITORY / "lib"]
    return griffe.load(
        "expvae", search_paths=where, allow_inspection=False, docstring_parser="google", docstring_options=options
    )


@cache
def exported(package: str) -> dict[str, griffe.Object]:
    """What a package re-exports of its private modules, and these modules, by name."""
    module = library()[package.removeprefix("expvae.")] if package != "expvae" else library()
    own = [one for one in module.members.values() if not one.is_alias or one.target_path.startswith("expvae.")]
    return {one.name: one.final_target if one.is_alias else one for one in own}


def described(one: griffe.Object, fence: int) -> Iterator[str]:
    """A function, a class with its public methods and properties, or a constant, as directives of MyST.

    Of a module it is the docstring alone.
    """
    if one.is_module:
        yield from _sections(one)
        return
    kind, shown, inner = "data", "\n".join(one.lines), []
    if one.is_class:
        members = [member for name, member in one.members.items() if not name.startswith("_") and member.docstring]
        kind, shown = "class", _call(one, "")
        inner = [text for member in members for text in described(member, fence - 1)]
    elif one.is_function:
        kind, shown = "method" if one.parent.is_class else "function", _call(one, f" -> {one.returns}")
    elif "property" in one.labels:
        kind, shown = "property", f"{one.name}: {one.annotation}"
    code = "```python\n" + shown.replace("'", '"') + "\n```"
    yield "\n\n".join([f"{':' * fence}{{py:{kind}}} {one.name}", code, *_sections(one), *inner, ":" * fence])


def _call(one: griffe.Function | griffe.Class, end: str) -> str:
    """A call with its parameters, as the source is written."""
    parts = []
    for each in one.parameters:
        if each.kind is griffe.ParameterKind.keyword_only and "*" not in parts:
            parts.append("*")
        if each.name != "self":
            default = "" if each.default is None else f" = {each.default}"
            parts.append(f"{each.name}: {each.annotation}{default}")
    line = f"{one.name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else f"{one.name}(\n    " + ",\n    ".join(parts) + f",\n){end}"


def _sections(one: griffe.Object) -> Iterator[str]:
    """The parts of a docstring, as Markdown."""
    for section in one.docstring.parsed if one.docstring else ():
        if section.kind.value not in TITLES:
            yield section.value
            continue
        yield f"**{TITLES[section.kind.value]}**"
        for item in section.value:
            name = f"`{getattr(item, 'name', None) or item.annotation}`"
            text = indent(item.description, "  ").strip()
            yield text if section.kind.value == "returns" else f"{name}\n: {text}"
