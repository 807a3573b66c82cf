# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Times the tile kernels of the Triton backend by tile, and a step by the size of its chunks.

python -m benchmarks.gpu_tiles tiles     # statistics and gradient apart
python -m benchmarks.gpu_tiles chunks
"""

import argparse
import contextlib
import itertools
import json
import unittest.mock

import torch

from marginkernels.backends.triton import configs, operands, tuning
from marginkernels.backends.triton.configs import Config

from .contenders import Shape
from .gpu_kernels import profiled
from .gpu_time import as_graph, steps
from .timing import first_line

SHAPES = [Shape(1024, 1_000_000, 512), Shape(256, 1_000_000, 512)]
COMPILED = Shape(512, 4096, 512)
CHUNK_MIB = (32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Compiles one tile, or prints one of the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("--compile", metavar="TILE")
    parser.add_argument("table", nargs="?", choices=("tiles", "chunks"))
    options = parser.parse_args()
    if options.compile:
        with contextlib.suppress(Exception):  # the table tells which tiles do not fit
            run_tile(COMPILED, candidates()[options.compile])
    elif options.table == "tiles":
        print_tiles()
    else:
        print_chunks()


def candidates() -> dict[str, Config]:
    """Returns the tiles to time by name: rows, classes, features, warps, stages, programs."""
    target = configs.target(torch.device("cuda")).name
    found = tuning.candidates(target, "half", rows=SHAPES[0].n, saves_tiles=False)
    return {name_of(config): config for config in found}


def name_of(config: Config) -> str:
    """Returns the sizes of a tile, and what it has beside."""
    flags = [flag for flag in ("descriptors", "flatten") if getattr(config, flag)]
    return "_".join([*map(str, config[:6]), *flags])


def run_tile(shape: Shape, config: Config) -> dict[str, float]:
    """Returns milliseconds of the tile kernels of a step with this tile."""
    call = steps(shape, torch.bfloat16, "triton")["loss and gradients"]
    with unittest.mock.patch.object(configs, "choose", lambda *_, **__: config):
        kernels = profiled(call)
    return {
        name: sum(kernel.ms for key, kernel in kernels.items() if key.startswith(name))
        for name in ("statistics", "gradient")
    }


def print_tiles() -> None:
    """Prints the time of both tile kernels for each tile."""
    for shape, (name, config) in itertools.product(SHAPES, candidates().items()):
        try:
            found = run_tile(shape, config)
        except Exception as error:  # the other tiles are still worth their time
            print(f"{tuple(shape)} {name}: FAILED: {first_line(error)}", flush=True)
            continue
        flops = 2e-9 * shape.n * shape.c * shape.d
        rates = (f"{k} {ms:.3f} ms {flops / ms:.0f} TFLOP/s" for k, ms in found.items())
        print(f"{tuple(shape)} {name}:", *rates, flush=True)
        print("@row", json.dumps(dict(shape=shape, tile=name) | found), flush=True)
        torch.cuda.empty_cache()


def print_chunks() -> None:
    """Prints the time of a step, as a graph, by what a chunk of classes takes at most."""
    for shape in SHAPES:
        call = steps(shape, torch.bfloat16, "triton")["loss and gradients"]
        for mib in CHUNK_MIB:
            with unittest.mock.patch.object(operands, "CHUNK_BYTES", mib << 20):
                call()
                ms = as_graph(call)
            print(f"{tuple(shape)} chunks of {mib} MiB: {ms} ms", flush=True)
            print("@row", json.dumps(dict(shape=shape, chunk_MiB=mib, ms=ms)), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
