#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

// space in a file
struct csp_file {
    // throws if there are no such files here
    csp_file(int fd);
    ~csp_file();

    csp_file(const csp_file &) = delete;
    csp_file & operator=(const csp_file &) = delete;

    uint64_t alloc(size_t size);
    void     free (uint64_t offset, size_t size);

    // throw if the device fails, or is full
    void read (uint64_t offset,       void * data, size_t size) const;
    void write(uint64_t offset, const void * data, size_t size);

    int fd; // our own

    uint64_t n_bytes = 0;

    std::multimap<size_t, uint64_t> unused; // size to offset

    std::mutex mutex; // snapshots are freed on any thread
};

// some rows, in the file or, without one, in memory
struct csp_block {
    csp_block(std::shared_ptr<csp_file> file, size_t size);
    ~csp_block();

    csp_block(const csp_block &) = delete;
    csp_block & operator=(const csp_block &) = delete;

    void get(size_t offset,       uint8_t * dst, size_t n) const;
    void set(size_t offset, const uint8_t * src, size_t n);

    const std::shared_ptr<csp_file> file;

    const size_t   size;
    const uint64_t offset; // in the file

    std::vector<uint8_t> data;
};

// rows of K or V on the host, beside the cache
struct csp_rows {
    static constexpr uint32_t N_BLOCK = 256;

    ggml_type type   = GGML_TYPE_F32;
    int64_t   n_embd = 0;

    std::shared_ptr<csp_file> file; // NULL: in memory

    std::vector<std::shared_ptr<csp_block>> blocks; // of N_BLOCK rows, shared with snapshots until they are written to

    size_t size() const; // of a row, in bytes

    // n rows from the i-th on
    void get(uint32_t i, uint32_t n,       uint8_t * dst) const;
    void set(uint32_t i, uint32_t n, const uint8_t * src);

    // the rows of another, which stay where they are
    void share(const csp_rows & src);
};
