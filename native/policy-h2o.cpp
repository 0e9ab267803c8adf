// H2O (arXiv 2306.14048)

#include "llama-csp-policies.h"

// its window is the whole prompt, which is resolved before. what is left is SnapKV's choice without pooling
bool llama_csp_policy_h2o(const llama_csp_view * view, llama_csp_choice * choice, const void *) {
    const llama_csp_settings_snapkv settings = { 1, false };

    return llama_csp_policy_snapkv(view, choice, &settings);
}
