#include "csp.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>

// softmax_n is softmax with one more key of logit ln(n) and a zero value: an attention sink
ggml_tensor * llama_csp::build_sinks(const llm_graph_context & graph, const layer & l, ggml_tensor * sinks) const {
    if (!sinks) {
        return l.sink;
    }

    auto * ctx0 = graph.ctx0;

    // it joins a sink that the model has: ln(exp(a) + exp(b))
    return ggml_add(ctx0, sinks, ggml_softplus(ctx0, ggml_sub(ctx0, l.sink, sinks)));
}

void llama_csp::set_sinks(layer & l, const llama_csp_params & params, const std::vector<float> & mass) {
    switch (params.sink) {
        case LLAMA_CSP_SINK_NONE:
            l.index.sink.clear();
            return;
        case LLAMA_CSP_SINK_FIXED:
            l.index.sink.assign(l.n_head, logf(params.n_decode));
            break;
        case LLAMA_CSP_SINK_MASS:
            // what was evicted before is still gone
            l.index.mass.resize(l.n_head, CSP_SINK_EMPTY);

            for (uint32_t h = 0; h < l.n_head; ++h) {
                const float a = std::max(l.index.mass[h], mass[h]);
                const float b = std::min(l.index.mass[h], mass[h]);

                l.index.mass[h] = a + log1pf(expf(b - a));
            }

            l.index.sink = l.index.mass;
            break;
    }

    ggml_backend_tensor_set(l.sink, l.index.sink.data(), 0, ggml_nbytes(l.sink));
}
