# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Prints versions, the build report, and which backends can run here."""

import platform

import torch

from . import __version__, backend_notes, backend_report
from .backends import native


def main() -> None:
    python = platform.python_version()
    print(f"marginkernels {__version__}, torch {torch.__version__}, Python {python}")
    if native.extension is not None:
        print("\nextension")
        for key, value in native.extension.build_info().items():
            text = ", ".join(value) if isinstance(value, list) else value
            print(f"  {key:<26}{text}")
    print("\nbackends")
    notes = backend_notes()
    for backend, reasons in backend_report().items():
        print(f"  {backend:<26}{'unavailable' if reasons else 'available'}")
        for line in reasons + notes[backend]:
            print(f"    {line}")


if __name__ == "__main__":
    main()
