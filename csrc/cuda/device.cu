// SPDX-License-Identifier: Apache-2.0
// Copyright (c) 2026 The marginkernels authors

// Asks the CUDA runtime for the schedule and the build report. The host that runs kernels as fibers
// answers as an sm_80 would.

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "launch.h"

namespace marginkernels::cuda {

#if defined(MK_ON_HOST)

int multiprocessors() {
    return fibers::multiprocessors;
}

int stages_per_block() {
    return kMostStages;
}

#else

namespace {

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) return 0;
    return value;
}

int current_device() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
}

}  // namespace

int multiprocessors() {
    return attribute(cudaDevAttrMultiProcessorCount, current_device());
}

int stages_per_block() {
    constexpr int kReserved = 1 << 10;  // of each block, by the system
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, current_device());
    const int wanted = BigTile::kBlocksPerSm * (kMostStages * BigTile::kStageBytes + kReserved);
    return shared >= wanted ? kMostStages : kFewestStages;
}

cudaError_t allow_shared(const void* kernel, int bytes) {
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, int> allowed;  // by kernel and device
    const std::lock_guard<std::mutex> lock(mutex);
    int& most = allowed[{kernel, current_device()}];
    if (bytes <= most) return cudaSuccess;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    if (error == cudaSuccess) most = bytes;
    return error;
}

// Stands for all kernels where the runtime is asked whether there is code for a device.
__global__ void __launch_bounds__(32) probe_kernel() {}

std::string failure(int device) {
    const int before = current_device();
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSetDevice(device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaGetLastError();  // which would be reported by the next launch
    cudaSetDevice(before);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

int cuda_version() {
    return CUDART_VERSION;
}

const char* architectures() {
#define MK_TEXT_OF(...) #__VA_ARGS__
#define MK_TEXT(...) MK_TEXT_OF(__VA_ARGS__)
    return MK_TEXT(__CUDA_ARCH_LIST__);
}

#endif

}  // namespace marginkernels::cuda
