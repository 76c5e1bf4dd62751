// The backward kernels for sm_90a: which instances serve which arguments, and their launches.
#include "attention/sm90_backward.cuh"
#include "attention/sm90_backward_rows.cuh"
#include "attention/start.cuh"

namespace aadkern {
namespace {

template <class T, int HeadDim>
const char* launch(const BackwardParameters& p, void* stream) {
    using Tile = BackwardTile<HeadDim>;
    const int64_t heads = int64_t(p.batch) * p.heads, rows = heads * p.tables.query_tile_count, tiles = heads * p.tables.key_tile_count;
    if (rows > INT32_MAX || tiles > INT32_MAX) return "tiles * batch * heads must be below 2^31";
    cudaError_t error = start(prepare_backward<T, HeadDim>, rows, backward_row_threads, 0, p, stream);
    if (error == cudaSuccess) error = start(attention_backward<T, HeadDim>, tiles, Tile::threads, Tile::shared_bytes, p, stream);
    if (error == cudaSuccess) error = start(finish_backward<T, HeadDim>, rows, backward_row_threads, 0, p, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_backward(const BackwardArguments& arguments, void* stream) {
    const Shape& shape = arguments.shape;
    if (shape.batch == 0 || shape.heads == 0) return nullptr;
    BackwardParameters parameters{};
    if (const char* problem = make_backward_parameters(arguments, &parameters)) return problem;
    const bool wide = shape.head_dim == 128;
    if (shape.type == DataType::BFloat16) {
        return wide ? launch<BFloat16, 128>(parameters, stream) : launch<BFloat16, 64>(parameters, stream);
    }
    return wide ? launch<Float16, 128>(parameters, stream) : launch<Float16, 64>(parameters, stream);
}

}  // namespace aadkern
