#include "csp-rows.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

//
// csp_file
//

#ifdef _WIN32

csp_file::csp_file(int) : fd(-1) {
    throw std::invalid_argument("evicted cells can't be kept in a file on this system");
}

csp_file::~csp_file() = default;

uint64_t csp_file::alloc(size_t) {
    return 0;
}

void csp_file::read (uint64_t,       void *, size_t) const {}
void csp_file::write(uint64_t, const void *, size_t)       {}

#else

#include <unistd.h>

[[noreturn]] static void csp_throw(const char * what) {
    throw std::runtime_error(std::string("the file of evicted cells can't be ") + what + ": " + strerror(errno));
}

csp_file::csp_file(int fd) : fd(dup(fd)) {
    if (this->fd < 0) {
        csp_throw("opened");
    }
}

csp_file::~csp_file() {
    close(fd);
}

uint64_t csp_file::alloc(size_t size) {
    std::lock_guard<std::mutex> lock(mutex);

    const auto it = unused.find(size);

    if (it != unused.end()) {
        const auto res = it->second;

        unused.erase(it);

        return res;
    }

    // what is not written yet can be read
    if (ftruncate(fd, n_bytes + size) != 0) {
        csp_throw("enlarged");
    }

    n_bytes += size;

    return n_bytes - size;
}

void csp_file::read(uint64_t offset, void * data, size_t size) const {
    while (size > 0) {
        const ssize_t n = pread(fd, data, size, offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            csp_throw("read");
        }

        offset += n;
        size   -= n;
        data    = (char *) data + n;
    }
}

void csp_file::write(uint64_t offset, const void * data, size_t size) {
    while (size > 0) {
        const ssize_t n = pwrite(fd, data, size, offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            csp_throw("written");
        }

        offset += n;
        size   -= n;
        data    = (const char *) data + n;
    }
}

#endif

void csp_file::free(uint64_t offset, size_t size) {
    std::lock_guard<std::mutex> lock(mutex);

    unused.emplace(size, offset);
}

//
// csp_block
//

csp_block::csp_block(std::shared_ptr<csp_file> file, size_t size) :
    file(std::move(file)), size(size), offset(this->file ? this->file->alloc(size) : 0), data(this->file ? 0 : size) {}

csp_block::~csp_block() {
    if (file) {
        file->free(offset, size);
    }
}

void csp_block::get(size_t i, uint8_t * dst, size_t n) const {
    if (file) {
        file->read(offset + i, dst, n);
    } else {
        memcpy(dst, data.data() + i, n);
    }
}

void csp_block::set(size_t i, const uint8_t * src, size_t n) {
    if (file) {
        file->write(offset + i, src, n);
    } else {
        memcpy(data.data() + i, src, n);
    }
}

//
// csp_rows
//

size_t csp_rows::size() const {
    return ggml_row_size(type, n_embd);
}

void csp_rows::get(uint32_t i, uint32_t n, uint8_t * dst) const {
    while (n > 0) {
        const uint32_t n_cur = std::min(n, N_BLOCK - i%N_BLOCK);

        blocks.at(i/N_BLOCK)->get(i%N_BLOCK*size(), dst, n_cur*size());

        i   += n_cur;
        n   -= n_cur;
        dst += n_cur*size();
    }
}

void csp_rows::set(uint32_t i, uint32_t n, const uint8_t * src) {
    const size_t size_block = N_BLOCK*size();

    while (n > 0) {
        const uint32_t n_cur = std::min(n, N_BLOCK - i%N_BLOCK);

        while (blocks.size() <= i/N_BLOCK) {
            blocks.push_back(std::make_shared<csp_block>(file, size_block));
        }

        auto & block = blocks[i/N_BLOCK];

        if (block.use_count() > 1) {
            std::vector<uint8_t> data(size_block);

            block->get(0, data.data(), data.size());

            block = std::make_shared<csp_block>(file, size_block);
            block->set(0, data.data(), data.size());
        }

        block->set(i%N_BLOCK*size(), src, n_cur*size());

        i   += n_cur;
        n   -= n_cur;
        src += n_cur*size();
    }
}

void csp_rows::share(const csp_rows & src) {
    type   = src.type;
    n_embd = src.n_embd;
    blocks = src.blocks;
}
