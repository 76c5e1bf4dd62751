// The host model's half of the primitives that are templates; the others are functions of the .cpp files beside this one.
#pragma once

#include <cstring>
#include <type_traits>

#include "primitives/model/launch.h"
#include "primitives/model/numbers.h"

namespace aadkern {

namespace host_model {
void issue_wgmma(int columns, float* d, const uint32_t* a_registers, uint64_t a, Major major_a, uint64_t b, Major major_b,
                 bool accumulate, bool bfloat16);
void wait_for_wgmma(int allowed);
void wait_for_bulk(int allowed, bool reading_only);
void set_registers(int registers, bool increase);
bool global_access(const void* address, size_t bytes, bool write);
}  // namespace host_model

template <class T> uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return host_model::float_to_bfloat16(low) | uint32_t(host_model::float_to_bfloat16(high)) << 16;
    } else {
        static_assert(std::is_same_v<T, Float16>);
        return host_model::float_to_float16(low) | uint32_t(host_model::float_to_float16(high)) << 16;
    }
}

template <class T> float unpack_low(uint32_t packed) {
    return std::is_same_v<T, BFloat16> ? host_model::bfloat16_to_float(uint16_t(packed))
                                       : host_model::float16_to_float(uint16_t(packed));
}
template <class T> float unpack_high(uint32_t packed) { return unpack_low<T>(packed >> 16); }

template <class T> T load_global(const T* source) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if (host_model::global_access(source, sizeof(T), false)) return *source;
    T poison;
    std::memset(static_cast<void*>(&poison), 0xFF, sizeof poison);
    return poison;
}
template <class T> void store_global(T* target, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if (host_model::global_access(target, sizeof(T), true)) *target = value;
}

template <int N> void bulk_wait_read() { host_model::wait_for_bulk(N, true); }
template <int N> void bulk_wait() { host_model::wait_for_bulk(N, false); }

template <int R> void registers_increase() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    host_model::set_registers(R, true);
}
template <int R> void registers_decrease() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    host_model::set_registers(R, false);
}

template <class T, Major MajorA, Major MajorB, int Size> void wgmma(float (&d)[Size], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    static_assert(Size == 16 || Size == 32 || Size == 40 || Size == 64 || Size == 88, "N is 32, 64, 80, 128 or 176");
    host_model::issue_wgmma(2 * Size, d, nullptr, a, MajorA, b, MajorB, accumulate, std::is_same_v<T, BFloat16>);
}
template <class T, Major MajorB, int Size> void wgmma(float (&d)[Size], const uint32_t* a, uint64_t b, bool accumulate) {
    static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>);
    static_assert(Size == 16 || Size == 32 || Size == 64, "N is 32, 64 or 128");
    host_model::issue_wgmma(2 * Size, d, a, 0, Major::K, b, MajorB, accumulate, std::is_same_v<T, BFloat16>);
}
template <int N> void wgmma_wait() { host_model::wait_for_wgmma(N); }

template <int Size> void keep(float (&)[Size]) {}
template <int Size> void keep(uint32_t (&)[Size]) {}

}  // namespace aadkern
