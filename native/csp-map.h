#pragma once

#include "ggml-backend.h"

// buffers on the host that the operating system makes larger or smaller without a copy: pages that are not written to
// take no memory and read as zeros. Linux only

// returns NULL if there is no memory for it, or no such system
ggml_backend_buffer_t csp_map_alloc(size_t size);

// keeps the first n_used bytes of what is in it. all from the next page on is zero. returns false and changes nothing if there is no memory for it
bool csp_map_resize(ggml_backend_buffer_t buf, size_t size, size_t n_used);

bool csp_is_map(ggml_backend_buffer_t buf);
