// The forward kernels on the host model, for tests/sm90/test_sm90_forward.py: one plain C entry.
#include <algorithm>
#include <vector>

#include "attention/sm90/forward.cuh"
#include "attention/sm90/forward_simple.cuh"
#include "primitives/model/launch.h"

namespace aadkern {
namespace {

using host_model::Access;

// A tensor's elements from the first to the last, with what a strided view leaves out between them.
host_model::Region region(const TensorView& view, const Shape& shape, int length, Access access, const char* name) {
    if (length == 0) return {view.data, 0, access, name};
    const int64_t last_head = (shape.batch - 1) * view.batch_stride + (shape.heads - 1) * view.head_stride;
    return {view.data, size_t(2 * (last_head + (length - 1) * view.length_stride + shape.head_dim)), access, name};
}

template <class Kernel>
host_model::Report run(const ForwardParameters& parameters, host_model::Launch launch, int threads, int shared_bytes,
                       const host_model::Options& options, Kernel kernel) {
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    return host_model::launch(launch, options, [&] { kernel(parameters); });
}

template <class T, int HeadDim, int Keys, bool PingPong, bool Persistent = false>
host_model::Report run_specialised(const ForwardParameters& parameters, const host_model::Launch& launch,
                                   const host_model::Options& options) {
    using Shared = ForwardShared<HeadDim, Keys>;
    return run(parameters, launch, Shared::threads, Shared::bytes, options, forward_kernel<T, HeadDim, Keys, PingPong, Persistent>);
}

template <class T, int HeadDim>
host_model::Report run(const ForwardParameters& parameters, ForwardKernel kernel, const host_model::Launch& launch,
                       const host_model::Options& options) {
    using Simple = SimpleForwardShared<HeadDim>;
    switch (kernel) {
        case ForwardKernel::Simple:
            return run(parameters, launch, Simple::threads, Simple::bytes, options, simple_forward_kernel<T, HeadDim>);
        case ForwardKernel::Specialised: return run_specialised<T, HeadDim, 128, false>(parameters, launch, options);
        case ForwardKernel::PingPong: return run_specialised<T, HeadDim, 128, true>(parameters, launch, options);
        case ForwardKernel::Wide: return run_specialised<T, HeadDim, 176, true>(parameters, launch, options);
        case ForwardKernel::Persistent: return run_specialised<T, HeadDim, 176, true, true>(parameters, launch, options);
    }
    return {};
}

}  // namespace

// The number of kinds of error that the model reports, and the report as text; refused arguments are of kind "arguments".
extern "C" int forward(const ForwardArguments* arguments, int kernel, int range_count, const host_model::Options* options,
                       char* text, int text_size) {
    const Shape& shape = arguments->shape;
    ForwardParameters parameters{};
    if (const char* problem = make_forward_parameters(*arguments, ForwardKernel(kernel), &parameters)) {
        host_model::Report report;
        report.kinds["arguments"] = {1, problem};
        return host_model::write_report(report, text, text_size);
    }
    const Tables& tables = arguments->tables;
    host_model::Launch launch;
    launch.grid[0] = tables.tile_count * shape.batch * shape.heads;
    if (ForwardKernel(kernel) == ForwardKernel::Persistent) {
        launch.grid[0] = std::min(launch.grid[0], arguments->persistent_ctas > 0 ? arguments->persistent_ctas : 2);
    }
    launch.regions = {
        region(arguments->q, shape, shape.q_len, Access::Read, "q"),
        region(arguments->k, shape, shape.k_len, Access::Read, "k"),
        region(arguments->v, shape, shape.k_len, Access::Read, "v"),
        region(arguments->out, shape, shape.q_len, Access::WriteOnce, "out"),
        {arguments->lse, size_t(shape.batch) * size_t(shape.heads) * size_t(shape.q_len) * 4, Access::WriteOnce, "lse"},
        {tables.tiles, size_t(tables.tile_count) * 16, Access::Read, "tiles"},
        {tables.ranges, size_t(range_count) * 8, Access::Read, "ranges"},
    };
    const bool wide = shape.head_dim == 128;
    host_model::Report report;
    if (shape.type == DataType::BFloat16) {
        report = wide ? run<BFloat16, 128>(parameters, ForwardKernel(kernel), launch, *options)
                      : run<BFloat16, 64>(parameters, ForwardKernel(kernel), launch, *options);
    } else {
        report = wide ? run<Float16, 128>(parameters, ForwardKernel(kernel), launch, *options)
                      : run<Float16, 64>(parameters, ForwardKernel(kernel), launch, *options);
    }
    return host_model::write_report(report, text, text_size);
}

}  // namespace aadkern
