// How every kernel is put on its stream.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace bertfast {
namespace {

// Where the GPU can, the kernel may start while the one before it still runs: it has to call wait_for_predecessors()
// in every thread before it touches global memory (ptx.cuh). check_launch() says what went wrong.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = kernels_can_overlap() ? 1 : 0;
    cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace
}  // namespace bertfast
