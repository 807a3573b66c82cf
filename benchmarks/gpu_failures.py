# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Names a test where it fails, as a plugin of pytest: a time limit may cut off the summary."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Watches the tests, once: not in each process of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Watch(config))


class Watch:
    """Writes a line for each failure."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            assert terminal is not None
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(getattr(crash, "message", report.longrepr)).splitlines()
            terminal.write_line(f"\nFAILED {report.nodeid}: {(why or [''])[0]}")
