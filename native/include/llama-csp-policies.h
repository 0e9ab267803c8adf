#pragma once

#include "llama.h"
#include "llama-csp-policy.h"

// The policies that come with the library. Each keeps the last R cells of every head; where it does not say otherwise, exactly B
// Window attention: self + cross, blind to modality. Draws go to the highest score, ties to the lower index
// settings NULL: the defaults. False where they are out of range, or where keys are needed and not there

#ifdef __cplusplus
extern "C" {
#endif

    // Cross-Self Pruning (arXiv 2412.04652, section 3.2, without its double draws):
    // floor((B - R)*r) cells by cross score, then the best by self score not yet drawn
    struct llama_csp_settings_csp {
        double cross_ratio; // r up to 1 [< 0]
                            // < 0: per head, the cross share of the scores of the cells to choose from
        double distance;    // lambda [0], needs keys where it is not 0: draw one by one by log(score) - lambda*i/(i + 4)*max(0, c)^2,
                            // c the largest cosine of the cell's key with those of the recent and of the i drawn cells
                            // < 0: 32 where there are cells of pictures to choose from, else 0
    };

    // SnapKV (arXiv 2404.14469): window attention, pooled along the sequence
    struct llama_csp_settings_snapkv {
        uint32_t kernel;  // cells that are pooled, odd, up to 99 [7]
        bool     average; // their mean, with zeros beyond both ends, not their maximum [false]
    };

    // StreamingLLM (arXiv 2309.17453): the first cells, but B - R at most, and the most recent
    struct llama_csp_settings_streaming {
        uint32_t n_sink; // [4]
    };

    // PyramidKV (arXiv 2406.02069): as SnapKV, with R + k_l cells in every head of layer l, B on average:
    // k_l falls linearly from 2*k - k_min in the first layer to k_min = k/beta in the last, k = B - R
    struct llama_csp_settings_pyramid {
        struct llama_csp_settings_snapkv score;

        double beta; // >= 1 [20]
    };

    // Ada-KV (arXiv 2407.11550): as SnapKV, with one budget of n_head_kv*B cells for the heads of a layer
    struct llama_csp_settings_adakv {
        struct llama_csp_settings_snapkv score;

        double safeguard; // share of B - R that every head has for itself, in [0, 1] [0.2]
    };

    // cells by the number that splitmix64 gives them
    struct llama_csp_settings_random {
        uint64_t seed; // [0]
    };

    LLAMA_API bool llama_csp_policy_csp      (const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);
    LLAMA_API bool llama_csp_policy_snapkv   (const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);
    LLAMA_API bool llama_csp_policy_streaming(const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);
    LLAMA_API bool llama_csp_policy_pyramid  (const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);
    LLAMA_API bool llama_csp_policy_adakv    (const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);
    LLAMA_API bool llama_csp_policy_random   (const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);

    // H2O (arXiv 2306.14048): window attention, of a window that is the whole prompt. no settings
    LLAMA_API bool llama_csp_policy_h2o(const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);

    // LOOK-M (arXiv 2406.18139): text before pictures, each by window attention. an evicted picture cell is merged
    // into the kept cell whose key has the largest cosine with its own. no settings, needs keys
    LLAMA_API bool llama_csp_policy_lookm(const struct llama_csp_view * view, struct llama_csp_choice * choice, const void * settings);

#ifdef __cplusplus
}
#endif
