#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <map>
#include <stdexcept>

// the head's row of a policy's answer, in indices into its cells. throws unless it makes sense
static llama_csp::head_choice csp_read_choice(const std::string & where, uint32_t n_cells, uint32_t n_kept, const uint32_t * kept, const uint32_t * merge) {
    if (n_kept == 0 || n_kept > n_cells) {
        throw std::invalid_argument(format("the policy keeps %u of the %u cells in %s: keep at least one, and each once", n_kept, n_cells, where.c_str()));
    }

    llama_csp::head_choice res;

    res.kept.assign(kept, kept + n_kept);

    for (uint32_t i = 0; i < n_kept; ++i) {
        if (kept[i] >= n_cells) {
            throw std::invalid_argument(format("the policy keeps cell %u of the %u in %s: there is none", kept[i], n_cells, where.c_str()));
        }
        if (i > 0 && kept[i] <= kept[i - 1]) {
            throw std::invalid_argument(format("the policy keeps cell %u after cell %u in %s: give them in ascending order, each once", kept[i], kept[i - 1], where.c_str()));
        }
    }

    const auto is_kept = [&](uint32_t i) { return std::binary_search(res.kept.begin(), res.kept.end(), i); };

    for (uint32_t i = 0; i < n_cells; ++i) {
        if (merge[i] == LLAMA_CSP_NO_MERGE) {
            continue;
        }
        if (is_kept(i)) {
            throw std::invalid_argument(format("the policy keeps cell %u in %s and merges it, too", i, where.c_str()));
        }
        if (!is_kept(merge[i])) {
            throw std::invalid_argument(format("the policy merges cell %u into cell %u in %s, which is not kept", i, merge[i], where.c_str()));
        }

        res.merged.emplace_back(i, merge[i]);
    }

    return res;
}

template<typename T, typename F>
static std::vector<T> csp_concat(const std::vector<uint32_t> & hs, F && row) {
    std::vector<T> res;

    for (const auto h : hs) {
        res.insert(res.end(), row(h).begin(), row(h).end());
    }

    return res;
}

bool llama_csp::needs_keys(const std::vector<head_cells> & heads, const llama_csp_params & params) {
    const bool has_media = std::any_of(heads.begin(), heads.end(), [](const head_cells & head) {
        return std::find(head.modality.begin(), head.modality.end(), LLAMA_CSP_MODALITY_MEDIA) != head.modality.end();
    });

    return params.keys == LLAMA_CSP_KEYS_ALL || (params.keys == LLAMA_CSP_KEYS_MEDIA && has_media);
}

std::vector<llama_csp::head_choice> llama_csp::choose(uint32_t i_layer, const std::vector<head_cells> & heads, const llama_csp_params & params) const {
    const auto & l = layers[i_layer];

    std::vector<head_choice> res(heads.size());

    // heads of equally many cells
    std::map<uint32_t, std::vector<uint32_t>> groups;

    for (uint32_t h = 0; h < heads.size(); ++h) {
        groups[heads[h].size()].push_back(h);
    }

    for (const auto & [n_cells, hs] : groups) {
        if (n_cells <= params.budget) {
            for (const auto h : hs) {
                res[h].kept = heads[h].cells;
            }
            continue;
        }

        const auto token    = csp_concat<uint32_t>(hs, [&](uint32_t h) -> const auto & { return heads[h].token;    });
        const auto modality = csp_concat<int8_t>  (hs, [&](uint32_t h) -> const auto & { return heads[h].modality; });
        const auto self     = csp_concat<float>   (hs, [&](uint32_t h) -> const auto & { return heads[h].self;     });
        const auto cross    = csp_concat<float>   (hs, [&](uint32_t h) -> const auto & { return heads[h].cross;    });
        const auto k        = csp_concat<float>   (hs, [&](uint32_t h) -> const auto & { return heads[h].k;        });

        std::vector<uint32_t> n_kept(hs.size(), 0);
        std::vector<uint32_t> kept  (hs.size()*n_cells, 0);
        std::vector<uint32_t> merge (hs.size()*n_cells, LLAMA_CSP_NO_MERGE);

        const llama_csp_view view = {
            /*.i_layer       =*/ i_layer,
            /*.n_layer       =*/ (uint32_t) layers.size(),
            /*.n_head_kv     =*/ (uint32_t) hs.size(),
            /*.n_embd_head_k =*/ l.n_embd_head_k,
            /*.n_cells       =*/ n_cells,
            /*.budget        =*/ params.budget,
            /*.recent        =*/ params.recent,
            /*.n_threads     =*/ ctx.n_threads_batch(),
            /*.token         =*/ token   .data(),
            /*.modality      =*/ modality.data(),
            /*.self          =*/ self    .data(),
            /*.cross         =*/ cross   .data(),
            /*.k             =*/ needs_keys(heads, params) ? k.data() : nullptr,
        };

        llama_csp_choice choice = { n_kept.data(), kept.data(), merge.data() };

        if (!params.policy(&view, &choice, params.policy_settings)) {
            throw std::invalid_argument(format("the policy could not choose in layer %d: its settings are out of range, or it needs keys", l.il));
        }

        for (uint32_t i = 0; i < hs.size(); ++i) {
            const auto & head = heads[hs[i]];

            auto & cur = res[hs[i]];

            cur = csp_read_choice(format("layer %d, KV head %u", l.il, hs[i]), n_cells, n_kept[i], kept.data() + size_t(i)*n_cells, merge.data() + size_t(i)*n_cells);

            for (auto & j : cur.kept) {
                j = head.cells[j];
            }
            for (auto & [from, into] : cur.merged) {
                from = head.cells[from];
                into = head.cells[into];
            }
        }
    }

    return res;
}
