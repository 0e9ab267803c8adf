#include "llama-csp-memory.h"

#include "csp-work.h"

#include "llama-context.h"

static bool csp_is_host(ggml_backend_buffer_type_t buft) {
    const ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);

    return !dev || ggml_backend_buft_is_host(buft) || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

llama_csp_memory llama_csp_get_memory(const llama_context * ctx) {
    llama_csp_memory res = {};

    for (const auto & [buft, data] : ctx->memory_breakdown()) {
        if (csp_is_host(buft)) {
            // a host buffer holds the blocks of the file, others rearrange them
            (ggml_backend_buft_is_host(buft) ? res.weights : res.repacked) += data.model;

            res.cache   += data.context;
            res.compute += data.compute;
        } else {
            res.device_weights += data.model;
            res.device_cache   += data.context;
            res.device_compute += data.compute;
        }
    }

    res.work = csp_work_size(ctx->get_gf_res_reserve()->get_gf());

    return res;
}

uint64_t llama_csp_free_device_memory(void) {
    uint64_t res = 0;

    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);

        if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_GPU) {
            size_t free  = 0;
            size_t total = 0;

            ggml_backend_dev_memory(dev, &free, &total);

            res += free;
        }
    }

    return res;
}
