// How a GEMM's weights lie in memory: the same for every instruction set.
//
// [cols, depth] is cut into panels of 16 columns of the output, which lie one behind another. Word k of a panel's 16
// columns, 4 bytes each, are one cache line, and lines follow in the order of k. Columns are filled up with zeros to a
// multiple of 32, the depth to whole words.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bertfast {

constexpr int64_t panel_columns = 16;

// Bytes of packed weights.
int64_t packed_bytes(Operand operand, int64_t cols, int64_t depth);

// Packs rows [first, first + rows) of a GEMM's [cols, depth] weight, dense rows of a dtype of their own. For int8, each
// row is divided by its scale, max |w| / 127, and rounded, as in reference.quantise_weight; scale and sums are those of
// the whole weight, and a row with anything that is not finite gets the scale NaN. What no call has written must have
// been zeroed.
void pack_weights(Operand operand, DType dtype, const void* weight, int64_t first, int64_t rows, int64_t depth,
                  void* packed, float* scale, int32_t* sums, int threads);

}  // namespace bertfast
