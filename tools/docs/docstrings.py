# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Turns docstrings into Markdown where the site renders them; a griffe extension.

The docstrings are plain text with a little reStructuredText, for readers of the source: roles such
as ``:class:`Margin```, double backticks, and ``::`` before a block of code. The site's renderer
knows Markdown alone. A field of a NamedTuple or dataclass is documented by the comment beside it.
"""

import re
import textwrap

from griffe import Attribute, Docstring, Extension, Object

PACKAGE = "marginkernels"
_ROLE = re.compile(r":(?:class|func|meth|mod|data):`(~?)\.?([\w.]+)`")
_LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
# what Markdown shows as it is: code in a line, and a block of indented lines after an empty one
_VERBATIM = re.compile(r"(`[^`]+`|<autoref.*?</autoref>|(?<=\n\n)(?: {4}[^\n]*\n)+)", re.DOTALL)
# a line that ends in a double colon, and the lines below that are indented more
_BLOCK = re.compile(
    r"^(?P<indent> *)(?P<lead>\S.*)::\n\n(?P<code>(?:(?P=indent) {4}.*\n|\n)+)", re.MULTILINE
)
# names of arguments that share a description, and go on in the next line
_NAMES = re.compile(r"^( {4}(?:\w+, )*\w+),\n {4}(?=\w)", re.MULTILINE)
_COMMENT = re.compile(r"\s#\s(.*)$")


def to_markdown(text: str, owner: Object) -> str:
    """Returns the text of ``owner``'s docstring as Markdown."""
    text = _NAMES.sub(r"\1, ", text) + "\n"
    parts, end = [], 0
    for block in _BLOCK.finditer(text):
        parts += [_prose(text[end : block.start()], owner), _fenced(block, owner)]
        end = block.end()
    return "".join([*parts, _prose(text[end:], owner)]).rstrip("\n")


def _fenced(block: re.Match[str], owner: Object) -> str:
    """Fences the block of code that follows a double colon, so that it is highlighted."""
    fenced = "```python\n" + textwrap.dedent(block["code"]).strip("\n") + "\n```"
    lead = f"{_prose(block['lead'], owner)}:\n\n"
    return textwrap.indent(lead + fenced, block["indent"]) + "\n\n"


def _prose(text: str, owner: Object) -> str:
    """Rewrites roles and double backticks, and escapes what Markdown takes for HTML."""
    text = _ROLE.sub(lambda role: _reference(role[2], owner, is_short=bool(role[1])), text)
    text = _LITERAL.sub(lambda literal: f"`{' '.join(literal[1].split())}`", text)
    pieces = _VERBATIM.split(text)
    pieces[::2] = [re.sub("<(?=[a-zA-Z/!])", "&lt;", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _reference(name: str, owner: Object, is_short: bool) -> str:
    """Links a name to where the site documents it, if it does. A tilde shows its last part only."""
    path = name if name.startswith(f"{PACKAGE}.") else _path(name, owner)
    shown = name.rpartition(".")[2] if is_short else name.removeprefix(f"{PACKAGE}.")
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _path(name: str, owner: Object) -> str:
    """Returns the path of a name that is in scope in ``owner``'s docstring.

    A name that the package exports has its anchor there, and so have the members of such a class.
    """
    first = name.partition(".")[0]
    scope = owner
    while first not in scope.members and scope.parent is not None:
        scope = scope.parent
    exported = owner.package.exports or ()
    if first in exported or scope.name in exported:
        inner = "" if first in exported else f"{scope.name}."
        return f"{PACKAGE}.{inner}{name}"
    return f"{scope.path}.{name}"


def _is_field(attribute: Attribute) -> bool:
    """Says whether an attribute is declared in the body of its class, not set by a method."""
    declared = attribute.value is None or "class-attribute" in attribute.labels
    return declared and attribute.parent is not None and attribute.parent.is_class


class Markdown(Extension):
    """Rewrites every docstring once its object is loaded."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        if isinstance(obj, Attribute) and obj.docstring is None and _is_field(obj):
            comment = _COMMENT.search("".join(obj.lines))
            obj.docstring = Docstring(comment[1], parent=obj) if comment else None
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj)
