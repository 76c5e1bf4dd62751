// The checks of single primitives on a GPU: nvcc -shared -gencode arch=compute_90a,code=sm_90a (tests/sm90/hopper_host.py build_primitive_checks), called by
// ctypes.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "primitives/primitives.h"

namespace aadkern::primitive_checks {

class Machine {
public:
    explicit Machine(const void*) {}
    Machine(const Machine&) = delete;
    Machine& operator=(const Machine&) = delete;
    ~Machine() {
        for (const Copy& copy : copies_) cudaFree(copy.device);
    }
    template <class T> const T* input(const T* array, size_t count) {
        return static_cast<const T*>(copy_in(array, count * sizeof(T), nullptr));
    }
    template <class T> T* output(T* array, size_t count) { return static_cast<T*>(copy_in(array, count * sizeof(T), array)); }
    TensorMap map(const TensorMapRequest& request) {
        TensorMap made{};
        if (const char* why = encode_tensor_map(request, &made)) fail("tensor map", why);
        return made;
    }
    template <class Arguments>
    void run(void (*kernel)(Arguments), int ctas, int threads, int shared_bytes, const Arguments& arguments) {
        if (!report_.empty()) return;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "cudaFuncSetAttribute");
        kernel<<<ctas, threads, shared_bytes>>>(arguments);
        check(cudaGetLastError(), "launch");
        check(cudaDeviceSynchronize(), "kernel");
    }
    int finish(char* report, int size) {
        for (const Copy& copy : copies_) {
            if (copy.back && report_.empty())
                check(cudaMemcpy(copy.back, copy.device, copy.bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
        }
        if (size > 0) std::snprintf(report, size_t(size), "%s", report_.c_str());
        return report_.empty() ? 0 : 1;
    }

private:
    struct Copy {
        void* device;
        void* back;  // null: an input
        size_t bytes;
    };
    void* copy_in(const void* array, size_t bytes, void* back) {
        void* device = nullptr;
        check(cudaMalloc(&device, bytes), "cudaMalloc");
        if (device != nullptr) {
            check(cudaMemcpy(device, array, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
            copies_.push_back({device, back, bytes});
        }
        return device;
    }
    void check(cudaError_t error, const char* call) {
        if (error != cudaSuccess) fail(call, cudaGetErrorString(error));
    }
    void fail(const char* kind, const char* why) {
        if (report_.empty()) report_ = std::string(kind) + "\t1\t" + why + "\n";
    }
    std::vector<Copy> copies_;
    std::string report_;
};

}  // namespace aadkern::primitive_checks

#include "primitive_checks/entries.h"
