// The forward kernels for sm_90a: which instance serves which arguments, and its launch.
#include "attention/sm90/forward.cuh"
#include "attention/sm90/forward_simple.cuh"
#include "attention/sm90/start.cuh"

namespace aadkern {
namespace {

template <class Kernel>
const char* launch(Kernel kernel, int threads, int shared_bytes, const ForwardArguments& arguments,
                   const ForwardParameters& parameters, void* stream, int64_t most_blocks = INT32_MAX) {
    const int64_t tiles = int64_t(arguments.tables.tile_count) * arguments.shape.batch * arguments.shape.heads;
    if (tiles > INT32_MAX) return "tiles * batch * heads must be below 2^31";
    const cudaError_t error = start(kernel, tiles < most_blocks ? tiles : most_blocks, threads, shared_bytes, parameters, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T, int HeadDim, int Keys, bool PingPong>
const char* launch_specialised(const ForwardArguments& arguments, const ForwardParameters& parameters, void* stream) {
    using Shared = ForwardShared<HeadDim, Keys>;
    return launch(forward_kernel<T, HeadDim, Keys, PingPong, false>, Shared::threads, Shared::bytes, arguments, parameters, stream);
}

template <class T, int HeadDim, int Keys>
const char* launch_persistent(const ForwardArguments& arguments, const ForwardParameters& parameters, void* stream) {
    using Shared = ForwardShared<HeadDim, Keys>;
    int device = 0, ctas = arguments.persistent_ctas;
    cudaError_t error = ctas > 0 ? cudaSuccess : cudaGetDevice(&device);
    if (ctas == 0 && error == cudaSuccess) error = cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    return launch(forward_kernel<T, HeadDim, Keys, true, true>, Shared::threads, Shared::bytes, arguments, parameters, stream, ctas);
}

template <class T, int HeadDim>
const char* launch(const ForwardArguments& arguments, ForwardKernel kernel, const ForwardParameters& parameters, void* stream) {
    using Simple = SimpleForwardShared<HeadDim>;
    switch (kernel) {
        case ForwardKernel::Simple:
            return launch(simple_forward_kernel<T, HeadDim>, Simple::threads, Simple::bytes, arguments, parameters, stream);
        case ForwardKernel::Specialised:
            return launch_specialised<T, HeadDim, 128, false>(arguments, parameters, stream);
        case ForwardKernel::PingPong:
            return launch_specialised<T, HeadDim, 128, true>(arguments, parameters, stream);
        case ForwardKernel::Wide:
            return launch_specialised<T, HeadDim, 176, true>(arguments, parameters, stream);
        case ForwardKernel::Persistent:
            return launch_persistent<T, HeadDim, 176>(arguments, parameters, stream);
    }
    return "unknown forward kernel";
}

}  // namespace

const char* launch_forward(const ForwardArguments& arguments, ForwardKernel kernel, void* stream) {
    const Shape& shape = arguments.shape;
    if (shape.batch == 0 || shape.heads == 0 || shape.q_len == 0 || arguments.tables.tile_count == 0) return nullptr;
    ForwardParameters parameters{};
    if (const char* problem = make_forward_parameters(arguments, kernel, &parameters)) return problem;
    const bool bfloat16 = shape.type == DataType::BFloat16;
    if (shape.head_dim == 64) {
        return bfloat16 ? launch<BFloat16, 64>(arguments, kernel, parameters, stream)
                        : launch<Float16, 64>(arguments, kernel, parameters, stream);
    }
    return bfloat16 ? launch<BFloat16, 128>(arguments, kernel, parameters, stream)
                    : launch<Float16, 128>(arguments, kernel, parameters, stream);
}

}  // namespace aadkern
