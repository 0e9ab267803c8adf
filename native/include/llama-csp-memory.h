#pragma once

#include "llama.h"

// What a context and its model take, in bytes
//
// of a model that was loaded with llama_model_params.no_alloc: what they would take, though nothing is allocated
//
// usage:
//
//   llama_model_params mparams = llama_model_default_params();
//   mparams.no_alloc  = true;
//   mparams.load_mode = LLAMA_LOAD_MODE_NONE;
//
//   llama_model   * model = llama_model_load_from_file(path, mparams);
//   llama_context * ctx   = llama_init_from_model(model, cparams);
//
//   llama_csp_memory memory = llama_csp_get_memory(ctx);

#ifdef __cplusplus
extern "C" {
#endif

    struct llama_csp_memory {
        // in the host's memory
        uint64_t weights;  // as they stand in the file
        uint64_t repacked; // arranged anew for this CPU
        uint64_t cache;    // K and V
        uint64_t compute;  // of the largest graph
        uint64_t work;     // the CPU's scratch beside it

        // in that of all other devices
        uint64_t device_weights;
        uint64_t device_cache;
        uint64_t device_compute;
    };

    LLAMA_API struct llama_csp_memory llama_csp_get_memory(const struct llama_context * ctx);

    // bytes that a new context could have on all devices other than the CPU
    LLAMA_API uint64_t llama_csp_free_device_memory(void);

#ifdef __cplusplus
}
#endif
