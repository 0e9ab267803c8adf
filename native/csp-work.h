#pragma once

#include "ggml.h"

#include <algorithm>
#include <cstddef>

// the CPU's scratch for a graph: products with weights of another type than F32 convert the activations first
inline size_t csp_work_size(ggml_cgraph * gf) {
    size_t res = 0;

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->op != GGML_OP_MUL_MAT || node->src[0]->type == GGML_TYPE_F32) {
            continue;
        }

        const ggml_tensor * b = node->src[1];

        if (b->type != node->src[0]->type) {
            const ggml_type type = ggml_is_quantized(node->src[0]->type) ? GGML_TYPE_Q8_0 : node->src[0]->type;

            res = std::max(res, size_t(ggml_nelements(b)/ggml_blck_size(type)*ggml_type_size(type)));
        }
    }

    return res;
}
