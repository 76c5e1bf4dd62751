// The launches of csrc/attention as torch operators, on LibTorch's stable ABI: the only file that sees a torch header, and one binary
// for every torch from 2.11 on. aadkern/range_attention/ops.py holds the schemas; aadkern/range_attention/sm90.py checks, copies and allocates.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "attention/sm90/backward_parameters.h"
#include "attention/launch.h"

// Weak, so that the library loads into a torch without CUDA too: there its schemas and arguments are still tested.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// The tests build this file against the host model, where the kernels take CPU tensors (tests/sm90/test_sm90_binding.py).
#if defined(AADKERN_HOST_MODEL)
#define AADKERN_DISPATCH_KEY CPU
#else
#define AADKERN_DISPATCH_KEY CUDA
#endif

namespace aadkern {
namespace {

using torch::stable::Tensor;

// Makes a tensor's device the current one, and knows its current stream.
class Place {
public:
    explicit Place(const Tensor& tensor) {
        if (tensor.is_cpu()) return;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
        guard_.emplace(tensor.get_device_index());
        const bool found = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == AOTI_TORCH_SUCCESS;
        STD_TORCH_CHECK(found, "torch knows no current CUDA stream");
    }
    void* stream() const { return stream_; }

private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    void* stream_ = nullptr;
};

TensorView view(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1, "expected [batch, length, heads, head_dim], the last contiguous");
    return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Shape shape(const Tensor& q, const Tensor& k) {
    using torch::headeronly::ScalarType;
    const ScalarType type = q.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "expected bfloat16 or float16");
    return {int32_t(q.size(0)), int32_t(q.size(2)), int32_t(q.size(1)), int32_t(k.size(1)), int32_t(q.size(3)),
            type == ScalarType::BFloat16 ? DataType::BFloat16 : DataType::Float16};
}

template <class T>
T* contiguous(const Tensor& x) {
    STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
    return static_cast<T*>(x.data_ptr());
}

void require_no(const char* problem) { STD_TORCH_CHECK(problem == nullptr, "sm90: ", problem); }

void forward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor tiles, Tensor ranges, double scale, int64_t head_group,
             int64_t kernel) {
    const Place place(q);
    ForwardArguments arguments{};
    arguments.shape = shape(q, k);
    arguments.q = view(q);
    arguments.k = view(k);
    arguments.v = view(v);
    arguments.out = view(out);
    arguments.lse = contiguous<float>(lse);
    arguments.tables = {contiguous<int32_t>(tiles), contiguous<int32_t>(ranges), int32_t(tiles.size(0))};
    arguments.scale = float(scale);
    arguments.head_group = int32_t(head_group);
    require_no(launch_forward(arguments, ForwardKernel(kernel), place.stream()));
}

constexpr int64_t workspace_alignment = 256;  // torch's CUDA allocator gives 512, but there are others

int64_t workspace_bytes(Tensor q, Tensor k, int64_t query_rows, int64_t query_tiles) {
    return backward_workspace_bytes(shape(q, k), int32_t(query_rows), int32_t(query_tiles)) + workspace_alignment - 1;
}

void* aligned_workspace(const Tensor& workspace, const BackwardArguments& arguments) {
    void* start = contiguous<void>(workspace);
    size_t room = size_t(workspace.numel() * 4);
    const int64_t bytes = backward_workspace_bytes(arguments.shape, arguments.query_rows, arguments.tables.query_tile_count);
    start = std::align(workspace_alignment, size_t(bytes), start, room);
    STD_TORCH_CHECK(start != nullptr, "the workspace is smaller than sm90_workspace_bytes");
    return start;
}

void backward(Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dq, Tensor dk,
              Tensor dv, Tensor workspace, Tensor query_tiles, Tensor key_tiles, Tensor spans, int64_t query_rows, double scale,
              int64_t head_group, bool deterministic) {
    const Place place(q);
    BackwardArguments arguments{};
    arguments.shape = shape(q, k);
    arguments.q = view(q);
    arguments.k = view(k);
    arguments.v = view(v);
    arguments.out = view(out);
    arguments.dout = view(dout);
    arguments.dq = view(dq);
    arguments.dk = view(dk);
    arguments.dv = view(dv);
    arguments.lse = contiguous<float>(lse);
    arguments.dlse = dlse.has_value() ? contiguous<float>(*dlse) : nullptr;
    arguments.tables = {contiguous<int32_t>(query_tiles), contiguous<int32_t>(key_tiles), contiguous<int32_t>(spans),
                        int32_t(query_tiles.size(0)), int32_t(key_tiles.size(0))};
    arguments.query_rows = int32_t(query_rows);
    arguments.scale = float(scale);
    arguments.head_group = int32_t(head_group);
    arguments.deterministic = deterministic;
    arguments.workspace = aligned_workspace(workspace, arguments);
    require_no(launch_backward(arguments, place.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aadkern, AADKERN_DISPATCH_KEY, library) {
    library.impl("sm90_forward", TORCH_BOX(&forward));
    library.impl("sm90_workspace_bytes", TORCH_BOX(&workspace_bytes));
    library.impl("sm90_backward", TORCH_BOX(&backward));
}

}  // namespace aadkern
