#include "llama-csp-rpc.h"

#include "llama-impl.h"

#include "ggml-cpp.h"
#include "ggml-rpc.h"

#include <memory>
#include <vector>

// a scheduler takes 16 backends, of which two may be of this machine's CPU
static constexpr size_t CSP_MAX_DEVICES = 14;

struct llama_csp_rpc {
    std::vector<ggml_backend_dev_t> devices;
    std::vector<ggml_backend_ptr>   connections; // open as long as there is a backend
};

// the GPUs of one backend: others know the same ones by other names
static std::vector<ggml_backend_dev_t> csp_get_gpus() {
    std::vector<ggml_backend_dev_t> res;

    for (const auto type : { GGML_BACKEND_DEVICE_TYPE_GPU, GGML_BACKEND_DEVICE_TYPE_IGPU }) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_t dev = ggml_backend_dev_get(i);

            if (ggml_backend_dev_type(dev) != type) {
                continue;
            }
            if (res.empty() || (ggml_backend_dev_type(res[0]) == type && ggml_backend_dev_backend_reg(res[0]) == ggml_backend_dev_backend_reg(dev))) {
                res.push_back(dev);
            }
        }
    }

    return res;
}

// NULL, and an error logged, in a build without GGML_RPC
template<typename F>
static F * csp_rpc_function(const char * name) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    if (!reg) {
        LLAMA_LOG_ERROR("%s: the libraries are built without GGML_RPC\n", __func__);
        return nullptr;
    }

    return (F *) ggml_backend_reg_get_proc_address(reg, name);
}

llama_csp_rpc * llama_csp_rpc_init(const char ** endpoints, size_t n_endpoints) {
    auto * add_server = csp_rpc_function<decltype(ggml_backend_rpc_add_server)>("ggml_backend_rpc_add_server");
    if (!add_server) {
        return nullptr;
    }

    auto res = std::make_unique<llama_csp_rpc>();

    for (size_t i = 0; i < n_endpoints; ++i) {
        ggml_backend_reg_t reg = add_server(endpoints[i]);
        if (!reg) {
            return nullptr;
        }

        for (size_t j = 0; j < ggml_backend_reg_dev_count(reg); ++j) {
            res->devices.push_back(ggml_backend_reg_dev_get(reg, j));
        }

        res->connections.emplace_back(ggml_backend_dev_init(res->devices.back(), nullptr));
    }

    const auto gpus = csp_get_gpus();

    res->devices.insert(res->devices.end(), gpus.begin(), gpus.end());

    if (res->devices.size() > CSP_MAX_DEVICES) {
        LLAMA_LOG_ERROR("%s: %zu devices, more than %zu\n", __func__, res->devices.size(), CSP_MAX_DEVICES);
        return nullptr;
    }

    res->devices.push_back(nullptr);

    return res.release();
}

void llama_csp_rpc_free(llama_csp_rpc * rpc) {
    delete rpc;
}

ggml_backend_dev_t * llama_csp_rpc_devices(llama_csp_rpc * rpc) {
    return rpc->devices.data();
}

bool llama_csp_rpc_is_connected(const char * endpoint) {
    auto * is_connected = csp_rpc_function<decltype(ggml_backend_rpc_is_connected)>("ggml_backend_rpc_is_connected");

    return is_connected && is_connected(endpoint);
}

void llama_csp_rpc_serve(const char * endpoint, uint32_t n_threads) {
    auto * start_server = csp_rpc_function<decltype(ggml_backend_rpc_start_server)>("ggml_backend_rpc_start_server");
    if (!start_server) {
        return;
    }

    auto devices = csp_get_gpus();
    if (devices.empty()) {
        devices.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }

    start_server(endpoint, nullptr, n_threads, devices.size(), devices.data());
}
