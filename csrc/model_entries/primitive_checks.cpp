// The checks of single primitives on the host model.
#include <cstdint>
#include <type_traits>

#include "primitives/primitives.h"

namespace aadkern::primitive_checks {

// Kernels work on the caller's own arrays; every access is checked against them.
class Machine {
public:
    explicit Machine(const void* options) : options_(*static_cast<const host_model::Options*>(options)) {}
    template <class T> const T* input(const T* array, size_t count) {
        launch_.regions.push_back({array, count * sizeof(T), host_model::Access::Read, "an input"});
        return array;
    }
    template <class T> T* output(T* array, size_t count) {
        launch_.regions.push_back({array, count * sizeof(T), host_model::Access::Any, "an output"});
        return array;
    }
    TensorMap map(const TensorMapRequest& request) {
        TensorMap made{};
        if (const char* why = encode_tensor_map(request, &made)) report_.kinds["tensor map"] = {1, why};
        return made;
    }
    template <class Arguments>
    void run(void (*kernel)(Arguments), int ctas, int threads, int shared_bytes, const Arguments& arguments) {
        if (!report_.clean()) return;
        launch_.grid[0] = ctas;
        launch_.threads = threads;
        launch_.shared_bytes = shared_bytes;
        report_ = host_model::launch(launch_, options_, [&] { kernel(arguments); });
    }
    int finish(char* report, int size) { return host_model::write_report(report_, report, size); }

private:
    host_model::Options options_;
    host_model::Launch launch_;
    host_model::Report report_;
};

}  // namespace aadkern::primitive_checks

#include "primitive_checks/entries.h"
