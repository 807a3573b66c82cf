# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""The PEP 517 backend: setuptools', with the target environment's torch in reach of setup.py.

An isolated build runs the target's interpreter without the target's packages. They come last, so
that the isolated environment's own setuptools and ninja win.
"""

import site
import sys

from setuptools.build_meta import *  # noqa: F403

sys.path += [folder for folder in site.getsitepackages() if folder not in sys.path]
