// wgmma: operands by descriptor from swizzled shared memory or from registers, accumulators out of reach while in flight.
#include <algorithm>
#include <cstring>
#include <limits>

#include "primitives/model/machine.h"
#include "primitives/model/numbers.h"

namespace aadkern::host_model {
namespace {

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// PTX 9.7.15.5: where element i of a thread's D fragment lies, and half e of its A registers.
int row_of_d(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * ((i >> 1) & 1); }
int column_of_d(int thread, int i) { return 8 * (i >> 2) + 2 * (thread % 4) + (i & 1); }
int column_of_a(int thread, int e) { return 2 * (thread % 4) + (e & 1) + 8 * (e >> 2); }

// PTX 9.7.15.5.1.2.2. Only the 128-byte swizzle is modelled.
struct Descriptor {
    SharedAddress start, leading, stride;
    int base_offset, swizzle;
    explicit Descriptor(uint64_t bits)
        : start(SharedAddress(bits & 0x3FFF) << 4),
          leading(SharedAddress(bits >> 16 & 0x3FFF) << 4),
          stride(SharedAddress(bits >> 32 & 0x3FFF) << 4),
          base_offset(int(bits >> 49 & 7)),
          swizzle(int(bits >> 62)) {}
};

// The 16-byte unit that holds eight elements of an operand: of row `mn`, from column 8 * eight (K-major), or of column k, from row
// 8 * eight (MN-major).
SharedAddress unit_k_major(const Descriptor& d, int mn, int eight) {
    return swizzle_128(d.start + SharedAddress(mn / 8) * d.stride + SharedAddress(mn % 8) * 128 + SharedAddress(eight) * 16);
}
SharedAddress unit_mn_major(const Descriptor& d, int k, int eight) {
    return swizzle_128(d.start + SharedAddress(eight / 8) * d.leading + SharedAddress(k / 8) * d.stride +
                       SharedAddress(k % 8) * 128 + SharedAddress(eight % 8) * 16);
}

// visit(address of the unit, row, column, whether its elements run along the columns)
template <class Visit> void each_unit(const Operand& operand, int rows, Visit visit) {
    const Descriptor d(operand.descriptor);
    if (operand.major == Major::K) {
        for (int mn = 0; mn < rows; mn++) {
            for (int eight = 0; eight < 2; eight++) visit(unit_k_major(d, mn, eight), mn, 8 * eight, true);
        }
    } else {
        for (int k = 0; k < 16; k++) {
            for (int eight = 0; eight < rows / 8; eight++) visit(unit_mn_major(d, k, eight), 8 * eight, k, false);
        }
    }
}

float to_float(uint16_t bits, bool bfloat16) { return bfloat16 ? bfloat16_to_float(bits) : float16_to_float(bits); }

// matrix[row * row_step + column * column_step]
void gather(const Operand& operand, int rows, bool bfloat16, float* matrix, int row_step, int column_step) {
    each_unit(operand, rows, [&](SharedAddress address, int row, int column, bool along_columns) {
        uint16_t elements[8];
        std::memset(elements, 0xFF, sizeof elements);
        if (cta().memory.contains(address, 16)) std::memcpy(elements, cta().memory.at(address), 16);
        float* target = matrix + row * row_step + column * column_step;
        for (int i = 0; i < 8; i++) target[i * (along_columns ? column_step : row_step)] = to_float(elements[i], bfloat16);
    });
}

// What an operand reads, checked once for the warpgroup by the thread that issues first.
void check_operand(WgmmaOperation& operation, const Operand& operand, int rows, Stamp stamp, const char* what) {
    const Descriptor d(operand.descriptor);
    if (d.swizzle != 1) {
        error("wgmma", "%s: swizzle mode %d in the descriptor; the model knows the 128-byte swizzle", what, d.swizzle);
        return;
    }
    if (d.base_offset == 0 && (d.start & 0x380) != 0) {
        error("alignment", "%s starts at %u: inside a 1024-byte pattern, with base offset 0", what, d.start);
    }
    bool good = true;
    each_unit(operand, rows, [&](SharedAddress address, int, int, bool) {
        good = good && cta().memory.check(address, 16, 16, what) &&
               cta().memory.read_operand(address, 16, stamp, Swizzle::Bytes128, operation.writers, what);
    });
}

void multiply(WgmmaOperation& operation, Accumulator& accumulator) {
    constexpr int most_columns = 256;
    static float a[64][16], b[16][most_columns];
    const int columns = operation.columns;
    if (operation.a.in_registers) {
        for (int thread = 0; thread < 128; thread++) {
            for (int e = 0; e < 8; e++) {
                const uint32_t pair = operation.a_registers[size_t(thread)][size_t(e >> 1)];
                a[row_of_d(thread, e)][column_of_a(thread, e)] = to_float(uint16_t(pair >> (16 * (e & 1))), operation.bfloat16);
            }
        }
    } else {
        gather(operation.a, 64, operation.bfloat16, &a[0][0], 16, 1);
    }
    gather(operation.b, columns, operation.bfloat16, &b[0][0], 1, most_columns);
    if (!operation.accumulate) std::fill(accumulator.matrix.begin(), accumulator.matrix.end(), 0.f);
    for (int row = 0; row < 64; row++) {
        float* d = accumulator.matrix.data() + row * columns;
        for (int k = 0; k < 16; k++) {
            const float factor = a[row][k];
            for (int column = 0; column < columns; column++) d[column] += factor * b[k][column];
        }
    }
}

void run_next(Warpgroup& group) {
    WgmmaOperation& operation = group.operations[size_t(group.done - group.first)];
    multiply(operation, group.accumulators[size_t(operation.accumulator)]);
    operation.done = true;
    group.done++;
    wake(group.waiting);
}

// The accumulator whose array for this lane is `d`, or a free one.
int find_accumulator(Warpgroup& group, int lane, const float* d, int columns) {
    int free = -1;
    for (int i = 0; i < int(group.accumulators.size()); i++) {
        const Accumulator& it = group.accumulators[size_t(i)];
        if (it.array[size_t(lane)] == d) return i;
        if (it.bound == 0 && free < 0) free = i;
    }
    if (free < 0) {
        free = int(group.accumulators.size());
        group.accumulators.emplace_back();
        group.accumulators.back().array.fill(nullptr);
    }
    Accumulator& it = group.accumulators[size_t(free)];
    it.columns = columns;
    it.matrix.assign(size_t(64 * columns), kPoison);
    return free;
}

void bind(Accumulator& accumulator, int lane, float* d) {
    if (accumulator.array[size_t(lane)] == d) return;
    if (accumulator.array[size_t(lane)] != nullptr) {
        error("wgmma", "the threads of the warpgroup disagree on which accumulator this wgmma uses");
        return;
    }
    accumulator.array[size_t(lane)] = d;
    accumulator.bound++;
    for (int i = 0; i < accumulator.columns / 2; i++) {
        accumulator.matrix[size_t(row_of_d(lane, i) * accumulator.columns + column_of_d(lane, i))] = d[i];
        d[i] = kPoison;
    }
}

void unbind(Accumulator& accumulator, int lane) {
    float* d = accumulator.array[size_t(lane)];
    bool touched = false;
    for (int i = 0; i < accumulator.columns / 2; i++) {
        touched |= bits_of(d[i]) != bits_of(kPoison);
        d[i] = accumulator.matrix[size_t(row_of_d(lane, i) * accumulator.columns + column_of_d(lane, i))];
    }
    if (touched) error("wgmma", "an accumulator was written while its wgmma was in flight");
    accumulator.array[size_t(lane)] = nullptr;
    accumulator.bound--;
}

WgmmaOperation& first_to_issue(Warpgroup& group, int lane, int columns, float* d, Operand a, Operand b, bool accumulate,
                               bool bfloat16) {
    group.operations.emplace_back();
    WgmmaOperation& it = group.operations.back();
    it.columns = columns;
    it.group = self().wgmma.groups;
    it.accumulator = find_accumulator(group, lane, d, columns);
    it.a = a;
    it.b = b;
    it.accumulate = accumulate;
    it.bfloat16 = bfloat16;
    const Stamp stamp{group.agent, uint32_t(it.group) + 1};
    if (!a.in_registers) check_operand(it, a, 64, stamp, "wgmma's A operand");
    check_operand(it, b, columns, stamp, "wgmma's B operand");
    return it;
}

}  // namespace

void issue_wgmma(int columns, float* d, const uint32_t* a_registers, uint64_t a_descriptor, Major major_a, uint64_t b_descriptor,
                 Major major_b, bool accumulate, bool bfloat16) {
    const Operand a{a_registers != nullptr, a_descriptor, major_a}, b{false, b_descriptor, major_b};
    Thread& thread = self();
    const int lane = thread.index % 128;
    if (size_t(thread.index / 128) >= cta().warpgroups.size()) {
        error("wgmma", "wgmma outside a full warpgroup");
        return;
    }
    Warpgroup& group = cta().warpgroups[size_t(thread.index / 128)];
    WgmmaUse& use = thread.wgmma;
    if (use.needs_fence)
        error("wgmma", "wgmma without wgmma_fence since the registers were last free (the start, or a wgmma_wait)");
    const int number = use.issued++;
    const bool first = number == group.first + int(group.operations.size());
    WgmmaOperation& it = first ? first_to_issue(group, lane, columns, d, a, b, accumulate, bfloat16)
                               : group.operations[size_t(number - group.first)];
    if (it.columns != columns || !(it.a == a) || !(it.b == b) || it.accumulate != accumulate || it.bfloat16 != bfloat16 ||
        it.group != use.groups) {
        error("wgmma", "the threads of the warpgroup disagree on the operands of a wgmma");
    }
    for (const Writer& writer : it.writers) {
        if (knows(thread, writer, true)) continue;
        error("race", "wgmma reads shared memory without being ordered after the write by %s%s",
              cta().agent_name(writer.agent).c_str(),
              knows(thread, writer, false) ? " (ordered, but without fence_proxy_async)" : "");
        break;
    }
    bind(group.accumulators[size_t(it.accumulator)], lane, d);
    const auto chain =
        std::find_if(use.chains.begin(), use.chains.end(), [&](const auto& c) { return c.accumulator == it.accumulator; });
    if (chain == use.chains.end()) {
        use.chains.push_back({it.accumulator, use.groups});
    } else {
        chain->last_group = use.groups;
    }
    if (a_registers != nullptr) {
        auto& value = it.a_registers[size_t(lane)];
        std::copy(a_registers, a_registers + 4, value.begin());
        use.sources.push_back({a_registers, value, use.groups});
    }
    if (++it.issued == 128) post(1 + thread.index / 128, [&group] { run_next(group); });
    yield_sometimes();
}

void wait_for_wgmma(int allowed) {
    Thread& thread = self();
    WgmmaUse& use = thread.wgmma;
    Warpgroup& group = cta().warpgroups[size_t(thread.index / 128)];
    const int due = use.groups - allowed;  // groups 0 .. due - 1 must be done
    const auto unfinished = [&] {
        return std::any_of(group.operations.begin(), group.operations.end(),
                           [&](const auto& o) { return o.group < due && !o.done; });
    };
    while (unfinished()) block(group.waiting, [] { return std::string("wgmma_wait"); });
    use.needs_fence = true;
    if (due > 0) thread.knows.past.raise(group.agent + thread.index % 128 / 32, uint32_t(due));
    for (size_t i = 0; i < use.sources.size();) {
        auto& source = use.sources[i];
        if (source.group >= due) {
            i++;
            continue;
        }
        if (!std::equal(source.value.begin(), source.value.end(), source.registers)) {
            error("wgmma", "A registers were written while their wgmma was in flight");
        }
        source = use.sources.back();
        use.sources.pop_back();
    }
    for (size_t i = 0; i < use.chains.size();) {
        if (use.chains[i].last_group >= due) {
            i++;
            continue;
        }
        unbind(group.accumulators[size_t(use.chains[i].accumulator)], thread.index % 128);
        use.chains[i] = use.chains.back();
        use.chains.pop_back();
    }
    // Operations that every thread has issued and that are done can be forgotten.
    while (!group.operations.empty() && group.operations.front().done && group.operations.front().issued == 128) {
        group.operations.pop_front();
        group.first++;
    }
}

}  // namespace aadkern::host_model

namespace aadkern {

void wgmma_fence() { host_model::self().wgmma.needs_fence = false; }
void wgmma_commit() { host_model::self().wgmma.groups++; }

}  // namespace aadkern
