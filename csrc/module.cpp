// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// The Python module marginkernels._C. It says what was built, and hands tests the numbers of
// numerics.h, the facts of transforms.h and update.h, and the host side of math.h, update.h and
// rounding.h. The ops are not here: loading
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
#include "rounding.h"
#include "transforms.h"
#include "update.h"

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
        facts["one_versus_rest"] = Functor::kOneVersusRest;
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

// Returns the positions in the numbers of a step by the names in marginkernels/rules.py, and the
// rounds of marginkernels/rounding.py.
py::dict step_numbers() {
    py::dict numbers;
    numbers["UNSCALE"] = mk::kUnscale;
    numbers["SKIP"] = mk::kSkip;
    numbers["MAX_ROW_NORM"] = mk::kMaxRowNorm;
    numbers["OF_RULE"] = mk::kOfRule;
    numbers["NUMBERS"] = mk::kUpdateNumbers;
    numbers["PHILOX_ROUNDS"] = mk::kPhiloxRounds;
    return numbers;
}

// Returns, for each rule by its name, the states that it may have; tests compare
// marginkernels/rules.py. Each is a list that says of a state whether it is one number per row.
py::dict rules() {
    py::dict known;
    mk::Rules::for_each([&](mk::Rule, auto functor) {
        using Functor = decltype(functor);
        std::vector<bool> per_row(Functor::kStates, false);
        if (Functor::kHasRowState) per_row.push_back(true);
        if (!known.contains(Functor::kName)) known[Functor::kName] = py::list();
        py::list(known[Functor::kName]).append(per_row);
    });
    return known;
}

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Moves a row of weights, and its states in place, by the rule that has this name and so many
// states. A state per row is the last one, as one number.
void apply_rule(const std::string& name, Floats w, const Floats& g, std::vector<Floats> states,
                const Floats& numbers) {
    mk::Rules::for_each([&](mk::Rule, auto functor) {
        using Functor = decltype(functor);
        if (name != Functor::kName || states.size() != Functor::kStates + Functor::kHasRowState)
            return;
        float row_state = 0;
        if constexpr (Functor::kHasRowState) {
            float total = 0;
            for (py::ssize_t k = 0; k < w.size(); ++k)
                total += Functor::row_term(w.at(k), g.at(k), numbers.data());
            float& state = states.back().mutable_at(0);
            row_state = state = Functor::row_state(state, total / w.size(), numbers.data());
        }
        for (py::ssize_t k = 0; k < w.size(); ++k) {
            float state[mk::kMostStates] = {};
            for (int s = 0; s < Functor::kStates; ++s) state[s] = states[s].at(k);
            w.mutable_at(k) = Functor::apply(w.at(k), g.at(k), state, row_state, numbers.data());
            for (int s = 0; s < Functor::kStates; ++s) states[s].mutable_at(k) = state[s];
        }
    });
}

uint32_t random_word(int64_t seed, int64_t step, int64_t global_class, int64_t feature,
                     int64_t stream) {
    const mk::Random random = {static_cast<uint64_t>(seed), static_cast<uint32_t>(step)};
    const auto four =
        mk::random_words(random, static_cast<uint64_t>(feature / 4),
                         static_cast<uint32_t>(global_class), static_cast<uint32_t>(stream));
    return static_cast<uint32_t>(four.word[feature % 4]);
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

    m.attr("step_numbers") = step_numbers();
    m.attr("rules") = rules();
    py::module_ update =
        m.def_submodule("update", "Host side of csrc/update.h and csrc/rounding.h, in float32.");
    update.def("apply_rule", apply_rule, py::arg("rule"), py::arg("w").noconvert(), py::arg("g"),
               py::arg("states"), py::arg("numbers_of_rule"),
               "Moves a row of weights, and its states, in place.");
    update.def("random_word", py::vectorize(random_word), py::arg("seed"), py::arg("step"),
               py::arg("global_class"), py::arg("feature"), py::arg("stream"));
    update.def("bits_of", py::vectorize(mk::bits_of<uint32_t>), py::arg("number"), py::arg("word"));
    update.def("stochastic_bf16", py::vectorize(mk::stochastic_bf16<float, uint32_t>),
               py::arg("value"), py::arg("bits"));
}
