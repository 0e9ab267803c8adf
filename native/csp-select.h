#pragma once

#include <cstdint>

// selection: scores -> kept cells, on the host, without ggml

// the cross share of the scores of the cells to choose from: the automatic r of one head
double csp_cross_ratio(const float * self, const float * cross, uint32_t n, uint32_t recent);
