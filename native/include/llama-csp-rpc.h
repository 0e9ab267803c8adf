#pragma once

#include "llama.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// layers on other machines, by ggml's RPC backend. endpoints are "host:port", the host an IPv4 address or its name
// what goes wrong is logged

struct llama_csp_rpc;

// connect to servers, until it is freed, which has to be after the models on them are
// returns NULL if one of them can't be reached, or there are too many devices
LLAMA_API struct llama_csp_rpc * llama_csp_rpc_init(const char ** endpoints, size_t n_endpoints);
LLAMA_API void                   llama_csp_rpc_free(struct llama_csp_rpc * rpc);

// the devices of the servers, then the GPUs of this machine, NULL-terminated, for llama_model_params
LLAMA_API ggml_backend_dev_t * llama_csp_rpc_devices(struct llama_csp_rpc * rpc);

// false: there is no connection. if it was lost, all that came from the server since is zero
LLAMA_API bool llama_csp_rpc_is_connected(const char * endpoint);

// lend this machine's GPUs, or else its CPU. returns only if that fails
LLAMA_API void llama_csp_rpc_serve(const char * endpoint, uint32_t n_threads);

#ifdef __cplusplus
}
#endif
