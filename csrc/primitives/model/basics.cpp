// Indices, shuffles, numbers, and global memory.
#include <cmath>
#include <cstring>

#include "primitives/model/machine.h"
#include "primitives/model/numbers.h"

namespace aadkern::host_model {

// An access that is outside every region is reported and not carried out.
bool check_global(const void* address, size_t bytes, bool write, const char* what) {
    const auto& regions = machine.launch.regions;
    if (regions.empty()) return true;
    if (machine.written.size() != regions.size()) {
        machine.written.clear();
        for (const Region& region : regions) machine.written.emplace_back(region.access == Access::WriteOnce ? region.bytes : 0);
    }
    const auto* first = static_cast<const uint8_t*>(address);
    for (size_t i = 0; i < regions.size(); i++) {
        const Region& region = regions[i];
        const auto* start = static_cast<const uint8_t*>(region.start);
        if (first < start || first + bytes > start + region.bytes) continue;
        if (write && region.access == Access::Read) error("global", "%s writes to %s, which is read only", what, region.name);
        if (write && region.access == Access::WriteOnce) {
            for (size_t byte = size_t(first - start); byte < size_t(first - start) + bytes; byte++) {
                if (machine.written[i][byte]) error("global", "%s writes byte %zu of %s a second time", what, byte, region.name);
                machine.written[i][byte] = true;
            }
        }
        return true;
    }
    error("global", "%s of %zu bytes outside every region of the launch", what, bytes);
    return false;
}

bool global_access(const void* address, size_t bytes, bool write) {
    yield_sometimes();
    const char* what = write ? "st.global" : "ld.global";
    if (uintptr_t(address) % bytes != 0) error("alignment", "%s of %zu bytes at a misaligned global address", what, bytes);
    return check_global(address, bytes, write, what);
}

}  // namespace aadkern::host_model

namespace aadkern {
using namespace host_model;

int thread_index() { return self().index; }
int lane_index() { return self().index % 32; }
int warp_index() { return self().index / 32; }
int warpgroup_index() { return self().index / 128; }
int block_index_x() { return cta().block[0]; }
int block_index_y() { return cta().block[1]; }
int block_index_z() { return cta().block[2]; }
int grid_size_x() { return machine.launch.grid[0]; }
int grid_size_y() { return machine.launch.grid[1]; }
int grid_size_z() { return machine.launch.grid[2]; }

// Which lane it is, a kernel must not care.
bool elect_one() {
    meet_warp("elect.sync", 0);
    return uint64_t(lane_index()) == machine.options.seed / 7 % 32;
}

uint32_t shuffle(uint32_t value, int source_lane) { return meet_warp("shfl.idx", 0, value).values[size_t(source_lane & 31)]; }
uint32_t shuffle_xor(uint32_t value, int lane_mask) {
    return meet_warp("shfl.bfly", lane_mask, value).values[size_t((lane_index() ^ lane_mask) & 31)];
}
float shuffle(float value, int source_lane) { return float_of(shuffle(bits_of(value), source_lane)); }
float shuffle_xor(float value, int lane_mask) { return float_of(shuffle_xor(bits_of(value), lane_mask)); }
int warp_uniform(int value) { return int(shuffle(uint32_t(value), 0)); }

float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.f : y;
}

float log2_approx(float x) { return x < 0x1p-126f && x > -0x1p-126f ? -INFINITY : std::log2(x); }

int atomic_add_global(int* counter, int value) {
    yield_sometimes();
    if (!check_global(counter, 4, true, "an atomic")) return 0;
    const int before = *counter;
    *counter += value;
    return before;
}

void semaphore_wait(const int* counter, int value) {
    if (!check_global(counter, 4, false, "semaphore_wait")) return;
    while (*counter != value) {
        block(machine.waiting_for_semaphores,
              [counter, value] { return "a semaphore at " + std::to_string(*counter) + " to become " + std::to_string(value); });
    }
    yield_sometimes();
}

void semaphore_add(int* counter, int value) {
    if (!check_global(counter, 4, true, "semaphore_add")) return;
    *counter += value;
    wake(machine.waiting_for_semaphores);
    yield_sometimes();
}

}  // namespace aadkern
