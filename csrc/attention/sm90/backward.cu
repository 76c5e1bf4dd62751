// The backward kernels for sm_90a: which instances serve which arguments, and their launches.
#include "attention/sm90/backward.cuh"
#include "attention/sm90/backward_rows.cuh"
#include "attention/sm90/start.cuh"

namespace aadkern {
namespace {

template <class T, class Tile>
const char* launch_tiles(const BackwardParameters& p, void* stream) {
    const int64_t heads = int64_t(p.batch) * p.heads, rows = heads * p.tables.query_tile_count, tiles = heads * p.tables.key_tile_count;
    if (rows > INT32_MAX || tiles > INT32_MAX) return "tiles * batch * heads must be below 2^31";
    cudaError_t error = start(prepare_backward<T, Tile>, rows, backward_row_threads, 0, p, stream);
    if (error == cudaSuccess) error = start(attention_backward<T, Tile>, tiles, Tile::threads, Tile::shared_bytes, p, stream);
    if (error == cudaSuccess) error = start(finish_backward<T, Tile>, rows, backward_row_threads, 0, p, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
const char* launch(const BackwardArguments& arguments, const BackwardParameters& p, void* stream) {
    if (arguments.shape.head_dim == 64) return launch_tiles<T, BackwardTile<64, 128>>(p, stream);
    if (arguments.query_rows == 80) return launch_tiles<T, BackwardTile<128, 80>>(p, stream);
    return launch_tiles<T, BackwardTile<128, 64>>(p, stream);
}

}  // namespace

const char* launch_backward(const BackwardArguments& arguments, void* stream) {
    const Shape& shape = arguments.shape;
    if (shape.batch == 0 || shape.heads == 0) return nullptr;
    BackwardParameters parameters{};
    if (const char* problem = make_backward_parameters(arguments, &parameters)) return problem;
    return shape.type == DataType::BFloat16 ? launch<BFloat16>(arguments, parameters, stream)
                                            : launch<Float16>(arguments, parameters, stream);
}

}  // namespace aadkern
