# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Serves as the PEP 517 backend: setuptools', with the target's torch in reach of setup.py.

An isolated build runs the target's interpreter without the target's packages. This backend appends
the target's packages to the path: they come last, so that the isolated environment's own setuptools
and ninja win. The user's packages come after the target's, except where the target is a virtual
environment that does not see them.
"""

import site
import sys

from setuptools.build_meta import *  # noqa: F403

folders = site.getsitepackages()
if sys.base_prefix in site.PREFIXES:  # pip sets PYTHONNOUSERSITE, so that site itself denies it
    folders.append(site.getusersitepackages())
sys.path += [folder for folder in folders if folder not in sys.path]
