// Cross-Self Pruning (arXiv 2412.04652, section 3.2)

#include "policy-util.h"

#include "llama-csp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

// the automatic r of one head: the cross share of the scores of the cells to choose from
static double csp_cross_ratio(const std::vector<double> & self, const std::vector<double> & cross) {
    const double sum_self  = std::accumulate(self .begin(), self .end(), 0.0);
    const double sum_cross = std::accumulate(cross.begin(), cross.end(), 0.0);

    const double sum = sum_self + sum_cross;

    return std::isfinite(sum) && sum > 0.0 ? std::clamp(sum_cross/sum, 0.0, 1.0) : 0.0;
}

// the automatic lambda of one head: neighbouring patches of a picture say the same, words don't
static double csp_distance(const int8_t * modality, size_t n) {
    return std::find(modality, modality + n, LLAMA_CSP_MODALITY_MEDIA) != modality + n ? 32.0 : 0.0;
}

// draws one by one: the value of a cell falls with every key that is drawn near it, and the further the more are drawn
struct csp_distant_draw {
    csp_distant_draw(const llama_csp_view & view, uint32_t h, double lambda) :
        keys(view, h), lambda(lambda), n_recent(view.recent), cosine(view.n_cells, 0.0), n_seen(view.n_cells, 0) {
        for (uint32_t i = view.n_cells - view.recent; i < view.n_cells; ++i) {
            keys.add(i);
        }
    }

    // a score of 0 has no logarithm: take the least one that is not
    double value(double score, uint32_t i) const {
        constexpr double least = std::numeric_limits<float>::min();

        const double n_drawn = keys.added.size() - n_recent;

        return std::log(score > least ? score : least) - lambda*n_drawn/(n_drawn + 4.0)*cosine[i]*cosine[i];
    }

    std::vector<uint32_t> operator()(std::vector<uint32_t> & cand, uint32_t n, const std::vector<double> & score) {
        struct entry {
            double   value; // as of when it was last looked at, it can only have fallen
            uint32_t i;

            bool operator<(const entry & other) const {
                return value < other.value || (value == other.value && i > other.i);
            }
        };

        std::vector<entry> heap;

        for (const auto i : cand) {
            heap.push_back({ value(score[i], i), i });
        }

        std::make_heap(heap.begin(), heap.end());

        std::vector<uint32_t> res;

        while (res.size() < n) {
            std::pop_heap(heap.begin(), heap.end());

            auto & cur = heap.back();

            if (n_seen[cur.i] == keys.added.size()) {
                res .push_back(cur.i);
                keys.add      (cur.i);
                heap.pop_back();
                continue;
            }

            // until another one may be better
            do {
                cosine[cur.i] = std::max(cosine[cur.i], keys.nearest(cur.i, n_seen[cur.i]).cosine);

                cur.value = value(score[cur.i], cur.i);
            } while (n_seen[cur.i] < keys.added.size() && !(cur < heap.front()));

            std::push_heap(heap.begin(), heap.end());
        }

        cand.clear();

        for (const auto & cur : heap) {
            cand.push_back(cur.i);
        }

        return res;
    }

    csp_keys     keys; // added: the recent cells, then those drawn
    const double lambda;
    const size_t n_recent;

    std::vector<double>   cosine; // [n_cells] the largest with the first n_seen keys that were added, or 0
    std::vector<uint32_t> n_seen; // [n_cells]
};

// the floor(n*r) best by cross score, then the best of the rest by self score
template<typename F>
static std::vector<uint32_t> csp_draw_both(
        F && draw,
        std::vector<uint32_t> cand,
        uint32_t n,
        const std::vector<double> & self,
        const std::vector<double> & cross,
        double cross_ratio) {
    if (!(cross_ratio >= 0.0)) {
        cross_ratio = csp_cross_ratio(self, cross);
    }

    auto res = draw(cand, uint32_t(std::floor(n*std::min(cross_ratio, 1.0))), cross);

    const auto rest = draw(cand, n - res.size(), self);

    res.insert(res.end(), rest.begin(), rest.end());

    return res;
}

bool llama_csp_policy_csp(const llama_csp_view * view, llama_csp_choice * choice, const void * settings) {
    const auto cfg = csp_settings<llama_csp_settings_csp>(settings, { -1.0, 0.0 });

    if (!(cfg.cross_ratio <= 1.0) || !std::isfinite(cfg.distance)) {
        return false;
    }

    const auto cand = csp_candidates(*view);

    std::vector<double> distance;

    for (uint32_t h = 0; h < view->n_head_kv; ++h) {
        distance.push_back(cfg.distance >= 0.0 ? cfg.distance : csp_distance(view->modality + size_t(h)*view->n_cells, cand.size()));

        if (distance[h] > 0.0 && !view->k) {
            return false;
        }
    }

    csp_for_heads(*view, [&](uint32_t h) {
        const auto first = size_t(h)*view->n_cells;
        const auto last  = first + cand.size();

        const std::vector<double> self (view->self  + first, view->self  + last);
        const std::vector<double> cross(view->cross + first, view->cross + last);

        const uint32_t n = view->budget - view->recent;

        csp_keep(*view, choice, h, distance[h] > 0.0
            ? csp_draw_both(csp_distant_draw(*view, h, distance[h]), cand, n, self, cross, cfg.cross_ratio)
            : csp_draw_both(csp_draw,                                cand, n, self, cross, cfg.cross_ratio));
    });

    return true;
}
