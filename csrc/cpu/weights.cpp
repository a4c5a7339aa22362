#include "weights.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace bertfast {
namespace {

float widen(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float widen(float value) { return value; }

// To nearest, ties to even; a NaN stays one.
uint16_t narrow(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void pack_row(Operand operand, const T* row, int64_t column, int64_t depth, void* packed, float* scale, int32_t* sums) {
    const int64_t words = words_for(operand, depth), elements = elements_in_word(operand);
    unsigned char* const panel = static_cast<unsigned char*>(packed) +
                                 4 * (column / panel_columns * panel_columns * words + column % panel_columns);
    float factor = 0;
    if (operand == Operand::int8) {
        float largest = 0, check = 0;
        for (int64_t k = 0; k < depth; ++k) {
            largest = std::fmax(largest, std::fabs(widen(row[k])));
            check += widen(row[k]) * 0;
        }
        scale[column] = largest / 127;
        factor = 1 / scale[column];
        if (check != 0 || factor > FLT_MAX) {
            scale[column] = check;
            factor = 0;
        }
        sums[column] = 0;
    }
    for (int64_t k = 0; k < depth; ++k) {
        unsigned char* const word = panel + k / elements * panel_columns * 4;
        const float value = widen(row[k]);
        if (operand == Operand::float32) {
            std::memcpy(word, &value, sizeof value);
        } else if (operand == Operand::bfloat16) {
            const uint16_t half = narrow(value);
            std::memcpy(word + 2 * (k % 2), &half, sizeof half);
        } else {
            const float rounded = factor > 0 ? std::nearbyint(value * factor) : 0;
            const int8_t byte = static_cast<int8_t>(rounded > 127 ? 127 : rounded < -127 ? -127 : rounded);
            std::memcpy(word + k % 4, &byte, sizeof byte);
            sums[column] += byte;
        }
    }
}

}  // namespace

int64_t packed_bytes(Operand operand, int64_t cols, int64_t depth) {
    constexpr int64_t columns = 2 * panel_columns;
    return 4 * words_for(operand, depth) * ((cols + columns - 1) / columns * columns);
}

void pack_weights(Operand operand, DType dtype, const void* weight, int64_t first, int64_t rows, int64_t depth,
                  void* packed, float* scale, int32_t* sums, int threads) {
    // A panel's columns share cache lines, so one thread packs them.
    const int64_t panels = (rows + panel_columns - 1) / panel_columns;
    parallel_for(panels, threads, [&](int64_t panel) {
        const int64_t end = (panel + 1) * panel_columns < rows ? (panel + 1) * panel_columns : rows;
        const auto pack = [&](const auto* weights) {
            for (int64_t row = panel * panel_columns; row < end; ++row)
                pack_row(operand, weights + row * depth, first + row, depth, packed, scale, sums);
        };
        dtype == DType::float32 ? pack(static_cast<const float*>(weight)) : pack(static_cast<const uint16_t*>(weight));
    });
}

}  // namespace bertfast
