# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The marginkernels authors
"""Times the tile kernels of the Triton backend by tile, and a step by the sizes of its chunks.

python -m benchmarks.gpu_tiles tiles     # statistics and gradient apart
python -m benchmarks.gpu_tiles chunks
"""

import argparse
import importlib
import itertools
import json
import unittest.mock
from types import ModuleType

import torch

from marginkernels.backends.triton import configs
from marginkernels.backends.triton.configs import Config

from .contenders import Shape
from .gpu_kernels import profiled
from .gpu_time import as_graph, steps
from .timing import first_line

SHAPES = [Shape(1024, 1_000_000, 512), Shape(256, 1_000_000, 512)]
COMPILED = Shape(512, 4096, 512)
# rows, classes, features, warps, stages, programs per multiprocessor
BEYOND = [
    Config(256, 128, 64, 8, 3, 1), Config(128, 256, 64, 8, 3, 1), Config(128, 256, 64, 8, 4, 1),
    Config(128, 128, 64, 4, 3, 2), Config(128, 128, 64, 8, 3, 1), Config(128, 128, 32, 4, 3, 2),
    Config(128, 128, 32, 4, 4, 2), Config(128, 192, 64, 8, 3, 1), Config(64, 128, 64, 4, 3, 2),
    Config(64, 256, 64, 8, 3, 1), Config(128, 64, 64, 4, 4, 2), Config(256, 64, 64, 8, 3, 1),
]  # fmt: skip
# modules whose constants named *_CHUNK_BYTES bound a chunk
CHUNKED = ("operands", "sources", "dw")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    """Compiles one tile, or prints one of the tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_tiles", description=__doc__)
    parser.add_argument("--compile", metavar="TILE")
    parser.add_argument("table", nargs="?", choices=("tiles", "chunks"))
    options = parser.parse_args()
    if options.compile:
        run_tile(COMPILED, candidates()[options.compile])
    elif options.table == "tiles":
        print_tiles()
    else:
        print_chunks()


def candidates() -> dict[str, Config]:
    """Returns the tiles to time by name: those of the table for this GPU, and others."""
    table = configs.TABLE[configs.target(torch.device("cuda")).name]["half"]
    every = [*(config._replace(serves=configs.Load.ANY) for config in table), *BEYOND]
    return {"_".join(map(str, config[:6])): config for config in every}


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
    """Prints the time of a step, as a graph, with other sizes of chunks."""
    for shape, (module, constant) in itertools.product(SHAPES, chunk_constants()):
        call = steps(shape, torch.bfloat16, "triton")["loss and gradients"]
        size = getattr(module, constant)
        for factor in FACTORS:
            with unittest.mock.patch.object(module, constant, int(size * factor)):
                call()
                ms = as_graph(call)
            print(f"{tuple(shape)} {constant} {factor:g}x: {ms} ms", flush=True)
            row = dict(shape=shape, constant=constant, bytes=int(size * factor), ms=ms)
            print("@row", json.dumps(row), flush=True)
        torch.cuda.empty_cache()


def chunk_constants() -> list[tuple[ModuleType, str]]:
    """Returns the constants that bound chunks, with their modules."""
    modules = [importlib.import_module(f"{configs.__package__}.{name}") for name in CHUNKED]
    return [
        (module, name)
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_CHUNK_BYTES") and isinstance(value, int)
    ]


if __name__ == "__main__":
    main()
