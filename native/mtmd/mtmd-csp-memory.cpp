#include "mtmd-csp-memory.h"

#include "csp-work.h"

#include "clip-graph.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>

// in clip.cpp
std::unique_ptr<clip_graph> clip_get_graph_builder(clip_ctx * ctx, const clip_image_f32_batch & imgs, const clip_encode_params * params);

struct clip_deleter {
    void operator()(clip_ctx * ctx) const { clip_free(ctx); }
};

using clip_ptr = std::unique_ptr<clip_ctx, clip_deleter>;

// the side of the square that stands for the picture
static int csp_side(const clip_hparams & hparams, uint64_t n_pixels) {
    if (hparams.image_max_pixels <= 0) {
        return hparams.image_size;
    }

    const uint64_t min = std::max(hparams.image_min_pixels, 1);
    const uint64_t max = std::max<uint64_t>(hparams.image_max_pixels, min);

    const int align = hparams.patch_size*std::max(hparams.n_merge, 1);

    return std::max(int(std::sqrt(n_pixels ? std::clamp(n_pixels, min, max) : max))/align, 1)*align;
}

// that a picture is cut into at most, with the whole of it in small
static uint32_t csp_n_tiles(const clip_ctx * ctx) {
    const auto & hparams = *clip_get_hparams(ctx);

    if (hparams.image_max_pixels > 0 || hparams.image_size <= 0) {
        return 1;
    }

    uint32_t res = std::max(hparams.preproc_max_tiles, 0);

    if (clip_get_projector_type(ctx) == PROJECTOR_TYPE_IDEFICS3) {
        const uint32_t n_side = (hparams.image_longest_edge + hparams.image_size - 1)/hparams.image_size;

        res = n_side*n_side;
    }
    for (const auto & size : hparams.image_res_candidates) {
        res = std::max<uint32_t>(res, (size.width/hparams.image_size)*(size.height/hparams.image_size));
    }

    return res + 1;
}

// of the values that are put together on the host for an input
static size_t csp_input_size(ggml_cgraph * gf) {
    size_t res = 0;

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        for (const auto * src : ggml_graph_node(gf, i)->src) {
            if (src && (src->flags & GGML_TENSOR_FLAG_INPUT)) {
                res = std::max(res, ggml_nbytes(src));
            }
        }
    }

    return res;
}

static void csp_measure(clip_ctx * ctx, uint64_t n_pixels, mtmd_csp_memory & res) {
    const int side = csp_side(*clip_get_hparams(ctx), n_pixels);

    clip_image_f32_batch batch;
    batch.entries.emplace_back();
    batch.entries[0].set_size({ side, side }, true, false);

    auto builder = clip_get_graph_builder(ctx, batch, nullptr);

    ggml_cgraph * gf = builder->build();

    ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    if (!backend) {
        throw std::runtime_error("no CPU backend");
    }

    ggml_backend_t             backends[] = { backend.get() };
    ggml_backend_buffer_type_t bufts   [] = { ggml_backend_get_default_buffer_type(backend.get()) };

    ggml_backend_sched_ptr sched { ggml_backend_sched_new(backends, bufts, 1, 8192, false, false) };

    size_t compute = 0;
    ggml_backend_sched_reserve_size(sched.get(), gf, &compute);

    res.compute  = compute;
    res.work     = csp_work_size(gf) + csp_input_size(gf);
    res.n_tiles  = csp_n_tiles(ctx);
    res.nx       = side;
    res.ny       = side;
    res.n_tokens = clip_n_output_tokens(ctx, &batch.entries[0]);
    res.n_embd   = clip_n_mmproj_embd(ctx);
}

bool mtmd_csp_get_memory(const char * fname, uint64_t n_pixels, mtmd_csp_memory * res) {
    clip_context_params params = {};

    params.flash_attn_type  = CLIP_FLASH_ATTN_TYPE_ENABLED;
    params.image_min_tokens = -1;
    params.image_max_tokens = -1;
    params.no_alloc         = true;

    const auto init = clip_init(fname, params);

    const clip_ptr vision(init.ctx_v);
    const clip_ptr audio (init.ctx_a);
    const clip_ptr gen   (init.ctx_gen_a);

    if (!vision) {
        return false;
    }

    *res = {};

    for (const auto * ctx : { vision.get(), audio.get(), gen.get() }) {
        if (ctx) {
            for (const auto & [_, size] : clip_get_mem_usage(ctx)) {
                res->weights += size;
            }
        }
    }

    try {
        csp_measure(vision.get(), n_pixels, *res);
    } catch (const std::exception &) {
        return false;
    }

    return true;
}
