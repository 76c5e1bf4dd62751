// What Python calls: one extern "C" entry for each check, the same on a GPU and on the host model. The including file defines
// `Machine` before: input and output copy arrays to where kernels can reach them, map makes tensor maps, run launches,
// finish copies the outputs back and writes the report ("kind<TAB>count<TAB>message" lines; empty when all went well).
// Arrays and their sizes come from tests/sm90/primitive_checks.py, which also checks what comes back.
#pragma once

#include <type_traits>

#include "primitive_checks/checks.cuh"
#include "primitive_checks/wgmma.cuh"

namespace aadkern::primitive_checks {

inline TensorMapRequest matrix_request(const void* base, ElementType type, uint64_t rows, uint64_t columns, uint32_t box_rows,
                                       uint32_t box_columns) {
    const uint64_t row_bytes = columns * (type == ElementType::Float32 ? 4 : 2), all = rows * row_bytes;
    return {base, type, Swizzle::Bytes128, {columns, rows, 1, 1}, {row_bytes, all, all}, {box_columns, box_rows, 1, 1}};
}

template <class T, ASource Source, Major MajorB, int N>
void run_wgmma(Machine& machine, const uint16_t* a, const uint16_t* b, float* d, int column) {
    constexpr ElementType type = std::is_same_v<T, BFloat16> ? ElementType::BFloat16 : ElementType::Float16;
    constexpr int columns_b = N < 64 ? 64 : N;  // MN-major
    WgmmaArguments arguments{};
    const uint16_t* a_there = machine.input(a, 64 * 128);
    const uint16_t* b_there = machine.input(b, size_t(MajorB == Major::K ? N : columns_b) * 128);
    arguments.a = Source == ASource::SharedMN ? machine.map(matrix_request(a_there, type, 128, 64, 128, 64))
                                              : machine.map(matrix_request(a_there, type, 64, 128, 64, 64));
    arguments.b = MajorB == Major::K ? machine.map(matrix_request(b_there, type, N, 128, N, 64))
                                     : machine.map(matrix_request(b_there, type, 128, columns_b, 128, 64));
    arguments.a_values = a_there;
    arguments.d = machine.output(d, 64 * N);
    arguments.column = column;
    machine.run(wgmma_tile<T, Source, MajorB, N>, 1, 128, 1024 + 16384 + 45056 + 64, arguments);
}

template <class T, ASource Source, Major MajorB>
void choose_columns(Machine& machine, int n, const uint16_t* a, const uint16_t* b, float* d, int column) {
    if (n == 32) run_wgmma<T, Source, MajorB, 32>(machine, a, b, d, column);
    if (n == 64) run_wgmma<T, Source, MajorB, 64>(machine, a, b, d, column);
    if (n == 128) run_wgmma<T, Source, MajorB, 128>(machine, a, b, d, column);
    if constexpr (Source != ASource::Registers && MajorB == Major::K) {
        if (n == 80) run_wgmma<T, Source, MajorB, 80>(machine, a, b, d, column);
    }
    if constexpr (Source == ASource::SharedK && MajorB == Major::K) {
        if (n == 176) run_wgmma<T, Source, MajorB, 176>(machine, a, b, d, column);
    }
}

template <class T> void choose_operands(Machine& machine, int a_source, int major_b, int n, const uint16_t* a, const uint16_t* b,
                                        float* d, int column) {
    const bool mn = major_b == int(Major::MN);
    if (a_source == int(ASource::SharedK)) {
        mn ? choose_columns<T, ASource::SharedK, Major::MN>(machine, n, a, b, d, column)
           : choose_columns<T, ASource::SharedK, Major::K>(machine, n, a, b, d, column);
    } else if (a_source == int(ASource::SharedMN)) {
        mn ? choose_columns<T, ASource::SharedMN, Major::MN>(machine, n, a, b, d, column)
           : choose_columns<T, ASource::SharedMN, Major::K>(machine, n, a, b, d, column);
    } else {
        mn ? choose_columns<T, ASource::Registers, Major::MN>(machine, n, a, b, d, column)
           : choose_columns<T, ASource::Registers, Major::K>(machine, n, a, b, d, column);
    }
}

// A 4D tensor as Python gives it: sizes and box in elements, strides in bytes, innermost first.
struct TensorDescription {
    int type, swizzle;
    uint64_t bytes, size[4], stride[3];
    uint32_t box[4];
    TensorMapRequest request(const void* base) const {
        TensorMapRequest made{base, ElementType(type), Swizzle(swizzle), {}, {}, {}};
        for (int i = 0; i < 4; i++) made.size[i] = size[i];
        for (int i = 0; i < 3; i++) made.stride[i] = stride[i];
        for (int i = 0; i < 4; i++) made.box[i] = box[i];
        return made;
    }
};

}  // namespace aadkern::primitive_checks

extern "C" {

int check_numbers(const float* x, float* out, int count, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    const NumbersArguments arguments{machine.input(x, size_t(count)), machine.output(out, 6 * size_t(count)), count};
    machine.run(numbers, (count + 127) / 128, 128, 0, arguments);
    return machine.finish(report, size);
}

int check_elect(int* lane, int* count, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    const ElectArguments arguments{machine.output(lane, 8 * kElections), machine.output(count, 8 * kElections)};
    machine.run(elect, 1, 256, 0, arguments);
    return machine.finish(report, size);
}

int check_matrix(const uint32_t* registers, uint32_t* shared, uint32_t* back, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    const MatrixArguments arguments{machine.input(registers, 128), machine.output(shared, 256), machine.output(back, 512)};
    machine.run(matrix, 1, 32, 1024 + 1024, arguments);
    return machine.finish(report, size);
}

int check_ring(const float* source, float* sums, int rounds, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    const RingArguments arguments{machine.input(source, size_t(rounds) * kRingFloats), machine.output(sums, kRingFloats), rounds};
    machine.run(ring, 1, 128, 1024 + 128 + kRingStages * kRingFloats * 4, arguments);
    return machine.finish(report, size);
}

int check_tensor(const void* source, const aadkern::primitive_checks::TensorDescription* from, const int* at, void* target,
                  const aadkern::primitive_checks::TensorDescription* into, const int* to, uint32_t* shared, int* complete,
                  const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    TensorArguments arguments{};
    arguments.source = machine.map(from->request(machine.input(static_cast<const uint8_t*>(source), from->bytes)));
    arguments.target = machine.map(into->request(machine.output(static_cast<uint8_t*>(target), into->bytes)));
    arguments.box_bytes = from->type == int(aadkern::ElementType::Float32) ? 4 : 2;
    for (int i = 0; i < 4; i++) {
        arguments.at[i] = at[i];
        arguments.to[i] = to[i];
        arguments.box_bytes *= int(from->box[i]);
    }
    arguments.shared = machine.output(shared, size_t(arguments.box_bytes / 4));
    arguments.complete = machine.output(complete, 1);
    machine.run(tensor, 1, 128, 2048 + arguments.box_bytes, arguments);
    return machine.finish(report, size);
}

// sum: [heads, rows, 32]
int check_reduce(const float* terms, int ctas, float* sum, int rows, int heads, int row, int head, float* line, float* copies,
                  const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    constexpr size_t count = kReduceRows * kReduceColumns;
    const uint64_t row_bytes = 4 * kReduceColumns, head_bytes = row_bytes * uint64_t(rows);
    ReduceArguments arguments{};
    arguments.sum = machine.map({machine.output(sum, size_t(heads) * size_t(rows) * kReduceColumns),
                                 aadkern::ElementType::Float32,
                                 aadkern::Swizzle::Bytes128,
                                 {kReduceColumns, uint64_t(rows), uint64_t(heads), 1},
                                 {row_bytes, head_bytes, head_bytes * uint64_t(heads)},
                                 {kReduceColumns, kReduceRows, 1, 1}});
    arguments.row = row;
    arguments.head = head;
    arguments.terms = machine.input(terms, size_t(ctas) * count);
    arguments.line = machine.output(line, count);
    arguments.copies = machine.output(copies, size_t(ctas) * count);
    machine.run(reduce, ctas, 128, 1024 + 8 * int(count), arguments);
    return machine.finish(report, size);
}

int check_turns(int count, int* log, const float* values, float* sums, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    const TurnsArguments arguments{count, machine.output(log, 2 * size_t(count)), machine.input(values, kLive),
                                   machine.output(sums, 256)};
    machine.run(turns, 1, 384, 1024 + 16 + 4 * kLive, arguments);
    return machine.finish(report, size);
}

int check_semaphore(const float* terms, int ctas, float* sum, int* counters, const void* options, char* report, int size) {
    using namespace aadkern::primitive_checks;
    Machine machine(options);
    int* there = machine.output(counters, 2);
    const SemaphoreArguments arguments{machine.input(terms, size_t(ctas) * kSemaphoreFloats), machine.output(sum, kSemaphoreFloats),
                                       there, there + 1};
    machine.run(semaphore, ctas, 64, 1024 + 4 * kSemaphoreFloats + 64, arguments);
    return machine.finish(report, size);
}

int check_wgmma(int bfloat16, int a_source, int major_b, int n, const uint16_t* a, const uint16_t* b, float* d, int column,
                 const void* options, char* report, int size) {
    using namespace aadkern;
    primitive_checks::Machine machine(options);
    if (bfloat16) {
        primitive_checks::choose_operands<BFloat16>(machine, a_source, major_b, n, a, b, d, column);
    } else {
        primitive_checks::choose_operands<Float16>(machine, a_source, major_b, n, a, b, d, column);
    }
    return machine.finish(report, size);
}

}  // extern "C"
