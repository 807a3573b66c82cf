# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Runs checks, timings and tests on a GPU, and writes a report and its numbers.

    python -m benchmarks.gpu                          # all parts, in 25 minutes at most
    python -m benchmarks.gpu --budget 500             # as much as fits
    python -m benchmarks.gpu --only smoke kernels     # some parts
    python -m benchmarks.gpu --again kernels          # parts that were done before too

It needs no network and installs nothing. Each part is a few processes with a time limit: what fails
is written down, and the rest goes on. Lines appear as they come. Beside the report stands a JSON
file with the numbers. A part that is done there is left out the next time.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import torch

from .gpu_parts import PARTS, Command, machine

ROOT = Path(__file__).parents[1]
MOST_OF_THE_REST = 0.6  # of a part's time, so that a stage that hangs leaves some to the next
ROW = "@row "  # begins a line that a process prints for the JSON file


def main() -> None:
    """Runs the parts that are asked for and not done yet."""
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: needs a GPU, and torch finds none")
    report = Report(options.report)
    report.say(f"\n=== {json.dumps(report.found['machine'])}\n")
    names = [name for name in PARTS if not options.only or name in options.only]
    names = [name for name in names if name in (options.again or ()) or not report.is_done(name)]
    start = time.perf_counter()
    while names:
        left = options.budget - (time.perf_counter() - start)
        share = PARTS[names[0]].share / sum(PARTS[name].share for name in names)
        run_part(report, names.pop(0), max(left * share, 10.0))
    report.say(f"=== {time.perf_counter() - start:.0f} s; {options.report}, {report.json_path}\n")


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--report", type=Path, default=Path("gpu_report.txt"))
    parser.add_argument("--budget", type=float, default=1500, help="seconds (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", nargs="+", choices=PARTS, metavar="PART")
    return parser.parse_args()


class Report:
    """Writes to the screen, to a file of text, and to a JSON file beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.json_path = path, path.with_suffix(".json")
        self.found: dict[str, Any] = {"machine": machine(), "parts": {}}
        if self.json_path.exists():
            before = json.loads(self.json_path.read_text())
            if before["machine"] == self.found["machine"]:
                self.found = before
        self._lock = threading.Lock()

    def is_done(self, name: str) -> bool:
        """Says whether every process of a part has succeeded before."""
        fates = self.found["parts"].get(name, {}).get("fates", {})
        return bool(fates) and all(fate == "ok" for fate in fates.values())

    def say(self, text: str) -> None:
        """Writes text to the screen and to the report."""
        with self._lock, self.path.open("a") as file:
            for stream in (file, sys.stdout):
                stream.write(text)
                stream.flush()

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Writes what came out of a part to the JSON file."""
        self.found["parts"][name] = result
        temporary = self.json_path.with_suffix(".new")
        temporary.write_text(json.dumps(self.found, indent=1))
        temporary.replace(self.json_path)


def run_part(report: Report, name: str, limit: float) -> None:
    """Runs the stages of a part one after the other, and the processes of a stage together."""
    start = time.perf_counter()
    report.say(f"\n== {name}: at most {limit:.0f} s\n")
    result: dict[str, Any] = {"fates": {}, "rows": []}
    stages = PARTS[name].stages()
    for stage in stages:
        left = limit - (time.perf_counter() - start)
        if stage is not stages[-1]:
            left *= MOST_OF_THE_REST
        threads = [
            threading.Thread(target=run, args=(report, result, command, left)) for command in stage
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    result["seconds"] = round(time.perf_counter() - start, 1)
    report.keep(name, result)
    failed = [title for title, fate in result["fates"].items() if fate != "ok"]
    fate = "FAILED: " + ", ".join(failed) if failed else "ok"
    report.say(f"== {name}: {fate}, {result['seconds']} s\n")


def run(report: Report, result: dict[str, Any], command: Command, limit: float) -> None:
    """Runs a process to its end or to the limit; its lines go to the report as they come."""
    start = time.perf_counter()
    if limit < 1:
        result["fates"][command.title] = "left out: no time"
        return
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(command.env)
    try:
        process = subprocess.Popen(
            command.arguments, cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        result["fates"][command.title] = f"does not start: {error}"
        report.say(f"  {command.title}: does not start: {error}\n")
        return
    assert process.stdout is not None
    reader = threading.Thread(target=copy, args=(report, result, command, process.stdout))
    reader.start()
    try:
        status = process.wait(limit)
        fate = "ok" if status == 0 else f"status {status}"
    except subprocess.TimeoutExpired:
        fate = f"not done after {limit:.0f} s"
    end(process)
    reader.join(10)
    result["fates"][command.title] = fate
    report.say(f"  {command.title}: {fate}, {time.perf_counter() - start:.1f} s\n")


def copy(report: Report, result: dict[str, Any], command: Command, lines: IO[str]) -> None:
    """Copies lines to the report, and what they hold for the JSON file to the result.

    Of a quiet process it copies the last line if that tells an error.
    """
    line = ""
    for line in lines:
        if line.startswith(ROW):
            result["rows"].append(json.loads(line.removeprefix(ROW)))
        elif not command.quiet:
            report.say(f"  {command.title}: {line[:200].rstrip()}\n")
    if command.quiet and "Error" in line:
        report.say(f"  {command.title}: {line[:200].rstrip()}\n")


def end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
