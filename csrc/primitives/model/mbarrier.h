// What TMA needs of mbarriers.
#pragma once

#include "primitives/model/units.h"

namespace aadkern::host_model {

// The mbarrier at this address, or nullptr after a report. `async`: for a unit that needs fence_mbarrier_init to see it.
Mbarrier* find_mbarrier(SharedAddress address, bool async, const char* what);
// A load towards it is issued, and later its bytes have arrived.
Stamp begin_load(Mbarrier& mbarrier);
void end_load(Mbarrier& mbarrier, Stamp load, uint32_t bytes);

}  // namespace aadkern::host_model
