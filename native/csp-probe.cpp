#include "csp.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"

#include <algorithm>
#include <stdexcept>

// llama_decode() takes no gap: the newest cell of every cache goes to the position before the next token's. its key
// does not change, and every later query sees it, as before
void llama_csp::jump(llama_pos pos) {
    for (auto * cache : caches()) {
        auto & cells = cache->v_cells[0];

        const auto & seq_pos = cells.seq_pos_get(0);

        if (seq_pos.empty()) {
            continue;
        }

        const uint32_t i   = seq_pos.rbegin()->second;
        const auto     ext = cells.ext_get(i);

        cells.rm(i);
        cells.pos_set(i, pos);
        cells.ext_set(i, ext);
        cells.seq_add(i, 0);
    }
}

void llama_csp::decode_run(const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens) {
    std::vector<llama_token>    token_data(tokens, tokens + n_tokens);
    std::vector<llama_pos>      pos_data(pos, pos + n_tokens);
    std::vector<int32_t>        n_seq_id(n_tokens, 1);
    std::vector<int8_t>         logits(n_tokens, 0);

    llama_seq_id seq = 0;

    std::vector<llama_seq_id *> seq_id(n_tokens, &seq);

    const llama_batch batch = { (int32_t) n_tokens, token_data.data(), nullptr, pos_data.data(), n_seq_id.data(), seq_id.data(), logits.data() };

    if (ctx.decode(batch) != 0) {
        throw std::runtime_error("the probe could not be decoded");
    }
}

void llama_csp::probe(const llama_token * tokens, const llama_pos * pos, uint32_t n_tokens) {
    const llama_pos pos_max = ctx.get_memory()->seq_pos_max(0);

    if (n_window == 0) {
        throw std::invalid_argument("nothing is observed: call llama_csp_observe() before probing");
    }
    if (n_tokens == 0 || std::adjacent_find(pos, pos + n_tokens, std::greater_equal<llama_pos>()) != pos + n_tokens) {
        throw std::invalid_argument("a probe takes tokens at ascending positions");
    }
    if (pos[0] <= pos_max) {
        throw std::invalid_argument(format("position %d of the probe is not behind the sequence, which ends at %d", pos[0], pos_max));
    }

    // chosen cells are known by their position
    is_probing = true;

    const auto end = [&] {
        ctx.get_memory()->seq_rm(0, pos[0], -1);

        if (pos_max >= 0) {
            jump(pos_max);
        }

        is_probing = false;
    };

    try {
        for (uint32_t i = 0, n = 0; i < n_tokens; i += n) {
            n = 1;
            while (i + n < n_tokens && n < ctx.get_cparams().n_batch && pos[i + n] == pos[i] + (llama_pos) n) {
                n++;
            }

            jump(pos[i] - 1);
            decode_run(tokens + i, pos + i, n);
        }
    } catch (...) {
        end();

        throw;
    }

    end();
    hold();
}
