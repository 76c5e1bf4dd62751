// One fiber for each CUDA thread. ucontext gives each its stack, portably; after that first entry the switches are
// _setjmp/_longjmp, because swapcontext enters the kernel at every switch to save the signal mask.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <functional>
#include <memory>

#include <ucontext.h>

namespace aadkern::host_model {

class Fiber {
public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    // From the next resume on, runs `entry` from its start. What ran before, if it had not ended, is forgotten.
    void start(std::function<void()> entry);
    void resume();   // by the scheduler: until the fiber suspends or ends
    void suspend();  // by the fiber: back to the scheduler
private:
    static void trampoline(unsigned low, unsigned high);
    std::function<void()> entry_;
    bool entered_ = false;
    void* stack_;
    ucontext_t context_;
    jmp_buf inside_, scheduler_;
};

}  // namespace aadkern::host_model
