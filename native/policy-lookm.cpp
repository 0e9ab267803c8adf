// LOOK-M (arXiv 2406.18139)

#include "policy-util.h"

#include "llama-csp.h"

#include <algorithm>
#include <cmath>

// the added cell with the key nearest to that of cell i
static uint32_t csp_nearest(const csp_keys & keys, uint32_t i) {
    csp_keys::neighbor res = { keys.added[0], -HUGE_VAL };

    for (uint32_t n_seen = 0; n_seen < keys.added.size();) {
        const auto cur = keys.nearest(i, n_seen);

        if (cur.cosine > res.cosine) {
            res = cur;
        }
    }

    return res.i;
}

bool llama_csp_policy_lookm(const llama_csp_view * view, llama_csp_choice * choice, const void *) {
    if (!view->k) {
        return false;
    }

    csp_for_heads(*view, [&](uint32_t h) {
        const auto row = size_t(h)*view->n_cells;

        std::vector<uint32_t> text;
        std::vector<uint32_t> media;

        for (const auto i : csp_candidates(*view)) {
            (view->modality[row + i] == LLAMA_CSP_MODALITY_TEXT ? text : media).push_back(i);
        }

        const auto score = csp_attention(*view, h);

        const uint32_t n      = view->budget - view->recent;
        const uint32_t n_text = std::min<size_t>(n, text.size());

        auto drawn = csp_draw(text, n_text, score);

        const auto pictures = csp_draw(media, n - n_text, score);
        drawn.insert(drawn.end(), pictures.begin(), pictures.end());

        csp_keep(*view, choice, h, drawn);

        csp_keys keys(*view, h);

        for (uint32_t i = 0; i < choice->n_kept[h]; ++i) {
            keys.add(choice->kept[row + i]);
        }

        for (const auto i : media) {
            choice->merge[row + i] = csp_nearest(keys, i);
        }
    });

    return true;
}
