#pragma once

#include "mtmd.h"

#include <stdint.h>

// What a projector takes, in bytes, from its header alone

#ifdef __cplusplus
extern "C" {
#endif

    struct mtmd_csp_memory {
        uint64_t weights;
        uint64_t compute; // of the graph for one picture, or one tile
        uint64_t work;    // the CPU's scratch and the inputs beside it

        uint32_t n_tiles; // that a picture is cut into at most

        // the picture, or tile, as it is encoded
        uint32_t nx;
        uint32_t ny;
        uint32_t n_tokens;
        uint32_t n_embd;
    };

    // n_pixels: of a picture, where the projector takes any size. 0: the largest that it does not scale down
    // returns false if it has no vision or can't be read
    MTMD_API bool mtmd_csp_get_memory(const char * fname, uint64_t n_pixels, struct mtmd_csp_memory * res);

#ifdef __cplusplus
}
#endif
