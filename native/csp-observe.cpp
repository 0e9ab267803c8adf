#include "csp.h"

#include "llama-context.h"

#include <algorithm>

class llm_graph_input_csp : public llm_graph_input_i {
public:
    llm_graph_input_csp(llama_csp * csp) : csp(csp) {}
    virtual ~llm_graph_input_csp() = default;

    void set_input(const llama_ubatch * ubatch) override {
        csp->set_input_rows(rows, *ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        return rows->ne[0] == std::min(params.ubatch.n_tokens, csp->n_window);
    }

    ggml_tensor * rows; // I64 [min(n_tokens, n_window)]

    llama_csp * csp;
};

void llama_csp::observe(uint32_t n_window_new) {
    update_index();

    // more tokens are never seen
    n_window_new = std::min(n_window_new, ctx.get_cparams().n_ctx);

    n_observed = 0;
    i_row      = 0;

    if (is_holding) {
        reset_graphs();

        is_holding = false;
    }

    if (n_window_new != n_window) {
        // graphs and copies in flight may still use the old ring
        ctx.synchronize();
        reset_graphs();

        n_window = 0;
        bufs_q.clear();
        window.clear();

        if (n_window_new > 0) {
            bufs_q = csp_alloc(layers, &layer::q, [](const layer & l) -> int64_t { return l.n_embd_head_k*l.n_head; }, n_window_new);
        }

        window.resize(n_window_new);
        n_window = n_window_new;
    }
}

void llama_csp::hold() {
    reset_graphs();

    is_holding = true;
}

void llama_csp::build_observe(const llm_graph_context & graph, layer & l, ggml_tensor * q) {
    auto * ctx0 = graph.ctx0;

    auto * inp = csp_find_input<llm_graph_input_csp>(graph);

    const int64_t n_tokens = q->ne[2];

    if (!inp) {
        auto cur = std::make_unique<llm_graph_input_csp>(this);

        cur->rows = ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, std::min<int64_t>(n_tokens, n_window));
        ggml_set_input(cur->rows);
        ggml_set_name(cur->rows, "csp_inp_rows");

        inp = (llm_graph_input_csp *) graph.res->add_input(std::move(cur));
    }

    const int64_t n = inp->rows->ne[0];

    q = ggml_view_3d(ctx0, q, q->ne[0], q->ne[1], n, q->nb[1], q->nb[2], (n_tokens - n)*q->nb[2]);
    q = ggml_cont_2d(ctx0, q, q->ne[0]*q->ne[1], n);

    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx0, l.q, q, inp->rows));
}

void llama_csp::set_input_rows(ggml_tensor * dst, const llama_ubatch & ubatch) {
    GGML_ASSERT(ggml_backend_buffer_is_host(dst->buffer));

    int64_t * data = (int64_t *) dst->data;

    const uint32_t n_tokens = ubatch.n_tokens;
    const uint32_t n        = dst->ne[0];

    const bool is_2d = ubatch.is_pos_2d();

    // see llama_kv_cache::set_input_kq_mask()
    const bool causal = ctx.get_cparams().causal_attn ||
        (kv.hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY && kv.swa_type == LLAMA_SWA_TYPE_NONE);

    const llama_pos pos_max = *std::max_element(ubatch.pos, ubatch.pos + n_tokens);

    const auto get_ext = [&](uint32_t i) {
        llama_kv_cell_ext ext;
        if (is_2d) {
            ext.x = ubatch.pos[i + n_tokens*2];
            ext.y = ubatch.pos[i + n_tokens];
        }
        return ext;
    };

    take_back(ubatch.pos[0], get_ext(0));

    for (uint32_t i = n_tokens - n; i < n_tokens; ++i) {
        query & cur = window[i_row];

        cur.pos     = ubatch.pos[i];
        cur.pos_max = causal ? ubatch.pos[i] : pos_max;
        cur.is_2d   = causal && is_2d;

        cur.ext     = get_ext(i);

        cur.modality = ubatch.token ? LLAMA_CSP_MODALITY_TEXT : LLAMA_CSP_MODALITY_MEDIA;

        *data++ = i_row;

        i_row = (i_row + 1)%n_window;
    }

    n_observed = std::min(n_observed + n, n_window);
}

void llama_csp::take_back(llama_pos p, const llama_kv_cell_ext & ext) {
    while (n_observed > 0) {
        const uint32_t i_last = (i_row + n_window - 1)%n_window;

        const query & last = window[i_last];

        // the parts of one picture can share a position
        if (last.pos < p || (last.pos == p && ext.is_2d_gt(last.ext.x, last.ext.y))) {
            break;
        }

        i_row = i_last;
        n_observed--;
    }
}

void llama_csp::drop_before(llama_pos p) {
    const auto is_before = [&](int32_t row) { return window[row].pos < p; };

    const auto rows = window_rows(n_observed);

    n_observed -= std::find_if_not(rows.begin(), rows.end(), is_before) - rows.begin();
}

std::vector<int32_t> llama_csp::window_rows(uint32_t n) const {
    std::vector<int32_t> res(n);

    for (uint32_t i = 0; i < n; ++i) {
        res[i] = (i_row + n_window - n + i)%n_window;
    }

    return res;
}
