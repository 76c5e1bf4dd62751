#include "primitives/model/fiber.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <sys/mman.h>

namespace aadkern::host_model {
namespace {
constexpr size_t kStackBytes = 256 * 1024;   // reserved, touched only where used
constexpr size_t kPoisonedBytes = 8 * 1024;  // of it, at the top, where a kernel's frame lies: fragments are NaN until written
}  // namespace

Fiber::Fiber() : stack_(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (stack_ == MAP_FAILED) std::abort();
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::start(std::function<void()> entry) {
    entry_ = std::move(entry);
    entered_ = false;
    std::memset(static_cast<char*>(stack_) + kStackBytes - kPoisonedBytes, 0xFF, kPoisonedBytes);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);  // makecontext passes ints only
    makecontext(&context_, reinterpret_cast<void (*)()>(trampoline), 2, unsigned(self), unsigned(uint64_t(self) >> 32));
}

void Fiber::trampoline(unsigned low, unsigned high) {
    auto* self = reinterpret_cast<Fiber*>(uintptr_t(uint64_t(high) << 32 | low));
    self->entry_();
    _longjmp(self->scheduler_, 1);
}

__attribute__((noinline)) void Fiber::resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (entered_) _longjmp(inside_, 1);
    entered_ = true;
    setcontext(&context_);
}

__attribute__((noinline)) void Fiber::suspend() {
    if (_setjmp(inside_) == 0) _longjmp(scheduler_, 1);
}

}  // namespace aadkern::host_model
