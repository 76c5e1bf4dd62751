// Who knows what happened: vector clocks. An agent is something that reads or writes shared memory: a thread, a warpgroup's
// wgmma unit, the TMA writes that arrive at one mbarrier, the bulk stores of one thread. An agent's accesses carry its time; B is
// ordered after an access of A at time t if B's clock for A is at least t.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace aadkern::host_model {

class Clock {
public:
    void reset(size_t agents) { times_.assign(agents, 0); }
    uint32_t operator[](int agent) const { return times_[size_t(agent)]; }
    void raise(int agent, uint32_t time) { times_[size_t(agent)] = std::max(times_[size_t(agent)], time); }
    void join(const Clock& other) {
        const size_t n = std::min(times_.size(), other.times_.size());
        for (size_t i = 0; i < n; i++) times_[i] = std::max(times_[i], other.times_[i]);
    }

private:
    std::vector<uint32_t> times_;
};

struct Knowledge {
    Clock past;     // what happened before
    Clock proxied;  // of the threads' own writes, those that have since passed a fence.proxy.async; threads only
    void reset(size_t agents, size_t threads) {
        past.reset(agents);
        proxied.reset(threads);
    }
    void join(const Knowledge& other) {
        past.join(other.past);
        proxied.join(other.proxied);
    }
};

}  // namespace aadkern::host_model
