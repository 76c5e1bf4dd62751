// How a test starts a kernel on the host model, and what it hears of it. The whole interface for csrc/model_entries/*.cpp:
//     Report report = launch(Launch{{grid_x, grid_y, grid_z}, threads, shared_bytes}, options, [&] { kernel<...>(arguments); });
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace aadkern::host_model {

// When asynchronous work (TMA, bulk copies, wgmma) is carried out: as soon as it is issued, only when no thread can go on, or at
// random. The first two also run threads in turn; the third picks threads at random, and lets whole warps run far ahead.
enum class Completion : int { Eager = 0, Lazy = 1, Random = 2 };

struct Options {
    int completion = int(Completion::Random);
    uint64_t seed = 1;  // also: the shared-memory offset, and which lane is elected
    int resident_ctas = 1;
    int check_races = 1;                // 0: values and deadlocks only, several times faster
    int64_t max_switches = 50'000'000;  // more is reported as a livelock
};

// Global memory that the kernel may touch. WriteOnce: no byte is written twice in a launch.
enum class Access : int { Read, WriteOnce, Any };
struct Region {
    const void* start;
    size_t bytes;
    Access access;
    const char* name;
};

struct Launch {
    int grid[3] = {1, 1, 1};
    int threads = 128;
    int shared_bytes = 0;
    int registers = 0;                 // a thread, at launch; 0: the most that `threads` leave, as ptxas does with setmaxnreg
    std::vector<Region> regions = {};  // none: global accesses are not checked
};

// What went wrong, by kind: race, deadlock, livelock, bounds, global, alignment, uninitialised, swizzle, mbarrier, barrier,
// wgmma, registers, bulk, collective, exit, and model (asked for what it cannot do).
struct Report {
    struct Kind {
        int count = 0;
        std::string first;  // the first message, with the CTA and the thread
    };
    std::map<std::string, Kind> kinds;
    int64_t switches = 0;
    bool clean() const { return kinds.empty(); }
    // One line a kind: "kind<TAB>count<TAB>first message"; empty if clean.
    std::string text() const;
};

Report launch(const Launch& launch, const Options& options, const std::function<void()>& kernel);

// For extern "C" entries: the report as text into a caller's buffer; the number of kinds.
int write_report(const Report& report, char* buffer, int size);

}  // namespace aadkern::host_model
