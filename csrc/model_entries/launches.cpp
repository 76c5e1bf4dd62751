// The launches of csrc/attention/launch.h on the host model. With csrc/bindings.cpp they make torch operators that run the very kernels on
// CPU tensors: tests/sm90/test_sm90_binding.py goes through all of aadkern.attention's "sm90" but the device. The report of a run with errors is
// the message of the exception.
#include <algorithm>

#include "attention/sm90/backward_parameters.h"
#include "attention/launch.h"
#include "primitives/model/launch.h"

namespace aadkern {

// Of forward.cpp and backward.cpp.
extern "C" int forward(const ForwardArguments* arguments, int kernel, int range_count, const host_model::Options* options, char* text,
                           int text_size);
extern "C" int backward(const BackwardArguments* arguments, const host_model::Options* options, char* text, int text_size);

// How the next launches are scheduled.
extern "C" host_model::Options schedule;
host_model::Options schedule;

namespace {

char report[16384];

const char* told(int errors) { return errors == 0 ? nullptr : report; }

}  // namespace

const char* launch_forward(const ForwardArguments& arguments, ForwardKernel kernel, void* stream) {
    if (stream != nullptr) return "the host model has no streams";
    int ranges = 0;
    for (int tile = 0; tile < arguments.tables.tile_count; ++tile) ranges = std::max(ranges, arguments.tables.tiles[4 * tile + 3]);
    return told(forward(&arguments, int(kernel), ranges, &schedule, report, sizeof(report)));
}

const char* launch_backward(const BackwardArguments& arguments, void* stream) {
    if (stream != nullptr) return "the host model has no streams";
    return told(backward(&arguments, &schedule, report, sizeof(report)));
}

}  // namespace aadkern
