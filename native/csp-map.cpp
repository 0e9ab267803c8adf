#include "csp-map.h"

#include "ggml-backend-impl.h"

#ifdef __linux__

#include <sys/mman.h>
#include <unistd.h>

static void csp_map_free(ggml_backend_buffer_t buf) {
    munmap(buf->context, buf->size);
}

ggml_backend_buffer_t csp_map_alloc(size_t size) {
    void * data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }

    ggml_backend_buffer_t res = ggml_backend_cpu_buffer_from_ptr(data, size);

    res->iface.free_buffer = csp_map_free;

    return res;
}

bool csp_map_resize(ggml_backend_buffer_t buf, size_t size, size_t n_used) {
    void * data = mremap(buf->context, buf->size, size, MREMAP_MAYMOVE);
    if (data == MAP_FAILED) {
        return false;
    }

    buf->context = data;
    buf->size    = size;

    n_used = GGML_PAD(n_used, sysconf(_SC_PAGESIZE));

    if (n_used < size) {
        madvise((char *) data + n_used, size - n_used, MADV_DONTNEED);
    }

    return true;
}

bool csp_is_map(ggml_backend_buffer_t buf) {
    return buf->iface.free_buffer == csp_map_free;
}

#else

ggml_backend_buffer_t csp_map_alloc(size_t) {
    return nullptr;
}

bool csp_map_resize(ggml_backend_buffer_t, size_t, size_t) {
    return false;
}

bool csp_is_map(ggml_backend_buffer_t) {
    return false;
}

#endif
