// The backward kernels on the host model, for tests/sm90/test_sm90_backward.py: plain C entries.
#include <algorithm>

#include "attention/sm90/backward.cuh"
#include "attention/sm90/backward_rows.cuh"
#include "primitives/model/launch.h"

namespace aadkern {
namespace {

using host_model::Access;

// A tensor's elements from the first to the last, with what a strided view leaves out between them.
host_model::Region region(const TensorView& view, const Shape& shape, int length, Access access, const char* name) {
    if (length == 0) return {view.data, 0, access, name};
    const int64_t last = (shape.batch - 1) * view.batch_stride + (length - 1) * view.length_stride + (shape.heads - 1) * view.head_stride;
    return {view.data, size_t(2 * (last + shape.head_dim)), access, name};
}

// Runs one of the three launches, and adds what the model says to `report`.
template <class Kernel>
void run(Kernel&& kernel, int64_t blocks, int threads, int shared_bytes, const BackwardArguments& arguments,
         const host_model::Options& options, host_model::Report* report) {
    if (blocks == 0) return;
    const Shape& shape = arguments.shape;
    const BackwardTables& tables = arguments.tables;
    int spans = 0;
    for (int tile = 0; tile < tables.key_tile_count; ++tile) spans = std::max(spans, tables.key_tiles[4 * tile + 3]);
    const size_t rows = size_t(shape.batch) * size_t(shape.heads) * size_t(shape.q_len) * 4;
    host_model::Launch launch;
    launch.grid[0] = int(blocks);
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    launch.regions = {
        region(arguments.q, shape, shape.q_len, Access::Read, "q"),
        region(arguments.k, shape, shape.k_len, Access::Read, "k"),
        region(arguments.v, shape, shape.k_len, Access::Read, "v"),
        region(arguments.out, shape, shape.q_len, Access::Read, "out"),
        region(arguments.dout, shape, shape.q_len, Access::Read, "dout"),
        region(arguments.dq, shape, shape.q_len, Access::WriteOnce, "dq"),
        region(arguments.dk, shape, shape.k_len, Access::WriteOnce, "dk"),
        region(arguments.dv, shape, shape.k_len, Access::WriteOnce, "dv"),
        {arguments.lse, rows, Access::Read, "lse"},
        {arguments.dlse, arguments.dlse == nullptr ? 0 : rows, Access::Read, "dlse"},
        {tables.query_tiles, size_t(tables.query_tile_count) * 8, Access::Read, "query_tiles"},
        {tables.key_tiles, size_t(tables.key_tile_count) * 16, Access::Read, "key_tiles"},
        {tables.spans, size_t(spans) * 16, Access::Read, "spans"},
        {arguments.workspace, size_t(backward_workspace_bytes(shape, arguments.query_rows, tables.query_tile_count)), Access::Any, "workspace"},
    };
    const host_model::Report one = host_model::launch(launch, options, kernel);
    report->switches += one.switches;
    for (const auto& [name, kind] : one.kinds) {
        host_model::Report::Kind& all = report->kinds[name];
        if (all.count == 0) all.first = kind.first;
        all.count += kind.count;
    }
}

template <class T, class Tile>
host_model::Report run_tiles(const BackwardArguments& arguments, const BackwardParameters& p, const host_model::Options& options) {
    host_model::Report report;
    const int64_t heads = int64_t(p.batch) * p.heads, rows = heads * p.tables.query_tile_count, tiles = heads * p.tables.key_tile_count;
    run([&] { prepare_backward<T, Tile>(p); }, rows, backward_row_threads, 0, arguments, options, &report);
    run([&] { attention_backward<T, Tile>(p); }, tiles, Tile::threads, Tile::shared_bytes, arguments, options, &report);
    run([&] { finish_backward<T, Tile>(p); }, rows, backward_row_threads, 0, arguments, options, &report);
    return report;
}

template <class T>
host_model::Report run(const BackwardArguments& arguments, const BackwardParameters& p, const host_model::Options& options) {
    if (arguments.shape.head_dim == 64) return run_tiles<T, BackwardTile<64, 128>>(arguments, p, options);
    if (arguments.query_rows == 80) return run_tiles<T, BackwardTile<128, 80>>(arguments, p, options);
    return run_tiles<T, BackwardTile<128, 64>>(arguments, p, options);
}

}  // namespace

extern "C" int64_t workspace_bytes(const BackwardArguments* arguments) {
    return backward_workspace_bytes(arguments->shape, arguments->query_rows, arguments->tables.query_tile_count);
}

// The number of kinds of error that the model reports, and the report as text; where the arguments are refused, why, as kind "arguments".
extern "C" int backward(const BackwardArguments* arguments, const host_model::Options* options, char* text, int text_size) {
    BackwardParameters p{};
    host_model::Report report;
    if (const char* problem = make_backward_parameters(*arguments, &p)) {
        report.kinds["arguments"] = {1, problem};
        return host_model::write_report(report, text, text_size);
    }
    report = arguments->shape.type == DataType::BFloat16 ? run<BFloat16>(*arguments, p, *options) : run<Float16>(*arguments, p, *options);
    return host_model::write_report(report, text, text_size);
}

}  // namespace aadkern
