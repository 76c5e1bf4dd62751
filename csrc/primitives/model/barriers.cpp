// Meetings of a warp, barriers of a CTA, the proxy fences and the register pool.
#include <cstring>
#include <utility>

#include "primitives/model/machine.h"

namespace aadkern::host_model {

const Warp::Meeting& meet_warp(const char* what, int argument, uint32_t value, bool orders_memory,
                               const std::function<uint32_t()>& last) {
    Warp& warp = my_warp();
    Thread& thread = self();
    if (warp.arrived == 0) {
        warp.what = what;
        warp.argument = argument;
    } else if (std::strcmp(warp.what, what) != 0 || warp.argument != argument) {
        error("collective", "is at %s (%d) while other lanes of its warp are at %s (%d)", what, argument, warp.what, warp.argument);
    }
    const uint32_t generation = warp.generation;
    Warp::Meeting& meeting = warp.meetings[generation & 1];
    meeting.values[size_t(thread.index % 32)] = value;
    if (orders_memory) thread.release_to(warp.arriving);
    if (++warp.arrived == 32) {
        if (orders_memory) {
            warp.complete = warp.arriving;
            warp.arriving.reset(cta().agent_capacity, size_t(machine.launch.threads));
        }
        if (last) meeting.result = last();
        warp.arrived = 0;
        warp.generation++;
        wake(warp.waiting);
    }
    while (warp.generation == generation) {
        block(warp.waiting, [what] { return std::string(what) + ", for the other lanes of the warp"; });
    }
    if (orders_memory) thread.knows.join(warp.complete);
    return meeting;
}

namespace {

// A warp arrives as one, as bar.sync and bar.arrive do. The generation it arrived in is what a waiting warp waits to end.
void barrier(int id, int threads, bool wait) {
    const char* what = wait ? "bar.sync" : "bar.arrive";
    if (id < 0 || id > 15 || threads <= 0 || threads % 32 != 0 || threads > machine.launch.threads) {
        error("barrier", "%s: bad barrier %d or thread count %d", what, id, threads);
        return;
    }
    NamedBarrier& it = cta().named_barriers[id];
    const auto arrive = [&] {
        const uint32_t now = it.generation;
        if (it.arrived > 0 && it.threads != threads) {
            error("barrier", "%s: barrier %d is used with %d and %d threads", what, id, it.threads, threads);
        }
        it.threads = threads;
        it.arriving.join(my_warp().complete);
        it.arrived += 32;
        if (it.arrived >= threads) {
            it.arrived = 0;
            it.generation++;
            std::swap(it.complete, it.arriving);
            it.arriving.reset(cta().agent_capacity, size_t(machine.launch.threads));
            wake(it.waiting);
        }
        return now;
    };
    const uint32_t generation = meet_warp(what, id, 0, true, arrive).result;
    if (!wait) {
        yield_sometimes();
        return;
    }
    while (it.generation == generation) {
        block(it.waiting, [&it, id, threads] {
            return (id ? "named barrier " + std::to_string(id) : std::string("cta_sync")) + ", " + std::to_string(it.arrived) +
                   " of " + std::to_string(threads) + " threads there";
        });
    }
    self().knows.join(it.complete);
}

}  // namespace

void set_registers(int registers, bool increase) {
    meet_warp(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", registers);
    Thread& thread = self();
    if (increase ? registers < thread.registers : registers > thread.registers) {
        error("registers", "setmaxnreg.%s to %d from %d", increase ? "inc" : "dec", registers, thread.registers);
    }
    while (cta().free_registers < registers - thread.registers) {
        block(cta().waiting_for_registers, [registers] { return "setmaxnreg.inc " + std::to_string(registers); });
    }
    cta().free_registers -= registers - thread.registers;
    thread.registers = registers;
    wake(cta().waiting_for_registers);
}

}  // namespace aadkern::host_model

namespace aadkern {
using namespace host_model;

void cta_sync() { barrier(0, machine.launch.threads, true); }
void named_barrier_sync(int id, int threads) { barrier(id, threads, true); }
void named_barrier_arrive(int id, int threads) { barrier(id, threads, false); }
void warp_sync() { meet_warp("__syncwarp", 0, 0, true); }

// What is known of by then, whoever wrote it, may be read by the asynchronous units.
void fence_proxy_async() {
    Knowledge& knows = self().knows;
    for (int thread = 0; thread < machine.launch.threads; thread++) knows.proxied.raise(thread, knows.past[thread]);
}

void fence_proxy_async_global() {}  // global memory has no shadow

}  // namespace aadkern
