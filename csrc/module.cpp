// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The Python module marginkernels._C. It says what was built, and hands tests the numbers of
// numerics.h, the facts of transforms.h and the host side of math.h. The ops are not here: loading
// the library registers them with PyTorch (cpu/ops.cpp, cuda/ops.cpp).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#if defined(MARGINKERNELS_CUDA)
#include "cuda/kernels.h"
#endif
#include "math.h"
#include "numerics.h"
#include "transforms.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
    return "Clang " __clang_version__;
#else
    return "GCC " __VERSION__;
#endif
}

#if defined(MARGINKERNELS_CUDA)
// Returns the compute capabilities that the kernels were compiled for: "8.0", "8.6".
std::vector<std::string> cuda_architectures() {
    std::vector<std::string> found;
    std::istringstream list(marginkernels::cuda::architectures());
    for (std::string entry; std::getline(list, entry, ',');) {
        const int architecture = std::stoi(entry);  // 860 for 8.6
        found.push_back(std::to_string(architecture / 100) + "." +
                        std::to_string(architecture % 100 / 10));
    }
    return found;
}
#endif

py::dict build_info() {
    py::dict info;
    info["marginkernels"] = BUILT_FOR_MARGINKERNELS;
    info["torch"] = BUILT_FOR_TORCH;
    info["compiler"] = compiler();
    info["cxx_standard"] = __cplusplus / 100 % 100;
    info["cpu_capability"] = marginkernels::cpu_capability();
    info["cpu_capabilities_compiled"] = marginkernels::cpu_capabilities_compiled();
#if defined(MARGINKERNELS_CUDA)
    const int version = marginkernels::cuda::cuda_version();  // 13020 for 13.2
    info["cuda"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    info["cuda_architectures"] = cuda_architectures();
#else
    info["cuda"] = py::none();
#endif
    return info;
}

// Returns the facts of each transform by its name; tests compare marginkernels/transforms.py.
py::dict transforms() {
    py::dict known;
    mk::Transforms::for_each([&](mk::Transform, auto functor) {
        using Functor = decltype(functor);
        py::dict facts;
        facts["constants"] = Functor::kConstants;
        facts["per_row"] = Functor::kPerRow;
        facts["steepest_slope"] =
            py::cpp_function([](const std::array<double, Functor::kConstants>& constants) {
                return double(Functor::steepest_slope(constants));
            });
        known[Functor::kName] = facts;
    });
    return known;
}

// Returns the numbers of numerics.h by the names in marginkernels/numerics.py.
py::dict numerics() {
    py::dict numbers;
    numbers["LEAST_NORM"] = mk::kLeastNorm;
    numbers["LEAST_NORM_FLOAT16"] = mk::kLeastNormFloat16;
    numbers["GREATEST_NORM"] = mk::kGreatestNorm;
    numbers["LARGEST_EXPONENT"] = mk::kLargestExponent;
    numbers["OFFSET_START"] = mk::kOffsetStart;
    numbers["OFFSET_SCALE_LIMIT"] = mk::kOffsetScaleLimit;
    numbers["NO_MAXIMUM"] = mk::kNoMaximum;
    numbers["LEAST_SINE"] = mk::kLeastSine;
    numbers["TILE_PADDING"] = mk::kTilePadding;
    return numbers;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("build_info", build_info,
          "What the extension was built for and with, and the CPU capability in use.");

#if defined(MARGINKERNELS_CUDA)
    m.def("cuda_failure", marginkernels::cuda::failure, py::arg("device"),
          "Why the CUDA kernels cannot be launched on this device, in CUDA's words, or nothing.");
#endif

    m.attr("transforms") = transforms();
    m.attr("numerics") = numerics();

    py::module_ math = m.def_submodule("math", "Host side of csrc/math.h, elementwise in float32.");
    math.def("exp", py::vectorize(mk::exp<float>), py::arg("x"));
    math.def("inverse_norm", py::vectorize(mk::inverse_norm), py::arg("sum_of_squares"),
             py::arg("eps"));
}
