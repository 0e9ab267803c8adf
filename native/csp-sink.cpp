#include "csp.h"

#include "llama-context.h"

#include <algorithm>
#include <cmath>

// has the graph built anew, without sinks, once the sequence is gone for which they stood
class llm_graph_input_csp_sinks : public llm_graph_input_i {
public:
    llm_graph_input_csp_sinks(const llama_csp * csp) : csp(csp) {}
    virtual ~llm_graph_input_csp_sinks() = default;

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        GGML_UNUSED(params);

        return !csp->is_index_gone();
    }

    const llama_csp * csp;
};

// softmax_n is softmax with one more key of logit ln(n) and a zero value: an attention sink
ggml_tensor * llama_csp::build_sinks(const llm_graph_context & graph, const layer & l, ggml_tensor * sinks) const {
    if (!csp_find_input<llm_graph_input_csp_sinks>(graph)) {
        graph.res->add_input(std::make_unique<llm_graph_input_csp_sinks>(this));
    }

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
            l.sink_data.clear();
            return;
        case LLAMA_CSP_SINK_FIXED:
            l.sink_data.assign(l.n_head, logf(params.n_decode));
            break;
        case LLAMA_CSP_SINK_MASS:
            // what was evicted before is still gone
            l.mass_data.resize(l.n_head, CSP_SINK_EMPTY);

            for (uint32_t h = 0; h < l.n_head; ++h) {
                const float a = std::max(l.mass_data[h], mass[h]);
                const float b = std::min(l.mass_data[h], mass[h]);

                l.mass_data[h] = a + log1pf(expf(b - a));
            }

            l.sink_data = l.mass_data;
            break;
    }

    ggml_backend_tensor_set(l.sink, l.sink_data.data(), 0, ggml_nbytes(l.sink));
}
