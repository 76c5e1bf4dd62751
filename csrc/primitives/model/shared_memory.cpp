// Shared memory: bounds, poison, the happens-before check; and the loads, stores and matrix moves of the generic proxy.
#include "primitives/model/shared_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "primitives/model/machine.h"

namespace aadkern::host_model {
namespace {
constexpr uint32_t kMostShared = 227 * 1024;  // a CTA's limit on sm_90
constexpr uint32_t kAllocation = 1024 + 1024 + kMostShared;
}  // namespace

bool knows(const Thread& thread, const Writer& writer, bool async) {
    if (writer.generic && async) return thread.knows.proxied[writer.agent] >= writer.time;
    return writer.agent == thread.index || thread.knows.past[writer.agent] >= writer.time;
}

SharedMemory::SharedMemory() : bytes_(static_cast<uint8_t*>(std::aligned_alloc(1024, kAllocation / 1024 * 1024 + 1024))) {}

SharedMemory::~SharedMemory() { std::free(bytes_); }

void SharedMemory::reset(SharedAddress base, uint32_t bytes) {
    if (bytes > kMostShared) error("bounds", "%u bytes of shared memory; a CTA has at most %u", bytes, kMostShared);
    base_ = base;
    size_ = std::min(bytes, kMostShared);
    std::memset(bytes_ + base_, 0xFF, size_);
    words_.assign(machine.options.check_races ? size_ / 4 + 1 : 0, Word());
    clocks_.clear();
    free_clocks_.clear();
}

void SharedMemory::poison(SharedAddress address, uint32_t bytes) { std::memset(bytes_ + address, 0xFF, bytes); }

bool SharedMemory::check(SharedAddress address, uint32_t bytes, uint32_t alignment, const char* what) const {
    if (address % alignment != 0) {
        error("alignment", "%s at shared+%d: not %u-byte aligned", what, int(address - base_), alignment);
        return false;
    }
    if (!contains(address, bytes)) {
        error("bounds", "%s at shared+%d of %u bytes: the CTA has %u", what, int(address - base_), bytes, size_);
        return false;
    }
    return true;
}

void SharedMemory::check_writer(const Word& word, SharedAddress address, bool async, const char* what) const {
    if (word.writer == kNobody) return;
    const Writer writer{word.writer, word.written, word.generic};
    if (knows(self(), writer, async)) return;
    const bool only_the_fence = async && word.generic && knows(self(), writer, false);
    error("race", "%s at shared+%u is not ordered after the write by %s%s", what, address - base_,
          cta().agent_name(word.writer).c_str(), only_the_fence ? " (ordered, but without fence_proxy_async)" : "");
}

void SharedMemory::check_readers(const Word& word, SharedAddress address, const char* what) const {
    // A wgmma has been known to end when each of its four warps' waits has: one warp's own wait says nothing of the others' parts.
    const int threads = machine.launch.threads;
    const auto known = [&](int agent) {
        const Clock& past = self().knows.past;
        const bool wgmma = agent >= threads && agent < threads + threads / 128 * 4;
        return wgmma ? std::min({past[agent], past[agent + 1], past[agent + 2], past[agent + 3]}) : past[agent];
    };
    const auto check_one = [&](int agent, uint32_t time) {
        if (agent == self().index || known(agent) >= time) return;
        error("race", "%s at shared+%u is not ordered after the read by %s", what, address - base_,
              cta().agent_name(agent).c_str());
    };
    if (word.many >= 0) {
        const Clock& clock = clocks_[size_t(word.many)];
        for (int agent = 0; agent < int(cta().agent_capacity); agent++) {
            if (clock[agent] > 0) check_one(agent, clock[agent]);
        }
    } else {
        for (int i = 0; i < word.readers; i++) check_one(word.reader[i].agent, word.reader[i].time);
    }
}

void SharedMemory::add_reader(Word& word, Stamp stamp) {
    if (word.many >= 0) {
        clocks_[size_t(word.many)].raise(stamp.agent, stamp.time);
        return;
    }
    for (int i = 0; i < word.readers; i++) {
        if (word.reader[i].agent == stamp.agent) {
            word.reader[i].time = std::max(word.reader[i].time, stamp.time);
            return;
        }
    }
    if (word.readers < kReaders) {
        word.reader[word.readers++] = stamp;
        return;
    }
    if (free_clocks_.empty()) {
        free_clocks_.push_back(int(clocks_.size()));
        clocks_.emplace_back();
    }
    word.many = free_clocks_.back();
    free_clocks_.pop_back();
    Clock& clock = clocks_[size_t(word.many)];
    clock.reset(cta().agent_capacity);
    for (const Stamp& reader : word.reader) clock.raise(reader.agent, reader.time);
    clock.raise(stamp.agent, stamp.time);
}

void SharedMemory::read(SharedAddress address, uint32_t bytes, const char* what) {
    if (words_.empty()) return;
    for (SharedAddress a = address & ~3u; a < address + bytes; a += 4) {
        Word& it = word(a);
        if (it.writer == kNobody) error("uninitialised", "%s reads shared+%u, which nobody wrote", what, a - base_);
        check_writer(it, a, false, what);
        add_reader(it, {self().index, self().now()});
    }
}

void SharedMemory::read_async(SharedAddress address, uint32_t bytes, Stamp stamp, const char* what) {
    if (words_.empty()) return;
    for (SharedAddress a = address; a < address + bytes; a += 4) {
        Word& it = word(a);
        if (it.writer == kNobody) error("uninitialised", "%s reads shared+%u, which nobody wrote", what, a - base_);
        check_writer(it, a, true, what);
        add_reader(it, stamp);
    }
}

void SharedMemory::write(SharedAddress address, uint32_t bytes, const char* what) {
    if (words_.empty()) return;
    for (SharedAddress a = address & ~3u; a < address + bytes; a += 4) {
        Word& it = word(a);
        check_writer(it, a, false, what);
        check_readers(it, a, what);
        if (it.many >= 0) free_clocks_.push_back(it.many);
        it = Word();
        it.writer = self().index;
        it.written = self().now();
        it.generic = true;
    }
}

void SharedMemory::write_async(SharedAddress address, uint32_t bytes, Stamp stamp, Swizzle swizzle, const char* what) {
    if (words_.empty()) return;
    for (SharedAddress a = address; a < address + bytes; a += 4) {
        Word& it = word(a);
        check_writer(it, a, true, what);
        check_readers(it, a, what);
        if (it.many >= 0) free_clocks_.push_back(it.many);
        it = Word();
        it.writer = stamp.agent;
        it.written = stamp.time;
        it.swizzle = int8_t(swizzle);
    }
}

bool SharedMemory::read_operand(SharedAddress address, uint32_t bytes, Stamp stamp, Swizzle swizzle, std::vector<Writer>& writers,
                                const char* what) {
    if (words_.empty()) return true;
    for (SharedAddress a = address; a < address + bytes; a += 4) {
        Word& it = word(a);
        if (it.writer == kNobody) {
            error("uninitialised", "%s reads shared+%u, which nobody wrote", what, a - base_);
            return false;
        }
        if (it.swizzle >= 0 && Swizzle(it.swizzle) != swizzle) {
            error("swizzle", "%s reads shared+%u with swizzle mode %d, but TMA wrote it with mode %d", what, a - base_,
                  int(swizzle), it.swizzle);
            return false;
        }
        add_reader(it, stamp);
        const auto same = [&](const Writer& w) { return w.agent == it.writer && w.generic == it.generic; };
        if (!writers.empty() && same(writers.back())) {  // the usual case: neighbours have one writer
            writers.back().time = std::max(writers.back().time, it.written);
            continue;
        }
        const auto found = std::find_if(writers.begin(), writers.end(), same);
        if (found == writers.end()) {
            writers.push_back({it.writer, it.written, it.generic});
        } else {
            found->time = std::max(found->time, it.written);
        }
    }
    return true;
}

namespace {

template <class T> T load(SharedAddress source, const char* what) {
    yield_sometimes();
    T value;
    std::memset(&value, 0xFF, sizeof value);
    SharedMemory& memory = cta().memory;
    if (memory.check(source, sizeof value, sizeof value, what)) {
        memory.read(source, sizeof value, what);
        std::memcpy(&value, memory.at(source), sizeof value);
    }
    return value;
}

template <class T> void store(SharedAddress target, T value, const char* what) {
    yield_sometimes();
    SharedMemory& memory = cta().memory;
    if (!memory.check(target, sizeof value, sizeof value, what)) return;
    memory.write(target, sizeof value, what);
    std::memcpy(memory.at(target), &value, sizeof value);
}

// Element (row, column) of matrix i belongs to half `column & 1` of register i of lane 4 row + column / 2; transposed, with row and
// column exchanged. `rows[8i + r]` is the address of row r of matrix i.
template <class Move> void each_element_of_lane(int lane, bool transposed, Move move) {
    for (int i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++) {
            const int major = lane / 4, minor = 2 * (lane % 4) + half;
            move(i, half, transposed ? minor : major, transposed ? major : minor);
        }
    }
}

void store_matrix(SharedAddress row, const uint32_t (&value)[4], bool transposed) {
    SharedMemory& memory = cta().memory;
    if (!memory.check(row, 16, 16, "stmatrix")) row = 0;
    // A row is written for its lane in one piece, after a meeting that gathers every lane's registers.
    std::array<std::array<uint32_t, 32>, 4> values;
    for (int i = 0; i < 4; i++) values[i] = meet_warp("stmatrix", i, value[i]).values;
    if (row == 0) return;
    const int lane = self().index % 32;
    uint16_t elements[8];
    for (int other = 0; other < 32; other++) {
        each_element_of_lane(other, transposed, [&](int i, int half, int r, int column) {
            if (8 * i + r == lane) elements[column] = uint16_t(values[i][other] >> (16 * half));
        });
    }
    memory.write(row, 16, "stmatrix");
    std::memcpy(memory.at(row), elements, 16);
}

void load_matrix(SharedAddress row, uint32_t (&value)[4], bool transposed) {
    SharedMemory& memory = cta().memory;
    if (!memory.check(row, 16, 16, "ldmatrix")) row = 0;
    const std::array<uint32_t, 32> rows = meet_warp("ldmatrix", 0, row).values;
    each_element_of_lane(self().index % 32, transposed, [&](int i, int half, int r, int column) {
        const SharedAddress address = rows[8 * i + r] + 2 * column;
        uint16_t element = 0xFFFF;
        if (rows[8 * i + r] != 0) {
            memory.read(address, 2, "ldmatrix");
            std::memcpy(&element, memory.at(address), 2);
        }
        value[i] = half ? (value[i] & 0xFFFF) | uint32_t(element) << 16 : element;
    });
}

}  // namespace
}  // namespace aadkern::host_model

namespace aadkern {
using namespace host_model;

SharedAddress shared_base() { return cta().memory.base(); }
uint32_t load_shared_u32(SharedAddress source) { return load<uint32_t>(source, "ld.shared"); }
float load_shared_f32(SharedAddress source) { return load<float>(source, "ld.shared"); }
Float2 load_shared_f32x2(SharedAddress source) { return load<Float2>(source, "ld.shared.v2"); }
Word4 load_shared_v4(SharedAddress source) { return load<Word4>(source, "ld.shared.v4"); }
void store_shared_u32(SharedAddress target, uint32_t value) { store(target, value, "st.shared"); }
void store_shared_f32(SharedAddress target, float value) { store(target, value, "st.shared"); }
void store_shared_f32x2(SharedAddress target, Float2 value) { store(target, value, "st.shared.v2"); }
void store_shared_v4(SharedAddress target, Word4 value) { store(target, value, "st.shared.v4"); }
void store_matrix_x4(SharedAddress row, const uint32_t (&value)[4]) { store_matrix(row, value, false); }
void store_matrix_x4_transposed(SharedAddress row, const uint32_t (&value)[4]) { store_matrix(row, value, true); }
void load_matrix_x4(SharedAddress row, uint32_t (&value)[4]) { load_matrix(row, value, false); }
void load_matrix_x4_transposed(SharedAddress row, uint32_t (&value)[4]) { load_matrix(row, value, true); }

}  // namespace aadkern
