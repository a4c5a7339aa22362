// A sample of some tensors' bytes, to tell whether they were written to.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace bertfast {

// Hashes 16 eight-byte words of each tensor, spread evenly, the first and the last among them; all bytes where there
// are no more than that. An optimiser step or a copy changes every word, so 16 of them tell; they cost cache
// misses that the processor waits for all at once, 0.2 us, where reading a BERT-base weight would cost a hundred.
class Fingerprint {
public:
    using Tensors = std::vector<std::pair<uintptr_t, int64_t>>;  // address and bytes of each

    explicit Fingerprint(Tensors tensors) : tensors_(std::move(tensors)), hash_(compute()) {}

    // Whether the samples are what they were. The caller knows that the tensors are still where they were.
    bool matches() const { return compute() == hash_; }

private:
    uint64_t compute() const {
        uint64_t hash = 0xcbf29ce484222325u;
        for (const auto& [address, bytes] : tensors_) mix(reinterpret_cast<const unsigned char*>(address), bytes, hash);
        return hash;
    }

    static void mix(const unsigned char* data, int64_t bytes, uint64_t& hash) {
        constexpr int64_t samples = 16, word = sizeof(uint64_t);
        const auto add = [&hash](uint64_t value) {
            hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 32;
        };
        if (bytes <= samples * word) {
            for (int64_t i = 0; i < bytes; ++i) add(data[i]);
            return;
        }
        uint64_t words[samples];
        for (int64_t i = 0; i < samples; ++i)
            std::memcpy(&words[i], data + i * (bytes - word) / (samples - 1), word);
        for (uint64_t value : words) add(value);
    }

    Tensors tensors_;
    uint64_t hash_;
};

}  // namespace bertfast
