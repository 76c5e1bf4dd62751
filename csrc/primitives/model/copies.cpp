// TMA and bulk copies: checked when issued, carried out later.
#include <algorithm>
#include <array>
#include <cstring>

#include "primitives/model/machine.h"
#include "primitives/model/mbarrier.h"

namespace aadkern::host_model {
namespace {

using Coordinates = std::array<int, 4>;

// Visits the box in 16-byte units, in the order of its rows: visit(shared offset in the unswizzled box, first element's address or
// null, bytes of the unit inside the tensor, bytes skipped before them).
template <class Visit> void walk_box(const TensorMap& map, const Coordinates& c, Visit visit) {
    const TensorMapRequest& t = map.request;
    const int64_t bytes = map.element_bytes, row_bytes = int64_t(t.box[0]) * bytes;
    const int64_t first = int64_t(c[0]) * bytes, end = int64_t(t.size[0]) * bytes;
    uint32_t linear = 0;
    for (uint32_t i3 = 0; i3 < t.box[3]; i3++) {
        for (uint32_t i2 = 0; i2 < t.box[2]; i2++) {
            for (uint32_t i1 = 0; i1 < t.box[1]; i1++) {
                const std::array<int64_t, 3> at = {int64_t(c[1]) + i1, int64_t(c[2]) + i2, int64_t(c[3]) + i3};
                bool inside = true;
                auto* row = const_cast<uint8_t*>(static_cast<const uint8_t*>(t.base));
                for (int d = 0; d < 3; d++) {
                    inside &= at[d] >= 0 && at[d] < int64_t(t.size[d + 1]);
                    if (inside) row += at[d] * int64_t(t.stride[d]);
                }
                for (int64_t offset = 0; offset < row_bytes; offset += 16, linear += 16) {
                    const int64_t from = std::max<int64_t>(first + offset, 0), to = std::min(first + offset + 16, end);
                    const bool some = inside && from < to;
                    visit(linear, some ? row + from : nullptr, some ? size_t(to - from) : 0,
                          some ? size_t(from - first - offset) : 0);
                }
            }
        }
    }
}

// Every byte of the box that is inside the tensor, against the launch's regions.
bool check_rows(const TensorMap& map, const Coordinates& c, bool write, const char* what) {
    bool good = true;
    walk_box(map, c, [&](uint32_t, uint8_t* global, size_t bytes, size_t) {
        if (global != nullptr) good = check_global(global, bytes, write, what) && good;
    });
    return good;
}

SharedAddress swizzled(SharedAddress address, Swizzle mode) {
    const SharedAddress bits = mode == Swizzle::Bytes128 ? 7 : mode == Swizzle::Bytes64 ? 3 : mode == Swizzle::Bytes32 ? 1 : 0;
    return address ^ (((address >> 7) & bits) << 4);
}

bool check_box(const TensorMap& map, SharedAddress address, const char* what) {
    static constexpr uint32_t kPattern[] = {128, 256, 512, 1024};
    return cta().memory.check(address, map.box_bytes, kPattern[int(map.request.swizzle)], what);
}

// Whoever waits for the bytes knows of them, and not of what the issuer did before: an arrive tells that.
void finish_load(Mbarrier& mbarrier, Stamp stamp, uint32_t bytes, std::function<void()> move) {
    post(kUnordered, [=, &mbarrier] {
        move();
        end_load(mbarrier, stamp, bytes);
    });
    yield_sometimes();
}

// A bulk store reads shared memory at one moment and writes global memory at a later one.
void store_in_two_steps(SharedAddress source, uint32_t bytes, const char* what, std::function<void(const uint8_t*)> write) {
    Thread& thread = self();
    BulkUse& bulk = thread.bulk;
    if (bulk.agent < 0) bulk.agent = cta().new_agent("a bulk store of thread " + std::to_string(thread.index));
    cta().memory.read_async(source, bytes, {bulk.agent, uint32_t(bulk.groups.size())}, what);
    auto group = bulk.groups.back();
    group->reading++;
    group->writing++;
    post(kUnordered, [=, &thread] {
        const uint8_t* shared = cta().memory.at(source);
        std::vector<uint8_t> snapshot(shared, shared + bytes);
        group->reading--;
        wake(thread.bulk.waiting);
        post(kDetached, [=, &thread, snapshot = std::move(snapshot)] {
            write(snapshot.data());
            group->writing--;
            wake(thread.bulk.waiting);
        });
    });
    yield_sometimes();
}

void add_floats(uint8_t* target, const uint8_t* source, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4) {
        float sum, term;
        std::memcpy(&sum, target + i, 4);
        std::memcpy(&term, source + i, 4);
        sum += term;
        std::memcpy(target + i, &sum, 4);
    }
}

void tensor_store(const TensorMap& map, SharedAddress source, const Coordinates& c, bool add) {
    const char* what = add ? "TMA reduce" : "TMA store";
    if (add && map.request.type != ElementType::Float32) {
        error("bulk", "tma_reduce_add_4d is modelled for fp32 maps only");
        return;
    }
    if (!check_box(map, source, what) || !check_rows(map, c, true, what)) return;
    store_in_two_steps(source, map.box_bytes, what, [=](const uint8_t* shared) {
        walk_box(map, c, [&](uint32_t linear, uint8_t* global, size_t bytes, size_t skipped) {
            if (global == nullptr) return;
            const uint8_t* from = shared + (swizzled(source + linear, map.request.swizzle) - source) + skipped;
            if (add) {
                add_floats(global, from, bytes);
            } else {
                std::memcpy(global, from, bytes);
            }
        });
    });
}

bool check_bulk(const void* global, SharedAddress shared, int bytes, bool write, const char* what) {
    if (uintptr_t(global) % 16 != 0 || bytes <= 0 || bytes % 16 != 0) {
        error("alignment", "%s of %d bytes at a global address that is %d mod 16: both must be multiples of 16", what, bytes,
              int(uintptr_t(global) % 16));
        return false;
    }
    return cta().memory.check(shared, uint32_t(bytes), 16, what) && check_global(global, size_t(bytes), write, what);
}

}  // namespace

void wait_for_bulk(int allowed, bool reading_only) {
    Thread& thread = self();
    BulkUse& bulk = thread.bulk;
    const int due = bulk.committed() - allowed;
    const auto unfinished = [&] {
        int count = 0;
        for (int i = 0; i < due; i++) count += reading_only ? bulk.groups[size_t(i)]->reading : bulk.groups[size_t(i)]->writing;
        return count > 0;
    };
    while (unfinished()) {
        block(bulk.waiting, [reading_only] { return std::string(reading_only ? "bulk_wait_read" : "bulk_wait"); });
    }
    if (bulk.agent >= 0 && due > 0) thread.knows.past.raise(bulk.agent, uint32_t(due));
}

}  // namespace aadkern::host_model

namespace aadkern {
using namespace host_model;

void tma_prefetch_descriptor(const TensorMap*) {}

void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2, int c3) {
    Mbarrier* it = find_mbarrier(mbarrier, true, "TMA load");
    const TensorMap& tensor = *map;
    const Coordinates c = {c0, c1, c2, c3};
    if (it == nullptr || !check_box(tensor, target, "TMA load") || !check_rows(tensor, c, false, "TMA load")) return;
    const Stamp stamp = begin_load(*it);
    cta().memory.write_async(target, tensor.box_bytes, stamp, tensor.request.swizzle, "TMA load");
    cta().memory.poison(target, tensor.box_bytes);
    finish_load(*it, stamp, tensor.box_bytes, [tensor, c, target] {
        uint8_t* shared = cta().memory.at(0);
        walk_box(tensor, c, [&](uint32_t linear, uint8_t* global, size_t bytes, size_t skipped) {
            uint8_t* to = shared + swizzled(target + linear, tensor.request.swizzle);
            if (bytes < 16) std::memset(to, 0, 16);
            if (global != nullptr) std::memcpy(to + skipped, global, bytes);
        });
    });
}

void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2, int c3, L2Hint) {
    tma_load_4d(target, map, mbarrier, c0, c1, c2, c3);
}

void tma_store_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3) {
    tensor_store(*map, source, {c0, c1, c2, c3}, false);
}

void tma_reduce_add_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3) {
    tensor_store(*map, source, {c0, c1, c2, c3}, true);
}

void bulk_load(SharedAddress target, const void* source, int bytes, SharedAddress mbarrier) {
    Mbarrier* it = find_mbarrier(mbarrier, true, "bulk load");
    if (it == nullptr || !check_bulk(source, target, bytes, false, "bulk load")) return;
    const Stamp stamp = begin_load(*it);
    cta().memory.write_async(target, uint32_t(bytes), stamp, Swizzle::None, "bulk load");
    cta().memory.poison(target, uint32_t(bytes));
    finish_load(*it, stamp, uint32_t(bytes), [=] { std::memcpy(cta().memory.at(target), source, size_t(bytes)); });
}

void bulk_store(void* target, SharedAddress source, int bytes) {
    if (!check_bulk(target, source, bytes, true, "bulk store")) return;
    store_in_two_steps(source, uint32_t(bytes), "bulk store",
                       [=](const uint8_t* shared) { std::memcpy(target, shared, size_t(bytes)); });
}

void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes) {
    if (!check_bulk(target, source, bytes, true, "bulk reduce")) return;
    store_in_two_steps(source, uint32_t(bytes), "bulk reduce",
                       [=](const uint8_t* shared) { add_floats(reinterpret_cast<uint8_t*>(target), shared, size_t(bytes)); });
}

void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes, L2Hint) { bulk_reduce_add_f32(target, source, bytes); }

void bulk_commit() { self().bulk.groups.push_back(std::make_shared<BulkUse::Group>()); }

}  // namespace aadkern
