// mbarriers: phases, pending arrivals, bytes still expected.
#include "primitives/model/mbarrier.h"

#include <algorithm>

#include "primitives/model/machine.h"

namespace aadkern::host_model {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;

unsigned offset(SharedAddress address) { return unsigned(address - cta().memory.base()); }

void complete_if_due(Mbarrier& it) {
    if (it.pending != 0 || it.bytes != 0) return;
    it.phase++;
    it.pending = it.count;
    // The loads whose bytes this phase waited for: all that were issued, up to the first still on its way.
    const uint32_t landed = it.landing.empty() ? it.loads : *std::min_element(it.landing.begin(), it.landing.end()) - 1;
    it.arriving.past.raise(it.agent, landed);
    it.complete.join(it.arriving);
    it.arriving.reset(cta().agent_capacity, size_t(machine.launch.threads));
    wake(it.waiting);
}

void arrive(SharedAddress address, int bytes, const char* what) {
    Mbarrier* it = find_mbarrier(address, false, what);
    if (it == nullptr) return;
    self().release_to(it->arriving);
    if (it->observed < it->phase) {
        error("mbarrier", "%s at the mbarrier at shared+%u in phase %u, but no wait has seen phase %u complete", what,
              offset(address), it->phase, it->phase - 1);
    }
    it->bytes += bytes;
    if (it->bytes > kMostBytes || bytes < 0)
        error("mbarrier", "%s: %lld bytes expected, at most %lld", what, (long long)it->bytes, (long long)kMostBytes);
    if (it->pending == 0) {
        error("mbarrier", "%s at the mbarrier at shared+%u: more than its %d arrivals in phase %u", what, offset(address),
              it->count, it->phase);
    } else {
        it->pending--;
    }
    complete_if_due(*it);
    yield_sometimes();
}

bool complete(Mbarrier& it, int parity) {
    if (int(it.phase & 1) == parity) return false;
    it.observed = std::max(it.observed, it.phase);
    self().knows.join(it.complete);
    return true;
}

bool good_parity(int parity) {
    if (parity == 0 || parity == 1) return true;
    error("mbarrier", "parity %d", parity);
    return false;
}

}  // namespace

Mbarrier* find_mbarrier(SharedAddress address, bool async, const char* what) {
    const auto found = cta().mbarriers.find(address);
    if (found == cta().mbarriers.end()) {
        error("mbarrier", "%s at shared+%d, where no mbarrier was initialised", what, int(offset(address)));
        return nullptr;
    }
    const Mbarrier& it = found->second;
    const Writer init{it.init_thread, it.init_time, true};
    if (machine.options.check_races && !knows(self(), init, async && !it.fenced)) {
        error("race", "%s at the mbarrier at shared+%u is not ordered after its init%s", what, offset(address),
              async ? " and fence_mbarrier_init" : "");
    }
    return &found->second;
}

Stamp begin_load(Mbarrier& it) {
    it.landing.push_back(++it.loads);
    return {it.agent, it.loads};
}

void end_load(Mbarrier& it, Stamp load, uint32_t bytes) {
    it.landing.erase(std::find(it.landing.begin(), it.landing.end(), load.time));
    it.bytes -= bytes;
    if (it.bytes < -kMostBytes) error("mbarrier", "%lld bytes more than expected", (long long)-it.bytes);
    complete_if_due(it);
}

}  // namespace aadkern::host_model

namespace aadkern {
using namespace host_model;

void mbarrier_init(SharedAddress address, int count) {
    if (!cta().memory.check(address, 8, 8, "mbarrier.init")) return;
    if (cta().mbarriers.count(address)) error("mbarrier", "the mbarrier at shared+%u is initialised twice", offset(address));
    if (count < 1 || count >= 1 << 20) error("mbarrier", "an mbarrier of %d arrivals", count);
    cta().memory.write(address, 8, "mbarrier.init");
    Mbarrier& it = cta().mbarriers[address];
    it = Mbarrier();
    it.count = it.pending = count;
    it.init_thread = self().index;
    it.init_time = self().now();
    it.agent = cta().new_agent("TMA to the mbarrier at shared+" + std::to_string(offset(address)));
    it.arriving.reset(cta().agent_capacity, size_t(machine.launch.threads));
    it.complete.reset(cta().agent_capacity, size_t(machine.launch.threads));
}

void fence_mbarrier_init() {
    for (auto& [address, it] : cta().mbarriers) it.fenced |= it.init_thread == self().index;
}

void mbarrier_arrive(SharedAddress address) { arrive(address, 0, "mbarrier.arrive"); }
void mbarrier_arrive_expect_tx(SharedAddress address, int bytes) { arrive(address, bytes, "mbarrier.arrive.expect_tx"); }

bool mbarrier_test(SharedAddress address, int parity) {
    Mbarrier* it = find_mbarrier(address, false, "mbarrier.try_wait");
    if (it == nullptr || !good_parity(parity)) return true;
    if (complete(*it, parity)) return true;
    spin();
    return complete(*it, parity);
}

void mbarrier_wait(SharedAddress address, int parity) {
    Mbarrier* it = find_mbarrier(address, false, "mbarrier.try_wait");
    if (it == nullptr || !good_parity(parity)) return;
    while (!complete(*it, parity)) {
        block(it->waiting, [it, address, parity] {
            return "mbarrier at shared+" + std::to_string(offset(address)) + " parity " + std::to_string(parity) + " (in phase " +
                   std::to_string(it->phase) + ", " + std::to_string(it->pending) + " of " + std::to_string(it->count) +
                   " arrivals and " + std::to_string(it->bytes) + " bytes missing)";
        });
    }
    yield_sometimes();
}

}  // namespace aadkern
