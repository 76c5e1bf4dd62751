// State of the machine while a launch runs, and the scheduler's services to the files that implement the primitives.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "primitives/model/fiber.h"
#include "primitives/model/knowledge.h"
#include "primitives/model/launch.h"
#include "primitives/model/shared_memory.h"
#include "primitives/model/units.h"
#include "primitives/primitives.h"

namespace aadkern::host_model {

struct Thread {
    enum class State { Ready, Blocked, Done };
    Cta* cta = nullptr;
    int index = 0;
    State state = State::Ready;
    Fiber fiber;
    std::function<std::string()> waiting_for;  // asked only when nothing can go on
    Knowledge knows;
    WgmmaUse wgmma;
    BulkUse bulk;
    int registers = 0;

    uint32_t now() const { return knows.past[index]; }
    void release_to(Knowledge& other) {  // later accesses of this thread are not covered by what `other` now knows
        other.join(knows);
        knows.past.raise(index, now() + 1);
    }
};

// One cooperative thread array and all that it owns.
struct Cta {
    int slot = 0;  // among the resident ones
    int block[3] = {0, 0, 0};
    int running = 0;
    std::vector<std::unique_ptr<Thread>> threads;
    SharedMemory memory;
    std::map<SharedAddress, Mbarrier> mbarriers;
    NamedBarrier named_barriers[16];
    std::vector<Warp> warps;
    std::vector<Warpgroup> warpgroups;
    int free_registers = 0;
    WaitList waiting_for_registers;
    std::vector<std::string> agents;  // beyond the threads: names, for messages
    size_t agent_capacity = 0;

    int new_agent(const std::string& name);
    std::string agent_name(int agent) const;
};

struct Machine {
    Launch launch;
    Options options;
    Report report;
    Thread* current = nullptr;  // null while asynchronous work runs
    Cta* current_cta = nullptr;
    std::vector<std::unique_ptr<Cta>> ctas;  // the resident ones
    WaitList waiting_for_semaphores;
    std::vector<std::vector<bool>> written;  // bytes of each WriteOnce region
    uint64_t random_state = 1;

    uint32_t random() {  // xorshift64
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return uint32_t(random_state >> 16);
    }
    bool randomly(uint32_t one_in) { return options.completion == int(Completion::Random) && random() % one_in == 0; }
};
extern Machine machine;

inline Thread& self() { return *machine.current; }
inline Cta& cta() { return *machine.current_cta; }
inline Warp& my_warp() { return cta().warps[size_t(self().index / 32)]; }

// Counts an error of this kind; the first message of each kind is kept.
void error(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- scheduler
void wake(WaitList& list);
// Until somebody wakes the list; the caller tests its condition again.
void block(WaitList& list, std::function<std::string()> waiting_for);
void yield();
// As one who asks again and again.
void spin();
void yield_sometimes();  // at random, so that others come between two primitives
// Asynchronous work for later. Work of one queue of a CTA runs in order, except queue 0. Detached work may outlive its CTA.
constexpr int kUnordered = 0, kDetached = -1;
void post(int queue, std::function<void()> work);

// All 32 lanes meet, with the same `what` and argument; each gives a value, and all values come back. `last` is run once, by the
// lane that comes last; its result comes back too.
const Warp::Meeting& meet_warp(const char* what, int argument, uint32_t value = 0, bool orders_memory = false,
                               const std::function<uint32_t()>& last = {});

// Checks an access to global memory against the launch's regions.
bool check_global(const void* address, size_t bytes, bool write, const char* what);

}  // namespace aadkern::host_model
