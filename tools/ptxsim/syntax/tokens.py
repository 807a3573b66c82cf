# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Splits PTX text into tokens."""

from __future__ import annotations

import re

from ..errors import PtxSyntaxError
from .elements import Imm

TOKEN = re.compile(
    r"""
    (?P<str>"(?:[^"\\]|\\.)*")
  | (?P<num>0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b | 0[xX][0-9a-fA-F]+U?\b | 0[bB][01]+U?\b
      | \d+\.\d*(?:[eE][-+]?\d+)? | \d+[eE][-+]?\d+ | \d+U?)
  | (?P<id>[%.$_A-Za-z][\w$.%]*(?:::[\w$.]+)*)
  | (?P<op>[{}\[\]()<>,;:@!|+\-*=&^~?/])
""",
    re.X,
)
LINE_DIRECTIVE = re.compile(r"\s*\.(loc|file)\s")

Token = tuple[str, str, int]  # kind, text, line


def tokenise(text: str) -> tuple[list[Token], list[str]]:
    """Returns the tokens of a text, and its lines without block comments."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    lines = text.split("\n")
    tokens: list[Token] = []
    for number, line in enumerate(lines, 1):
        if "//" in line:
            line = _strip_comment(line)
        if not LINE_DIRECTIVE.match(line):
            tokens += _line_tokens(line, number)
    tokens.append(("eof", "", len(lines)))
    return tokens, lines


def _line_tokens(line: str, number: int) -> list[Token]:
    tokens: list[Token] = []
    end = 0
    for match in TOKEN.finditer(line):
        _check_gap(line[end : match.start()], number)
        text = match.group()
        if text[0] == "." and "." in text[1:]:  # `.reg.b16` is two directives
            tokens += [("id", "." + part, number) for part in text[1:].split(".")]
        else:
            tokens.append((match.lastgroup or "", text, number))
        end = match.end()
    _check_gap(line[end:], number)
    return tokens


def _check_gap(text: str, number: int) -> None:
    if text.strip():
        raise PtxSyntaxError(f"line {number}: unexpected text {text.strip()!r}")


def _strip_comment(line: str) -> str:
    in_string = False
    for at, c in enumerate(line):
        if c == '"':
            in_string = not in_string
        elif not in_string and line.startswith("//", at):
            return line[:at]
    return line


def literal(token: str) -> Imm:
    """Returns the value of a number."""
    text = token[:-1] if token.endswith("U") else token
    prefix = text[:2].lower()
    if prefix == "0f" and len(text) == 10:
        return Imm(int(text[2:], 16), 32)
    if prefix == "0d" and len(text) == 18:
        return Imm(int(text[2:], 16), 64)
    if prefix == "0x":
        return Imm(int(text, 16))
    if prefix == "0b":
        return Imm(int(text, 2))
    if "." in text or "e" in text or "E" in text:
        return Imm(float(text))
    if len(text) > 1 and text[0] == "0":
        return Imm(int(text, 8))
    return Imm(int(text))


class TokenStream:
    """Walks over the tokens of a text."""

    def __init__(self, text: str) -> None:
        self.tokens, self.lines = tokenise(text)
        self.i = 0

    def kind(self) -> str:
        """Returns the kind of the next token: str, num, id, op or eof."""
        return self.tokens[self.i][0]

    def peek(self, k: int = 0) -> str:
        """Returns the text of the next token, or of one `k` further on."""
        return self.tokens[min(self.i + k, len(self.tokens) - 1)][1]

    def next(self) -> str:
        """Takes the next token."""
        token = self.tokens[self.i]
        self.i += 1
        return token[1]

    def line(self) -> int:
        """Returns the line of the next token."""
        return self.tokens[self.i][2]

    def accept(self, text: str) -> bool:
        """Takes the next token if it is this one."""
        if self.peek() == text and self.kind() != "str":
            self.i += 1
            return True
        return False

    def expect(self, text: str) -> None:
        """Takes the next token, which has to be this one."""
        if not self.accept(text):
            raise self.error(
                f"expected {text!r}, found {self.peek()!r}: {self.lines[self.line() - 1].strip()!r}"
            )

    def skip_past(self, text: str) -> None:
        """Takes tokens up to and with this one."""
        while self.next() != text:
            pass

    def number(self) -> int:
        """Takes a number and returns its value."""
        return literal(self.next()).value

    def numbers(self) -> list[int]:
        """Takes numbers that commas separate."""
        values = [self.number()]
        while self.accept(","):
            values.append(self.number())
        return values

    def error(self, message: str) -> PtxSyntaxError:
        """Returns an error that names the current line."""
        return PtxSyntaxError(f"line {self.line()}: {message}")
