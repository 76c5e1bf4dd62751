// State of the units of a CTA: mbarriers, barriers, warps, and the asynchronous ones (wgmma, bulk copies).
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "primitives/model/knowledge.h"
#include "primitives/model/shared_memory.h"

namespace aadkern::host_model {

struct Thread;
struct Cta;
using WaitList = std::vector<Thread*>;

struct Mbarrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;  // expected and not yet written; below zero while the expectation is still to come
    uint32_t phase = 0;
    uint32_t observed = 0;  // the latest phase that some wait saw begin
    int init_thread = -1;
    uint32_t init_time = 0;
    bool fenced = false;            // fence_mbarrier_init came after the init
    int agent = -1;                 // the TMA writes that arrive here; each load is one tick of its time
    uint32_t loads = 0;             // issued
    std::vector<uint32_t> landing;  // issued and not yet complete
    Knowledge arriving, complete;   // of those who arrived; of the completed phases
    WaitList waiting;
};

struct NamedBarrier {
    int threads = 0, arrived = 0;
    uint32_t generation = 0;
    Knowledge arriving, complete;
    WaitList waiting;
};

// The lanes of a warp meet here; two sets of values, since a fast lane may be at the next meeting already.
struct Warp {
    struct Meeting {
        std::array<uint32_t, 32> values;
        uint32_t result = 0;  // of what the last lane did for all
    };
    Meeting meetings[2];
    int arrived = 0;
    uint32_t generation = 0;
    const char* what = nullptr;
    int argument = 0;
    Knowledge arriving, complete;
    WaitList waiting;
};

// ---- wgmma
// The accumulator of one chain of wgmmas, as a 64 x N matrix in the model's hands. The threads' own arrays hold NaN from the first
// issue to the wait.
struct Accumulator {
    int columns = 0;
    int bound = 0;  // threads whose array is in flight
    std::array<float*, 128> array;
    std::vector<float> matrix;
};

struct Operand {
    bool in_registers = false;
    uint64_t descriptor = 0;
    Major major = Major::K;
    bool operator==(const Operand& o) const {
        return in_registers == o.in_registers && descriptor == o.descriptor && major == o.major;
    }
};

struct WgmmaOperation {
    int columns, group, accumulator;
    Operand a, b;
    bool accumulate, bfloat16;
    int issued = 0;  // threads
    bool done = false;
    std::array<std::array<uint32_t, 4>, 128> a_registers;
    std::vector<Writer> writers;  // of the shared memory that it reads
};

struct Warpgroup {
    int agent = -1;  // and the three after it: one for each warp's part
    std::deque<WgmmaOperation> operations;  // from number `first` on
    int first = 0, done = 0;
    std::deque<Accumulator> accumulators;
    WaitList waiting;
};

// A thread's side of it.
struct WgmmaUse {
    struct Source {
        const uint32_t* registers;
        std::array<uint32_t, 4> value;
        int group;
    };
    struct Chain {
        int accumulator, last_group;
    };
    int issued = 0, groups = 0;
    bool needs_fence = true;
    std::vector<Source> sources;  // A registers in flight
    std::vector<Chain> chains;    // accumulators in flight
};

// ---- bulk stores and reductions of one thread
struct BulkUse {
    struct Group {
        int reading = 0, writing = 0;
    };
    int agent = -1;
    std::vector<std::shared_ptr<Group>> groups = {std::make_shared<Group>()};  // the last is open
    WaitList waiting;
    int committed() const { return int(groups.size()) - 1; }
};

}  // namespace aadkern::host_model
