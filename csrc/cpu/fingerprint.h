// A sample of a tensor's bytes, to tell whether it was written to.
#pragma once

#include <cstdint>
#include <cstring>

namespace bertfast {

// A hash of 16 eight-byte words spread evenly over `bytes` bytes, the first and the last among them; of all bytes
// where there are no more than that. An optimiser step or a copy changes every word, so 16 of them tell; they
// cost 16 cache misses that the processor waits for all at once, 0.2 us, where reading a BERT-base weight would
// cost a hundred.
inline uint64_t fingerprint(const unsigned char* data, int64_t bytes) {
    constexpr int64_t samples = 16, word = sizeof(uint64_t);
    uint64_t hash = 0xcbf29ce484222325u;
    const auto mix = [&hash](uint64_t value) {
        hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 32;
    };
    if (bytes <= samples * word) {
        for (int64_t i = 0; i < bytes; ++i) mix(data[i]);
        return hash;
    }
    uint64_t words[samples];
    for (int64_t i = 0; i < samples; ++i)
        std::memcpy(&words[i], data + i * (bytes - word) / (samples - 1), word);
    for (uint64_t value : words) mix(value);
    return hash;
}

}  // namespace bertfast
